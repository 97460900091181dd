"""Checkpoints: complete or not there, bit for bit what was saved, and nothing lost when the disk refuses."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fox_training import checkpoint as ckpt
from fox_training.checkpoint import CheckpointError, CheckpointFolder
from fox_training.optimizers import build_optimizers
from fox_training.recipe import OptimizerRecipe
from modeling_fox import FoxConfig, FoxForCausalLM


def save(folder, step, text="x"):
    return folder.save(
        step,
        lambda path: (path / "main.txt").write_text(text),
        lambda path: (path / "own.txt").write_text(text),
    )


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints", keep_last=2)


def names(folder):
    return [path.name for path in folder.all()]


def test_the_newest_two_stay_in_order_of_steps(folder):
    for step in (8, 9, 10, 100):
        save(folder, step)
    assert names(folder) == ["step_00000010", "step_00000100"]
    assert folder.newest(print).name == "step_00000100"
    assert not list(folder.root.glob("*.tmp"))


def test_saving_a_step_again_replaces_it(folder):
    save(folder, 1, "old")
    path = save(folder, 1, "new")
    assert (path / "main.txt").read_text() == "new"
    ckpt.verify_folder(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "name", "reason"),
    [
        (Path.unlink, "main.txt", "main.txt is missing"),
        (truncate, "own.txt", "has 0 bytes instead of 1"),
        (flip, "main.txt", "is damaged"),
        (Path.unlink, "manifest.json", "cannot be read"),
        (truncate, "manifest.json", "cannot be read"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(folder, damage, name, reason):
    save(folder, 1)
    damage(save(folder, 2) / name)
    said = []
    assert folder.newest(said.append).name == "step_00000001"
    assert len(said) == 1 and "step_00000002" in said[0] and reason in said[0]


def test_when_no_checkpoint_is_intact_nothing_starts_over(folder):
    truncate(save(folder, 1) / "main.txt")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints .* is intact"):
        folder.newest(print)


def test_without_checkpoints_there_is_none(folder):
    assert folder.newest(print) is None


@pytest.mark.parametrize("point", ["own", "main", "fsync", "rename"])
def test_a_full_disk_leaves_the_checkpoint_before_it(folder, monkeypatch, point):
    save(folder, 1, "kept")

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def nothing(path):
        (path / "a").write_text("a")

    if point in ("fsync", "rename"):
        monkeypatch.setattr(ckpt.os, point, refuse)
    writers = (refuse if point == "main" else nothing, refuse if point == "own" else lambda path: None)
    with pytest.raises(CheckpointError, match="step_00000002 cannot be written: .*No space left"):
        folder.save(2, *writers)
    monkeypatch.undo()
    assert names(folder) == ["step_00000001"]
    assert (folder.newest(print) / "main.txt").read_text() == "kept"
    save(folder, 2)
    assert names(folder) == ["step_00000001", "step_00000002"]


def test_what_a_killed_save_leaves_behind_is_never_chosen_and_is_cleared(folder):
    save(folder, 1)
    half = folder.root / "step_00000002.tmp"
    half.mkdir()
    (half / "main.txt").write_text("half")
    assert folder.newest(print).name == "step_00000001"
    save(folder, 3)
    assert not half.exists()


def test_a_folder_is_replaced_in_one_step_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    ckpt.write_folder(target, lambda path: (path / "a").write_text("1"))

    def fails(path):
        (path / "a").write_text("2")
        raise OSError(errno.EIO, "broken")

    with pytest.raises(CheckpointError, match="model cannot be written"):
        ckpt.write_folder(target, fails)
    assert (target / "a").read_text() == "1"
    ckpt.write_folder(target, lambda path: (path / "b").write_text("3"), manifest=False)
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def tiny_model(tied=False):
    config = FoxConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return FoxForCausalLM(config)


def step(model, optimizers):
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon", "kron"])
def test_weights_and_optimizers_go_on_bit_for_bit(tmp_path, name, tied):
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch.optim.Muon")
    recipe = OptimizerRecipe(name=name)
    model = tiny_model(tied)
    optimizers = build_optimizers(model, recipe)
    for _ in range(2):
        step(model, optimizers)
    ckpt.save_weights(model, tmp_path / "model.safetensors")
    for number, optimizer in enumerate(optimizers):
        ckpt.save_optimizer(optimizer, tmp_path / f"{number}.safetensors")

    other = tiny_model(tied)
    others = build_optimizers(other, recipe)
    ckpt.load_weights(other, tmp_path / "model.safetensors")
    for number, optimizer in enumerate(others):
        ckpt.load_optimizer(optimizer, tmp_path / f"{number}.safetensors")
    for each, own in ((model, optimizers), (other, others)):
        torch.manual_seed(5)  # Kron draws random vectors
        np.random.seed(5)
        for _ in range(2):
            step(each, own)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert others[0].param_groups[0]["peak_lr"] == optimizers[0].param_groups[0]["peak_lr"]


def test_weights_of_another_model_are_one_clear_error(tmp_path):
    ckpt.save_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        ckpt.load_weights(nn.Linear(3, 2), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        ckpt.load_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ckpt.load_tensors(tmp_path / "w.safetensors")


def test_random_numbers_go_on_where_they_were(tmp_path):
    ckpt.save_random_state(tmp_path, 0, torch.device("cpu"))
    expected, drawn = torch.rand(3), np.random.random(700)
    torch.manual_seed(99)
    np.random.seed(99)
    assert ckpt.load_random_state(tmp_path, 0, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected) and (np.random.random(700) == drawn).all()
    assert not ckpt.load_random_state(tmp_path, 1, torch.device("cpu"))


def test_floats_in_the_state_come_back_bit_for_bit(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 1e-310, "c": 123456789.123456789}
    ckpt.save_state(values, tmp_path)
    assert {k: v.hex() for k, v in ckpt.load_state(tmp_path).items()} == {k: v.hex() for k, v in values.items()}
    assert json.loads((tmp_path / "state.json").read_text()) == values
