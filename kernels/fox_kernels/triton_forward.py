"""Forgetting attention, forward pass, as one Triton kernel.

    o_i = sum_{j = first_i .. i} p_ij v_j,   p_i = softmax_j(scale * q_i . k_j + lam_i - lam_j),   lam = cumsum(log f)

Online softmax over tiles of keys (FlashAttention-2, arXiv:2307.08691, algorithm 1); the bias is that of the
Forgetting Transformer (arXiv:2503.02130). `first_i` hides padding, closed gates and what pruning dropped: see
gates.py.

Letters:  B batch, H query heads, G query heads per key head, T queries (the last of the keys), S keys, D head dim.
Tensors:  q, o (B, H, T, D);  k, v (B, H // G, S, D);  lam (2, B, H, S) high and low part;  first_key, lse (B, H, T).
Names:    `x_ptr` points at the whole tensor, `x` is this program's tile of it, t, s, d are index vectors.
Units:    scores, lam and lse are in bits inside the kernels (exp2 is one instruction), in nats everywhere outside.
Frame:    away from the diagonal lam_i - lam_j is split at lam_ref of the tile's first query; lam_ref - lam_j is one
          number per key, and lam_i - lam_ref (`-to_frame`) is constant in a row and leaves the softmax. On the
          diagonal, where the two parts have opposite signs, float32 inputs take the difference in full; the 2e-4 bits
          that a decay of 3000 bits within a tile costs otherwise are below the rounding of 16-bit inputs. The running
          maximum is never split.
"""

import math

import torch
import triton
import triton.language as tl

from .gates import GateSums, split_in_two
from .tile_sizes import TileSizes, architecture, forward_tiles, padded_head_dim

LOG2_E = 1.0 / math.log(2.0)


@triton.jit
def load_tile(ptr, row, num_rows, stride, d, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """(len(row), BLOCK_D) rows of a matrix, zeros outside of it."""
    at = ptr + row[:, None].to(tl.int64) * stride + d[None, :]
    if CHECK_ROWS:
        if BLOCK_D != D:
            return tl.load(at, mask=(row[:, None] < num_rows) & (d[None, :] < D), other=0.0)
        return tl.load(at, mask=row[:, None] < num_rows, other=0.0)
    if BLOCK_D != D:
        return tl.load(at, mask=d[None, :] < D, other=0.0)
    return tl.load(at)


@triton.jit
def _accumulate(
    acc, row_max, row_sum, q, k_ptr, v_ptr, k_stride, v_stride, lam_ptr, lam_low, lam_ref_high, lam_ref_low,
    lam_t_high, lam_t_low, to_frame, first, t_key, start, d, S, score_scale,
    MASKED: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over the keys start .. start + BLOCK_S - 1."""
    s = start + tl.arange(0, BLOCK_S)
    k = load_tile(k_ptr, s, S, k_stride, d, D, BLOCK_D, MASKED)
    if MASKED:
        high = tl.load(lam_ptr + s, mask=s < S, other=0.0)
        low = tl.load(lam_ptr + lam_low + s, mask=s < S, other=0.0)
    else:
        high = tl.load(lam_ptr + s)
        low = tl.load(lam_ptr + lam_low + s)
    # Scale after the product, in fp32: scaling q would round it once more.
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
    if EXACT:
        score += (lam_t_high[:, None] - high[None, :]) + (lam_t_low[:, None] - low[None, :])
    else:
        score += ((lam_ref_high - high) + (lam_ref_low - low))[None, :]
    if MASKED:
        score = tl.where((s[None, :] >= first[:, None]) & (s[None, :] <= t_key[:, None]), score, float("-inf"))
    tile_max = tl.max(score, axis=1)
    new_max = tl.maximum(row_max, tile_max if EXACT else tile_max - to_frame)
    # A row that has seen no key yet stays at -inf; subtracting that would give NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    p = tl.math.exp2(score - (shift if EXACT else shift + to_frame)[:, None])
    rescale = tl.math.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(p, axis=1)
    v = load_tile(v_ptr, s, S, v_stride, d, D, BLOCK_D, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def forgetting_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lam_ptr, first_key_ptr, lse_ptr, score_scale, T, S, H, num_tiles,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    o_stride_b, o_stride_h, o_stride_t, lam_low,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    # 1. Which tile is this program's? The last queries have the most keys: start them first.
    program = tl.program_id(0)
    start_t = (num_tiles - 1 - program % num_tiles) * BLOCK_T
    batch_head = (program // num_tiles).to(tl.int64)
    batch, head = batch_head // H, batch_head % H
    t = start_t + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    offset = S - T
    t_key = t + offset
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + (head // G) * k_stride_h
    v_ptr += batch * v_stride_b + (head // G) * v_stride_h
    o_ptr += batch * o_stride_b + head * o_stride_h
    lam_ptr += batch_head * S
    first_key_ptr += batch_head * T

    # 2. What stays for the whole loop.
    q = load_tile(q_ptr, t, T, q_stride_t, d, D, BLOCK_D, True)
    first = tl.load(first_key_ptr + t, mask=t < T, other=0)
    lowest = tl.load(first_key_ptr + start_t)
    highest = tl.load(first_key_ptr + tl.minimum(start_t + BLOCK_T, T) - 1)
    lam_t_high = tl.load(lam_ptr + t_key, mask=t < T, other=0.0)
    lam_t_low = tl.load(lam_ptr + lam_low + t_key, mask=t < T, other=0.0)
    lam_ref_high = tl.load(lam_ptr + start_t + offset)
    lam_ref_low = tl.load(lam_ptr + lam_low + start_t + offset)
    to_frame = (lam_ref_high - lam_t_high) + (lam_ref_low - lam_t_low)
    row_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)

    # 3. The diagonal: from the tile of keys that holds the first query's own, so that every row has a finite maximum.
    diagonal = (start_t + offset) // BLOCK_S * BLOCK_S
    first_tile = lowest // BLOCK_S * BLOCK_S
    for start in tl.range(
        tl.maximum(diagonal, first_tile), tl.minimum(start_t + BLOCK_T + offset, S), BLOCK_S, num_stages=1
    ):
        acc, row_max, row_sum = _accumulate(
            acc, row_max, row_sum, q, k_ptr, v_ptr, k_stride_s, v_stride_s, lam_ptr, lam_low, lam_ref_high,
            lam_ref_low, lam_t_high, lam_t_low, to_frame, first, t_key, start, d, S, score_scale, True,
            PRECISION != "tf32", D, BLOCK_D, BLOCK_S, PRECISION,
        )  # fmt: skip

    # 4. The keys that every row sees, without a mask.
    full = tl.minimum(tl.maximum((highest + BLOCK_S - 1) // BLOCK_S * BLOCK_S, first_tile), diagonal)
    for start in tl.range(full, diagonal, BLOCK_S, num_stages=NUM_STAGES):
        acc, row_max, row_sum = _accumulate(
            acc, row_max, row_sum, q, k_ptr, v_ptr, k_stride_s, v_stride_s, lam_ptr, lam_low, lam_ref_high,
            lam_ref_low, lam_t_high, lam_t_low, to_frame, first, t_key, start, d, S, score_scale, False, False, D,
            BLOCK_D, BLOCK_S, PRECISION,
        )  # fmt: skip

    # 5. Tiles that only some rows see, or see in part: padding and closed gates.
    for start in tl.range(first_tile, full, BLOCK_S, num_stages=1):
        acc, row_max, row_sum = _accumulate(
            acc, row_max, row_sum, q, k_ptr, v_ptr, k_stride_s, v_stride_s, lam_ptr, lam_low, lam_ref_high,
            lam_ref_low, lam_t_high, lam_t_low, to_frame, first, t_key, start, d, S, score_scale, True, False, D,
            BLOCK_D, BLOCK_S, PRECISION,
        )  # fmt: skip

    # 6. Normalise and store. A row that saw nothing is 0; its log-sum-exp is +inf so that p = 0 in the backward pass.
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("inf"), row_max + tl.math.log2(row_sum))
    tl.store(lse_ptr + batch_head * T + t, lse, mask=t < T)
    out = acc / row_sum[:, None]
    at = o_ptr + t[:, None].to(tl.int64) * o_stride_t + d[None, :]
    tl.store(at, out.to(o_ptr.dtype.element_ty), mask=(t[:, None] < T) & (d[None, :] < D))


def dot_precision(dtype: torch.dtype) -> str:
    """Of `tl.dot`: float32 in three tf32 products, right to about 2**-22 and many times faster than full ones.

    AMD has no such mode and multiplies in full precision. 16-bit inputs ignore it.
    """
    if dtype != torch.float32:
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sums: GateSums,
    first_key: torch.Tensor,
    scale: float,
    tiles: TileSizes | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel. Returns `o (B, H, T, D)` strided as `q`, and `lse (B, H, T)` float32 in bits."""
    running_bits = split_in_two(sums.running())
    batch, num_heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    tiles = tiles or forward_tiles(dim, q.element_size(), architecture(q.device), num_queries)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    num_tiles = triton.cdiv(num_queries, tiles.block_t)
    forgetting_attention_forward_kernel[(num_tiles * batch * num_heads,)](
        q, k, v, out, running_bits, first_key, lse, scale * LOG2_E, num_queries, num_keys, num_heads, num_tiles,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], running_bits.stride(0),
        G=num_heads // k.shape[1], D=dim, BLOCK_D=padded_head_dim(dim), BLOCK_T=tiles.block_t, BLOCK_S=tiles.block_s,
        PRECISION=dot_precision(q.dtype), NUM_STAGES=tiles.num_stages, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse
