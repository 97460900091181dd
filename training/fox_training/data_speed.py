"""How fast the data of a recipe comes, without a model: `python -m fox_training.data_speed`."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from .commands import command_parser, errors_of_the_user

DESCRIPTION = """\
Tokens per second of the data pipeline alone: reading, packing, positions, batches in memory, as training gets them.

A recipe:               python -m fox_training.data_speed --recipe training/recipes/demo.yaml
With two processes:     python -m fox_training.data_speed --recipe R --data.workers 2
Beside a training run:  python -m fox_training.data_speed --recipe runs/demo/recipe.yaml --against runs/demo

The first steps, which find files cold, are not counted. Text that is read while training (data.streaming) is tokenised
here as well; all else is tokenised or mapped before, as in training. Dotted options change fields of the recipe.
"""


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are written nowhere else."""
    parser = command_parser("data_speed", DESCRIPTION, "--recipe FILE [options] [--section.field VALUE ...]")
    add = parser.add_argument
    add("--recipe", type=Path, required=True, metavar="FILE", help="recipe whose data is read")
    add("--seconds", type=float, default=5.0, metavar="S", help="how long to measure (default: %(default)s)")
    add("--against", type=Path, metavar="OUT", help="a run: print the ratio to the tokens/s that it trained with")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status; prints one line for an error of the user."""
    from .recipe import load_recipe

    args, overrides = parser().parse_known_args(argv)
    with errors_of_the_user(parser()):
        if not 0 < args.seconds < float("inf"):
            raise ValueError(f"--seconds must be above 0, got {args.seconds}. 5, the default, suits most data.")
        recipe = load_recipe(args.recipe, overrides)
        figures = measure(recipe, args.seconds)
        print(
            f"data      {figures['tokens_per_second']:>14,.0f} tokens/s, {figures['workers'] or 'a thread'} preparing"
        )
        if args.against is not None:
            trained = training_speed(args.against)
            print(f"training  {trained:>14,.0f} tokens/s, {args.against}")
            print(f"ratio     {figures['tokens_per_second'] / trained:>14.1f}")
    return 0


def measure(recipe: Any, seconds: float, warm_up: int = 8) -> dict[str, Any]:
    """Steps per second of `Batches` on the host, in tokens.

    Args:
        recipe: See `recipe.Recipe`; one process is measured.
        seconds: How long, at least one step.
        warm_up: Steps that are not counted.
    """
    import torch

    from .batches import Batches, plan_batches
    from .pipeline import load_data

    _, rows, _, _ = load_data(recipe)
    batches = Batches(rows, plan_batches(recipe.data, 0, 1), torch.device("cpu"), workers=recipe.data.workers)
    try:
        for _ in itertools.islice(batches, warm_up):
            pass
        began, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - began < seconds:
            next(batches)
            steps += 1
        spent = time.perf_counter() - began
    finally:
        batches.close()
    tokens = steps * recipe.data.batch_size * recipe.data.sequence_length
    return {"tokens_per_second": tokens / spent, "steps": steps, "seconds": spent, "workers": recipe.data.workers}


def training_speed(out: Path) -> float:
    """Median tokens per second of the later half of a run's logged steps.

    Raises:
        UserError: If the folder holds no log of a run.
    """
    from .recipe import UserError

    try:
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--against must be the folder of a run; {out / 'metrics.jsonl'}: {error}") from error
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    if not speeds:
        raise UserError(f"--against {out} holds no logged step. Train for longer.")
    return statistics.median(speeds[len(speeds) // 2 :])


if __name__ == "__main__":
    sys.exit(main())
