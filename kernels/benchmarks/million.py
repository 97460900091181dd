"""A million tokens on one GPU, forward and backward, checked against float64 at sampled positions.

    python kernels/benchmarks/million.py                          T = 1,000,000, H = 16, D = 64; minutes
    python kernels/benchmarks/million.py --rules tight --length 300000
    python kernels/benchmarks/million.py --length 3000 --heads 3 --head-dim 32      on a CPU, to try it out

The workload is that of bench_forgetting_attention.py: heads that forget within 1 to 10,000 tokens. At two places, in
the middle and near the end, 512 positions each are drawn; of these the output, the gradient of the query and the
gradient of the gate are computed in float64 from the same bfloat16 inputs, block by block with exact log-sum-exps.
The gradient of a gate sums over all pairs around it, `dgate_t = sum_{i >= t > j} dS_ij`, so that some 10**11 pairs go
into each place. The same is done as PyTorch does it in bfloat16: products rounded to bfloat16, softmax in float32.
That is PyTorch's own error, and no error of ours may be more than twice as large in any head. Pairs whose decay is
beyond `--cut` nats are left out of both: 1e-11 of a row's weight, where bfloat16 rounds to 4e-3.

Prints a table for each rule, times and peak memory, and writes nothing. Exit status 1 where an error is too large.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import torch
from _common import LOG_TOLERANCE, commit, device, logit_bound
from bench_forgetting_attention import workload

from fox_kernels import forgetting_attention

PLACES = (0.5, 0.95)  # of the length
SAMPLES = 512  # positions at each place; the largest of 32 errors is half or twice that of another 32
SPREAD = 4096  # that they are drawn from
FLOOR = 1e-5  # of the largest value: where PyTorch happens to be exact
CHUNK = 1 << 26  # scores in memory at a time
NAMES = ("output", "dq", "dgate")


@dataclass
class Head:
    """The tensors of one head and the gates' running sums."""

    q: torch.Tensor  # (T, D), as the next three
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor
    lam: torch.Tensor  # (T,) float64, nats


def sampled(head, at, dtype, cut):
    """Output `(N, D)`, gradient of the query `(N, D)` and of the gate `(N,)` at the positions `at`, float64.

    Args:
        at: `(N,)` int64, in order.
        dtype: float64: the truth; bfloat16: as `forgetting_attention_reference` and autograd compute it.
        cut: Nats of decay beyond which a pair is left out.
    """
    exact = dtype == torch.float64
    accumulate = torch.float64 if exact else torch.float32
    scale = head.q.shape[-1] ** -0.5
    first, last = int(at[0]), int(at[-1])
    # A row that has decayed that far since the last position adds nothing across any of them.
    end = int(torch.searchsorted(-head.lam, cut - head.lam[last], right=True))
    outputs, dqs, dgates = [], [], torch.zeros(len(at), dtype=torch.float64, device=at.device)
    row = first
    while row < end:
        start = int(torch.searchsorted(-head.lam, -head.lam[row] - cut))
        stop = min(end, row + min(4096, max(16, CHUNK // (row + 256 - start))))
        rows, keys = torch.arange(row, stop, device=at.device), torch.arange(start, stop, device=at.device)
        q, grad_out = (x[row:stop].to(dtype) for x in (head.q, head.grad_out))
        k, v = (x[start:stop].to(dtype) for x in (head.k, head.v))
        p = (q @ k.T).to(accumulate).mul_(scale)
        p += (head.lam[row:stop, None] - head.lam[start:stop]).to(accumulate)
        p = p.masked_fill_(keys > rows[:, None], float("-inf")).softmax(-1)
        d_score = (grad_out @ v.T).to(accumulate)
        d_score.sub_((d_score * p).sum(-1, keepdim=True)).mul_(p)
        if row <= last:
            picked = at[(at >= row) & (at < stop)] - row
            outputs.append((p[picked].to(dtype) @ v).double())
            dqs.append(((d_score[picked] * scale).to(dtype) @ k).double())
            # Of each row the sum up to each position, and of these the rows from there on.
            before = torch.nn.functional.pad(d_score.cumsum(1, dtype=torch.float64), (1, 0))
            before = before[:, (at - start).clamp(0, len(keys))]
            dgates += before.masked_fill_(rows[:, None] < at, 0.0).sum(0)
        else:
            before = torch.nn.functional.pad(d_score.sum(0, dtype=torch.float64).cumsum(0), (1, 0))
            dgates += before[(at - start).clamp(min=0)]
        row = stop
    return torch.cat(outputs), torch.cat(dqs), dgates


def positions(length, where):
    """`SAMPLES` positions at each of `PLACES`, in order."""
    generator = torch.Generator().manual_seed(0)
    spread = min(SPREAD, length // 20)
    drawn = (torch.randperm(spread, generator=generator)[:SAMPLES].sort().values for _ in PLACES)
    return [(int(length * place) + x).to(where) for place, x in zip(PLACES, drawn, strict=True)]


def references(inputs, grad_out, at, cut):
    """`[place][head][0: exact, 1: PyTorch's bfloat16]` -> the three tensors of `sampled`."""
    q, k, v, gates = (x.detach()[0] for x in (*inputs,))
    lam = gates.double().cumsum(-1)
    out = []
    for places in at:
        heads = [Head(q[h], k[h], v[h], grad_out[0, h], lam[h]) for h in range(len(q))]
        out.append(
            [[sampled(head, places, dtype, cut) for dtype in (torch.float64, torch.bfloat16)] for head in heads]
        )
    return out


def run(inputs, grad_out, options):
    """Output and gradients, seconds, and GiB beyond the inputs."""
    on_gpu = inputs[0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    out = forgetting_attention(*inputs, **options)
    grads = torch.autograd.grad(out, inputs, grad_out)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else float("nan")
    return (out.detach(), grads[0], grads[3]), seconds, extra


def report(got, at, reference):
    """Print errors of each head; the largest ratio to PyTorch's own error of any."""
    worst = 0.0
    print(f"{'head':>4} " + " ".join(f"{name:>10} {'PyTorch':>10} {'ratio':>6}" for name in NAMES))
    for h in range(got[0].shape[1]):
        cells = []
        for n in range(len(NAMES)):
            ours = own = allowance = 0.0
            for places, heads in zip(at, reference, strict=True):
                exact, same = (x[n] for x in heads[h])
                ours = max(ours, float((got[n][0, h, places].double() - exact).abs().max()))
                own = max(own, float((same - exact).abs().max()))
                allowance = max(allowance, FLOOR * float(exact.abs().max()))
            ratio = ours / max(own, allowance / 2)
            cells.append(f"{ours:10.2e} {own:10.2e} {ratio:6.2f}")
            worst = max(worst, ratio) if ratio == ratio else float("inf")
        print(f"{h:4} " + " ".join(cells), flush=True)
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1_000_000, help="tokens; default: %(default)s")
    parser.add_argument("--heads", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--rules", nargs="+", choices=["none", "paper", "tight"], default=["none", "tight"])
    parser.add_argument("--cut", type=float, default=25.0, help="nats; default: %(default)s")
    options = parser.parse_args()
    where = device()
    name = torch.cuda.get_device_name() if where == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, commit {commit()}, B 1, H {options.heads}, T {options.length}, "
          f"D {options.head_dim}, bfloat16")  # fmt: skip
    bound = logit_bound(options.head_dim)
    pruning = {
        rule: {} if rule == "none" else dict(log_pruning_tolerance=LOG_TOLERANCE, logit_bound=bound, pruning_rule=rule)
        for rule in options.rules
    }
    if where == "cuda":  # compiles the kernels
        small = workload(1, options.heads, 2048, options.head_dim, where)[0]
        for rule in options.rules:
            run(small, torch.ones_like(small[0]), pruning[rule])
    inputs, _ = workload(1, options.heads, options.length, options.head_dim, where)
    grad_out = torch.randn_like(inputs[0])
    at = positions(options.length, where)
    results = {rule: run(inputs, grad_out, pruning[rule]) for rule in options.rules}
    for rule, (_, seconds, extra) in results.items():
        print(f"pruning {rule}: forward + backward {seconds:.2f} s, {extra:.2f} GiB beyond the inputs", flush=True)
    start = time.perf_counter()
    reference = references(inputs, grad_out, at, options.cut)
    print(f"float64 and bfloat16 references: {time.perf_counter() - start:.1f} s")
    failed = False
    for rule, (got, _, _) in results.items():
        print(f"\npruning {rule}: largest error at {SAMPLES * len(PLACES)} positions")
        worst = report(got, at, reference)
        failed |= not worst <= 2.0
        print(f"largest ratio {worst:.2f}, at most 2 allowed: {'ok' if worst <= 2.0 else 'TOO LARGE'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
