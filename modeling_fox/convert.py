# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints between the official implementation of FoX, flash-linear-attention's, and ours.

To ours:  python -m modeling_fox.convert SRC DST
Back:     python -m modeling_fox.convert SRC DST --to official
          python -m modeling_fox.convert SRC DST --to fla
A Llama, Mistral or Qwen3 with open forget gates, to be fine-tuned into forgetting:
          python -m modeling_fox.convert SRC DST --add-gates

SRC is a folder or the name of a model on the Hub, in any of the three formats; which one is found out. DST gets
config.json, safetensors and the tokenizer if SRC has one. Weights keep their bits.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import cached_file

from . import FoxForCausalLM, adoption
from .conversion_fox import FLA, OFFICIAL, foreign_config_dict, left_out, transforms_to
from .hub_fox import add_code

FORMATS = {"fox": None, "official": OFFICIAL, "fla": FLA}


def convert(
    source: str,
    destination: str | Path,
    to: str = "fox",
    max_shard_size: str = "5GB",
    add_gates: bool = False,
    decay_time: float = adoption.DECAY_TIME,
    with_code: bool = False,
) -> list[str]:
    """Write the causal language model `source` to the folder `destination`, in the format `to`.

    Args:
        source: Folder or Hub name of a checkpoint of ours, of the official implementation or of
            flash-linear-attention; with `add_gates` of a Llama, Mistral or Qwen3.
        to: `"fox"`, `"official"` or `"fla"`.
        max_shard_size: Largest file of weights, as for `save_pretrained`.
        add_gates: Whether to add open gates to a Llama, Mistral or Qwen3, see `adoption`.
        decay_time: How open those are: tokens after which one has forgotten all but 1/e.
        with_code: Whether our code goes beside the weights, see `hub_fox`.

    Returns:
        Names of the fields of our configuration that `to` has no place for and that change no output.

    Raises:
        ValueError: If `source` is no causal language model, or `to` cannot represent it.
    """
    destination = Path(destination)
    if destination.exists() and any(destination.iterdir()):
        raise ValueError(f"`destination` must be a new or empty folder; got {destination}. Choose another.")
    if with_code and to != "fox":
        raise ValueError(f"`with_code` must be False with `to={to!r}`: that code is not ours. Leave --with-code out.")
    model = adoption.add_gates(source, decay_time) if add_gates else _load_language_model(source)
    target = FORMATS[to]
    if target is None:
        model.save_pretrained(destination, max_shard_size=max_shard_size)
    else:
        _save_theirs(model, target, destination, max_shard_size)
    if cached_file(source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is not None:
        # With our config, or it would ask to run the code that their config.json points to.
        AutoTokenizer.from_pretrained(source, config=model.config).save_pretrained(destination)
    if with_code:
        add_code(destination)
    return [] if target is None else left_out(model.config, target)


def _load_language_model(source: str) -> FoxForCausalLM:
    model, info = FoxForCausalLM.from_pretrained(source, output_loading_info=True)
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:4])
        raise ValueError(f"`source` must be a causal language model; got {source}, which lacks {some}.")
    return model


def _save_theirs(model, target: str, destination: Path, max_shard_size: str) -> None:
    # First, as it says what cannot be written.
    config = foreign_config_dict(model.config, target)
    model._weight_conversions = transforms_to(target, model.config)
    # Our gate projection stays in fp32 beside fp16 weights; theirs has the dtype of the others.
    weights = {name: weight.to(model.dtype) for name, weight in model.state_dict().items()}
    model.save_pretrained(destination, state_dict=weights, max_shard_size=max_shard_size)
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_fox.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="folder or Hub name of the checkpoint to read")
    parser.add_argument("destination", metavar="DST", help="new folder to write")
    parser.add_argument("--to", choices=FORMATS, default="fox", help="format of DST (default: fox)")
    parser.add_argument("--add-gates", action="store_true", help="SRC is a Llama, Mistral or Qwen3: add open gates")
    parser.add_argument(
        "--decay-time",
        type=float,
        default=adoption.DECAY_TIME,
        metavar="TOKENS",
        help="with --add-gates: tokens after which an open gate has forgotten all but 1/e (default: %(default).0e)",
    )
    parser.add_argument("--with-code", action="store_true", help="our code beside the weights, for trust_remote_code")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (default: 5GB)")
    options = parser.parse_args(arguments)
    try:
        dropped = convert(**vars(options))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if dropped:
        sys.stderr.write(f"no place for {', '.join(dropped)}: they change no output and were left out\n")


if __name__ == "__main__":
    main()
