"""Time forgetting attention beside PyTorch's dense attention and other packages on one GPU.

    python kernels/benchmarks/bench_forgetting_attention.py                the whole workload, rows to results.csv
    python kernels/benchmarks/bench_forgetting_attention.py --shapes 2,24,16384,64 --csv try.csv
    python kernels/benchmarks/bench_forgetting_attention.py --memory       peak memory in place of times
    python kernels/benchmarks/bench_forgetting_attention.py --plot times.png    draw the newest rows of the CSV
    python kernels/benchmarks/bench_forgetting_attention.py --ops sdpa-cudnn fox --skip-tests
    python kernels/benchmarks/bench_forgetting_attention.py --gates kernels/benchmarks/data/trained_gates.safetensors

The workload: q and k normal and RMS-normalised per head (as QK-norm with weight 1 leaves them), v normal, bfloat16;
head h of H forgets c_h = 10 ** (-4 h / (H - 1)) nats a token on average, each gate -c_h times an exponential
variable: head 0 forgets within a token, the last one over 10,000. The tolerance of pruning is log eps = -10.

The operator's GPU tests run first: a wrong kernel gets no time. TFLOP/s count the dense causal work, 2 B H T^2 D
forward and 3.5 times that with the backward pass, whatever was skipped; shares of the peak are of the data sheet's
dense bfloat16 rate, which is printed. FlexAttention, flash-linear-attention and the official package take part where
they can be imported, each in a process of its own that has `--limit` seconds for a row; packages that try out
configurations take the first of each kernel, and the row's note says so.

--gates: gates and QK-norms of a trained model in place of the above; heads, length and batch are filled by repetition.

--memory: bytes that a call holds at its worst beyond its inputs: everything from the start of the forward pass to the
end of the backward pass, the gradients included.
"""

import argparse
import json
import queue
import subprocess
import sys
import threading
from operator import itemgetter

import torch
from _common import (
    ENVIRONMENT,
    FOLDER,
    append_rows,
    environment,
    log_gates,
    logit_bound,
    parsed_shapes,
    parser,
    peak_tflops,
    read_rows,
    require_gpu,
    rms_normalised,
    run_tests,
    trained,
)
from _peers import NOTES, PEERS, contenders, without_autotuning

from fox_kernels import forgetting_attention

SHAPES = ["8,24,4096,64", "2,24,16384,64", "2,16,16384,128", "1,16,65536,64"]
LETTERS = "B,H,T,D"
SIZES = ["batch", "heads", "length", "head_dim", "dtype"]
COLUMNS = ["op", "pass", *SIZES, "pruned_fraction", "p20_ms", "p50_ms", "p80_ms", "dense_tflops", *ENVIRONMENT]
MEMORY_COLUMNS = ["op", *SIZES, "extra_mib", "over_cudnn", *ENVIRONMENT]
BASELINE = "sdpa-cudnn"
OURS = ("sdpa-cudnn", "sdpa-flash2", "fox", "fox-acp-paper", "fox-acp-tight")
ROW = "ROW "  # begins a line of a peer's process that holds a row


def workload(batch, heads, length, head_dim, where="cuda", gates_file=None):
    """q, k, v and gates, and a bound on the logits."""
    generator = torch.Generator(where).manual_seed(0)
    shape = (batch, heads, length, head_dim)
    q, k, v = (torch.randn(shape, device=where, generator=generator) for _ in range(3))
    if gates_file is None:
        gates, bound = log_gates(batch, heads, length, generator), logit_bound(head_dim)
        q, k = rms_normalised(q), rms_normalised(k)
    else:
        gates, q_norm, k_norm, bound = trained(gates_file, *shape, where)
        q, k = rms_normalised(q, q_norm), rms_normalised(k, k_norm)
    return [x.bfloat16().requires_grad_() for x in (q, k, v)] + [gates.requires_grad_()], bound


def quantiles(function):
    import triton

    return triton.testing.do_bench(function, warmup=100, rep=300, quantiles=[0.2, 0.5, 0.8])


def sizes(shape):
    return dict(zip(SIZES, (*shape, "bfloat16"), strict=True))


def chosen(functions, options):
    return {name: x for name, x in functions.items() if not options.ops or name in options.ops}


def attempted(op, shape, name, measure):
    """`measure()`, or None of a peer that cannot do it, which is said."""
    try:
        return measure()
    except Exception as error:
        if op not in PEERS:
            raise
        print(f"{shape!s:24} {op:22} {name:17} not measured, {type(error).__name__}: {str(error)[:90]!r}", flush=True)
        return None


def functions_of(inputs, bound, options):
    """name -> (function, tensors that get gradients): ours and PyTorch's, or in a process of its own one peer."""
    if options.peer is None:
        functions, rules = contenders(*inputs, bound)
        return chosen(functions, options), rules
    try:
        return {options.peer: (PEERS[options.peer](*inputs), inputs)}, {}
    except Exception as error:  # not installed, or made for other versions: either way it is said
        sys.exit(f"{options.peer}: not measured, {type(error).__name__}: {error}")


def bench(shape, options, common):
    batch, heads, length, head_dim = shape
    inputs, bound = workload(*shape, gates_file=options.gates)
    grad_out = torch.randn_like(inputs[0])
    functions, rules = functions_of(inputs, bound, options)
    pruned = {
        name: float(forgetting_attention(*inputs, **rule, return_stats=True)[1].pruned_fraction.mean())
        for name, rule in rules.items()
        if name in functions
    }
    work = 2.0 * batch * heads * length**2 * head_dim / 1e12
    peak = peak_tflops(options.peak_tflops)
    for op, (function, leaves) in functions.items():
        passes = {
            "forward": (function, work),
            "forward+backward": (lambda f=function, x=leaves: torch.autograd.grad(f(), x, grad_out), 3.5 * work),
        }
        for name, (call, flops) in passes.items():
            times = attempted(op, shape, name, lambda call=call: quantiles(call))
            if times is None:
                continue
            p20, p50, p80 = times
            rate = flops / p50 * 1e3
            share = "" if peak is None else f" {rate / peak:6.1%} of peak"
            print(
                f"{shape!s:24} {op:22} {name:17} {p50:8.3f} ms {rate:7.1f} TFLOP/s{share}   "
                f"pruned {pruned.get(op, 0.0):.1%}",
                flush=True,
            )
            yield {
                "op": op, "pass": name, **sizes(shape), "pruned_fraction": round(pruned.get(op, 0.0), 4),
                "p20_ms": round(p20, 4), "p50_ms": round(p50, 4), "p80_ms": round(p80, 4),
                "dense_tflops": round(rate, 1), **common,
            }  # fmt: skip


def extra_bytes(function, leaves, grad_out):
    """The most that a call holds beyond what was there before it."""
    for _ in range(2):  # the first call compiles, and allocates what stays
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(function(), leaves, grad_out)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory(shape, options, common):
    inputs, bound = workload(*shape, gates_file=options.gates)
    grad_out = torch.randn_like(inputs[0])
    for op, (function, leaves) in functions_of(inputs, bound, options)[0].items():
        count = attempted(op, shape, "memory", lambda f=function, x=leaves: extra_bytes(f, x, grad_out))
        if count is not None:
            print(f"{shape!s:24} {op:22} {count / 2**20:9.1f} MiB extra", flush=True)
            yield {"op": op, **sizes(shape), "extra_mib": round(count / 2**20, 2), "over_cudnn": "", **common}


def with_ratios(rows):
    """Memory over that of dense cuDNN of the same shape, where that was measured."""
    shape = itemgetter(*SIZES)
    baseline = {shape(row): row["extra_mib"] for row in rows if row["op"] == BASELINE}
    for row in rows:
        if shape(row) in baseline:
            row["over_cudnn"] = round(row["extra_mib"] / baseline[shape(row)], 3)
            print(f"{shape(row)!s:40} {row['op']:22} {row['over_cudnn']:.3f} x {BASELINE}")
    return rows


def of_a_peer(peer, options, arguments):
    """Rows that a process of its own measures; it is ended when the next one takes longer than `--limit` seconds."""
    command = [sys.executable, __file__, *arguments, "--skip-tests", "--peer", peer]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines, rows = queue.Queue(), []

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while (line := lines.get(timeout=options.limit)) is not None:
            if line.startswith(ROW):
                rows.append(json.loads(line[len(ROW) :]) | {"tested": not options.skip_tests})
            else:
                print(line, end="", flush=True)
    except queue.Empty:
        print(f"{peer}: ended, nothing more within {options.limit} s", flush=True)
    process.kill()
    process.wait()
    reader.join()
    process.stdout.close()
    return rows


def plot(path, picture):
    """A panel for each pass: time over that of dense cuDNN, by shape, of the newest commit in the CSV."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_rows(path)
    rows = [row for row in rows if (row["commit"], row["gpu"]) == (rows[-1]["commit"], rows[-1]["gpu"])]
    times = {}  # a repeated measurement replaces the one before
    for row in rows:
        shape = tuple(int(row[name]) for name in SIZES[:4])
        times[row["pass"], shape, row["op"]] = [float(row[name]) for name in ("p20_ms", "p50_ms", "p80_ms")]
    shapes = sorted({shape for _, shape, _ in times}, key=lambda x: (x[2], x[3]))
    ops = list(dict.fromkeys(op for _, _, op in times if op != BASELINE))
    figure, axes = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    for axis, kind in zip(axes, ("forward", "forward+backward"), strict=True):
        for i, op in enumerate(ops):
            at, ratio, spread = [], [], ([], [])
            for x, shape in enumerate(shapes):
                base, got = times.get((kind, shape, BASELINE)), times.get((kind, shape, op))
                if base and got:
                    at.append(x + (i + 0.5) * 0.8 / len(ops) - 0.4)
                    ratio.append(got[1] / base[1])
                    spread[0].append((got[1] - got[0]) / base[1])
                    spread[1].append((got[2] - got[1]) / base[1])
            axis.bar(at, ratio, 0.8 / len(ops), yerr=spread, label=op)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set(ylabel="time / dense cuDNN", title=kind)
    axes[1].set_xticks(range(len(shapes)), [", ".join(map(str, shape)) for shape in shapes])
    axes[1].set_xlabel(f"{LETTERS}   ({rows[-1]['gpu']}, torch {rows[-1]['torch']}, commit {rows[-1]['commit']})")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(picture, dpi=120)
    print(f"{len(times)} times drawn in {picture}")


def main():
    arguments = parser(__doc__, shapes=SHAPES, letters=LETTERS, results="results.csv")
    arguments.add_argument("--ops", nargs="+", metavar="OP", help=f"only these, of {', '.join((*OURS, *PEERS))}")
    arguments.add_argument("--memory", action="store_true", help="measure memory; rows to memory_results.csv")
    arguments.add_argument("--plot", metavar="PNG", help="draw the rows of --csv and stop")
    arguments.add_argument("--peak-tflops", type=float, help="bfloat16 rate of the GPU (default: its data sheet's)")
    arguments.add_argument(
        "--limit", type=float, default=120.0, help="seconds for a peer's next row (default: %(default)s)"
    )
    arguments.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)  # what a process of its own measures
    options = arguments.parse_args()
    shapes = parsed_shapes(options.shapes, LETTERS)
    unknown = set(options.ops or ()) - {*OURS, *PEERS}
    if unknown:
        sys.exit(f"--ops must be of {', '.join((*OURS, *PEERS))}; got {', '.join(sorted(unknown))}.")
    if options.plot:
        plot(options.csv, options.plot)
        return
    require_gpu()
    if not options.skip_tests:
        run_tests("tests/test_kernels_triton.py")
    common = environment(options)
    measure = memory if options.memory else bench
    if options.peer is not None:
        without_autotuning()
        common["note"] = ", ".join(filter(None, (common["note"], NOTES.get(options.peer, ""))))
        for shape in shapes:
            for row in measure(shape, options, common):
                print(ROW + json.dumps(row), flush=True)
        return
    print(f"{common['gpu']}: shares of a peak of {peak_tflops(options.peak_tflops)} TFLOP/s in bfloat16, dense")
    rows = [row for shape in shapes for row in measure(shape, options, common)]
    for peer in chosen(PEERS, options):
        torch.cuda.empty_cache()
        rows += of_a_peer(peer, options, sys.argv[1:])
    if options.memory:
        path = options.csv if options.csv.name != "results.csv" else FOLDER / "memory_results.csv"
        append_rows(path, MEMORY_COLUMNS, with_ratios(rows))
        return
    append_rows(options.csv, COLUMNS, rows)


if __name__ == "__main__":
    main()
