"""What the cache that forgets loses in 20,000 generated tokens, one token a step, every row of attention in float64.

    python tests/twenty_thousand_steps.py                    # half an hour on a core; not part of `make test`
    python tests/twenty_thousand_steps.py --parts operator --dtypes bfloat16    # a third of it; likewise float32, text
    python tests/twenty_thousand_steps.py --tokens 2000

1. The paged operator in float32 and bfloat16. Gates: random, in bursts, landing on the tolerance again and again, and
   those of a FoX that was trained on real text (kernels/benchmarks/data). Scores: random, and at the worst that the
   logit bound allows. Of every row of every head, the mass on what had been dropped by its turn, from the definition.
2. A random model in float32 that writes greedily: the text and the logits beside those of the cache of everything.

Ends with status 1 if a row loses more than eps, a logit is off by more than 1e-3, or a token differs.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / name) for name in ("kernels", "training", "tests"))]

GATES = ROOT / "kernels" / "benchmarks" / "data" / "trained_gates.safetensors"
LOG_TOLERANCE = -10.0
DIM = 64
ROWS = 250  # of the definition at a time
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser():
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--tokens", type=int, default=20_000, help="steps; default: %(default)s")
    parts = ["operator", "text"]
    out.add_argument("--parts", nargs="+", choices=parts, default=parts, help="default: both")
    out.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="default: both")
    out.add_argument("--heads", nargs="+", type=int, help="only these of the operator's, counted from 0; default: all")
    return out


def tell(began, done, of):
    """A line of progress on standard error, twenty times in all."""
    if done % max(of // 20, 1) == 0:
        print(f"{time.monotonic() - began:6.0f} s: {done} of {of} steps", file=sys.stderr, flush=True)


def made_up_gates(kind, length, generator):
    """`(2, T)` float32 nats: a head that forgets within ten tokens, one within a hundred."""
    rate = torch.tensor([[0.5], [0.05]])
    noise = torch.empty(2, length).exponential_(generator=generator)
    if kind == "random":
        return -rate * noise
    if kind == "bursts":  # open for long, then much at once, and a document that ends
        chance = torch.rand(2, length, generator=generator)
        gates = torch.where(chance < 0.02, -20.0 * rate * noise, torch.zeros(()))
        return torch.where(chance > 0.999, -torch.inf, gates)
    return -rate * torch.ones(2, length)  # "edge"


def heads(length):
    """Name, gates `(T,)`, logit bound and the norm of queries and of keys, of each head."""
    generator = torch.Generator().manual_seed(0)
    for kind in ("random", "bursts", "edge"):
        for gates in made_up_gates(kind, length, generator):
            yield kind, gates, 4.0
    trained = load_file(GATES)
    sizes = [trained[name].abs().amax(-1).flatten() for name in ("q_norm", "k_norm")]
    gates = trained["log_fgate_long"][:, 0].flatten(0, 1).float()
    repeats = math.ceil(length / gates.shape[-1])
    bounds = sizes[0] * sizes[1] * DIM**0.5
    # From those that forget most to those that forget least; the last ones never reach the condition here.
    order = gates.mean(-1).argsort()[[0, 8, 16, 22, 24, 26, 27, 28, 29, 30]].tolist()
    for head in order:
        yield "trained", gates[head].repeat(repeats)[:length], float(bounds[head])


def queries_and_keys(worst, bounds, length):
    """`(1, H, T, D)` with `|q . k| * D ** -0.5` at most the bound; worst: far keys at +bound, those near at -bound."""
    generator = torch.Generator().manual_seed(1)
    if worst:
        direction = torch.randn(DIM, generator=generator)
        sign = torch.where(torch.arange(length) % 160 < 80, 1.0, -1.0)
        k = (sign[:, None] * direction).expand(1, len(bounds), length, DIM)
        q = -k
    else:
        q, k = (torch.randn(1, len(bounds), length, DIM, generator=generator) for _ in range(2))
    size = (torch.tensor(bounds) * DIM**0.5).sqrt()[None, :, None, None]
    return tuple(x / x.norm(dim=-1, keepdim=True) * size for x in (q, k))


def most_lost(q, k, gates, first):
    """The largest mass on keys before `first (T,)` of one head's rows, in float64, with the row."""
    length = len(gates)
    lam = gates.clamp(min=-9000.0).double().cumsum(-1)
    place, most = torch.arange(length), (0.0, 0)
    for begin in range(0, length, ROWS):
        rows = place[begin : begin + ROWS]
        scores = q[rows].double() @ k[: rows[-1] + 1].double().T * DIM**-0.5
        scores += lam[rows, None] - lam[: rows[-1] + 1]
        weights = scores.masked_fill_(place[: rows[-1] + 1] > rows[:, None], -torch.inf).softmax(-1)
        lost = (weights * (place[: rows[-1] + 1] < first[rows, None])).sum(-1)
        most = max(most, (float(lost.max()), int(rows[lost.argmax()])))
    return most


@torch.no_grad()
def lost_by_the_operator(length, dtype, chosen=None):
    """Runs all heads, or those `chosen`, at once.

    Yields scores and gates, dropped keys, most lost, its row, what the cache reports.
    """
    from fox_kernels.paged import PagedKeys
    from fox_kernels.paged_attention import paged_attention

    kinds, gates, bounds = zip(*heads(length), strict=True)
    names = [f"{scores:<6} scores, {kind:<7} gates" for scores in ("random", "worst") for kind in kinds]
    pairs = zip(*(queries_and_keys(worst, bounds, length) for worst in (False, True)), strict=True)
    chosen = range(len(names)) if chosen is None else chosen
    names, bounds = [names[head] for head in chosen], [(bounds * 2)[head] for head in chosen]
    q, k = (torch.cat(pair, dim=1)[:, chosen].to(dtype) for pair in pairs)
    gates, margin = torch.stack(gates * 2)[None, chosen], 1.0 if dtype == torch.float32 else 1.01
    options = {"page_size": 16, "log_tolerance": LOG_TOLERANCE, "dtype": dtype, "device": q.device}
    cache = PagedKeys(1, 1, len(names), len(names), DIM, **options)
    cache.set_logit_bound(0, torch.tensor(bounds) * margin)
    first = torch.zeros(len(names), length, dtype=torch.int64)
    began = time.monotonic()
    for t in range(length):
        one = slice(t, t + 1)
        paged_attention(q[:, :, one], k[:, :, one], k[:, :, one], gates[:, :, one], cache, 0)
        first[:, t] = cache.first_key[0, 0]
        tell(began, t + 1, length)
    reported = (cache.worst + 2.0 * cache.logit_bound[:, None]).exp().flatten()
    for head, name in enumerate(names):
        lost, row = most_lost(q[0, head], k[0, head], gates[0, head], first[head])
        yield name, int(first[head, -1]), lost, row, float(reported[head])


@torch.no_grad()
def texts(length):
    """Largest difference of the logits, tokens that differ, and the report of the cache."""
    from transformers import DynamicCache

    from helpers import random_tokens, tiny_fox
    from modeling_fox import FoxEvictingCache

    model = tiny_fox(hidden_size=32, intermediate_size=32, fgate_decay_time_min=1.5, fgate_decay_time_max=60.0)
    caches = [FoxEvictingCache(model.config), DynamicCache(config=model.config)]
    tokens, worst, different, began = [random_tokens(1, 8)] * 2, 0.0, 0, time.monotonic()
    for t in range(length):
        logits = [
            model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
            for ids, cache in zip(tokens, caches, strict=True)
        ]
        worst = max(worst, float((logits[0] - logits[1]).abs().max()))
        tokens = [row.argmax(-1, keepdim=True) for row in logits]
        different += int(tokens[0] != tokens[1])
        tell(began, t + 1, length)
    return worst, different, caches[0].report()


def main(argv=None):
    args = parser().parse_args(argv)
    began, failed, eps = time.monotonic(), 0, math.exp(LOG_TOLERANCE)
    for dtype in args.dtypes if "operator" in args.parts else ():
        for name, dropped, lost, row, reported in lost_by_the_operator(args.tokens, DTYPES[dtype], args.heads):
            ok = lost <= min(eps, reported * (1 + 1e-9)) or dropped == lost == 0
            failed += not ok
            print(
                f"{'ok    ' if ok else 'FAILED'} {dtype:<8} {name}: {dropped:6} of {args.tokens} keys "
                f"dropped, at most {lost:.2e} lost (row {row}), reported {reported:.2e}, eps {eps:.2e}",
                flush=True,
            )
    if "text" in args.parts:
        worst, different, report = texts(args.tokens)
        ok = worst <= 1e-3 and not different and report.is_proven
        failed += not ok
        print(f"{'ok    ' if ok else 'FAILED'} greedy text: {different} tokens differ, logits within {worst:.1e}")
        print(report)
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
