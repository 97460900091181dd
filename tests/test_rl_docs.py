"""rl_extensions/README.md: every component is where its table says, every command and option in it exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("gymnasium")

from fox_rl.agents import common
from fox_rl.experiments import runner

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "rl_extensions" / "README.md").read_text(encoding="utf-8")


def components():
    """(name, modules that may have it); sections of a recipe and commands are no names of Python."""
    for row in re.findall(r"^\| (.*) \|$", TEXT.split("## Agents")[0], flags=re.MULTILINE)[2:]:
        _, take, place = row.split(" | ")
        names = (re.fullmatch(r"([A-Za-z_]\w*)(\(.*\))?", code) for code in re.findall(r"`([^`]*)`", take))
        yield from (pytest.param(x[1], re.findall(r"`([\w.]+)`", place), id=x[1]) for x in names if x)


@pytest.mark.parametrize(("name", "modules"), list(components()))
def test_a_component_is_where_the_table_says(name, modules):
    missing = []
    for place in modules:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            assert "pip install" in str(error), error
            missing.append(str(error))
        else:
            if hasattr(module, name) or place.endswith("." + name):
                return
    assert missing, f"{name} is in none of {modules}"
    pytest.skip(missing[0])


@pytest.mark.parametrize("command", re.findall(r"(?:python|launch .*) -m (fox_rl\.[\w.]+ [^`\n]*)", TEXT))
def test_a_command_takes_its_options(command):
    module, *arguments = shlex.split(command)
    if module == "fox_rl.experiments":
        arguments = ["memory" if x == "NAME" else "2" if x == "N" else x for x in arguments]
        assert runner.build_parser().parse_args(arguments).names
    else:
        assert common.options_from_command_line(importlib.import_module(module).Options, "", arguments)


def test_every_option_that_is_named_exists():
    known = set(re.findall(r"--[\w-]+", runner.build_parser().format_help())) | {"--num_processes"}  # of Accelerate
    for name in ("dqn", "pqn", "ppo_fox", "td3", "sac"):
        fields = importlib.import_module(f"fox_rl.agents.{name}").Options.__dataclass_fields__
        known |= {"--" + x.replace("_", "-") for x in fields}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXT))
    assert len(named) > 15 and named <= known, named - known
