"""The largest norms of queries and keys, which bound the scores where no bound is given.

Letters:  B batch, H query heads, H_kv key heads, T queries (the last of the keys), S keys, D head dim.
"""

import torch
import triton
import triton.language as tl

from .launch import launch
from .tile_sizes import padded_head_dim

NORM_CHUNK = 1024  # rows of q or k whose largest norm one program finds


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
def largest_of(ptr, count, WIDTH: tl.constexpr):
    largest = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, count, WIDTH):
        at = start + tl.arange(0, WIDTH)
        largest = tl.maximum(largest, tl.load(ptr + at, mask=at < count, other=0.0))
    return tl.max(largest, axis=0)


def largest_norms(q: torch.Tensor, k: torch.Tensor, key_start: torch.Tensor | None) -> torch.Tensor:
    """Largest norms of chunks of rows, `(B, H + H_kv, chunks)` float32, the heads of q before those of k.

    A q without heads leaves those of k.
    """
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    num_chunks = -(-num_keys // NORM_CHUNK)  # triton.cdiv takes 5 us
    norms = torch.empty(batch, num_heads + num_kv_heads, num_chunks, dtype=torch.float32, device=q.device)
    launch(
        largest_norms_kernel, (batch * (num_heads + num_kv_heads), num_chunks),
        (q, k, q if key_start is None else key_start, norms),
        (num_queries, num_keys, num_heads, num_kv_heads, num_chunks, *q.stride()[:3], *k.stride()[:3]),
        HAS_KEY_START=key_start is not None, D=dim, BLOCK_D=padded_head_dim(dim),
        ROWS=max(16, 4096 // padded_head_dim(dim)), CHUNK=NORM_CHUNK,
    )  # fmt: skip
    return norms
