"""The README is executed: its Python runs from top to bottom, and every command, path and make target in it exists."""

import re
from pathlib import Path

import pytest
import what_works

from helpers import tiny_fox

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_first_code_stands_within_twenty_lines():
    lines = README.splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("```")) <= 20
    assert "make demo" in README and "make test" in README


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    from fox_training.tokenizers import byte_tokenizer

    tiny_fox(vocab_size=258, bos_token_id=256, eos_token_id=256, pad_token_id=257).save_pretrained(
        tmp_path / "runs/demo/model"
    )
    byte_tokenizer().save_pretrained(tmp_path / "runs/demo/model")
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = code_blocks("python")
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "Fellow-Citizens of the Senate" in capsys.readouterr().out
    assert names["stats"].pruned_fraction.shape == (8,)


def test_the_figures_at_the_top_are_those_that_were_recorded():
    top = README[: README.index("```")]
    rows = [line for line in top.splitlines() if line.startswith("|")][2:]
    measured = README[README.index("\n## Measured") :]
    recorded = measured + "".join((ROOT / x).read_text(encoding="utf-8") for x in ("RESULTS.md", "kernels/README.md"))
    figures = [figure for row in rows for cell in row.split("|")[2:] for figure in re.findall(r"\d[\d,]*\.?\d+", cell)]
    assert len(figures) >= 2 * len(rows) >= 8
    assert [figure for figure in figures if figure not in recorded] == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([\w-]+)", README)) - {"it"}))
def test_make_targets_of_the_readme_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"-m (fox_training\.\w+)", README))))
def test_modules_of_the_readme_run(module):
    assert (ROOT / "training" / Path(*module.split("."))).with_suffix(".py").exists()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:training|kernels|modeling_fox|model_cards)/[\w./-]*[\w/]", README)))
)
def test_paths_of_the_readme_exist(path):
    assert (ROOT / path.replace("NAME.yaml", "demo.yaml")).exists()


def test_what_works_is_what_the_tests_show():
    """Else: `python tests/what_works.py --write`."""
    assert what_works.with_table(README) == README
