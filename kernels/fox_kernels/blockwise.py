"""Forgetting attention on a CPU: blocks of queries against the keys they keep, never a T x S matrix.

    o_i = sum_j p_ij v_j,   p_i = softmax_j(scale * q_i . k_j + lam_i - lam_j) over first_key_i <= j <= i

A block of queries attends to one contiguous range of keys in two matrix products; the backward pass recomputes p from
the saved log-sum-exp and takes five. A block has few heads, those whose ranges start at about the same key, so that
its scores stay in the cache from product to product. Keys between the common start and a head's own are masked: the
set of pairs is the one that `gates.py` chose, less the keys whose weight is certain to be `_NEGLIGIBLE`.

Letters:  B batch, H query heads, H_kv key heads, T queries, S keys, D head dim; A = B * H, all heads in the order of
          their decay, each with its own copy of its keys; N heads in a block, R its queries, W keys in its range.
Decay:    lam_i - lam_j is taken in full on the diagonal. Left of it it is split at the block's first query into a
          number per row and one per key, both <= 0, so that nothing large cancels. They ride in the product as two
          channels, `(q_i, row_i, 1) . (k_j, 1, column_j)`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .gates import LOG2_E, GateSums

BLOCK_T = 128  # queries in a block
_SCORES_PER_THREAD = 1 << 19  # in memory at a time: 2**18 costs calls, 2**21 the cache, a tenth to a fifth each
_UNEVEN = 1.2  # heads share a block if it is at most this much larger than what they need
_NEGLIGIBLE = 1e-26  # of a row's largest weight; float32 resolves 6e-8


@dataclass
class _Heads:
    """The inputs as the products want them; the first dimension is A."""

    order: torch.Tensor  # (A,) int64: which of the B * H heads this is
    kv_head: torch.Tensor  # (A,) int64: which of the B * H_kv heads has its keys
    running: torch.Tensor  # (A, S) float64, bits: lam
    high: torch.Tensor  # (A, S) float32: lam, and
    low: torch.Tensor  # (A, S) float32: what float32 leaves of it
    first: torch.Tensor  # (A, T) int32: first key of each query
    bound: torch.Tensor  # (A,) float32, bits: at least every |scale * q . k|
    queries: torch.Tensor  # (A, T, D + 2) float32: q * scale in bits, decay since the block's first query, 1
    keys: torch.Tensor  # (A, D + 2, S) float32: k, 1, decay up to the first query of the block at hand
    scratch: torch.Tensor | None = None  # room for the scores of a block


@dataclass
class _Block:
    """One block of queries and the heads whose keys start together."""

    heads: slice  # of A
    rows: slice  # queries
    keys: slice
    hidden: int  # that many of the first keys are hidden from some row of some head

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(part.stop - part.start for part in (self.heads, self.rows, self.keys))


def _channels_first(heads: int, channels: int, length: int) -> torch.Tensor:
    """An empty `(heads, channels, length)`, channels not a power of two apart: a cache has few places for those.

    At a length of 4096 that makes the backward pass a fifth faster.
    """
    return torch.empty(heads, channels, length + 16)[..., :length]


def _pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`x[index]`; `x` itself when that is all of it in order."""
    return x if torch.equal(index, torch.arange(len(x))) else x[index]


def _prepare(q: torch.Tensor, k: torch.Tensor, sums: GateSums, first_key: torch.Tensor, scale: float) -> _Heads:
    num_heads, num_queries, dim = q.shape[1:]
    num_kv_heads, num_keys = k.shape[1:3]
    running = sums.running().flatten(0, 1)
    order = running[:, -1].argsort(stable=True)
    kv_head = order.div(num_heads // num_kv_heads, rounding_mode="floor")
    running = _pick(running, order)
    high = running.float()

    of_query = running[:, num_keys - num_queries :]
    start = of_query[:, ::BLOCK_T].repeat_interleave(BLOCK_T, dim=1)[:, :num_queries]
    queries = torch.empty(len(order), num_queries, dim + 2)
    queries[..., :dim] = _pick(q.flatten(0, 1), order)
    queries[..., :dim] *= scale * LOG2_E
    queries[..., dim] = of_query - start
    queries[..., dim + 1] = 1.0
    keys = _channels_first(len(order), dim + 2, num_keys)
    keys[:, :dim] = _pick(k.flatten(0, 1), kv_head).transpose(1, 2)
    keys[:, dim] = 1.0
    first = _pick(first_key.flatten(0, 1), order)
    q_norm, k_norm = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).flatten(0, 1) for x in (q, k))
    k_norm = k_norm[kv_head].masked_fill(torch.arange(num_keys) < first[:, :1], 0.0)
    # Rounded up by more than float32 can have lost.
    bound = 1.001 * LOG2_E * abs(scale) * q_norm[order].amax(dim=1) * k_norm.amax(dim=1)
    return _Heads(order, kv_head, running, high, (running - high).float(), first, bound, queries, keys)


def _first_key_that_counts(heads: _Heads) -> torch.Tensor:
    """First key of each block of queries that can weigh more than `_NEGLIGIBLE`, `(A, blocks)` int64.

    With U the bound on |q . k|, a key weighs less than `2^(2U + decay)` of the row's own key, which every row sees.
    """
    offset = heads.running.shape[1] - heads.first.shape[1]
    limit = math.log2(_NEGLIGIBLE) - 2.0 * heads.bound.double()[:, None] - heads.running[:, offset::BLOCK_T]
    # Where the inputs are not numbers nothing is left out.
    return torch.searchsorted(-heads.running, limit.nan_to_num(nan=-math.inf))


def _blocks(heads: _Heads) -> Iterator[_Block]:
    num_heads, num_queries = heads.first.shape
    offset = heads.running.shape[1] - num_queries
    threads = torch.get_num_threads()
    # Along the queries the first key never decreases: the first row of a block has the smallest, the last the largest.
    smallest = torch.maximum(heads.first[:, ::BLOCK_T], _first_key_that_counts(heads)).T.tolist()
    for lows, start in zip(smallest, range(0, num_queries, BLOCK_T), strict=True):
        stop = min(start + BLOCK_T, num_queries)
        end = stop + offset
        largest = heads.first[:, stop - 1].tolist()
        # Padding can put the first key past the row itself.
        lows = [min(low, start + offset) for low in lows]
        most = max(1, threads * _SCORES_PER_THREAD // (stop - start))  # keys of all heads together
        head = 0
        while head < num_heads:
            last, low, needed = head + 1, lows[head], end - lows[head]
            while last < num_heads:
                lower, count = min(low, lows[last]), last + 1 - head
                size, needed = count * (end - lower), needed + end - lows[last]
                if size > _UNEVEN * needed or (size > most and count > threads):
                    break
                last, low = last + 1, lower
            hidden = max(0, min(max(largest[head:last]), end) - low)
            yield _Block(slice(head, last), slice(start, stop), slice(low, end), hidden)
            head = last


def _plan(heads: _Heads) -> list[_Block]:
    """All blocks, and `heads.scratch` for the largest: fresh memory for every block costs more than a pass over it."""
    blocks = list(_blocks(heads))
    heads.scratch = torch.empty(max(math.prod(block.shape) for block in blocks))
    return blocks


def _view(scratch: torch.Tensor, block: _Block) -> torch.Tensor:
    """The first elements of `scratch` as `(N, R, W)`."""
    return scratch[: math.prod(block.shape)].view(block.shape)


def _scores(q: torch.Tensor, k: torch.Tensor, block: _Block, heads: _Heads) -> torch.Tensor:
    """The scores of a block in bits, `(N, R, W)`, in `heads.scratch`.

    Args:
        q: Queries of the block, `(N, R, D + 2)`.
        k: Its keys, `(N, W, D + 2)`; their decay is set here.
    """
    keys, out = k.mT, _view(heads.scratch, block)
    num_rows = q.shape[1]
    left = k.shape[1] - num_rows
    if left:
        running = heads.running[block.heads, block.keys]
        torch.sub(running[:, left, None], running[:, :left], out=keys[:, -1, :left])
        out[..., :left].baddbmm_(q, keys[..., :left], beta=0)
    high, low = (x[block.heads, block.keys][:, left:] for x in (heads.high, heads.low))
    near = out[..., left:]
    torch.sub(high[:, :, None], high[:, None], out=near)
    near.add_(low[:, :, None]).sub_(low[:, None])
    near.baddbmm_(q[..., :-2], keys[:, :-2, left:])
    near.masked_fill_(torch.ones(num_rows, num_rows, dtype=torch.bool).triu_(1), float("-inf"))
    if block.hidden:
        key = torch.arange(block.keys.start, block.keys.start + block.hidden, dtype=torch.int32)
        out[..., : block.hidden].masked_fill_(key < heads.first[block.heads, block.rows, None], float("-inf"))
    return out


def _exp2(scores: torch.Tensor) -> torch.Tensor:
    """2 ** scores in place; what is too small to change a sum becomes 0.

    A CPU is slow at the edge of its floats, and decay goes there: PyTorch's exp takes 140 times longer where it
    underflows (exp2 does not), and a product with a subnormal number takes a hundred times longer than with a normal
    one. Together they made 12 heads at T = 4096 take 3.1 s forward on two Xeon cores instead of 0.5 s.
    """
    return torch.nn.functional.threshold_(scores.exp2_(), _NEGLIGIBLE, 0.0)


def _block_scores(heads: _Heads, block: _Block) -> torch.Tensor:
    q = heads.queries[block.heads, block.rows]
    return _scores(q, heads.keys[block.heads, :, block.keys].mT, block, heads)


def _unpick(x: torch.Tensor, order: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Heads back in their order: `(A, ...)` to the shape, strides and dtype of `like`."""
    return torch.empty_like(like).copy_(_pick(x, order.argsort()).view(like.shape))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sums: GateSums,
    first_key: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `o (B, H, T, D)` as `q`, and the log-sum-exp of each row, `(B, H, T)` float32, bits."""
    heads = _prepare(q, k, sums, first_key, scale)
    values = _pick(v.flatten(0, 1), heads.kv_head).float()
    out = torch.empty(*heads.first.shape, q.shape[-1])
    row_max, total = torch.empty(heads.first.shape), torch.empty(heads.first.shape)
    for block in _plan(heads):
        here = (block.heads, block.rows)
        scores = _block_scores(heads, block)
        # A row without a visible key has only -inf: keep its exponent finite, its sum is then 0.
        torch.amax(scores, dim=-1, out=row_max[here]).clamp_(min=torch.finfo(torch.float32).min)
        weights = _exp2(scores.sub_(row_max[here].unsqueeze(-1)))
        torch.sum(weights, dim=-1, out=total[here])
        torch.bmm(weights, values[block.heads, block.keys], out=out[here])
    out.div_(total.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1))
    # +inf: p = exp(score - lse) = 0 in the backward pass for a row that saw nothing.
    lse = torch.where(total > 0, row_max + total.log2(), float("inf"))
    return _unpick(out, heads.order, q), _unpick(lse, heads.order, q.new_empty(q.shape[:-1], dtype=torch.float32))


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    sums: GateSums,
    first_key: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `dq`, `dk`, `dv` in their dtypes, and the sums of dS over the queries, `(B, H, S)` float32.

    With dP = dO v^T and dS = p * (dP - rowsum(p * dP)):  dq = scale dS k,  dk = scale dS^T q,  dv = p^T dO,
    dlam_j = -sum_i dS_ij; the row sums of dS, the other half of the gradient of lam, are 0. Keys and values get their
    gradients transposed, which is faster, and the last channel of the queries, 1, sums dS on the way.
    """
    heads = _prepare(q, k, sums, first_key, scale)
    keys = _pick(k.flatten(0, 1), heads.kv_head).float()
    of_head = _pick(v.flatten(0, 1), heads.kv_head).mT
    values = _channels_first(*of_head.shape).copy_(of_head)
    grads = _pick(grad_out.flatten(0, 1), heads.order).float()
    lse = _pick(lse.flatten(0, 1), heads.order).unsqueeze(-1)
    dq = torch.empty_like(grads)
    d_keys, d_values = _channels_first(*heads.keys.shape).zero_(), _channels_first(*values.shape).zero_()
    blocks = _plan(heads)
    scratch = torch.empty_like(heads.scratch)
    for block in blocks:
        here, there = (block.heads, block.rows), (block.heads, slice(None), block.keys)
        weights = _exp2(_block_scores(heads, block).sub_(lse[here]))
        d_values[there].baddbmm_(grads[here].transpose(1, 2), weights)
        d_scores = torch.bmm(grads[here], values[there], out=_view(scratch, block)).mul_(weights)
        d_scores.addcmul_(weights, d_scores.sum(dim=-1, keepdim=True), value=-1)
        d_keys[there].baddbmm_(heads.queries[here].transpose(1, 2), d_scores)
        torch.bmm(d_scores, keys[block.heads, block.keys], out=dq[here])
    dq.mul_(scale)
    groups = q.shape[1] // k.shape[1]
    inverse = heads.order.argsort()
    d_k, d_v = (_pick(x, inverse).unflatten(0, (-1, groups)).sum(dim=1) for x in (d_keys[:, :-2], d_values))
    d_k.div_(LOG2_E)  # the queries hold it, and `scale`
    d_k, d_v = (torch.empty_like(x).copy_(y.mT.unflatten(0, x.shape[:2])) for x, y in ((k, d_k), (v, d_v)))
    column_sum = _unpick(d_keys[:, -1], heads.order, sums.within[0])
    return _unpick(dq, heads.order, q), d_k, d_v, column_sum
