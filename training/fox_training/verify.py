"""Measure a shared model again and hold it against its card: `python -m fox_training.verify MODEL`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import documents as sources
from .commands import add_batch_argument, add_device_argument, command_parser, errors_of_the_user, load

DESCRIPTION = """\
Load a model as anybody would, evaluate it on the text that its card names, and compare with the card's own figures.

From the Hub:       python -m fox_training.verify user/fox-demo
A folder of it:     python -m fox_training.verify runs/demo/model
Text of your own:   python -m fox_training.verify user/fox-demo --data the_same_text.jsonl

Needs README.md, evaluation.json and recipe.yaml beside the weights, as `fox publish` puts them there. The text must be
the same to the byte: its SHA-256 is in evaluation.json. Ends with status 1 if a figure differs by more than rounding:
1e-4 of itself for float32, 2e-3 for 16-bit weights or another kind of device.
"""
FILES = ["README.md", "config.json", "*.safetensors", "*.json", "recipe.yaml"]
METRICS = ("bits_per_byte", "perplexity", "next_token_accuracy")
SAME, ROUNDED = 1e-4, 2e-3


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are written nowhere else."""
    parser = command_parser("verify", DESCRIPTION, "MODEL [options]")
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a model with its card, or Hub id")
    add("--data", metavar="SOURCE", help="the held-out text (default: what the recipe or the card names)")
    add("--column", default="text", help="field that holds the text (default: %(default)s)")
    add_device_argument(add)
    add_batch_argument(add)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 0 if the figures are the card's, 1 if not; prints one line for an error of the user."""
    args = parser().parse_args(argv)
    with errors_of_the_user(parser()):
        rows = verify(args)
    for name, card, measured, agrees in rows:
        print(f"{name:<22} card {card:12.6f}   measured {measured:12.6f}   {'ok' if agrees else 'DIFFERS'}")
    return 0 if all(agrees for *_, agrees in rows) else 1


def verify(args: argparse.Namespace) -> list[tuple[str, float, float, bool]]:
    """Name, figure of the card, figure measured now, and whether they agree.

    Raises:
        ValueError: If something needed is missing, or the text is not the card's.
    """
    from . import evaluate, provenance, scoring

    folder = fetch(args.model)
    known = read_evaluation(folder)
    card = read_card(folder)
    held_out = find_text(args, folder, known["data"])
    tokenizer, model = load(
        str(folder), attention=known["attention"], dtype=known["dtype"], device=args.device,
        log_pruning_tolerance=known.get("log_pruning_tolerance"),
    )  # fmt: skip
    if provenance.weights_sha256(str(folder)) != known["weights_sha256"]:
        raise ValueError(f"the weights of {args.model} are not those that evaluation.json was measured with.")
    token_ids, _ = evaluate.encode(tokenizer, held_out.texts)
    windows = known["windows"]
    scores = scoring.score(model, token_ids, **windows, tokens_per_batch=args.tokens_per_batch)
    measured = evaluate.results(scores, held_out)
    same_kind = model.device.type == known["device"].partition(":")[0] and known["dtype"] == "float32"
    allowed = SAME if same_kind else ROUNDED
    rows = []
    for name in METRICS:
        figure = card.get(name, known["results"][name])
        agrees = abs(measured[name] - figure) <= allowed * abs(figure) and figure == known["results"][name]
        rows.append((name, figure, measured[name], agrees))
    return rows


def fetch(model: str) -> Path:
    """The folder of a model with its card; downloads it if it is on the Hub.

    Raises:
        ValueError: If there is none.
    """
    from . import pretrained

    name = pretrained.resolve(model)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{name} could not be downloaded: {str(error).strip().splitlines()[0]}") from error


def read_evaluation(folder: Path) -> dict[str, Any]:
    """evaluation.json beside the weights.

    Raises:
        ValueError: If it is missing or broken.
    """
    path = folder / "evaluation.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MODEL must have evaluation.json beside its weights; {path} cannot be read ({error}). It comes with "
            "`fox evaluate` and `fox card`."
        ) from error


def read_card(folder: Path) -> dict[str, float]:
    """The results in the metadata of README.md, by metric.

    Raises:
        ValueError: If there is no card, or it states no result.
    """
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        raise ValueError(f"MODEL must have a card; there is no {path}. Write it with `fox card`.")
    results = ModelCard.load(path).data.eval_results or []
    if not results:
        raise ValueError(f"the card {path} states no result to compare with. Run `fox evaluate`, then `fox card`.")
    return {result.metric_type: float(result.metric_value) for result in results}


def find_text(args: argparse.Namespace, folder: Path, known: dict[str, Any]) -> sources.Documents:
    """The text that the card's figures are of.

    Raises:
        ValueError: If it cannot be found, or is another.
    """
    if args.data is not None:
        found = sources.from_source(args.data, column=args.column)
    elif known["source"].startswith("validation documents of ") and (folder / "recipe.yaml").is_file():
        found = sources.of_run(folder, "validation")
    else:
        found = sources.from_source(known["source"].partition(" (")[0], column=args.column)
    found = sources.Documents(found.texts[: known["documents"]], found.source)
    if found.describe()["sha256"] != known["sha256"]:
        raise ValueError(
            f"{found.source} is not the text of the card: {found.num_bytes} bytes in {len(found.texts)} documents; "
            f"the card has {known['bytes']} in {known['documents']}, or other words. Pass the same text as --data."
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
