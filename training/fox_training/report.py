"""One page on a run, with everything in it: `python -m fox_training.report OUT` writes OUT/report.html."""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import plots
from .commands import command_parser, errors_of_the_user
from .recipe import UserError

DESCRIPTION = """\
Write OUT/report.html from the files of a run: loss, gradient norm, throughput, waiting for data, pruned share by layer
and gate half-lives over training, and the recipe. One file, the figures inside; also while the run goes on.

After training:      python -m fox_training.report runs/demo
While it goes on:    watch -n 60 python -m fox_training.report runs/demo
Of another machine:  python -m fox_training.report copied/run
"""

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}}img{{max-width:49%}}
table{{border-collapse:collapse}}td,th{{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}}
pre{{background:#f6f6f6;padding:1rem;overflow:auto}}</style></head><body>
<h1>{title}</h1>
<table>{rows}</table>
{figures}
<h2>Recipe</h2>
<pre>{recipe}</pre>
</body></html>
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("report", DESCRIPTION, "OUT")
    parser.add_argument("run", metavar="OUT", type=Path, help="folder of the run")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status; prints one line for an error of the user."""
    args = parser().parse_args(argv)
    with errors_of_the_user(parser()):
        print(f"saved {write_report(args.run)}")
    return 0


def write_report(run: Path) -> Path:
    """Write OUT/report.html; returns its path.

    Raises:
        UserError: If the folder is not that of a run with a logged step.
    """
    if not run.is_dir():
        raise UserError(f"OUT must be the folder of a run; there is no folder {run}. Train first.")
    lines = _read(run / "metrics.jsonl")
    logged = [line for line in lines if "loss" in line]
    if not logged:
        raise UserError(f"{run / 'metrics.jsonl'} must hold a logged step, got none. Train for longer.")
    evaluated = [line for line in lines if "eval_loss" in line]
    try:
        figures = _figures(logged, evaluated, _read(run / "heads.jsonl"))
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
        page = PAGE.format(
            title=html.escape(run.resolve().name),
            rows="".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in summary(logged, evaluated)),
            figures="\n".join(f'<img alt="{name}" src="data:image/png;base64,{data}">' for name, data in figures),
            recipe=html.escape(recipe),
        )
        path = run / "report.html"
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"OUT must be readable and writable; got {error}.") from error
    return path


def summary(logged: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name and value of the figures at the top, of the last logged step and the lowest validation loss."""
    last, late = logged[-1], logged[len(logged) // 2 :]
    found = [
        ("step", f"{last['step']:,}"),
        ("tokens", f"{last['tokens']:,}"),
        ("training loss (nats per token)", f"{last['loss']:.4f}"),
        ("seconds of training", f"{last['train_seconds']:,.0f}"),
        ("tokens per second, median of the later half", f"{np.median([x['tokens_per_second'] for x in late]):,.0f}"),
    ]
    if "mfu" in last:
        found.append(("MFU, median of the later half", f"{np.median([x['mfu'] for x in late]):.1%}"))
    if "data_wait" in last:
        found.append(("share of the time waiting for data", f"{np.mean([x['data_wait'] for x in late]):.2%}"))
    if "pruned_fraction" in last:
        found.append(("attention pruned at the end", f"{last['pruned_fraction']:.1%}"))
    if evaluated:
        best = min(evaluated, key=lambda line: line["eval_loss"])
        found.append((f"lowest validation loss (nats per token), step {best['step']:,}", f"{best['eval_loss']:.4f}"))
        found.append(("bits per byte there", f"{best['eval_bits_per_byte']:.4f}"))
    return found


def _figures(logged: list[dict], evaluated: list[dict], heads: list[dict]) -> list[tuple[str, str]]:
    tokens = [line["tokens"] for line in logged]
    per_step = tokens[-1] / logged[-1]["step"]
    x = "training tokens"

    def over_training(key: str, y: str, log: bool = False) -> Callable[[Path], None]:
        chosen = [(line["tokens"], line[key]) for line in logged if key in line]
        return lambda path: plots.curves(path, {key: tuple(zip(*chosen, strict=True))}, x=x, y=y, log=log)

    drawn: dict[str, Callable[[Path], None]] = {
        "loss": lambda path: plots.training_curve(
            path, tokens, [line["loss"] for line in logged], [line["step"] * per_step for line in evaluated],
            [line["eval_loss"] for line in evaluated],
        ),
        "gradient norm": over_training("grad_norm", "gradient norm before clipping", log=True),
        "throughput": over_training("tokens_per_second", "tokens per second"),
    }  # fmt: skip
    if "data_wait" in logged[-1]:
        drawn["waiting for data"] = over_training("data_wait", "share of the time without a batch")
    if heads:
        drawn |= _head_figures(heads, per_step, x)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in drawn.items():
            path = Path(folder) / "figure.png"
            draw(path)
            found.append((name, base64.b64encode(path.read_bytes()).decode()))
    return found


def _head_figures(heads: list[dict], per_step: float, x: str) -> dict[str, Callable[[Path], None]]:
    at = [line["step"] * per_step for line in heads]
    # A head that never forgets has no half-life; the map shows it at the upper end.
    lives = [
        np.array([[np.inf if v is None else v for v in row] for row in line["half_life_tokens"]]) for line in heads
    ]
    layers = range(len(lives[0]))
    finite = np.isfinite(lives[-1])
    top = lives[-1][finite].max() if finite.any() else 1.0
    shown = np.clip(np.where(finite, lives[-1], 10 * top), 1e-3, None)
    medians = np.array([[float(np.median(life[layer])) for life in lives] for layer in layers])
    drawn = {
        "half-life by layer": lambda path: plots.curves(
            path,
            {f"layer {layer}": (at, np.where(np.isinf(medians[layer]), np.nan, medians[layer])) for layer in layers},
            x=x, y="median half-life of the gates (tokens)", log=True,
        ),
        "half-life by head": lambda path: plots.head_map(
            path, shown, label="tokens", title="half-life of the gates at the end", log=True
        ),
    }  # fmt: skip
    if "pruned_share" in heads[-1]:
        shares = np.array([np.mean(line["pruned_share"], axis=1) for line in heads])
        drawn["pruned by layer"] = lambda path: plots.curves(
            path, {f"layer {layer}": (at, shares[:, layer]) for layer in layers}, x=x, y="share of attention pruned"
        )
    return drawn


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break  # the run is writing it
    return lines


if __name__ == "__main__":
    sys.exit(main())
