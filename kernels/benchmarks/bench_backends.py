"""Time a whole FoX (Pro) by attention backend: which one deserves to be the default on this machine?

    python kernels/benchmarks/bench_backends.py                                  GPU if there is one, else CPU
    python kernels/benchmarks/bench_backends.py --device cpu --shapes 8,256 1,2048
    python kernels/benchmarks/bench_backends.py --backends sdpa fox_acp --layers 12 --hidden-size 768

A training step is forward and backward of the mean loss, in bfloat16 autocast on a GPU and float32 on a CPU; a
prefill is forward without gradient. Gate biases are spread over the heads from 1 to 10,000 tokens, as training
spreads them. Prints the median and writes nothing.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from modeling_fox import FoxConfig, FoxForCausalLM, pruning_stats  # noqa: E402

DEFAULT_SHAPES = {"cuda": ["32,512", "8,2048", "2,8192", "1,32768"], "cpu": ["8,256", "2,1024", "1,2048"]}
BACKENDS = ["eager", "sdpa", "flex_attention", "fox_acp", "fox_acp -10"]


def median_ms(function, device, rounds):
    times = []
    for number in range(rounds + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def bench(model, tokens, device, rounds):
    """(training step, prefill) in milliseconds."""

    def forward():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return model(tokens, labels=tokens, use_cache=False).loss

    def step():
        model.zero_grad(set_to_none=True)
        forward().backward()

    def prefill():
        with torch.no_grad():
            forward()

    return median_ms(step, device, rounds), median_ms(prefill, device, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", metavar="B,T", help=f"default: {DEFAULT_SHAPES}")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help='"fox_acp -10" prunes')
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
        batch, length = (int(x) for x in shape.split(","))
        tokens = torch.randint(1024, (batch, length), device=options.device)
        for backend in options.backends:
            torch.manual_seed(0)
            config.log_pruning_tolerance = -10.0 if backend.endswith("-10") else None
            config._attn_implementation = backend.split()[0]
            model = FoxForCausalLM(config).to(options.device)
            try:
                step, prefill = bench(model, tokens, options.device, options.rounds)
            except (torch.OutOfMemoryError, RuntimeError, NotImplementedError) as error:
                print(f"{shape:>10} {backend:16} {type(error).__name__}: {str(error).splitlines()[0][:80]}")
                continue
            pruned = ""
            if config.log_pruning_tolerance is not None:
                with torch.no_grad(), pruning_stats(model) as stats:
                    model(tokens, use_cache=False)
                pruned = f"   pruned {float(stats.pruned_fraction.mean()):.0%}"
            print(
                f"{shape:>10} {backend:16} training step {step:9.2f} ms   prefill {prefill:9.2f} ms{pruned}",
                flush=True,
            )


if __name__ == "__main__":
    main()
