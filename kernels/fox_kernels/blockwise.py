"""Forgetting attention on a CPU: blocks of queries against the keys they keep, never a T x S matrix.

    o_i = sum_j p_ij v_j,   p_i = softmax_j(scale * q_i . k_j + lam_i - lam_j) over first_key_i <= j <= i

A block of queries attends to one contiguous range of keys in three matrix products. Heads whose range starts at about
the same key share them; keys between the common start and a head's own are masked, so the set of pairs is exactly the
one that `gates.py` chose. The backward pass recomputes p from the saved log-sum-exp.

Letters:  B batch, H query heads, K key heads, G query heads per key head, T queries, S keys, D head dim; N heads in a
          group of equal range, R queries in a block, W keys in its range.
Decay:    lam_i - lam_j is taken in full on the diagonal; left of it it is split at the block's first query into one
          number per row and one per key, both <= 0, so that nothing large cancels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .gates import LOG2_E, GateSums

BLOCK_T = 128  # queries in a block; 256 from T = 8192 on, where fewer Python steps outweigh the larger diagonal
_MAX_GROUPS = 8  # more groups skip more keys, fewer mean larger products
_MAX_SCORES = 1 << 21  # scores in memory at a time; 2**18 is slower by a third, 2**28 by nothing
_NEGLIGIBLE = 1e-26  # of a row's largest weight; float32 resolves 6e-8


@dataclass
class _Block:
    """One block of queries and the heads whose keys start together."""

    rows: slice  # queries
    keys: slice
    heads: slice | torch.Tensor  # of the B * K
    bias: torch.Tensor  # (N, G, R, W): lam_i - lam_j, bits; the scores are accumulated onto it
    left: int  # columns before the diagonal
    future: torch.Tensor  # (R, W - left) bool: key after query
    past: torch.Tensor | None  # (N, G, R, columns) bool: key before the query's first, in the first columns


def _decay(running: torch.Tensor, rows: int, left: int, dtype: torch.dtype) -> torch.Tensor:
    """lam_i - lam_j of the last `rows` positions against all W, `(N, G, rows, W)`; `left` keys come before them all.

    `running` is `(N, G, W)` float64. Float32 differences of a high and a low part are four times faster than float64
    ones.
    """
    high = running.to(dtype)
    low = (running - high).to(dtype)
    reference = running[..., -rows, None]
    decay = torch.empty(*running.shape[:-1], rows, running.shape[-1], dtype=dtype)
    if left:
        row = (running[..., -rows:] - reference).to(dtype)
        torch.add(row[..., None], (reference - running[..., :left]).to(dtype)[..., None, :], out=decay[..., :left])
    near = decay[..., left:]
    torch.sub(high[..., -rows:, None], high[..., None, left:], out=near)
    near.add_(low[..., -rows:, None]).sub_(low[..., None, left:])
    return decay


def _blocks(sums: GateSums, first_key: torch.Tensor, num_kv_heads: int, dtype: torch.dtype) -> Iterator[_Block]:
    batch, num_heads, num_queries = first_key.shape
    num_keys = sums.within.shape[-1]
    offset = num_keys - num_queries
    groups = num_heads // num_kv_heads
    running = sums.running().view(batch * num_kv_heads, groups, num_keys)
    first = first_key.view(batch * num_kv_heads, groups, num_queries)
    size = BLOCK_T if num_queries < 8192 else 2 * BLOCK_T
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        end = stop + offset
        # first_key never decreases: the first row of the block has the smallest. Padding can put it past the row
        # itself.
        lowest = first[:, :, start].amin(dim=1).clamp_(max=start + offset)  # (B * K,)
        step = max(64, -(-end // (64 * _MAX_GROUPS)) * 64)
        bucket = lowest.div(step, rounding_mode="floor") if len(lowest.unique()) > 2 * _MAX_GROUPS else lowest
        query = torch.arange(start + offset, end)
        for value in bucket.unique().tolist():
            members = (bucket == value).nonzero().flatten()
            low = int(lowest[members].min())
            left = max(start + offset - low, 0)
            key = torch.arange(low, end)
            future = key[left:] > query[:, None]
            for heads in members.split(max(1, _MAX_SCORES // (groups * (stop - start) * (end - low)))):
                first_head, last_head = int(heads[0]), int(heads[-1])
                if last_head - first_head == len(heads) - 1:
                    heads = slice(first_head, last_head + 1)  # a view instead of a copy
                mine = first[heads, :, start:stop]
                columns = int(mine.max()) - low
                past = key[:columns] < mine[..., None] if columns > 0 else None
                bias = _decay(running[heads, :, low:end], stop - start, left, dtype)
                yield _Block(slice(start, stop), slice(low, end), heads, bias, left, future, past)


def _take(x: torch.Tensor, block: _Block, part: slice) -> torch.Tensor:
    """Rows `part` of the block's heads; `x` is (B * K, ..., L, C) or (B * K, ..., L)."""
    return x[block.heads][..., part, :]


def _scores(q: torch.Tensor, k: torch.Tensor, block: _Block, scale: float) -> torch.Tensor:
    """(N, G, R, W) scores of a block, in place of its bias; `q` is (N, G, R, D), `k` (N, W, D)."""
    heads, groups, rows, dim = q.shape
    scores = block.bias
    scores.view(heads, groups * rows, -1).baddbmm_(
        q.reshape(heads, groups * rows, dim), k.transpose(1, 2), alpha=scale * LOG2_E
    )
    scores[..., block.left :].masked_fill_(block.future, float("-inf"))
    if block.past is not None:
        scores[..., : block.past.shape[-1]].masked_fill_(block.past, float("-inf"))
    return scores


def _exp2(scores: torch.Tensor) -> torch.Tensor:
    """2 ** scores in place; what is too small to change a sum becomes 0.

    A CPU is slow at the edge of its floats, and decay goes there: PyTorch's exp takes 140 times longer where it
    underflows (exp2 does not), and a product with a subnormal number takes a hundred times longer than with a normal
    one. Together they made 12 heads at T = 4096 take 3.1 s forward on two Xeon cores instead of 0.5 s.
    """
    return torch.nn.functional.threshold_(scores.exp2_(), _NEGLIGIBLE, 0.0)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    # Half precision products are slower on most CPUs and the softmax needs float32 anyway.
    return torch.promote_types(dtype, torch.float32)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sums: GateSums,
    first_key: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `o (B, H, T, D)` as `q`, and the log-sum-exp of each row, `(B, H, T)` float32, bits."""
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads = k.shape[1]
    groups = num_heads // num_kv_heads
    work = _work_dtype(q.dtype)
    qs = q.reshape(batch * num_kv_heads, groups, num_queries, dim)
    ks, vs = (x.reshape(batch * num_kv_heads, -1, dim) for x in (k, v))
    out = torch.zeros(qs.shape, dtype=work)
    # +inf: p = exp(score - lse) = 0 in the backward pass for a row that saw nothing.
    lse = torch.full(qs.shape[:-1], float("inf"), dtype=work)
    for block in _blocks(sums, first_key, num_kv_heads, work):
        scores = _scores(_take(qs, block, block.rows).to(work), _take(ks, block, block.keys).to(work), block, scale)
        # A row without a visible key has only -inf: keep its exponent finite, its sum is then 0.
        row_max = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(work).min)
        weights = _exp2(scores.sub_(row_max))
        total = weights.sum(dim=-1, keepdim=True)
        heads, _, rows, width = weights.shape
        mixed = torch.bmm(weights.view(heads, groups * rows, width), _take(vs, block, block.keys).to(work))
        mixed = mixed.view(heads, groups, rows, dim).div_(total.clamp(min=torch.finfo(work).tiny))
        row_lse = torch.where(total > 0, row_max + total.log2(), float("inf")).squeeze(-1)
        out[block.heads, :, block.rows] = mixed
        lse[block.heads, :, block.rows] = row_lse
    out = torch.empty_like(q).copy_(out.view(q.shape))
    return out, lse.view(q.shape[:-1])


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
    dlam_j = -sum_i dS_ij; the row sums of dS, the other half of the gradient of lam, are 0.
    """
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    groups = num_heads // num_kv_heads
    work = _work_dtype(q.dtype)
    flat_q = (batch * num_kv_heads, groups, num_queries, dim)
    qs, grads = q.reshape(flat_q), grad_out.reshape(flat_q)
    ks, vs = (x.reshape(batch * num_kv_heads, num_keys, dim) for x in (k, v))
    row_lse = lse.reshape(flat_q[:-1]).unsqueeze(-1)
    dq = torch.zeros(flat_q, dtype=work)
    dk, dv = torch.zeros(ks.shape, dtype=work), torch.zeros(ks.shape, dtype=work)
    column_sum = torch.zeros(batch * num_kv_heads, groups, num_keys, dtype=work)
    for block in _blocks(sums, first_key, num_kv_heads, work):
        q_rows, grad_rows = (_take(x, block, block.rows).to(work) for x in (qs, grads))
        k_cols, v_cols = (_take(x, block, block.keys).to(work) for x in (ks, vs))
        heads, _, rows, _ = q_rows.shape
        weights = _exp2(_scores(q_rows, k_cols, block, scale).sub_(_take(row_lse, block, block.rows)))
        flat = (heads, groups * rows)
        weights_flat, grad_flat = weights.view(*flat, -1), grad_rows.reshape(*flat, dim)
        d_v = torch.bmm(weights_flat.transpose(1, 2), grad_flat)
        d_scores = torch.bmm(grad_flat, v_cols.transpose(1, 2)).mul_(weights_flat)
        d_scores.addcmul_(weights_flat, d_scores.sum(dim=-1, keepdim=True), value=-1)
        d_k = torch.bmm(d_scores.transpose(1, 2), q_rows.reshape(*flat, dim)).mul_(scale)
        d_q = torch.bmm(d_scores, k_cols).mul_(scale).view(q_rows.shape)
        dq[block.heads, :, block.rows] = d_q
        dk[block.heads, block.keys] += d_k
        dv[block.heads, block.keys] += d_v
        column_sum[block.heads, :, block.keys] += d_scores.view(weights.shape).sum(dim=-2)
    d_q = torch.empty_like(q).copy_(dq.view(q.shape))
    d_k, d_v = (torch.empty_like(x).copy_(y.view(x.shape)) for x, y in ((k, dk), (v, dv)))
    return d_q, d_k, d_v, column_sum.view(batch, num_heads, num_keys)
