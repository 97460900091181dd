"""Pruning in the language-model recipe and under the Trainer: the target is hit, and a resumed run is the same run."""

import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fox_training.recipe import RecipeError, load_recipe
from fox_training.sparsity import SparsityConfig
from fox_training.train import train
from helpers import random_tokens, tiny_fox

pytestmark = pytest.mark.usefixtures("without_cards")

TINY = {
    "run": {"device": "cpu"},
    "model": {
        "config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    },
    "data": {"validation_ids": ["1797-Adams"], "sequence_length": 64, "batch_size": 4},
    "optimizer": {"learning_rate": 1e-2},
    "sparsity": {"method": "magnitude", "final_sparsity": 0.8, "every_steps": 3},
    "schedule": {"steps": 10, "warmup_steps": 2, "kind": "constant"},
    "evaluation": {"every_steps": 0, "batch_size": 16, "max_documents": 1},
    "checkpoint": {"every_steps": 4},
    "tracking": {"log_every_steps": 1},
}


def run_tiny(folder, *overrides, out):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    train(load_recipe(path, [f"run.output_dir={folder / out}", f"data.cache_dir={folder / 'cache'}", *overrides]))
    return folder / out


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "options", [["optimizer.ema_decay=0.9"], ["sparsity.method=rigl", "optimizer.name=muon"]], ids=["ema", "rigl-muon"]
)
def test_a_pruned_run_resumes_bit_for_bit_and_exports_a_sparse_model(tmp_path, options):
    whole, parts = run_tiny(tmp_path, *options, out="whole"), tmp_path / "parts"
    # A copy that has lost its end goes on from step 8, between two refreshes.
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "model")
    shutil.rmtree(parts / "checkpoints/step_00000010")
    run_tiny(tmp_path, *options, out="parts")
    assert [m["step"] for m in lines(parts) if "loss" in m] == list(range(1, 11))
    assert (whole / "model" / "model.safetensors").read_bytes() == (parts / "model" / "model.safetensors").read_bytes()
    one, two = (load_file(out / "checkpoints/step_00000010/sparsity.safetensors") for out in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert lines(whole)[-2]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    exported = load_file(whole / "model" / "model.safetensors")
    masked = [exported[key.removeprefix("mask.")] for key in one if key.startswith("mask.")]
    zeros = sum(int((weight == 0).sum()) for weight in masked)
    assert len(masked) == 8 and zeros / sum(weight.numel() for weight in masked) == pytest.approx(0.8, abs=2e-2)
    assert torch.all(exported["model.embed_tokens.weight"][:256] != 0)


def test_the_best_weights_are_looked_for_once_pruning_is_over(tmp_path):
    out = run_tiny(tmp_path, "evaluation.every_steps=2", "checkpoint.export=best", out="best")
    best = json.loads((out / "checkpoints" / "best" / "state.json").read_text(encoding="utf-8"))["best"]
    assert best["step"] >= 8
    weight = load_file(out / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert (weight == 0).float().mean() > 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsity.final_sparsity=90", "sparsity.final_sparsity must be at least 0 and below 1; got 90"),
        ("sparsity.method=movement", "sparsity.method must be one of none, magnitude"),
        ("sparsity.include=[nothing_here]", "sparsity: model must have a prunable parameter"),
        ("sparsity.include=['q_proj(']", r"sparsity.include and .* must be regular expressions; 'q_proj\(' is none"),
        ("sparsity.start_fraction=0.9", "sparsity: start_fraction and end_fraction"),
    ],
)
def test_says_what_is_wrong_with_the_section(tmp_path, override, message):
    with pytest.raises(RecipeError, match=message):
        run_tiny(tmp_path, override, out="wrong")


def test_another_sparsity_is_another_run(tmp_path):
    run_tiny(tmp_path, "schedule.steps=4", out="one")
    with pytest.raises(RecipeError, match="sparsity.final_sparsity: 0.8 -> 0.5"):
        run_tiny(tmp_path, "sparsity.final_sparsity=0.5", out="one")


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.tokens = random_tokens(40, 12)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def trainer_of(folder, config, **arguments):
    from transformers import Trainer, TrainingArguments

    from fox_training.sparsity.callback import PruningCallback

    arguments = {
        "output_dir": str(folder), "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "save_steps": 7, "logging_steps": 5, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "gradient_accumulation_steps": 2, "seed": 3, "dataloader_pin_memory": False, **arguments,
    }  # fmt: skip
    callback = PruningCallback(config)
    arguments = TrainingArguments(**arguments)
    return Trainer(tiny_fox(), arguments, train_dataset=Rows(), callbacks=[callback]), callback


@pytest.mark.filterwarnings("ignore")  # of Trainer and accelerate
def test_the_trainer_prunes_and_resumes_bit_for_bit(tmp_path):
    config = SparsityConfig(final_sparsity=0.7, every_steps=3)
    trainer, callback = trainer_of(tmp_path, config)
    trainer.train()
    assert callback.pruner.sparsity() == pytest.approx(0.7, abs=1e-3) and callback.pruner.step_count == 20
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert logged[0] < logged[-1] == pytest.approx(0.7, abs=1e-3)
    whole = trainer.model.state_dict()
    assert all(torch.all(whole[name][~keep] == 0) for name, keep in callback.pruner.masks.items())
    assert all(math.isfinite(float(value.sum())) for value in whole.values())

    again, other = trainer_of(tmp_path, config)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert all(torch.equal(value, whole[name]) for name, value in again.model.state_dict().items())
    assert all(torch.equal(callback.pruner.masks[name], keep) for name, keep in other.pruner.masks.items())

    (tmp_path / "checkpoint-7" / "sparsity.safetensors").unlink()
    third, _ = trainer_of(tmp_path, config)
    with pytest.raises(ValueError, match="resume_from must be the checkpoint folder that holds sparsity.safetensors"):
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


@torch.no_grad()
def test_pruned_weights_keep_the_guarantee_of_attention_pruning():
    """The bound of ACP is computed from the norm weights, which stay dense: no row loses more than e^-10."""
    from fox_training.sparsity import MaskedPruner
    from modeling_fox import pruning_stats

    model = tiny_fox()
    model.set_attn_implementation("fox_acp")
    MaskedPruner(model, SparsityConfig(final_sparsity=0.9, method="static_random"), total_steps=10).start()
    tokens = random_tokens(1, 700)
    for layer in model.model.layers:
        layer.self_attn.fgate_proj.bias.fill_(-3.0)  # strong decay, so that there is something to skip
    exact = model(tokens).logits
    model.config.log_pruning_tolerance = -10.0
    with pruning_stats(model) as stats:
        pruned = model(tokens).logits
    assert float(stats.pruned_fraction.max()) > 0.3
    assert float(stats.lost_mass_bound.max()) <= math.exp(-10.0)
    torch.testing.assert_close(pruned, exact, rtol=1e-3, atol=1e-3)
