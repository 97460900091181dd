"""The console script `fox`: one name in front of the commands of this package."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "train": "train from a recipe, or go on with a run that was interrupted",
    "evaluate": "perplexity, bits per byte, loss over context, pruned share and half-life of each head",
    "prepare": "tokenise the data of a recipe into shards, once, on all cores",
    "data_speed": "how fast the data of a recipe comes, without a model",
    "report": "one HTML page on a run: loss, speed, pruned share, half-lives",
    "generate": "continue a text",
    "card": "write the model card of a run",
    "publish": "put a trained model on the Hub",
    "verify": "measure a shared model again and hold it against its card",
    "throughput": "tokens per second and MFU of training steps, FoX beside a Transformer",
    "demo": "the whole path on a small text, in minutes on a CPU",
}


def usage() -> str:
    """What `fox --help` prints."""
    return "\n".join(
        [
            "The Forgetting Transformer from the command line: fox COMMAND [arguments]",
            "",
            "fox demo",
            "fox train --recipe training/recipes/demo.yaml",
            "fox evaluate runs/demo/model --ngrams",
            "",
            *(f"  {name:<11}{text}" for name, text in COMMANDS.items()),
            "",
            "`fox COMMAND --help` explains a command. Each is also a module: `python -m fox_training.train` and, over",
            "several GPUs, `accelerate launch -m fox_training.train`.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Pass the arguments on, unchanged. Returns the exit status of the command.

    Args:
        argv: Arguments without the program's name; None takes them from the command line.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *arguments = argv
    if name not in COMMANDS:
        print(
            f"fox: error: COMMAND must be one of {', '.join(COMMANDS)}; got {name}. Try fox --help.", file=sys.stderr
        )
        return 2
    # Only the chosen command is imported: torch alone takes seconds.
    return import_module(f"fox_training.{name}").main(arguments)


if __name__ == "__main__":
    sys.exit(main())
