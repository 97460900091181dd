"""Time forgetting attention beside PyTorch's dense attention on one GPU, forward and forward + backward.

    python kernels/benchmarks/bench_forgetting_attention.py                the whole workload, rows to results.csv
    python kernels/benchmarks/bench_forgetting_attention.py --shapes 2,24,16384,64 --csv try.csv
    python kernels/benchmarks/bench_forgetting_attention.py --skip-tests   no tests first; the rows say so

The workload: q and k normal and RMS-normalised per head (as QK-norm with weight 1 leaves them), v normal, bfloat16;
head h of H forgets c_h = 10 ** (-4 h / (H - 1)) nats a token on average, each gate -c_h times an exponential
variable: head 0 forgets within a token, the last one over 10,000. The tolerance of pruning is log eps = -10.

The operator's GPU tests run first: a wrong kernel gets no time. TFLOP/s count the dense causal work, 2 B H T^2 D
forward and 3.5 times that with the backward pass, whatever was skipped.
"""

import argparse
import csv
import datetime
import subprocess
import sys
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))
from fox_kernels import forgetting_attention  # noqa: E402

SHAPES = ["8,24,4096,64", "2,24,16384,64", "2,16,16384,128", "1,16,65536,64"]
LOG_TOLERANCE = -10.0
COLUMNS = [
    "op", "pass", "batch", "heads", "length", "head_dim", "dtype", "pruned_fraction", "p20_ms", "p50_ms", "p80_ms",
    "dense_tflops", "gpu", "torch", "triton", "commit", "tested", "date",
]  # fmt: skip


def workload(batch, heads, length, head_dim):
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, heads, length, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", generator=generator) for _ in range(3))
    q, k = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (q, k))
    decay = 10.0 ** (-4.0 * torch.arange(heads, device="cuda") / max(heads - 1, 1))
    gates = -decay[:, None] * torch.empty(shape[:3], device="cuda").exponential_(generator=generator)
    return [x.bfloat16().requires_grad_() for x in (q, k, v)] + [gates.requires_grad_()]


def contenders(q, k, v, log_fgate):
    """name -> (function of no arguments, tensors that get gradients)."""

    def dense(backend):
        def run():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    # QK-norm with weight 1: |q . k| / sqrt(D) <= sqrt(D); 1 % covers the rounding of q and k to bfloat16.
    bound = 1.01 * q.shape[-1] ** 0.5
    rules = {
        f"fox-acp-{rule}": dict(log_pruning_tolerance=LOG_TOLERANCE, logit_bound=bound, pruning_rule=rule)
        for rule in ("paper", "tight")
    }
    pruned = {
        name: (lambda options=options: forgetting_attention(q, k, v, log_fgate, **options), (q, k, v, log_fgate))
        for name, options in rules.items()
    }
    return {
        "sdpa-cudnn": (dense(SDPBackend.CUDNN_ATTENTION), (q, k, v)),
        "sdpa-flash2": (dense(SDPBackend.FLASH_ATTENTION), (q, k, v)),
        "fox": (lambda: forgetting_attention(q, k, v, log_fgate), (q, k, v, log_fgate)),
        **pruned,
    }, rules


def quantiles(function):
    return triton.testing.do_bench(function, warmup=100, rep=300, quantiles=[0.2, 0.5, 0.8])


def bench(shape, common):
    batch, heads, length, head_dim = shape
    inputs = workload(*shape)
    grad_out = torch.randn_like(inputs[0])
    functions, rules = contenders(*inputs)
    pruned = {
        name: float(forgetting_attention(*inputs, **options, return_stats=True)[1].pruned_fraction.mean())
        for name, options in rules.items()
    }
    work = 2.0 * batch * heads * length**2 * head_dim / 1e12
    rows = []
    for op, (function, leaves) in functions.items():
        passes = {
            "forward": (function, work),
            "forward+backward": (lambda f=function, x=leaves: torch.autograd.grad(f(), x, grad_out), 3.5 * work),
        }
        for name, (call, flops) in passes.items():
            p20, p50, p80 = quantiles(call)
            row = {
                "op": op, "pass": name, "batch": batch, "heads": heads, "length": length, "head_dim": head_dim,
                "dtype": "bfloat16", "pruned_fraction": round(pruned.get(op, 0.0), 4),
                "p20_ms": round(p20, 4), "p50_ms": round(p50, 4), "p80_ms": round(p80, 4),
                "dense_tflops": round(flops / p50 * 1e3, 1), **common,
            }  # fmt: skip
            print(
                f"{shape!s:24} {op:14} {name:17} {p50:8.3f} ms {row['dense_tflops']:7.1f} TFLOP/s   "
                f"pruned {row['pruned_fraction']:.1%}",
                flush=True,
            )
            rows.append(row)
    return rows


def commit():
    """The commit of the working tree, `+changes` if it differs from it; "unknown" outside of a checkout."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,H,T,D", help="default: %(default)s")
    parser.add_argument(
        "--csv", default=ROOT / "kernels" / "benchmarks" / "results.csv", type=Path, help="rows are appended"
    )
    parser.add_argument("--skip-tests", action="store_true", help="time without testing first")
    parser.add_argument("--commit", help="what to write where the folder is no git checkout (default: asks git)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_forgetting_attention.py needs a CUDA device; none is visible.")
    try:
        shapes = [tuple(int(x) for x in shape.split(",")) for shape in options.shapes]
        assert all(len(shape) == 4 for shape in shapes)
    except (ValueError, AssertionError):
        sys.exit(f"--shapes must be B,H,T,D with four whole numbers each; got {options.shapes}.")
    if not options.skip_tests:
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-x", "tests/test_kernels_triton.py"]
        if subprocess.run(tests, cwd=ROOT).returncode:
            sys.exit("The operator's tests failed: no times are taken of a wrong kernel.")
    common = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "commit": options.commit or commit(), "tested": not options.skip_tests,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    rows = [row for shape in shapes for row in bench(shape, common)]
    new = not options.csv.exists()
    with options.csv.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows appended to {options.csv}")


if __name__ == "__main__":
    main()
