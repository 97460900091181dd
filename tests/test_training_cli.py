"""The console script passes on what it gets, and the demo goes the whole path."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fox_training import cli, demo, evaluate

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_arguments_are_passed_on_unchanged(name, monkeypatch):
    seen = []

    def import_module(module):
        return SimpleNamespace(main=lambda argv: seen.append((module, argv)) or 7)

    monkeypatch.setattr(cli, "import_module", import_module)
    arguments = ["runs/x", "--data.path", "a b", "--", "-h", ""]
    assert cli.main([name, *arguments]) == 7
    assert seen == [(f"fox_training.{name}", arguments)]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_with_three_examples_first(name, capsys):
    try:
        status = cli.main([name, "--help"])
    except SystemExit as stopped:
        status = stopped.code
    out = capsys.readouterr().out
    assert not status
    before_options = re.split(r"\n(?:positional arguments|options|  --)", out)[0]
    assert len(re.findall(r"-m fox_training\.\w+ .*|-m fox_training\.demo$", before_options, re.MULTILINE)) >= 3


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} +\w", out, re.MULTILINE)


def test_an_unknown_command_is_an_error(capsys):
    assert cli.main(["trian"]) == 2
    assert "COMMAND must be one of train, evaluate" in capsys.readouterr().err
    assert cli.main([]) == 2


def test_the_front_imports_nothing_heavy():
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "training"))
    code = (
        "import sys; from fox_training import cli; cli.main(['--help']); "
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": paths}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.splitlines()[-1] == "[]"


TINY = [
    "--schedule.steps", "2", "--schedule.warmup_steps", "1", "--data.tokenizer.kind", "byte", "--data.batch_size", "2",
    "--model.config.hidden_size", "16", "--model.config.intermediate_size", "16", "--data.sequence_length", "64",
    "--model.config.num_hidden_layers", "1", "--model.config.num_attention_heads", "2", "--run.device", "cpu",
]  # fmt: skip


def test_the_demo_goes_the_whole_path_and_fails_a_model_that_has_learned_nothing(tmp_path, monkeypatch, capsys):
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "training"))
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.setattr(demo, "PROMPT", "Gentlemen")
    out = tmp_path / "demo"
    arguments = ["--output-dir", str(out), *TINY, "--data.cache_dir", str(tmp_path / "cache")]
    assert demo.main(arguments) == 1
    first = capsys.readouterr()
    assert "does not beat the byte 3-gram" in first.err
    assert re.search(r"^Gentlemen.+", first.out, re.MULTILINE | re.DOTALL)
    report = json.loads((out / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert f"this model       {report['results']['bits_per_byte']:9.4f}" in first.out
    assert re.search(r"with pruning +\d+\.\d{4}   skipping \d+\.\d% of the attention over 12,442 tokens", first.out)
    text = (out / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| {report['results']['bits_per_byte']:.4f} |" in text
    steps = (out / "metrics.jsonl").read_text(encoding="utf-8")

    def measured(*arguments):
        raise ValueError("nothing left to do")

    monkeypatch.setattr(evaluate, "evaluate", measured)
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert (out / "metrics.jsonl").read_text(encoding="utf-8") == steps, "a finished run is not trained again"


def test_the_demo_stops_at_a_mistake_in_the_recipe(tmp_path, capsys):
    assert demo.main(["--output-dir", str(tmp_path), "--schedule.step", "2"]) == 2
    assert "Did you mean schedule.steps" in capsys.readouterr().err


def test_the_demo_names_a_recipe_that_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--recipe", str(tmp_path / "gone.yaml")])
    assert "there is no" in capsys.readouterr().err
