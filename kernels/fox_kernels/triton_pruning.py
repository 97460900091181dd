"""Adaptive computation pruning as Triton kernels: `pruning.prune` in at most two launches.

A program decides for 8 blocks of queries at once and writes the first key of each of their rows. Nothing is searched
serially, and every operation is done as in pruning.py, so that both choose the same blocks.

Letters:  B batch, H query heads, H_kv key heads, G query heads per key head, T queries (the last of the keys), S keys,
    D head dim, M blocks of queries, N blocks of `GATE_BLOCK` keys.
"""

import math

import torch
import triton
import triton.language as tl

from .gates import GateSums
from .tile_sizes import padded_head_dim

NORM_CHUNK = 1024  # rows of q or k whose largest norm one program finds
ROW_BLOCKS = 8  # blocks of queries of one program
BLOCK_T = tl.constexpr(128)
BLOCK_S = tl.constexpr(64)
GATE_BLOCK = tl.constexpr(128)
PAPER_SLACK = tl.constexpr(2.0**-16)
LOG2_E = tl.constexpr(1.4426950408889634)
NO_ROW = tl.constexpr(-1e300)  # below every running sum, and finite: -inf would subtract to NaN


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _largest_norm(
    ptr, start, end, first_valid, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Largest Euclidean norm of the rows start .. end - 1 that are not before first_valid; NaN counts as infinite.

    In float64: its sums are the same in any order once they are rounded to float32.
    """
    d = tl.arange(0, BLOCK_D)
    largest = tl.zeros([ROWS], tl.float64)
    for first in tl.range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        valid = (row < end) & (row >= first_valid)
        at = ptr + row[:, None].to(tl.int64) * stride + d[None, :]
        x = tl.load(at, mask=valid[:, None] & (d[None, :] < D), other=0.0).to(tl.float64)
        square = tl.sum(x * x, axis=1)
        largest = tl.maximum(largest, tl.where(square != square, float("inf"), square))
    return tl.sqrt(tl.max(largest, axis=0)).to(tl.float32)


@triton.jit
def largest_norms_kernel(
    q_ptr, k_ptr, key_start_ptr, norm_ptr, T, S, H, H_KV, num_chunks,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s,
    HAS_KEY_START: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of every chunk of rows the largest norm; norm (B, H + H_kv, chunks), the heads of q before those of k."""
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // (H + H_KV), batch_head % (H + H_KV)
    start = tl.program_id(1) * CHUNK
    padding = 0
    if HAS_KEY_START:
        padding = tl.load(key_start_ptr + batch).to(tl.int32)
    if head < H:
        norm = _largest_norm(
            q_ptr + batch * q_stride_b + head * q_stride_h, start, tl.minimum(start + CHUNK, T), padding - (S - T),
            q_stride_t, D, BLOCK_D, ROWS,
        )  # fmt: skip
    else:
        norm = _largest_norm(
            k_ptr + batch * k_stride_b + (head - H) * k_stride_h, start, tl.minimum(start + CHUNK, S), padding,
            k_stride_s, D, BLOCK_D, ROWS,
        )  # fmt: skip
    tl.store(norm_ptr + batch_head * num_chunks + tl.program_id(1), norm)


@triton.jit
def _largest_of(ptr, count, WIDTH: tl.constexpr):
    largest = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, count, WIDTH):
        at = start + tl.arange(0, WIDTH)
        largest = tl.maximum(largest, tl.load(ptr + at, mask=at < count, other=0.0))
    return tl.max(largest, axis=0)


@triton.jit
def _running(within_ptr, starts_ptr, s, mask, within_low, starts_low):
    """lam at the positions s, bits, float64."""
    n = s // GATE_BLOCK
    within = tl.load(within_ptr + s, mask=mask, other=0.0).to(tl.float64)
    within += tl.load(within_ptr + within_low + s, mask=mask, other=0.0).to(tl.float64)
    starts = tl.load(starts_ptr + n, mask=mask, other=0.0).to(tl.float64)
    starts += tl.load(starts_ptr + starts_low + n, mask=mask, other=0.0).to(tl.float64)
    return within + starts


@triton.jit
def _store_first_keys(first_visible_ptr, first_key_ptr, num_dropped, m, S, T):
    """Write the first key of the rows of the blocks m; both pointers are at the head."""
    # A block that reaches past its first query holds a decay of 0: never drop it, whatever the gates are.
    num_dropped = tl.minimum(num_dropped, (S - T + m * BLOCK_T) // BLOCK_S)
    t = m[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    first = tl.load(first_visible_ptr + t, mask=t < T, other=0)
    tl.store(first_key_ptr + t, tl.maximum(first, num_dropped[:, None] * BLOCK_S), mask=t < T)


@triton.jit
def paper_rule_kernel(
    within_ptr, starts_ptr, first_visible_ptr, bound_ptr, norm_ptr, first_key_ptr, scale, budget, T, S, N, M, H, H_KV,
    num_chunks, num_steps, within_low, starts_low, bound_stride_b, bound_stride_h,
    HAS_BOUND: tl.constexpr, ROW_BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`first_key` under the paper's rule, see `pruning.first_kept_key`.

    The same steps of a binary search for every block: a larger limit ends further right even where the block ends are
    not in order, so first_key never decreases, whatever the gates are.
    """
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // H, batch_head % H
    within_ptr += batch_head * S
    starts_ptr += batch_head * N

    # 1. The threshold of this head, in bits.
    if HAS_BOUND:
        bound = tl.load(bound_ptr + batch * bound_stride_b + head * bound_stride_h).to(tl.float32)
    else:
        heads = batch * (H + H_KV)
        q_norm = _largest_of(norm_ptr + (heads + head) * num_chunks, num_chunks, WIDTH)
        k_norm = _largest_of(norm_ptr + (heads + H + head // (H // H_KV)) * num_chunks, num_chunks, WIDTH)
        bound = scale * q_norm * k_norm
    threshold = (2.0 * bound + budget) * -(1.0 + PAPER_SLACK) * LOG2_E
    threshold = tl.where(threshold != threshold, float("-inf"), threshold)

    # 2. lam at the first query of each block, or at a later block's where that is larger: a gate above 0.
    m = tl.program_id(1) * ROW_BLOCKS + tl.arange(0, ROW_BLOCKS)
    running = _running(within_ptr, starts_ptr, S - T + m * BLOCK_T, m < M, within_low, starts_low)
    running = tl.associative_scan(tl.where(m < M, running, NO_ROW), 0, _larger, reverse=True)
    later = tl.full([WIDTH], NO_ROW, tl.float64)
    for start in tl.range((tl.program_id(1) + 1) * ROW_BLOCKS, M, WIDTH):
        other = start + tl.arange(0, WIDTH)
        lam = _running(within_ptr, starts_ptr, S - T + other * BLOCK_T, other < M, within_low, starts_low)
        later = tl.maximum(later, tl.where(other < M, lam, NO_ROW))
    limit = threshold.to(tl.float64) - tl.maximum(running, tl.max(later, axis=0))

    # 3. Blocks of keys whose end has -lam below the limit.
    low = tl.zeros([ROW_BLOCKS], tl.int32)
    high = tl.zeros([ROW_BLOCKS], tl.int32) + S // BLOCK_S
    for _ in tl.range(0, num_steps):
        middle = (low + high) // 2
        searching = low < high
        end = _running(within_ptr, starts_ptr, middle * BLOCK_S + BLOCK_S - 1, searching, within_low, starts_low)
        dropped = -end < limit
        low = tl.where(searching & dropped, middle + 1, low)
        high = tl.where(searching & ~dropped, middle, high)

    # 4. The first key of every row.
    _store_first_keys(first_visible_ptr + batch_head * T, first_key_ptr + batch_head * T, low, m, S, T)


def _largest_norms(q: torch.Tensor, k: torch.Tensor, key_start: torch.Tensor | None) -> torch.Tensor:
    """Largest norms of chunks of rows, `(B, H + H_kv, chunks)` float32, the heads of q before those of k."""
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    num_chunks = triton.cdiv(num_keys, NORM_CHUNK)
    norms = torch.empty(batch, num_heads + num_kv_heads, num_chunks, dtype=torch.float32, device=q.device)
    largest_norms_kernel[(batch * (num_heads + num_kv_heads), num_chunks)](
        q, k, q if key_start is None else key_start, norms, num_queries, num_keys, num_heads, num_kv_heads, num_chunks,
        *q.stride()[:3], *k.stride()[:3], HAS_KEY_START=key_start is not None, D=dim, BLOCK_D=padded_head_dim(dim),
        ROWS=max(16, 4096 // padded_head_dim(dim)), CHUNK=NORM_CHUNK,
    )  # fmt: skip
    return norms


def paper_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    sums: GateSums,
    first_visible: torch.Tensor,
    key_start: torch.Tensor | None,
    *,
    scale: float,
    log_tolerance: float,
    logit_bound: torch.Tensor | None,
) -> torch.Tensor:
    """See `pruning.prune`: one launch with a `logit_bound`, two without."""
    batch, num_heads, num_queries, _ = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    num_blocks = triton.cdiv(num_queries, BLOCK_T.value)
    bound = norms = sums.starts  # the one that is not given is never read
    bound_strides, num_chunks = (0, 0), 0
    if logit_bound is None:
        norms = _largest_norms(q, k, key_start)
        num_chunks = norms.shape[-1]
    else:
        bound = logit_bound.expand(batch, num_heads)
        bound_strides = bound.stride()
    first_key = torch.empty_like(first_visible)
    paper_rule_kernel[(batch * num_heads, triton.cdiv(num_blocks, ROW_BLOCKS))](
        *sums, first_visible, bound, norms, first_key, abs(scale), math.log(num_keys) - log_tolerance, num_queries,
        num_keys, sums.starts.shape[-1], num_blocks, num_heads, num_kv_heads, num_chunks,
        (num_keys // BLOCK_S.value).bit_length(), sums.within.stride(0), sums.starts.stride(0), *bound_strides,
        HAS_BOUND=logit_bound is not None, ROW_BLOCKS=ROW_BLOCKS, WIDTH=256,
    )  # fmt: skip
    return first_key
