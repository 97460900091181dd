"""The loop: it learns, it goes on exactly where it was killed, and its numbers are the ones they claim to be."""

import contextlib
import json
import math
import os
import signal
import sqlite3
import time

import pytest
import torch
import torch.nn.functional as F
import yaml
from processes import server
from transformers import AutoModelForCausalLM, AutoTokenizer

from fox_training import run as run_module
from fox_training import train as train_module
from fox_training.card import write_card
from fox_training.data import load_documents
from fox_training.recipe import RecipeError, UserError, load_recipe, recipe_to_dict
from fox_training.tracking import MetricsLog, Stopwatch
from fox_training.train import main, train

pytestmark = pytest.mark.usefixtures("without_cards")
TINY = {
    "model": {
        "config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    },
    "data": {"validation_ids": ["1797-Adams"], "sequence_length": 64, "batch_size": 4},
    "optimizer": {"learning_rate": 1e-2},
    "schedule": {"steps": 8, "warmup_steps": 2, "kind": "constant"},
    "evaluation": {"every_steps": 0, "batch_size": 16},
    "checkpoint": {"every_steps": 4},
    "tracking": {"log_every_steps": 1},
}


def write_recipe(folder, *overrides, out="out"):
    """YAML file of the tiny run under `folder`, changed by dotted overrides."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    places = [f"run.output_dir={folder / out}", f"data.cache_dir={folder / 'cache'}", "run.device=cpu"]
    recipe = load_recipe(path, [*places, *overrides])
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    return path


def run_tiny(folder, *overrides, out="out", **options):
    """Train in this process; returns the output folder."""
    train(load_recipe(write_recipe(folder, *overrides, out=out)), **options)
    return folder / out


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out):
    """Step to (loss, gradient norm), as hexadecimal floats: equal means equal in every bit."""
    return {m["step"]: (m["loss"].hex(), m["grad_norm"].hex()) for m in lines(out) if "loss" in m}


def test_it_learns_and_what_it_saves_loads_and_scores_as_it_said(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "write_card", write_card)
    out = run_tiny(tmp_path, "schedule.steps=30")
    losses = [m["loss"] for m in lines(out) if "loss" in m]
    assert losses[0] == pytest.approx(math.log(258), abs=0.1)  # nothing known: uniform over the vocabulary
    assert losses[-1] < 3.5
    evaluation = lines(out)[-1]
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    _, held_out = load_documents(load_recipe(out / "recipe.yaml").data)
    nats, count = 0.0, 0
    ids = [tokenizer.bos_token_id, *tokenizer(held_out[0]["text"]).input_ids]
    for begin in range(0, len(ids) - 1, 63):  # rows of 64 tokens that overlap by one
        row = torch.tensor(ids[begin : begin + 64])
        with torch.no_grad():
            logits = model(row[None], use_cache=False).logits[0, :-1]
        nats += F.cross_entropy(logits, row[1:], reduction="sum").item()
        count += len(row) - 1
    assert count == evaluation["eval_tokens"] == 12_442
    assert evaluation["eval_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert evaluation["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / 12_442, rel=1e-5)
    described = json.loads((out / "data.json").read_text())
    assert (described["train"]["bytes"], described["validation"]["bytes"]) == (175_027, 12_442)
    assert (out / "model" / "README.md").is_file()


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path):
    options = ("optimizer.ema_decay=0.9", "tracking.log_every_steps=3", "data.micro_batch_size=2")
    whole = run_tiny(tmp_path, "schedule.steps=12", *options, out="whole")
    run_tiny(tmp_path, "schedule.steps=5", *options, out="parts")
    parts = run_tiny(tmp_path, "schedule.steps=12", *options, out="parts")
    assert {step: curve(whole)[step] for step in (9, 12)} == {step: curve(parts)[step] for step in (9, 12)}
    weights = [(o / "model" / "model.safetensors").read_bytes() for o in (whole, parts)]
    assert weights[0] == weights[1]


def test_kill_9_at_any_time_leaves_a_loss_curve_identical_to_an_uninterrupted_one(tmp_path):
    """Five times here; `python tests/kill_fifty_times.py` fifty times, at random moments."""
    steps = ("schedule.steps=30", "checkpoint.every_steps=3")
    whole = run_tiny(tmp_path, *steps, out="whole")
    recipe = write_recipe(tmp_path, *steps, out="killed")
    out = tmp_path / "killed"
    for number, after in enumerate((3, 9, 14, 19, 24)):
        process = server().Process(target=main, args=(["--recipe", str(recipe)],))
        process.start()
        deadline = time.monotonic() + 90
        while process.is_alive() and time.monotonic() < deadline:
            if (out / "metrics.jsonl").is_file() and len((out / "metrics.jsonl").read_text().splitlines()) >= after:
                time.sleep(0.004 * number)  # moves the kill into steps, saves and renames
                break
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        process.close()
    # What a process that dies inside a line or a save leaves behind.
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 31, "lo')
    (out / "checkpoints" / "step_00000099.tmp").mkdir()
    train(load_recipe(recipe))
    assert curve(out) == curve(whole)
    assert [m["step"] for m in lines(out) if "loss" in m] == list(range(1, 31))
    assert (out / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(tmp_path, capsys):
    whole = run_tiny(tmp_path, "schedule.steps=10", out="whole")
    out = run_tiny(tmp_path, "schedule.steps=8", out="damaged")
    weights = out / "checkpoints" / "step_00000008" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    run_tiny(tmp_path, "schedule.steps=10", out="damaged")
    assert "step_00000008 is not usable" in capsys.readouterr().out
    assert curve(out) == curve(whole)


def test_sigterm_saves_ends_cleanly_and_goes_on(tmp_path, monkeypatch, capsys):
    options = ("schedule.steps=9", "tracking.log_every_steps=4")  # stopped between two logged steps
    whole = run_tiny(tmp_path, *options, out="whole")
    real = train_module.optimizer_step

    def step_then_signal(run, batches, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, batches, step)

    monkeypatch.setattr(train_module, "optimizer_step", step_then_signal)
    recipe = write_recipe(tmp_path, *options, out="stopped")
    assert main(["--recipe", str(recipe)]) == 0
    monkeypatch.undo()
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert (tmp_path / "stopped" / "checkpoints" / "step_00000006").is_dir()
    assert not (tmp_path / "stopped" / "model").exists()
    train(load_recipe(recipe))
    assert curve(tmp_path / "stopped") == curve(whole)


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    options = ("schedule.steps=3", "optimizer.max_grad_norm=0.5")
    one = run_tiny(tmp_path, *options, out="one")
    four = run_tiny(tmp_path, *options, "data.micro_batch_size=1", out="four")
    for a, b in zip(lines(one)[:3], lines(four)[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_launcher_that_accelerate_does_not_see_is_refused(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path))
    run_module.start_accelerator(recipe)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match="started 4 processes .* Accelerate sees 1"):
        train(recipe)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path))
    with run_module.lock_output(run_module.open_output(recipe), is_main=True):
        with pytest.raises(RecipeError, match="another process trains in run.output_dir"):
            train(recipe)
    train(recipe)


def test_the_number_of_threads_is_that_of_the_recipe(tmp_path):
    before = torch.get_num_threads()
    try:
        run_module.start_accelerator(load_recipe(write_recipe(tmp_path, "run.threads=2")))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_launchers_precision_is_followed_or_refused(tmp_path, monkeypatch):
    recipe, cpu = load_recipe(write_recipe(tmp_path)), torch.device("cpu")
    assert not run_module.uses_bf16(recipe, cpu)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run_module.uses_bf16(recipe, cpu)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(RecipeError, match="must be no or bf16; got fp16"):
        run_module.uses_bf16(recipe, cpu)


def test_a_streamed_run_resumes_bit_for_bit(tmp_path):
    rows = [{"text": f"document number {i} says {'so ' * (i % 7)}"} for i in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = ("data.streaming=true", "data.source=local", f"data.path={tmp_path / 'data.jsonl'}",
              "data.validation_ids=[]", "data.validation_documents=3", "data.shuffle_block=6")  # fmt: skip
    whole = run_tiny(tmp_path, "schedule.steps=11", *stream, out="whole")  # several epochs
    run_tiny(tmp_path, "schedule.steps=5", *stream, out="parts")
    parts = run_tiny(tmp_path, "schedule.steps=11", *stream, out="parts")
    assert curve(parts) == curve(whole)
    assert "eval_bits_per_byte" in lines(parts)[-1]


def test_a_changed_recipe_is_refused_with_the_differing_keys_unless_allowed(tmp_path, capsys):
    run_tiny(tmp_path, "schedule.steps=4", "schedule.warmup_steps=8")
    assert "the learning rate ends at 50% of its peak" in capsys.readouterr().out
    changed = ("schedule.steps=6", "optimizer.beta2=0.9", "data.tokenizer.kind=byte")
    names = ("recipe.yaml", "data.json", "environment.json")
    before = [(tmp_path / "out" / name).read_bytes() for name in names]
    with pytest.raises(RecipeError, match=r"optimizer.beta2: 0.95 -> 0.9. Use another run.output_dir"):
        run_tiny(tmp_path, *changed)
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == before
    out = run_tiny(tmp_path, *changed, allow_recipe_change=True)
    assert "recipe changed: optimizer.beta2" in capsys.readouterr().out
    assert list(curve(out)) == [1, 2, 3, 4, 5, 6]


def test_changed_data_behind_an_unchanged_recipe_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    local = ("data.source=local", f"data.path={text}", "data.validation_ids=[]")
    text.write_text("some text " * 50)
    run_tiny(tmp_path, "schedule.steps=2", *local)
    text.write_text("other text " * 50)
    with pytest.raises(RecipeError, match="data fingerprint: .* -> "):
        run_tiny(tmp_path, "schedule.steps=4", *local)


def test_a_finished_run_stays_as_it_is(tmp_path, capsys):
    out = run_tiny(tmp_path)
    before = (out / "metrics.jsonl").read_bytes()
    run_tiny(tmp_path)
    assert "is complete at step 8" in capsys.readouterr().out
    assert (out / "metrics.jsonl").read_bytes() == before


def test_resume_must_and_never_mean_what_they_say(tmp_path):
    with pytest.raises(RecipeError, match="checkpoint.resume is must"):
        run_tiny(tmp_path, "checkpoint.resume=must")
    run_tiny(tmp_path, "schedule.steps=2")
    with pytest.raises(RecipeError, match="checkpoint.resume is never"):
        run_tiny(tmp_path, "checkpoint.resume=never")


def test_the_exported_weights_are_those_of_the_lowest_validation_loss(tmp_path, monkeypatch):
    order = iter([3.0, 2.0, 5.0])
    monkeypatch.setattr(
        train_module, "validation_loss", lambda run: {"eval_loss": next(order), "eval_bits_per_byte": 1.0}
    )
    out = run_tiny(tmp_path, "schedule.steps=6", "evaluation.every_steps=2", "checkpoint.export=best")
    state = json.loads((out / "checkpoints" / "best" / "state.json").read_text())
    assert state["best"] == {"step": 4, "loss": 2.0}
    monkeypatch.undo()
    four = AutoModelForCausalLM.from_pretrained(run_tiny(tmp_path, "schedule.steps=4", out="four") / "model")
    best = AutoModelForCausalLM.from_pretrained(out / "model")
    assert all(torch.equal(a, b) for a, b in zip(four.parameters(), best.parameters(), strict=True))


def test_a_loss_that_is_no_number_stops_with_a_message_and_saves_nothing(tmp_path):
    with pytest.raises(UserError, match="diverged and stops. .*Lower optimizer.learning_rate"):
        run_tiny(tmp_path, "optimizer.learning_rate=1e30", "tracking.log_every_steps=4")
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


def test_a_full_disk_during_training_is_one_error_and_the_run_goes_on_later(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_module.ckpt, "save_weights", refuse)
    assert main(["--recipe", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error
    monkeypatch.undo()
    assert main(["--recipe", str(recipe)]) == 0
    assert list(curve(tmp_path / "out")) == list(range(1, 9))


def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_is_done(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    recipe = write_recipe(tmp_path, f"run.output_dir={tmp_path / 'file' / 'out'}")
    assert main(["--recipe", str(recipe)]) == 2
    assert "run.output_dir must be a folder that can be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--recipe FILE is missing"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--recipe", "{tiny}", "--schedule.step", "3"], "Did you mean schedule.steps"),
        (["--recipe", "{tiny}", "--tracking.trackers", "[tensorbord]"], "tracking.trackers must be of tensorboard"),
        (["--recipe", "{tiny}", "--model.config.num_attention_heads", "5"], "hidden_size"),
        (["--recipe", "{tiny}", "--model.attn_implementation", "none"], "attn_implementation|attention"),
        (["--recipe", "{tiny}", "--model.type", "foks"], "model.type foks is no model of Transformers"),
        (["--recipe", "{tiny}", "--data.sequence_length", "999999"], "must be at most"),
    ],
)
def test_the_command_answers_a_mistake_with_one_line(tmp_path, capsys, arguments, message):
    tiny = str(write_recipe(tmp_path))
    assert main([argument.format(tiny=tiny) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fox_training.train: error: ") and error.count("\n") == 1
    assert any(part in error for part in message.split("|"))


def test_help_names_three_commands_and_every_section(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("fox_training.train --recipe") == 3
    assert all(f"--{name}." in text for name in recipe_to_dict(load_recipe(None)))


def test_another_model_trains_in_the_same_loop(tmp_path):
    options = ("model.type=llama", "schedule.steps=12", "data.tokenizer.kind=char", "data.validation_ids=[]")
    out = run_tiny(tmp_path, *options)
    losses = [m["loss"] for m in lines(out) if "loss" in m]
    assert losses[-1] < losses[0] - 0.5
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.model_type == "llama"


def test_pruning_is_logged_where_the_model_prunes(tmp_path):
    options = ("model.attn_implementation=fox_acp", "model.config.log_pruning_tolerance=-10", "schedule.steps=2")
    out = run_tiny(tmp_path, *options, "data.sequence_length=256", "model.config.fgate_decay_time_min=1",
                   "model.config.fgate_decay_time_max=1")  # fmt: skip
    shares = [m["pruned_fraction"] for m in lines(out) if "loss" in m]
    assert all(0.2 < share < 1 for share in shares)
    assert "pruned_fraction" not in lines(run_tiny(tmp_path, "schedule.steps=1", out="dense"))[0]


def test_bf16_autocast_keeps_fp32_weights(tmp_path):
    out = run_tiny(tmp_path, "run.precision=bf16", "schedule.steps=3")
    assert AutoModelForCausalLM.from_pretrained(out / "model").dtype == torch.float32
    fp32 = run_tiny(tmp_path, "schedule.steps=3", out="fp32")
    assert curve(out) != curve(fp32)
    assert lines(out)[2]["loss"] == pytest.approx(lines(fp32)[2]["loss"], rel=1e-2)


def test_tensorboard_gets_the_figures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run_tiny(tmp_path, "tracking.trackers=[tensorboard]", "schedule.steps=3")
    (events,) = [p.parent for p in out.rglob("events.out.tfevents*") if p.parent.name == "fox"]
    reader = EventAccumulator(str(events)).Reload()
    logged = [m["loss"] for m in lines(out) if "loss" in m]
    assert [e.value for e in reader.Scalars("loss")] == pytest.approx(logged, rel=1e-6)


def train_with_trackio(recipe, folder):
    os.environ |= {"TRACKIO_DIR": folder, "HF_HUB_OFFLINE": "1"}
    train(load_recipe(recipe))


def test_trackio_gets_the_figures(tmp_path):
    pytest.importorskip("trackio")
    recipe = write_recipe(tmp_path, "tracking.trackers=[trackio]", "schedule.steps=3")
    # It asks for its folder when it is imported.
    process = server().Process(target=train_with_trackio, args=(str(recipe), str(tmp_path / "trackio")))
    process.start()
    process.join(400)
    assert process.exitcode == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "fox.db")) as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    found = {step: figures["loss"] for step, text in rows if "loss" in (figures := json.loads(text))}
    assert found == {m["step"]: m["loss"] for m in lines(tmp_path / "out") if "loss" in m}


def test_the_throughput_is_tokens_over_seconds_of_training(tmp_path):
    now = 0.0
    watch = Stopwatch(clock=lambda: now)
    watch.start()
    now = 3.0
    watch.stop()
    now = 100.0  # an evaluation
    watch.start()
    now = 102.0
    assert watch.lap() == 5.0
    now = 104.0
    assert watch.lap() == 2.0
    watch.stop()
    assert watch.seconds == 7.0


def test_metrics_behind_the_resumed_step_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(path, after_step=2)
    log.write({"step": 3, "loss": 1.5})
    log.sync()
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 1.5}\n'
