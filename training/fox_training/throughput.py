"""Training throughput of FoX beside a Transformer on SDPA: `python -m fox_training.throughput --size 125M`."""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import command_parser, errors_of_the_user

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DESCRIPTION = """\
Tokens per second and MFU of whole training steps (forward, backward, clipping, AdamW), FoX (Pro) and the Transformer
(Pro) of the same shape side by side: the same model with every gate open and RoPE, on PyTorch's SDPA.

The published sizes:  python -m fox_training.throughput --size 125M 760M --json throughput.json
A look at the CPU:    python -m fox_training.throughput --size tiny --tokens 512 --seconds 2 --compile none
Where time goes:      python -m fox_training.throughput --size 125M --profile

The arms take turns, so that a machine that slows down does so for all. `fox-init` has the gates of a new model,
`fox-pruned` gates whose half-lives are spaced evenly in their logarithm over the heads, stretched until pruning skips
--pruned-share of the visible pairs; `fox-dense` the same gates without pruning. Weights are random and fp32, autocast
to bf16 as in training. The first GPU kernel of SDPA, cuDNN or FlashAttention, is the one that is faster here.
"""

# hidden_size, layers, heads: the published shapes. "tiny" is for a look at the command itself.
SIZES = {"125M": (768, 12, 12), "360M": (1024, 24, 16), "760M": (1536, 24, 24), "tiny": (64, 2, 4)}
ARMS = ("fox-init", "fox-pruned", "fox-dense", "transformer")
VOCABULARY = {"tiny": 512}
# The published 50,257 filled up to a multiple of 64, as a recipe should: without it the three products of the output
# layer took 31 of the 104 ms of a step of the 125M Transformer on an H100, in kernels for rows that are not aligned.
PUBLISHED_VOCABULARY = 50_304
TOLERANCE = -10.0
SHARE_TOLERANCE = 0.005


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are written nowhere else."""
    parser = command_parser("throughput", DESCRIPTION)
    add = parser.add_argument
    add("--size", nargs="+", choices=SIZES, default=["125M"], help="published shapes (default: 125M)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what is measured (default: all)")
    add("--tokens", type=int, default=16384, metavar="T", help="tokens in a row (default: %(default)s)")
    add("--rows", nargs="+", type=int, default=[1], metavar="B", help=ROWS_HELP)
    add("--pruned-share", type=float, default=0.7, metavar="S", help="of fox-pruned (default: %(default)s)")
    add("--pruning-rule", default="tight", choices=["tight", "paper"], help="(default: %(default)s)")
    add("--compile", default="layers", choices=["layers", "model", "none"], help=COMPILE_HELP)
    add("--seconds", type=float, default=8.0, help="timed seconds of each arm (default: %(default)s)")
    add("--checkpointing", action="store_true", help="recompute the activations of each layer")
    add("--profile", action="store_true", help="also list the GPU kernels of one step of each arm")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


ROWS_HELP = "rows in a step, one number for all sizes or one for each (default: 1)"
COMPILE_HELP = (
    "torch.compile each layer, which is compiled once for all, and the loss, as run.compile does; the whole model; or "
    "nothing (default: %(default)s)"
)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status; prints one line for an error of the user."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    with errors_of_the_user(parser()):
        measure_all(args, argv)
    return 0


def measure_all(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Measure every size, print a table after each, and write the JSON. Returns what it holds.

    Raises:
        ValueError: If an argument cannot be followed.
    """
    import torch

    from . import provenance
    from .flops import FORMULA

    if not 0 < args.pruned_share < 1:
        raise ValueError(f"--pruned-share must be in (0, 1), got {args.pruned_share}: a share, no percentage.")
    if args.tokens < 2:
        raise ValueError(f"--tokens must be at least 2, got {args.tokens}: each but the first is predicted.")
    if min(args.rows) < 1 or len(args.rows) not in (1, len(args.size)):
        raise ValueError(f"--rows must be one number from 1 on, or one for each of {args.size}; got {args.rows}.")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {"flops": FORMULA, "sizes": {}}
    report |= provenance.describe(provenance.command_line("fox_training.throughput", argv))
    every_rows = args.rows * len(args.size) if len(args.rows) == 1 else args.rows
    for size, rows in zip(args.size, every_rows, strict=True):
        own = argparse.Namespace(**vars(args) | {"rows": rows})
        report["sizes"][size] = {"rows": rows} | measure(size, own, device)
        print(table(size, own, report["sizes"][size]), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
        # The next size is another program: guesses on what varies would make its kernels general, and slower.
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report


def measure(size: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Figures of all arms of one size: tokens per second, MFU, pruned share, peak memory, the faster SDPA kernel."""
    import torch

    from .flops import flops_per_token, peak_flops

    kernel = choose_sdpa(size, args, device) if "transformer" in args.arms else None
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    arms: dict[str, dict[str, Any]] = {}
    steps = {}
    for name in args.arms:
        started = time.perf_counter()
        model, share = build(size, name, args, device)
        flops = flops_per_token(model, args.tokens)
        step = Step(model, args, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = step()  # compiles
        for _ in range(2):
            step()
        arms[name] = {"pruned_share": share, "loss": first, "setup_seconds": time.perf_counter() - started}
        if device.type == "cuda":
            arms[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        step.rest()
        steps[name] = (step, flops)
    times = take_turns({name: step for name, (step, _) in steps.items()}, args.seconds)
    for name, seconds in times.items():
        rate = args.rows * args.tokens / statistics.median(seconds)
        mfu = rate * steps[name][1] / peak if peak else None
        arms[name] |= {"tokens_per_second": rate, "mfu": mfu, "step_seconds": seconds}
    if args.profile:
        for name, (step, _) in steps.items():
            print(f"\n{size} {name}\n{profile(step)}", flush=True)
    return {"sdpa_kernel": kernel, "arms": arms}


def build(size: str, arm: str, args: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, float | None]:
    """The model of an arm on its device, and the share of the visible pairs that pruning skips."""
    from modeling_fox import FoxConfig, FoxForCausalLM

    hidden, layers, heads = SIZES[size]
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape["vocab_size"] = VOCABULARY.get(size, PUBLISHED_VOCABULARY)
    if arm == "transformer":
        config = FoxConfig.pro(**shape, fgate_type="none", use_rope=True)
        config._attn_implementation = "sdpa"
    else:
        tolerance = None if arm == "fox-dense" else TOLERANCE
        config = FoxConfig.pro(**shape, log_pruning_tolerance=tolerance, pruning_rule=args.pruning_rule)
        config._attn_implementation = "fox_acp"
    with device:
        model = FoxForCausalLM(config)
    model.train()
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    share = None
    if arm in ("fox-init", "fox-pruned"):
        share = measured_share(model, args, device)
    if arm == "fox-pruned":
        share = stretch_half_lives(model, args, device)
    if arm == "fox-dense":
        set_half_lives(model, args.tokens)
    return model, share


def set_half_lives(model: PreTrainedModel, longest: float) -> None:
    """Give the heads of every layer half-lives from 1 to `longest` tokens, evenly spaced in their logarithm."""
    import torch

    heads = model.config.num_attention_heads
    lives = torch.logspace(0.0, math.log10(longest), heads, dtype=torch.float64)
    rate = math.log(2) / lives  # nats per token; sigmoid(b) = exp(-rate) for b = -log(exp(rate) - 1)
    bias = -torch.expm1(rate).log()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.fgate_proj.bias.copy_(bias)


def measured_share(model: PreTrainedModel, args: argparse.Namespace, device: torch.device) -> float:
    """Share of the visible pairs that pruning skips on random tokens, mean over layers and heads."""
    import torch

    from .models import pruned_share

    tokens = random_tokens(model.config.vocab_size, 1, args.tokens, device)
    with torch.autocast(device.type, torch.bfloat16):
        return pruned_share(model, {"input_ids": tokens, "position_ids": None})


def stretch_half_lives(model: PreTrainedModel, args: argparse.Namespace, device: torch.device) -> float:
    """Bisect for the longest half-life at which pruning skips `args.pruned_share`; returns the share reached."""
    low, high = 0.0, math.log(1000.0 * args.tokens)
    for _ in range(16):
        middle = (low + high) / 2
        set_half_lives(model, math.exp(middle))
        share = measured_share(model, args, device)
        if abs(share - args.pruned_share) <= SHARE_TOLERANCE:
            return share
        low, high = (middle, high) if share > args.pruned_share else (low, middle)
    raise ValueError(
        f"--pruned-share {args.pruned_share} cannot be reached with {args.tokens} tokens: the nearest is {share:.3f}. "
        "Take longer rows, or the share of them that decay leaves out."
    )


class Step:
    """One optimizer step on random tokens; `rest` frees what only a step needs.

    Args:
        model: The model.
        args: The command line.
        device: Of the model.
    """

    def __init__(self, model: PreTrainedModel, args: argparse.Namespace, device: torch.device):
        import torch

        self.device = device
        self.model = model
        self.forward = compile_for_training(model, args.compile)
        self.tokens = random_tokens(model.config.vocab_size, args.rows, args.tokens, device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.labels = torch.tensor(float(args.rows * (args.tokens - 1)), device=device)

    def __call__(self) -> float:
        """Run it and wait for the device. Returns the loss in nats per token."""
        loss = self.run()
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return loss.item()

    def run(self) -> torch.Tensor:
        """Queue it on the device."""
        import torch

        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.forward(
                input_ids=self.tokens, labels=self.tokens, use_cache=False, num_items_in_batch=self.labels
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def rest(self) -> None:
        """Give cached memory back, for the next model."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


def compile_for_training(model: PreTrainedModel, what: str):
    """What is called in place of the model: see `COMPILE_HELP`."""
    import torch

    if what == "model":
        return torch.compile(model)
    if what == "layers":
        from .parallel import compile_layers

        compile_layers(model)
    return model


def random_tokens(vocab_size: int, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """`(rows, length)` int64, the same on every call."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (rows, length), generator=generator).to(device)


def take_turns(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Seconds of single steps of each arm, in rounds of a few steps, until each arm has had its time."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    while any(sum(found) < seconds for found in times.values()):
        for name, step in steps.items():
            for number in range(4):
                begin = time.perf_counter()
                step()
                if number:  # the first one after another model finds cold caches
                    times[name].append(time.perf_counter() - begin)
    return times


def choose_sdpa(size: str, args: argparse.Namespace, device: torch.device) -> str | None:
    """Switch SDPA to the faster of cuDNN and FlashAttention, forward and backward, at the shape of the model."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if device.type != "cuda":
        return None
    hidden, _, heads = SIZES[size]
    shape = (args.rows, args.tokens, heads, hidden // heads)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    found = {}
    for name in ("cudnn", "flash"):
        use_sdpa(name)
        try:
            for _ in range(3):
                scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(5):
                scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
            torch.cuda.synchronize()
            found[name] = (time.perf_counter() - begin) / 5
        except RuntimeError:  # not in this build, or not for this shape
            continue
    if not found:
        raise ValueError("--arms transformer needs cuDNN or FlashAttention in PyTorch's SDPA; this build has neither.")
    best = min(found, key=found.get)
    use_sdpa(best)
    print(f"{size}: SDPA forward and backward " + ", ".join(f"{k} {1e3 * v:.2f} ms" for k, v in found.items()))
    return best


def use_sdpa(name: str) -> None:
    """Leave PyTorch no other kernel than `cudnn` or `flash`."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
    torch.backends.cuda.enable_flash_sdp(name == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)


def profile(step: Step) -> str:
    """The 25 kernels of a step that take most time, and the sum of all."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    on_gpu = step.device.type == "cuda"
    with record(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        step()
    events = [e for e in found.key_averages() if not on_gpu or e.self_device_time_total > 0]

    def micros(event) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events.sort(key=micros, reverse=True)
    lines = [f"{micros(e) / 1e3:9.3f} ms {e.count:5d} x  {e.key[:110]}" for e in events[:25]]
    return "\n".join([*lines, f"{sum(map(micros, events)) / 1e3:9.3f} ms in all"])


def table(size: str, args: argparse.Namespace, figures: dict[str, Any]) -> str:
    """One line an arm, and what each is of the Transformer's."""
    arms = figures["arms"]
    base = arms.get("transformer", {}).get("tokens_per_second")
    kernel = figures["sdpa_kernel"] or "as it is"
    lines = [
        f"{size}, {args.rows} x {args.tokens} tokens, compile {args.compile}, SDPA {kernel}",
        "arm           tokens/s     MFU  of Transformer  pruned  GiB    set-up",
    ]
    for name, arm in arms.items():
        mfu = "      -" if arm["mfu"] is None else f"{arm['mfu']:7.1%}"
        ratio = "             -" if not base else f"{arm['tokens_per_second'] / base:14.3f}"
        share = "      -" if arm["pruned_share"] is None else f"{arm['pruned_share']:7.1%}"
        memory = f"{arm['peak_gib']:5.1f}" if "peak_gib" in arm else "    -"
        rate = f"{arm['tokens_per_second']:10,.0f}"
        lines.append(f"{name:<12}{rate}  {mfu}  {ratio}  {share}  {memory}  {arm['setup_seconds']:6.1f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
