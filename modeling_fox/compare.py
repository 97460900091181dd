# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""Compare our logits with those of the official implementation of FoX or of flash-linear-attention, on a GPU.

Random models, one for each option:  python -m modeling_fox.compare official
A checkpoint of theirs:              python -m modeling_fox.compare official SRC
                                     python -m modeling_fox.compare fla SRC --tokens 4096

Runs where their package can be imported. Both models get the same fp32 weights and the same random tokens, and compute
once in fp32 and once under autocast. In fp32 they must agree to `FP32_TOLERANCE`; under autocast ours may be at most
twice as far from our fp32 logits, computed with dense attention, as theirs is. The exit code is 1 if either fails.
"""

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers.modeling_utils import load_state_dict

from .conversion_fox import OF_THEIR_CODE
from .modeling_fox import FoxForCausalLM

PACKAGES = {
    "official": (
        "forgetting_transformer.model.forgetting_transformer",
        "pip install einops flash-linear-attention git+https://github.com/zhixuan-lin/forgetting-transformer",
    ),
    "fla": ("fla.models.forgetting_transformer", "pip install flash-linear-attention"),
}
FP32_TOLERANCE = 1e-2
"""Of the largest logit: kernels may multiply fp32 in TF32, which keeps 11 of 24 bits."""

SIZES = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_heads": 4, "intermediate_size": 512}
PRO = {"use_output_gate": True, "use_output_norm": True, "qk_norm": True, "use_k_shift": True, "use_v_shift": True}
DECAY = {"fgate_bias_init": True, "decay_time_min": 2.0, "decay_time_max": 64.0}
RANDOM_MODELS = {
    "official": {
        "pro, as published": PRO | {"qk_norm_share_param_across_head": True},
        "pro": PRO,
        "llama": {},
        "key shift": {"use_k_shift": True},
        "value shift": {"use_v_shift": True},
        "qk-norm": {"qk_norm": True},
        "sigmoid gate": {"use_output_gate": True},
        "silu gate": {"use_output_gate": True, "ogate_act": "silu"},
        "output norm": {"use_output_norm": True},
        "no gates, rope": PRO | {"fgate_type": "none", "use_rope": True, "rope_base": 10000.0},
        "learned bias": {"fgate_type": "bias_only"} | DECAY,
        "fixed bias": {"fgate_type": "fixed"} | DECAY,
        "pruning": PRO | {"log_pruning_tolerance": -10.0},
    },
    "fla": {
        "plain": {},
        "grouped": {"num_kv_heads": 2},
        "qk-norm": {"qk_norm": True},
        "output gate": {"use_output_gate": True},
        "all": {"num_kv_heads": 2, "qk_norm": True, "use_output_gate": True},
    },
}


@dataclass
class Comparison:
    """Largest differences of logits, all relative to the largest logit.

    Attributes:
        fp32: Ours to theirs, both in fp32.
        theirs, ours: Each under autocast, to ours in fp32.
    """

    fp32: float
    theirs: float
    ours: float

    @property
    def agrees(self) -> bool:
        return self.fp32 <= FP32_TOLERANCE and self.ours <= 2 * self.theirs + 1e-5


def import_theirs(package: str):
    """The module with their model, or an ImportError that says how to get it."""
    module, command = PACKAGES[package]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} cannot be imported ({error}). Get it in an environment of its own: {command}"
        ) from error


@contextmanager
def untuned():
    """Within, Triton takes the first variant of every kernel. To compile and time all of theirs takes minutes."""
    # Where their package is on Triton it has imported this.
    tuning = sys.modules.get("triton.runtime.autotuner")
    if tuning is None:
        yield
        return
    run = tuning.Autotuner.run

    def run_first(self, *args, **kwargs):
        self.configs = self.configs[:1]
        return run(self, *args, **kwargs)

    tuning.Autotuner.run = run_first
    try:
        yield
    finally:
        tuning.Autotuner.run = run


def build_theirs(package: str, options: dict):
    """Their model with random weights, norms around 1 and the others large enough that every part matters."""
    theirs = import_theirs(package)
    model = theirs.ForgettingTransformerForCausalLM(theirs.ForgettingTransformerConfig(**options))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values + ("norm" in name))
    return model


def load_theirs(package: str, folder: str | Path):
    """Their model with the weights of `folder`, read by PyTorch alone: their loading is not that of Transformers 5."""
    theirs, folder = import_theirs(package), Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in OF_THEIR_CODE}
    model = theirs.ForgettingTransformerForCausalLM(theirs.ForgettingTransformerConfig(**config))
    weights = {}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        weights |= load_state_dict(str(file))
    if config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embeddings.weight"]
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def compare(theirs, folder: str | Path, *, device: str, dtype: torch.dtype, num_tokens: int) -> Comparison:
    """Compare `theirs`, a model of another implementation whose checkpoint is `folder`, with ours of that checkpoint.

    Args:
        device: Where both compute.
        dtype: Of autocast.
        num_tokens: Length of the two random texts.
    """
    ours = FoxForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    theirs = theirs.float().to(device).eval()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, ours.config.vocab_size, (2, num_tokens), generator=generator).to(device)

    def logits(model, autocast=False):
        with torch.autocast(torch.device(device).type, dtype) if autocast else nullcontext():
            return model(tokens, use_cache=False).logits.float()

    backend = ours.config._attn_implementation
    ours.set_attn_implementation("eager")
    exact = logits(ours)
    ours.set_attn_implementation(backend)

    def distance(one, other):
        return float((one - other).abs().max() / exact.abs().max())

    return Comparison(
        fp32=distance(logits(ours), logits(theirs)),
        theirs=distance(logits(theirs, autocast=True), exact),
        ours=distance(logits(ours, autocast=True), exact),
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_fox.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("package", choices=PACKAGES, help="whose implementation")
    parser.add_argument("source", nargs="?", metavar="SRC", help="folder or Hub name of a checkpoint of theirs")
    parser.add_argument("--device", default="cuda", help="where to compute (default: cuda)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of autocast")
    parser.add_argument("--tokens", type=int, default=512, metavar="T", help="length of the texts (default: 512)")
    options = parser.parse_args(arguments)
    settings = {"device": options.device, "dtype": getattr(torch, options.dtype), "num_tokens": options.tokens}
    try:
        import_theirs(options.package)
        write, all_agree = sys.stdout.write, True
        write(f"{'model':24} {'fp32':>9} {'theirs':>9} {'ours':>9}  ({options.dtype}, {options.tokens} tokens)\n")
        sys.stdout.flush()
        with untuned():
            for name, result in comparisons(options.package, options.source, settings):
                verdict = "agrees" if result.agrees else "DIFFERS"
                write(f"{name:24} {result.fp32:9.1e} {result.theirs:9.1e} {result.ours:9.1e}  {verdict}\n")
                # Their kernels are compiled for every model that has new shapes, which takes a while.
                sys.stdout.flush()
                all_agree = all_agree and result.agrees
    except (ImportError, ValueError, OSError) as error:
        parser.error(str(error))
    return 0 if all_agree else 1


def comparisons(package: str, source: str | None, settings: dict) -> Iterator[tuple[str, Comparison]]:
    """Name and comparison of the checkpoint `source`, or of each of `RANDOM_MODELS`, saved and loaded on the way."""
    if source is not None:
        folder = source if Path(source).is_dir() else snapshot_download(source)
        yield source, compare(load_theirs(package, folder), folder, **settings)
        return
    for name, options in RANDOM_MODELS[package].items():
        theirs = build_theirs(package, SIZES | options)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            yield name, compare(theirs, folder, **settings)


if __name__ == "__main__":
    sys.exit(main())
