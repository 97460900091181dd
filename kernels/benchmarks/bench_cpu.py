"""Time forgetting attention on a CPU beside PyTorch's dense attention with the decay as a materialised bias.

    python kernels/benchmarks/bench_cpu.py                                   1 x 8 x 4096 x 64, some minutes
    python kernels/benchmarks/bench_cpu.py --shapes 1,8,2048,64 --rounds 5
    python kernels/benchmarks/bench_cpu.py --backends blockwise blockwise-pruned --shapes 1,8,16384,64

The workload is that of bench_forgetting_attention.py in float32: heads that forget from 1 to 1e-4 nats a token. The
loss is a fixed random projection of the output, and q, k, v and the gates get gradients in a training step.

Every measurement is a process of its own and the contenders take turns, so that none inherits memory or a busy
moment. A call on 256 tokens comes first and is not counted. Printed are the least of all rounds of the wall time, of
the CPU time of all threads, and of the peak of the resident memory above that with only the inputs in it; the ratios
are those of the baseline `sdpa-bias` to a contender. Threads that wait for each other count as busy: on a machine
with other jobs compare with `--threads 1`. Writes nothing.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))
from fox_kernels import forgetting_attention  # noqa: E402

BASELINE = "sdpa-bias"
PASSES = ["step", "prefill"]
WARM_UP_TOKENS = 256


def workload(batch, heads, length, head_dim):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, length, head_dim)
    q, k, v, direction = (torch.randn(shape, generator=generator) for _ in range(4))
    q, k = (F.rms_norm(x, (head_dim,)) for x in (q, k))
    decay = 10.0 ** (-4.0 * torch.arange(heads) / max(heads - 1, 1))
    gates = -decay[:, None] * torch.empty(shape[:3]).exponential_(generator=generator)
    return (q, k, v, gates), direction


def sdpa_bias(q, k, v, log_fgate):
    """What one writes without this package. The bias is built in place: a clearer version takes more memory."""
    running = log_fgate.cumsum(dim=-1)
    bias = running[..., :, None] - running[..., None, :]
    future = torch.ones(bias.shape[-2:], dtype=torch.bool).triu_(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill_(future, float("-inf")))


def blockwise_pruned(q, k, v, log_fgate):
    # QK-norm with weight 1: |q . k| / sqrt(D) <= sqrt(D).
    bound = 1.001 * q.shape[-1] ** 0.5
    return forgetting_attention(q, k, v, log_fgate, log_pruning_tolerance=-10.0, logit_bound=bound)


BACKENDS = {BASELINE: sdpa_bias, "blockwise": forgetting_attention, "blockwise-pruned": blockwise_pruned}


def peak_mib():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def run(function, inputs, direction, with_gradient):
    if not with_gradient:
        with torch.no_grad():
            return function(*inputs)
    leaves = [x.requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, direction)


def measure(backend, kind, shape):
    """Seconds by the wall clock, seconds of CPU and MiB above the inputs, in this process."""
    function, with_gradient = BACKENDS[backend], kind == "step"
    run(function, *workload(*shape[:2], WARM_UP_TOKENS, shape[3]), with_gradient)
    inputs, direction = workload(*shape)
    peak, wall, cpu = peak_mib(), time.perf_counter(), time.process_time()
    run(function, inputs, direction, with_gradient)
    return time.perf_counter() - wall, time.process_time() - cpu, peak_mib() - peak


def measure_apart(backend, kind, shape, threads):
    """`measure` in a new process."""
    sizes = ",".join(map(str, shape))
    command = [sys.executable, __file__, "--worker", backend, kind, "--shapes", sizes, "--threads", str(threads)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def compare(backends, kind, shape, threads, rounds):
    """Print one table: a row for each backend."""
    samples = {backend: [] for backend in backends}
    for _ in range(rounds):
        for backend in backends:
            samples[backend].append(measure_apart(backend, kind, shape, threads))
    print(f"\n{' x '.join(map(str, shape))}, {'forward + backward' if kind == 'step' else 'forward without gradient'}")
    print(f"{'':18}{'wall s':>9}{'CPU s':>9}{'MiB':>9}   baseline / this: wall, CPU, memory")
    best = {name: [min(column) for column in zip(*rows, strict=True)] for name, rows in samples.items()}
    for name, figures in best.items():
        ratios = ""
        if BASELINE in best and name != BASELINE:
            ratios = "   " + ", ".join(f"{a / b:.2f}" for a, b in zip(best[BASELINE], figures, strict=True))
        wall, cpu, mib = figures
        print(f"{name:18}{wall:9.3f}{cpu:9.3f}{mib:9.0f}{ratios}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["1,8,4096,64"], metavar="B,H,T,D",
        help="batch, heads, length, head width; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument(
        "--passes", nargs="+", choices=PASSES, default=PASSES, help="step: forward + backward; prefill: no gradient"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each figure; default: %(default)s")
    parser.add_argument("--worker", nargs=2, metavar=("BACKEND", "PASS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = [tuple(int(size) for size in shape.split(",")) for shape in options.shapes]
    if options.worker:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(*options.worker, shapes[0])))
        return
    print(f"{options.threads} thread(s), torch {torch.__version__}, float32, best of {options.rounds} processes")
    for shape in shapes:
        for kind in options.passes:
            compare(options.backends, kind, shape, options.threads, options.rounds)


if __name__ == "__main__":
    main()
