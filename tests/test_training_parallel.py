"""The same recipe on two processes, in every arrangement, is the run of one process to fp32 rounding."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from processes import run_two
from safetensors.torch import load_file
from worker_training import train_all

from fox_training.parallel import Parallel, clip_gradients
from fox_training.recipe import RecipeError, load_recipe, recipe_to_dict
from fox_training.train import train

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {
    "run": {"device": "cpu"},
    "model": {
        "config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "initializer_range": 0.1,
        },
        "attn_implementation": "fox_acp",
    },
    "data": {"validation_ids": ["1797-Adams"], "sequence_length": 64, "batch_size": 4, "micro_batch_size": 2},
    "optimizer": {"learning_rate": 1e-2, "max_grad_norm": 1.0},
    "schedule": {"steps": 4, "warmup_steps": 2, "kind": "constant"},
    "evaluation": {"every_steps": 2, "batch_size": 64},
    "checkpoint": {"every_steps": 2, "export": "best"},
    "tracking": {"log_every_steps": 1},
}  # fmt: skip
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip


def mesh(**sizes):
    values = {f"PARALLELISM_CONFIG_{name.upper()}": str(size) for name, size in sizes.items()}
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"} | values


ARRANGEMENTS = {
    "tensor": mesh(tp_size=2),
    "ulysses": mesh(sp_size=2),
    "fsdp2-ring": FSDP | mesh(cp_size=2),
    "ddp": {},
    "fsdp2": FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
    "ring": mesh(cp_size=2),
}
# CI runs some of them and a resume over FSDP2; FOX_ALL_ARRANGEMENTS=1 all, in minutes more.
ALL = os.environ.get("FOX_ALL_ARRANGEMENTS") == "1"
OFTEN = ("tensor", "ulysses", "fsdp2-ring", "ddp", "from-one", "from-two")
FIRST_SHARD = "shard-00001-model-00001-of-00001.safetensors"
SHARD = "parts/shard-00002-model-00001-of-00001.safetensors"
COMPILED = ["run.compile=true", "run.activation_checkpointing=true"]
# A loss that reads the output layer without calling it; a mean kept in parts, and a tied weight in one unit.
OTHERS = {
    "fsdp2-chunked": ["run.loss=chunked"],
    "fsdp2-average": ["optimizer.ema_decay=0.9", "model.config.tie_word_embeddings=true"],
}


def write_recipe(folder):
    recipe = load_recipe(write_yaml(folder / "base.yaml", RECIPE), [f"data.cache_dir={folder / 'cache'}"])
    return write_yaml(folder / "recipe.yaml", recipe_to_dict(recipe))


def write_yaml(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every arrangement on two processes, in one launch, beside the same runs here on one."""
    folder = tmp_path_factory.mktemp("parallel")
    recipe = write_recipe(folder)

    def alone(name, *overrides):
        train(load_recipe(recipe, [f"run.output_dir={folder / name}", *overrides]))

    alone("one")
    alone("from-one", "schedule.steps=2")
    runs = [
        {"environment": environment, "recipe": str(recipe), "overrides": [f"run.output_dir={folder / name}"]}
        for name, environment in ARRANGEMENTS.items()
        if ALL or name in OFTEN
    ]
    # What one process has begun, two go on with, and the other way round, in parts.
    runs.append({"environment": FSDP, "recipe": str(recipe), "overrides": [f"run.output_dir={folder / 'from-one'}"]})
    damaged = folder / "damaged"
    runs.append({
        "environment": ARRANGEMENTS["fsdp2-ring"], "recipe": str(recipe), "overrides": [f"run.output_dir={damaged}"],
        "damaged": [str(folder / "fsdp2-ring"), str(damaged), f"checkpoints/step_00000004/{SHARD}"],
    })  # fmt: skip
    expected = ["tensor 2", "ulysses 2", "FSDP2, ring 2", "", "FSDP2", "FSDP2, ring 2"]
    if ALL:
        for name, overrides in OTHERS.items():
            alone(f"one-{name}", *overrides)
        expected = ["tensor 2", "ulysses 2", "FSDP2, ring 2", "", "FSDP2", "ring 2", "FSDP2", "FSDP2, ring 2"]
        expected += ["FSDP2"] * (len(OTHERS) + 1)
    runs += [
        {"environment": FSDP, "recipe": str(recipe), "overrides": [f"run.output_dir={folder / name}", *overrides]}
        for name, overrides in OTHERS.items()
        if ALL
    ]
    if ALL:  # takes minutes on a CPU
        overrides = [f"run.output_dir={folder / 'fsdp2-compiled'}", *COMPILED]
        runs.append({"environment": FSDP, "recipe": str(recipe), "overrides": overrides})
    said, _ = run_two(train_all, runs, timeout=900)
    # That each was what it says, and not two processes side by side.
    assert re.findall(r"^model .* fp32 on cpu(?::0)?(?:, (.*))?$", said, re.MULTILINE) == expected, said
    (folder / "said.txt").write_text(said)
    # What two have done, one goes on with; of the newest checkpoint, a part is missing.
    shutil.copytree(folder / "fsdp2-ring", folder / "from-two")
    (folder / "from-two" / "checkpoints" / "step_00000004" / SHARD).unlink()
    with open(folder / "alone.txt", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        alone("from-two")
    return folder


def figures(out):
    """Loss, gradient norm and evaluation of every step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "eval_loss", "eval_bits_per_byte", "eval_tokens")
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


def assert_same_run(out, expected):
    found, wanted = figures(out), figures(expected)
    assert len(wanted) == 4 * 2 + 2 * 3
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=2e-5), key
    weights, whole = (
        load_file(out / "model" / "model.safetensors"),
        load_file(expected / "model" / "model.safetensors"),
    )
    assert weights.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name", [*ARRANGEMENTS, "from-one", "from-two", "fsdp2-compiled"])
def test_two_processes_train_as_one_does(folder, name):
    if not ALL and name not in OFTEN:
        pytest.skip("FOX_ALL_ARRANGEMENTS=1 runs it")
    assert_same_run(folder / name, folder / "one")


def test_each_process_writes_its_part_of_a_checkpoint(folder):
    checkpoint = folder / "fsdp2-ring" / "checkpoints" / "step_00000004"
    sizes = {path.name: path.stat().st_size for path in (checkpoint / "parts").iterdir()}
    assert list(sizes) and sorted(sizes) == sorted([SHARD.removeprefix("parts/"), FIRST_SHARD])
    # Weights, both moments of AdamW: all of it in two halves, to a row of each matrix.
    parts = [load_file(path) for path in (checkpoint / "parts").iterdir()]
    whole = load_file(folder / "one" / "checkpoints" / "step_00000004" / "model.safetensors")
    for name, value in whole.items():
        rows = [part[f"model.{name}"].shape[0] for part in parts if f"model.{name}" in part]
        assert sum(rows) == value.shape[0] and max(rows) - min(rows) <= 1, name
    assert not (checkpoint / "model.safetensors").exists()
    assert set(load_file(checkpoint / "replicated.safetensors")) <= {
        f"optimizer_0.{index}.step" for index in range(100)
    }
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert {name: entry["bytes"] for name, entry in manifest.items() if name.startswith("parts/")} == {
        f"parts/{name}": size for name, size in sizes.items()
    }


def test_a_damaged_part_costs_the_steps_since_the_checkpoint_before_it(folder):
    """One line says so, and the same processes go on bit for bit."""
    said = (folder / "said.txt").read_text()
    assert len(re.findall(r"checkpoint step_00000004 is not usable: .*00002.* is damaged: its SHA-256", said)) == 1
    assert "resumed from step_00000002, written by 2 process(es)" in said
    assert figures(folder / "damaged") == figures(folder / "fsdp2-ring")
    weights = [(folder / name / "model" / "model.safetensors").read_bytes() for name in ("damaged", "fsdp2-ring")]
    assert weights[0] == weights[1]


def test_a_missing_part_is_named(folder):
    said = (folder / "alone.txt").read_text()
    assert re.search(rf"checkpoint step_00000004 is not usable: .*{SHARD} is missing. Trying the one before it", said)


@pytest.mark.parametrize("name", OTHERS)
def test_losses_means_and_tied_weights_in_parts_are_those_of_the_whole(folder, name):
    if not ALL:
        pytest.skip("FOX_ALL_ARRANGEMENTS=1 runs it")
    assert_same_run(folder / name, folder / f"one-{name}")


def test_sizes_that_cannot_be_are_refused(monkeypatch):
    def refused(processes, environment, message):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(RecipeError, match=message):
                Parallel.from_environment(processes)

    refused(8, mesh(cp_size=2, sp_size=2), "two ways to cut up rows: set one to 1")
    refused(8, mesh(cp_size=3), r"x cp_size or sp_size 3 x tp_size 1 must be the number of processes, 8; got 6")
    refused(8, mesh(dp_shard_size=8), "dp_shard_size 8 needs distributed_type FSDP with fsdp_version 2")
    refused(
        8, FSDP | {"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "fsdp_version must be 2; got 1"
    )
    refused(8, FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params must be false")
    refused(8, mesh(tp_size=2), "tp_size 2 must be all 8 processes")


@pytest.mark.parametrize(
    ("processes", "environment", "expected"),
    [
        (1, FSDP, (1, 1, 1, 1)),
        (8, {}, (8, 1, 1, 1)),
        (8, FSDP, (1, 8, 1, 1)),
        (8, FSDP | mesh(dp_replicate_size=2, dp_shard_size=4), (2, 4, 1, 1)),
        (8, FSDP | mesh(dp_replicate_size=2, dp_shard_size=2, cp_size=2), (2, 2, 2, 1)),
        (8, mesh(sp_size=4), (2, 1, 4, 1)),
        (8, FSDP | mesh(cp_size=4), (1, 2, 4, 1)),
        (8, mesh(tp_size=8), (1, 1, 1, 8)),
    ],
)
def test_what_is_not_said_is_filled_up(monkeypatch, processes, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = Parallel.from_environment(processes)
    assert (found.replicate, found.shard, found.context, found.tensor) == expected
    assert found.gradient_parts * found.tensor == processes


def test_the_norm_of_gradients_is_pytorchs(monkeypatch):
    weights = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    expected = [weight.grad.clone() for weight in weights]
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in expected]))
    assert float(clip_gradients(weights, 0.5)) == pytest.approx(float(norm))
    for weight, grad in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, grad * 0.5 / norm, rtol=1e-5, atol=1e-6)


def launcher_environment(*arguments):
    """What `accelerate launch` would set for its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args([*map(str, arguments), "-m", "fox_training.train"])
    arguments, _, _ = _validate_launch_command(arguments)
    return arguments, prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize(
    ("name", "options", "described"),
    [
        ("ddp", ["--num_processes", 8], "DDP"),
        ("fsdp2", ["--num_processes", 8], "FSDP2"),
        ("hsdp", [], "FSDP2 x 2 copies"),
        (
            "hsdp",
            ["--num_machines", 4, "--num_processes", 32, "--parallelism_config_dp_replicate_size", 4],
            "FSDP2 x 4 copies",
        ),
        ("long_rows", [], "FSDP2, ring 4"),
        ("long_rows", ["--parallelism_config_cp_size", 1, "--parallelism_config_sp_size", 4], "FSDP2, ulysses 4"),
    ],
)
def test_the_configurations_arrange_what_they_say(monkeypatch, name, options, described):
    file = ROOT / "training" / "accelerate" / f"{name}.yaml"
    options = ["--main_process_ip", "127.0.0.1", "--main_process_port", 29500, *options]
    arguments, environment = launcher_environment("--config_file", file, *options)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    found = Parallel.from_environment(arguments.num_processes)
    assert found.describe() == described
    assert found.gradient_parts == arguments.num_processes
