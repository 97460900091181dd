"""Time a whole FoX (Pro) by attention backend: which one deserves to be the default on this machine?

    python kernels/benchmarks/bench_backends.py                                  GPU if there is one, else CPU
    python kernels/benchmarks/bench_backends.py --device cpu --shapes 8,256 1,2048
    python kernels/benchmarks/bench_backends.py --backends sdpa fox_acp --layers 12 --hidden-size 768

A training step is forward and backward of the mean loss, in bfloat16 autocast on a GPU and float32 on a CPU; a
prefill is forward without gradient. Gate biases are spread over the heads from 1 to 10,000 tokens, as training
spreads them. Prints the median of interleaved rounds, on a GPU also the time spent in its kernels, and writes
nothing.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from modeling_fox import FoxConfig, FoxForCausalLM, pruning_stats  # noqa: E402

DEFAULT_SHAPES = {"cuda": ["32,512", "8,2048", "2,8192", "1,32768"], "cpu": ["8,256", "2,1024", "1,2048"]}
BACKENDS = ["eager", "sdpa", "flex_attention", "fox_acp", "fox_acp -10 paper", "fox_acp -10 tight"]


def timed_ms(function, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def gpu_ms(function):
    """Time that the GPU spends in kernels: what is left when the host is fast enough, or replays a graph."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            function()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in profile.key_averages()) / 3e3


def passes(model, tokens, device):
    """(training step, prefill) as functions of no arguments."""

    def forward():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return model(tokens, labels=tokens, use_cache=False).loss

    def step():
        model.zero_grad(set_to_none=True)
        forward().backward()

    def prefill():
        with torch.no_grad():
            forward()

    return step, prefill


def build(backend, config, device):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.log_pruning_tolerance = None
    name, *options = backend.split()
    if options:
        config.log_pruning_tolerance, config.pruning_rule = float(options[0]), options[1]
    config._attn_implementation = name
    return FoxForCausalLM(config).to(device)


def bench(shape, backends, config, options):
    """Rounds go through all backends, so that what slows the machine slows them alike."""
    batch, length = (int(x) for x in shape.split(","))
    tokens = torch.randint(1024, (batch, length), device=options.device)
    runs, pruned = {}, {}
    for backend in backends:
        model = build(backend, config, options.device)
        try:
            step, prefill = passes(model, tokens, options.device)
            for _ in range(2):
                step(), prefill()
        except (torch.OutOfMemoryError, RuntimeError, NotImplementedError) as error:
            print(f"{shape:>10} {backend:18} {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            continue
        runs[backend] = (step, prefill)
        if model.config.log_pruning_tolerance is not None:
            with torch.no_grad(), pruning_stats(model) as stats:
                model(tokens, use_cache=False)
            pruned[backend] = f"   pruned {float(stats.pruned_fraction.mean()):.0%}"
    times = {backend: ([], []) for backend in runs}
    for _ in range(options.rounds):
        for backend, functions in runs.items():
            for function, into in zip(functions, times[backend], strict=True):
                into.append(timed_ms(function, options.device))
    for backend, functions in runs.items():
        parts = []
        for name, function, into in zip(("training step", "prefill"), functions, times[backend], strict=True):
            gpu = f", GPU {gpu_ms(function):8.2f}" if options.device == "cuda" else ""
            parts.append(f"{name} {statistics.median(into):9.2f} ms{gpu}")
        print(f"{shape:>10} {backend:18} {'   '.join(parts)}{pruned.get(backend, '')}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", metavar="B,T", help=f"default: {DEFAULT_SHAPES}")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help='"fox_acp -10 paper" prunes')
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=768, help="64 channels a head; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args()
    config = FoxConfig.pro(
        vocab_size=1024, hidden_size=options.hidden_size, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64, fgate_decay_time_min=1.0, fgate_decay_time_max=1e4,
    )  # fmt: skip
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    print(f"{name}, torch {torch.__version__}, {options.layers} layers, hidden size {options.hidden_size}")
    for shape in options.shapes or DEFAULT_SHAPES[options.device]:
        bench(shape, options.backends, config, options)


if __name__ == "__main__":
    main()
