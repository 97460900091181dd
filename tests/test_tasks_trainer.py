"""Transformers' Trainer and pipelines on FoX: every head learns a task that it cannot solve before."""

import numpy as np
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from fox_training.tokenizers import byte_tokenizer
from helpers import tiny_fox
from modeling_fox import (
    FoxForCausalLM,
    FoxForQuestionAnswering,
    FoxForSequenceClassification,
    FoxForTokenClassification,
)

SENTENCES = [
    "A fox dug a den.",
    "Bees dance for nectar in June.",
    "Cold rain fell.",
    "Dust hid the moon all night long.",
]


def fox_for(model_class, tokenizer, **config):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.1}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": 256}
    return tiny_fox(model_class=model_class, **(sizes | tokens | config))


def arguments(folder, **options):
    defaults = {
        "learning_rate": 0.01, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16, "seed": 0,
        "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "logging_steps": 10,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(defaults | options))


def encoded(tokenizer, texts=SENTENCES):
    return [{"input_ids": tokenizer(text)["input_ids"] + [256]} for text in texts]


def accuracy(prediction):
    labels = prediction.label_ids
    right = (prediction.predictions.argmax(-1) == labels)[labels != -100]
    return {"accuracy": float(np.mean(right))}


def test_sentences_are_learned_by_heart_saved_and_told_by_a_pipeline(tmp_path):
    tokenizer = byte_tokenizer()
    trainer = Trainer(
        fox_for(FoxForCausalLM, tokenizer, hidden_size=64),
        arguments(tmp_path / "run", max_steps=60, per_device_train_batch_size=4),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=encoded(tokenizer),
        eval_dataset=encoded(tokenizer),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before > 5 and trainer.evaluate()["eval_loss"] < 0.3
    trainer.save_model(tmp_path / "model")

    teller = pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")
    # Together, so that the shorter beginnings are padded on the left.
    beginnings = [text[: 3 + 2 * i] for i, text in enumerate(SENTENCES)]
    told = teller(beginnings, batch_size=4, do_sample=False, max_new_tokens=40, max_length=None)
    assert [answer[0]["generated_text"] for answer in told] == SENTENCES


def test_documents_in_one_row_have_the_loss_of_padded_ones(tmp_path):
    """`DataCollatorWithFlattening` writes them behind each other and tells them apart by `position_ids` only."""
    tokenizer = byte_tokenizer()
    losses = []
    for collator in (DataCollatorForLanguageModeling(tokenizer, mlm=False), DataCollatorWithFlattening()):
        options = {"remove_unused_columns": False, "per_device_eval_batch_size": 4}
        trainer = Trainer(
            fox_for(FoxForCausalLM, tokenizer),
            arguments(tmp_path, **options),
            data_collator=collator,
            eval_dataset=encoded(tokenizer),
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[0]


def test_label_smoothing_is_of_the_next_token(tmp_path):
    """Trainer computes this loss itself, and shifts the labels only for a class that it knows by name."""
    tokenizer, smoothing = byte_tokenizer(), 0.2
    model = fox_for(FoxForCausalLM, tokenizer)
    trainer = Trainer(
        model,
        arguments(tmp_path, label_smoothing_factor=smoothing, per_device_eval_batch_size=1),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        eval_dataset=encoded(tokenizer, SENTENCES[:1]),
    )
    tokens = torch.tensor([encoded(tokenizer)[0]["input_ids"]])
    with torch.no_grad():
        logits = model(tokens.to(model.device), use_cache=False).logits[0, :-1].cpu()
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], label_smoothing=smoothing)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-4)


def random_texts(number, seed):
    """Texts of 6 to 14 letters from a to e."""
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("abcde"), random.integers(6, 15))) for _ in range(number)]


def sequence_rows(tokenizer, number, seed):
    """Class 1 if the text holds "ab"."""
    return [{"input_ids": tokenizer(text)["input_ids"], "label": int("ab" in text)}
            for text in random_texts(number, seed)]  # fmt: skip


def token_rows(tokenizer, number, seed):
    """Class of a letter: 1 after the first e of the text, 0 before; the first letter has none."""
    return [{"input_ids": tokenizer(text)["input_ids"],
             "labels": [-100] + [int("e" in text[:i]) for i in range(1, len(text))]}
            for text in random_texts(number, seed)]  # fmt: skip


@pytest.mark.parametrize(
    "model_class, rows, collator",
    [
        (FoxForSequenceClassification, sequence_rows, DataCollatorWithPadding),
        (FoxForTokenClassification, token_rows, DataCollatorForTokenClassification),
    ],
    ids=["sequence", "token"],
)
def test_classes_are_learned_from_padded_texts(tmp_path, model_class, rows, collator):
    tokenizer = byte_tokenizer()
    trainer = Trainer(
        fox_for(model_class, tokenizer, num_labels=2),
        arguments(tmp_path, max_steps=60),
        data_collator=collator(tokenizer),
        train_dataset=rows(tokenizer, 512, seed=0),
        eval_dataset=rows(tokenizer, 100, seed=1),
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    assert before < 0.75 and after >= 0.95, (before, after)


def question_rows(tokenizer, number, seed):
    """The answer is the first d of the text and the letter behind it."""
    texts = [text for text in random_texts(2 * number, seed) if "d" in text[:-1]][:number]
    return [{"input_ids": tokenizer(text)["input_ids"], "start_positions": text.index("d"),
             "end_positions": text.index("d") + 1} for text in texts]  # fmt: skip


def test_answers_are_found_in_padded_texts(tmp_path):
    tokenizer = byte_tokenizer()

    def both_right(prediction):
        right = [got.argmax(-1) == wanted
                 for got, wanted in zip(prediction.predictions, prediction.label_ids, strict=True)]  # fmt: skip
        return {"exact": float(np.mean(right[0] & right[1]))}

    trainer = Trainer(
        fox_for(FoxForQuestionAnswering, tokenizer),
        arguments(tmp_path, max_steps=60),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=question_rows(tokenizer, 512, seed=0),
        eval_dataset=question_rows(tokenizer, 100, seed=1),
        compute_metrics=both_right,
    )
    before = trainer.evaluate()["eval_exact"]
    trainer.train()
    after = trainer.evaluate()["eval_exact"]
    assert before < 0.2 and after >= 0.9, (before, after)
