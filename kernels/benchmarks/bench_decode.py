"""Time decoding, one query per sequence against a long cache, beside PyTorch's dense attention and a plain copy.

    python kernels/benchmarks/bench_decode.py                       the whole workload, rows to decode_results.csv
    python kernels/benchmarks/bench_decode.py --shapes 1,16,16,131072,64 --csv try.csv
    python kernels/benchmarks/bench_decode.py --sweep               also other tile sizes, printed, not written
    python kernels/benchmarks/bench_decode.py --skip-tests          no tests first; the rows say so

The workload is that of bench_forgetting_attention.py, with `queries` new tokens at the end. The floor of a row is the
time that a device copy takes for as many bytes as the keys and values that survive: a copy of 1 GiB is timed in the
same run, and counts what it reads and what it writes. A dense contender reads all of them. "+append" also adds the
gates of the new tokens to the sums, as a model does. Every call is timed twice: as it is ("eager"), where launching
may take longer than computing, and replayed from a CUDA graph ("graph"), as a serving loop runs it. Before each call
256 MiB are read, so that the L2 cache is cold but clean, as after the weights of a layer: `triton.testing.do_bench`
fills it with zeros, which the call that is timed has to write back. The operator's GPU tests run first: a wrong kernel
gets no time.
"""

import itertools
from functools import partial

import torch
import triton
from _common import (
    ENVIRONMENT,
    LOG_TOLERANCE,
    append_rows,
    environment,
    log_gates,
    logit_bound,
    parsed_shapes,
    parser,
    require_gpu,
    rms_normalised,
    run_tests,
    trained,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from fox_kernels import triton_decode
from fox_kernels.decode import append_gates, empty_sums, forgetting_attention_decode
from fox_kernels.pruning import paper_budget

SHAPES = ["1,24,24,16384,64", "8,24,24,16384,64", "1,16,16,131072,64", "1,32,8,131072,128", "1,16,16,1000000,64"]
LETTERS = "B,H,H_kv,S,D"
COLUMNS = [
    "op", "mode", "batch", "heads", "kv_heads", "keys", "head_dim", "queries", "dtype", "pruned_fraction", "p20_ms",
    "p50_ms", "p80_ms", "floor_ms", "over_floor", *ENVIRONMENT,
]  # fmt: skip


def workload(batch, heads, kv_heads, keys, head_dim, queries, gates_file=None):
    """q, k, v in bfloat16, gates, the sums of the gates of all keys, and the bound on the logits, `(B, H)`."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (batch, heads, queries), (batch, kv_heads, keys), (batch, kv_heads, keys)
    q, k, v = (torch.randn(*shape, head_dim, device="cuda", generator=generator).bfloat16() for shape in shapes)
    if gates_file is None:
        q, k = rms_normalised(q), rms_normalised(k)
        gates = log_gates(batch, heads, keys, generator)
        bound = torch.full((1, 1), logit_bound(head_dim), device="cuda").expand(batch, heads)
    else:
        gates, q_norm, k_norm, bound = trained(gates_file, batch, heads, keys, head_dim, "cuda")
        if kv_heads < heads:  # norms of shared keys: those of the first head that shares them
            k_norm = k_norm[:: heads // kv_heads]
            bound = logit_bound(head_dim) * (q_norm.abs().amax(-1) * k_norm.abs().amax()).T.expand(batch, heads)
        q, k = rms_normalised(q, q_norm), rms_normalised(k, k_norm)
    growing = empty_sums(batch, heads, keys + queries, "cuda")
    append_gates(growing, gates, 0)
    return q, k, v, gates, growing, bound


def quantiles(function, repeats=100):
    """20th, 50th and 80th percentile of the milliseconds of a call."""
    other = torch.ones(2**26, dtype=torch.int32, device="cuda")
    total = torch.empty((), dtype=torch.int64, device="cuda")
    times = []
    for _ in range(repeats):
        torch.sum(other, dim=0, out=total)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    times = torch.tensor([begin.elapsed_time(end) for begin, end in times[10:]], dtype=torch.float64)
    return times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()


def captured(function):
    """`function` as a CUDA graph, to be called for a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def bytes_per_ms():
    """What a device copy reads and writes in a millisecond."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / quantiles(lambda: target.copy_(source))[1]


def contenders(q, k, v, gates, growing, bound):
    """name -> function of no arguments."""
    groups = q.shape[1] // k.shape[1]
    num_keys, queries = k.shape[2], q.shape[2]
    pruning = dict(log_pruning_tolerance=LOG_TOLERANCE, logit_bound=bound)
    tight = pruning | {"pruning_rule": "tight"}
    # The heads of a group as rows that share its keys: the best that dense attention can do.
    rows = q.unflatten(1, (k.shape[1], groups)).flatten(2, 3)

    def dense():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(rows, k, v)

    def with_append():
        # After all keys, where it changes nothing that is read: each repetition finds the same sums.
        append_gates(growing, gates[..., -queries:], num_keys)
        return forgetting_attention_decode(q, k, v, growing.sums, **pruning)

    return {
        "sdpa-flash2": dense,
        "fox": lambda: forgetting_attention_decode(q, k, v, growing.sums),
        "fox-acp-paper": lambda: forgetting_attention_decode(q, k, v, growing.sums, **pruning),
        "fox-acp-paper+append": with_append,
        "fox-acp-tight": lambda: forgetting_attention_decode(q, k, v, growing.sums, **tight),
    }


def survivors(q, k, growing, bound):
    """rule -> share of the keys, over all key heads, that some query of the head reads."""
    shape = (*q.shape[:2], k.shape[1], q.shape[2])
    budget = paper_budget(k.shape[2], LOG_TOLERANCE)
    shares = {}
    for rule in ("paper", "tight"):
        scored = triton_decode.TightInputs(q, k, q.shape[-1] ** -0.5, LOG_TOLERANCE) if rule == "tight" else None
        arguments = shape, growing.sums, k.shape[2], None, None, None, bound, budget, None, scored
        shares[rule] = 1.0 - float(triton_decode.plan(*arguments)[1].double().mean()) / k.shape[2]
    return shares


def sweep(q, k, v, growing, bound):
    """Print the best tile sizes, all keys read and pruned, from a CUDA graph."""
    arguments = q, k, v, growing.sums, k.shape[2], None, q.shape[-1] ** -0.5
    chosen = triton_decode.decode_tiles(q.shape[-1], 2, 90, q.shape[1] // k.shape[1] * q.shape[2], True)
    times = []
    for block_s, stages, per_sm in itertools.product((32, 64, 128), (3, 4, 5), (1, 2, 3, 4)):
        tiles = triton_decode.DecodeTiles(chosen.block_r, block_s, 4, stages, per_sm)
        try:
            for name, pruning in (
                ("all", {}),
                ("acp", dict(logit_bound=bound, budget=paper_budget(k.shape[2], -10.0))),
            ):
                function = captured(partial(triton_decode.forward, *arguments, **pruning, tiles=tiles))
                times.append((name, quantiles(function, 40)[1], tiles))
        except triton.runtime.errors.OutOfResources:
            continue
    for name in ("all", "acp"):
        for _, p50, tiles in sorted(t for t in times if t[0] == name)[:6]:
            print(f"    {name} {p50:.4f} ms {tiles}", flush=True)


def bench(shape, queries, rate, options, common):
    batch, heads, kv_heads, keys, head_dim = shape
    q, k, v, gates, growing, bound = workload(*shape, queries, options.gates)
    functions = contenders(q, k, v, gates, growing, bound)
    shares = survivors(q, k, growing, bound)
    rows = []
    for (op, function), mode in itertools.product(functions.items(), ("eager", "graph")):
        p20, p50, p80 = quantiles(function if mode == "eager" else captured(function))
        read = next((share for rule, share in shares.items() if rule in op), 1.0)
        floor = read * 2 * k.numel() * k.element_size() / rate
        over = f"floor {floor:.4f}  {p50 / floor:5.2f} x  ({read:.1%} read)"
        print(f"{shape!s:30} {op:22} {mode} {p50:8.4f} ms  {over}", flush=True)
        rows.append(
            {
                "op": op, "mode": mode, "batch": batch, "heads": heads, "kv_heads": kv_heads, "keys": keys,
                "head_dim": head_dim, "queries": queries, "dtype": "bfloat16", "pruned_fraction": round(1.0 - read, 4),
                "p20_ms": round(p20, 5), "p50_ms": round(p50, 5), "p80_ms": round(p80, 5),
                "floor_ms": round(floor, 5), "over_floor": round(p50 / floor, 3), **common,
            }
        )  # fmt: skip
    if options.sweep:
        sweep(q, k, v, growing, bound)
    return rows


def main():
    arguments = parser(__doc__, shapes=SHAPES, letters=LETTERS, results="decode_results.csv")
    arguments.add_argument("--queries", type=int, default=1, help="new tokens a step, 1 to 16 (default: %(default)s)")
    arguments.add_argument("--sweep", action="store_true", help="also time other tile sizes and print the best")
    options = arguments.parse_args()
    shapes = parsed_shapes(options.shapes, LETTERS)
    require_gpu()
    if not options.skip_tests:
        run_tests("tests/test_kernels_decode.py")
    common = environment(options)
    rate = bytes_per_ms()
    print(f"copy rate {rate / 1e9:.2f} TB/s")
    rows = [row for shape in shapes for row in bench(shape, options.queries, rate, options, common)]
    append_rows(options.csv, COLUMNS, rows)


if __name__ == "__main__":
    main()
