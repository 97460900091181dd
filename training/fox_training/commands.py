"""What the commands of this package share: how they read arguments, load a model, and say what is wrong."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ["auto", "float32", "bfloat16", "float16"]


def command_parser(module: str, description: str, usage: str = "[options]") -> argparse.ArgumentParser:
    """The parser of `python -m fox_training.MODULE`.

    Args:
        module: Name of the module.
        description: What --help prints, line by line.
        usage: What follows the command.
    """
    return argparse.ArgumentParser(
        prog=f"python -m fox_training.{module}",
        usage=f"%(prog)s {usage}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


@contextlib.contextmanager
def errors_of_the_user(parser: argparse.ArgumentParser):
    """Block whose ValueErrors, and `recipe.UserError` is one, end the command with one line and status 2."""
    try:
        yield
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def add_device_argument(add) -> None:
    """--device; `add` is the `add_argument` of a parser or group."""
    add("--device", help="as torch names it (default: cuda if there is one, else cpu)")


def add_model_arguments(add) -> None:
    """How a model is loaded: --attention, --dtype and --device."""
    add("--attention", metavar="NAME", help="eager, sdpa, flex_attention or fox_acp (default: the model's choice)")
    add("--dtype", default="auto", choices=DTYPES, help="of the weights (default: auto, as saved)")
    add_device_argument(add)


def add_batch_argument(add) -> None:
    """--tokens-per-batch."""
    text = "tokens read at once over all windows; lower it if memory runs out (default: %(default)s)"
    add("--tokens-per-batch", type=int, default=16384, metavar="N", help=text)


def load(
    name: str, *, attention: str | None, dtype: str, device: str | None, log_pruning_tolerance: float | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model of `pretrained.resolve`d MODEL, as the arguments above ask for.

    Raises:
        ValueError: If one of them cannot be loaded as asked.
    """
    from . import pretrained

    tokenizer = pretrained.load_tokenizer(name)
    overrides = {} if log_pruning_tolerance is None else {"log_pruning_tolerance": log_pruning_tolerance}
    return tokenizer, pretrained.load_model(name, attention=attention, dtype=dtype, device=device, **overrides)
