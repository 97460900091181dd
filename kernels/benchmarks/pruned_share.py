"""How much each rule prunes, and how much an oracle could: share of the causal pairs, tiles of 128 queries by 64 keys.

    python kernels/benchmarks/pruned_share.py                # T = 4096, D = 64, 12 heads; a minute on one core
    python kernels/benchmarks/pruned_share.py --length 16384

The oracle knows every weight: it drops a block of keys where no row of the block of queries would have lost more than
eps with it and all before. Inputs: q and k standard normal, RMS-normalised per head and multiplied by the norm's
weight, in bfloat16; or with a direction in common to them all. Gates: heads that forget within 1 to 10,000 tokens.
"""

import argparse
import math

import torch

from fox_kernels.gates import first_visible_key, gate_sums
from fox_kernels.pruning import PRUNING_BLOCK_S, PRUNING_BLOCK_T, prune

RULES = ("paper", "tight")


def inputs(length, dim, heads, weight, common, generator):
    """q, k `(1, H, T, D)` bfloat16 and log gates `(1, H, T)`."""
    q, k = torch.randn(2, 1, heads, length, dim, generator=generator)
    direction = torch.randn(1, heads, 1, dim, generator=generator) if common else 0.0
    q, k = (torch.nn.functional.rms_norm(x + direction, (dim,)).mul(weight).bfloat16() for x in (q, k))
    decay = 10 ** (-4 * torch.arange(heads) / (heads - 1))
    return q, k, -decay[:, None] * torch.empty(1, heads, length).exponential_(generator=generator)


def oracle(q, k, log_fgate, log_tolerance):
    """First key of each query, `(1, H, T)`, and the mass before every block end, `(1, H, T, N)` float64."""
    length = q.shape[2]
    position = torch.arange(length)
    ends = torch.arange(PRUNING_BLOCK_S - 1, length, PRUNING_BLOCK_S)
    first, mass = [], []
    for head in range(q.shape[1]):
        running = log_fgate[0, head].double().cumsum(-1)
        scores = (q[0, head].float() @ k[0, head].float().T).double() * q.shape[-1] ** -0.5
        scores += running[:, None] - running
        weights = scores.masked_fill_(position > position[:, None], -math.inf).softmax(-1)
        mass.append(weights.cumsum(-1)[:, ends])
        worst = mass[-1].unflatten(0, (-1, PRUNING_BLOCK_T)).amax(1)
        before = ends < position[::PRUNING_BLOCK_T, None]
        dropped = ((worst <= math.exp(log_tolerance)) & before).sum(-1) * PRUNING_BLOCK_S
        first.append(dropped.repeat_interleave(PRUNING_BLOCK_T))
    return torch.stack(first)[None], torch.stack(mass)[None]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens, a multiple of 128")
    parser.add_argument("--dim", type=int, default=64, help="channels of a head")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--log-tolerance", type=float, default=-10.0, help="nats")
    parser.add_argument("--given", action="store_true", help="pass the bound that the norm's weights give")
    args = parser.parse_args()
    print(f"{'q, k':<16}{'U':>6}" + "".join(f"{x:>10}" for x in (*RULES, "oracle", "gap won", "worst mass")))
    for weight in (1.0, 1.5):
        for common in (False, True):
            q, k, log_fgate = inputs(
                args.length, args.dim, args.heads, weight, common, torch.Generator().manual_seed(0)
            )
            bound = weight**2 * args.dim**0.5 * 1.01  # rounding to bfloat16 can add 2**-8 to each norm
            visible = first_visible_key(log_fgate, None, args.length)
            best, mass = oracle(q, k, log_fgate, args.log_tolerance)
            tiles = (torch.arange(args.length) // PRUNING_BLOCK_T + 1) * (PRUNING_BLOCK_T / PRUNING_BLOCK_S)
            total = float(tiles.sum()) * args.heads
            shares = []
            for rule in RULES:
                first = prune(
                    q, k, gate_sums(log_fgate), visible, None, scale=args.dim**-0.5, rule=rule,
                    log_tolerance=args.log_tolerance, logit_bound=torch.tensor([[bound]]) if args.given else None,
                )  # fmt: skip
                shares.append(float((first // PRUNING_BLOCK_S).sum()) / total)
                before = (first.long() // PRUNING_BLOCK_S - 1).clamp(min=0)[..., None]
                worst = float(torch.where(first > 0, mass.gather(-1, before)[..., 0], 0.0).max())
            shares.append(float((best // PRUNING_BLOCK_S).sum()) / total)
            gap = (shares[-2] - shares[0]) / (shares[-1] - shares[0])
            name = f"{'common' if common else 'random'}, {weight}"
            print(f"{name:<16}{bound:>6.1f}" + "".join(f"{x:>10.3f}" for x in shares) + f"{gap:>10.2f}{worst:>10.1e}")


if __name__ == "__main__":
    main()
