"""A loss that is no number or jumps: the step is named, its batch is kept. Checkpoints in the background."""

import errno
import itertools
import math
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_training_train import curve, lines, run_tiny, write_recipe

from fox_training import checkpoint as ckpt
from fox_training import train as training
from fox_training.batches import Batches, plan_batches
from fox_training.checkpoint import CheckpointError, CheckpointFolder
from fox_training.guard import Guard
from fox_training.pipeline import load_data
from fox_training.recipe import UserError, load_recipe
from fox_training.train import newest_checkpoint, one_error_for_a_lost_process, train


def alone(losses):
    return losses


def fill(guard, losses, first=1, norms=None):
    for step, loss in enumerate(losses, start=first):
        norm = 1.0 if norms is None else norms[step - first]
        guard.add(step, torch.tensor(loss), torch.tensor(norm), [{"input_ids": torch.tensor([[step]])}])


def test_the_first_bad_step_is_found_with_its_batch(tmp_path):
    guard = Guard(None)
    fill(guard, [3.0, 2.0])
    assert guard.check(alone) is None and guard.check(alone) is None
    fill(guard, [2.0, math.inf, 2.0, math.nan], first=3)
    found = guard.check(alone)
    assert (found.step, found.loss, found.expected) == (4, math.inf, None)
    guard.save_batch(tmp_path / "batch.safetensors")
    assert load_file(tmp_path / "batch.safetensors")["input_ids"].tolist() == [[[4]]]
    fill(guard, [2.0, 2.0], first=7, norms=[1.0, math.nan])
    assert guard.check(alone).step == 8


def test_a_jump_is_measured_from_the_running_mean_and_only_if_asked_for():
    wavy = [4.0 + 0.2 * math.sin(step) for step in range(80)]
    for spike, expected in ((1.0, 81), (2.0, None), (None, None)):
        guard = Guard(spike)
        fill(guard, [*wavy, 5.5, 4.0])
        found = guard.check(alone)
        assert (found.step if found else None) == expected
    early = Guard(1.0)
    fill(early, [4.0] * 20 + [9.0] + [4.0] * 60)  # the mean is not settled yet
    assert early.check(alone) is None


def test_a_run_stops_at_a_jump_and_keeps_the_batch_of_that_step(tmp_path):
    options = ("schedule.steps=80", "run.stop_on_spike=1e-6", "checkpoint.every_steps=10", "data.micro_batch_size=2",
               "tracking.log_every_steps=5")  # fmt: skip
    path = write_recipe(tmp_path, *options)
    with pytest.raises(UserError, match=r"jumped to .* more than run.stop_on_spike 1e-06.*The newest .*step_000000"):
        train(load_recipe(path))
    place = next((tmp_path / "out").glob("offending_step_*_process_00000.safetensors"))
    step = int(place.name.split("_")[2])
    assert step > 50
    recipe = load_recipe(path)
    batches = Batches(load_data(recipe)[1], plan_batches(recipe.data, 0, 1), torch.device("cpu"))
    expected = next(itertools.islice(batches, step - 1, None))
    batches.close()
    saved = load_file(place)
    assert torch.equal(saved["input_ids"], torch.stack([part["input_ids"] for part in expected]))
    assert torch.equal(saved["position_ids"], torch.stack([part["position_ids"] for part in expected]))
    # Without the limit the same command goes on.
    saved_steps = sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir())
    assert int(saved_steps[-1].removeprefix("step_")) < step
    train(load_recipe(path, ["run.stop_on_spike=null"]))
    assert list(curve(tmp_path / "out")) == list(range(5, 81, 5))
    heads = (tmp_path / "out" / "heads.jsonl").read_text().splitlines()
    assert len(heads) == 1 and "half_life_tokens" in heads[0]
    assert all(0 <= line["data_wait"] <= 1 for line in lines(tmp_path / "out") if "loss" in line)


def writers(text):
    return lambda folder: (folder / "main.txt").write_text(text), lambda folder: None


def test_a_checkpoint_becomes_visible_in_the_background(tmp_path, monkeypatch):
    folder, let_go = CheckpointFolder(tmp_path, keep_last=2), threading.Event()
    seal = ckpt.seal_folder
    monkeypatch.setattr(ckpt, "seal_folder", lambda work, known: let_go.wait(20) and seal(work, known))
    folder.save(1, *writers("1"), background=True)
    assert folder.all() == [] and (tmp_path / "step_00000001.tmp" / "main.txt").is_file()
    assert CheckpointFolder(tmp_path, 2).newest(print) is None  # what a run sees that was killed here
    let_go.set()
    folder.save(2, *writers("2"), background=True)
    folder.wait()
    assert [path.name for path in folder.all()] == ["step_00000001", "step_00000002"]
    assert folder.newest(print).name == "step_00000002"
    folder.close()


def test_a_full_disk_in_the_background_is_an_error_of_the_next_save(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep_last=2)
    folder.save(1, *writers("1"), background=True)
    folder.wait()

    def full(work, known):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ckpt, "seal_folder", full)
    folder.save(2, *writers("2"), background=True)
    with pytest.raises(CheckpointError, match="step_00000002 cannot be written: .*No space left"):
        folder.save(3, *writers("3"), background=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    folder.close()


def test_a_process_that_is_gone_is_one_line_and_other_errors_stay(tmp_path):
    run = SimpleNamespace(checkpoints=CheckpointFolder(tmp_path, keep_last=1))

    def block():
        return one_error_for_a_lost_process(SimpleNamespace(num_processes=2), lambda: newest_checkpoint(run))

    message = r"another process of this run is gone \(Connection closed by peer\)\. There is no checkpoint yet; "
    with pytest.raises(UserError, match=message), block():
        # The save in the background waits for the same process.
        run.checkpoints._pending = tmp_path, Future()
        run.checkpoints._pending[1].set_exception(RuntimeError("Connection closed by peer"))
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1234. GLHF!")
    with pytest.raises(RuntimeError, match="shapes do not match"), block():
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("place", ["set_up", "resume"])
def test_a_process_that_is_gone_before_the_first_step_is_one_line_too(tmp_path, monkeypatch, place):
    def gone(*arguments):
        raise RuntimeError("[pair.cc:537] Read error [127.0.0.1]:12675: Connection reset by peer.")

    accelerator = SimpleNamespace(num_processes=2, is_main_process=True)
    monkeypatch.setattr(training, "start_accelerator", lambda recipe: accelerator)
    monkeypatch.setattr(training, "set_up", lambda *arguments: (None, None))
    monkeypatch.setattr(training, place, gone)
    with pytest.raises(UserError, match=r"is gone \(Connection reset by peer\)\. No step was done since the newest"):
        run_tiny(tmp_path)


def test_a_run_with_kron_goes_on_bit_for_bit(tmp_path):
    options = ("optimizer.name=kron", "tracking.heads=false")
    whole = run_tiny(tmp_path, "schedule.steps=8", *options, out="whole")
    run_tiny(tmp_path, "schedule.steps=5", *options, out="parts")
    parts = run_tiny(tmp_path, "schedule.steps=8", *options, out="parts")
    assert curve(whole) == curve(parts)
    assert curve(whole)[8] != curve(run_tiny(tmp_path, "schedule.steps=8", out="adamw"))[8]
