"""TRL on FoX: supervised fine-tuning, preferences and a reward, each learned by a model of a few seconds."""

import pytest
import torch

from fox_training.tokenizers import byte_tokenizer
from helpers import tiny_fox

trl = pytest.importorskip("trl", reason="TRL is not installed: make test-tasks")
peft = pytest.importorskip("peft", reason="PEFT is not installed: make test-tasks")
from datasets import Dataset  # noqa: E402

pytestmark = [
    pytest.mark.tasks,
    # Transformers 5.23 renames these; TRL 1.16 and PEFT 0.21 know the old names.
    pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning"),
]
PROMPTS = ["sun:", "moonlight:", "sea:", "rivers:"]
WORDS = ["dawn", "owls", "salt", "eels"]


@pytest.fixture
def model(tmp_path):
    """Path of a random FoX: TRL loads it, and loads it again where it needs a copy to compare with."""
    tokens = {"vocab_size": 258, "pad_token_id": 257, "eos_token_id": 256, "bos_token_id": 256}
    tiny_fox(initializer_range=0.1, **tokens).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def options(config_class, folder, **changes):
    defaults = {
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
        "bf16": False, "logging_steps": 5, "seed": 0, "dataloader_pin_memory": False, "max_steps": 30,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    return config_class(output_dir=str(folder / "run"), **(defaults | changes))


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def answers(model, tokenizer):
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    with torch.no_grad():
        out = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["padded", "packed", "lora"])
def test_sft_teaches_the_answers(tmp_path, model, kind):
    """With gradient checkpointing, which TRL switches on."""
    tokenizer = byte_tokenizer()
    rows = [{"prompt": prompt, "completion": word} for prompt, word in zip(PROMPTS, WORDS, strict=True)]
    trainer = trl.SFTTrainer(
        model,
        options(trl.SFTConfig, tmp_path, packing=kind == "packed", max_length=64, learning_rate=0.01),
        train_dataset=Dataset.from_list(rows * 4),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear") if kind == "lora" else None,
    )
    trainer.train()
    assert logged(trainer, "loss")[-1] < 0.2 * logged(trainer, "loss")[0]
    assert answers(trainer.model, tokenizer) == WORDS
    assert isinstance(trainer.model, peft.PeftModel) == (kind == "lora")


def log_probabilities(model, tokenizer, endings):
    """Of each ending after its prompt, one by one, without cache or padding."""
    scores = []
    for prompt, ending in zip(PROMPTS, endings, strict=True):
        tokens = torch.tensor([tokenizer(prompt + ending)["input_ids"]], device=model.device)
        with torch.no_grad():
            logits = model.eval()(tokens, use_cache=False).logits.log_softmax(-1)
        scores.append(float(logits[0, :-1].gather(1, tokens[0, 1:, None])[-len(ending) :].sum()))
    return torch.tensor(scores)


def test_dpo_prefers_what_was_chosen(tmp_path, model):
    tokenizer = byte_tokenizer()
    # Each word is chosen once and rejected once, so that none is better without its prompt.
    rejected = WORDS[1:] + WORDS[:1]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, WORDS, rejected, strict=True)]
    trainer = trl.DPOTrainer(
        model,
        args=options(trl.DPOConfig, tmp_path, learning_rate=3e-3, max_steps=20),
        train_dataset=Dataset.from_list(rows * 4),
        processing_class=tokenizer,
    )

    def margins():
        return log_probabilities(trainer.model, tokenizer, WORDS) - log_probabilities(
            trainer.model, tokenizer, rejected
        )

    before = margins()
    trainer.train()
    assert before.abs().max() < 3 and margins().min() > 10, (before, margins())


def test_grpo_finds_the_letters_that_pay(tmp_path, model):
    def reward(completions, **kwargs):
        """Share of lower-case letters and spaces; 27 of the 256 bytes."""
        return [sum(c in "abcdefghijklmnopqrstuvwxyz " for c in text) / 8 for text in completions]

    changes = {"num_generations": 16, "per_device_train_batch_size": 32, "max_completion_length": 8, "beta": 0.001}
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=options(trl.GRPOConfig, tmp_path, learning_rate=3e-3, **changes),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 4]),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    rewards = logged(trainer, "reward")
    assert rewards[0] < 0.2 and rewards[-1] > 0.6, rewards
