"""Forgetting attention, forward pass, as one Triton kernel.

    o_i = sum_{j = first_i .. i} p_ij v_j,   p_i = softmax_j(scale * q_i . k_j + lam_i - lam_j),   lam = cumsum(log f)

A program owns a tile of queries. It begins on the diagonal with an online softmax (FlashAttention-2,
arXiv:2307.08691, algorithm 1), after which every row has a maximum that includes its own key. From there leftwards
the decay only lowers the scores, so the maximum stays as it is: in bfloat16 that of all the tile's rows, the *anchor*,
one fused multiply-add and one exp2 a score; in other dtypes, and where the rows lie further apart than float32 holds,
each row's own. What that takes for granted is checked: a tile whose sum outgrew `LARGEST_SUM` is done again with a
running maximum. All see the same pairs. The bias is that of the Forgetting Transformer (arXiv:2503.02130). `first_i`
hides padding, closed gates and what pruning dropped: see gates.py.

Letters:  B batch, H query heads, G query heads per key head, T queries (the last of the keys), S keys, D head dim,
          N blocks of `GATE_BLOCK` keys.
Tensors:  q, o (B, H, T, D);  k, v (B, H // G, S, D);  within (2, B, H, S) and starts (2, B, H, N), high and low part,
          see `gates.GateSums`;  first_key, lse (B, H, T).
Names:    `x_ptr` points at a whole tensor, `x` is a tile of it, t, s, d are index vectors. With DESCRIPTORS q, k, v
          and o are tensor descriptors (the tensor memory accelerator of Hopper and later), else pointers.
Units:    scores, lam and lse are in bits inside the kernels (exp2 is one instruction), in nats everywhere outside.
Frame:    lam_i - lam_j is split at `ref`, lam of the tile's first query; ref - lam_j is one number per key, and
          lam_i - ref (`-to_frame`) is constant in a row and leaves the softmax. On the diagonal, where the two parts
          have opposite signs, float32 inputs take the difference in full; the 2e-4 bits that a decay of 3000 bits
          within a tile costs otherwise are below the rounding of 16-bit inputs.
"""

import os

import torch
import triton
import triton.language as tl

from .gates import GATE_BLOCK, LOG2_E, GateSums
from .launch import described, launch
from .tile_sizes import TileSizes, architecture, descriptor_strides, forward_tiles, padded_head_dim

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4: pointers do everything
    TensorDescriptor = None
try:
    from . import gluon_forward
except (ImportError, AttributeError):  # Gluon is young and changes its names; before Triton 3.6 it lacks what we need
    gluon_forward = None

BLOCK = tl.constexpr(GATE_BLOCK)

# Bits. A row whose maximum lies this far below the anchor still has 2**-60 of weight, and what exp2 flushes to zero
# is below 2**-126.
LARGEST_SPREAD = tl.constexpr(60.0)
# Of the weights of a row, relative to its anchor: far from where its products overflow. A weight must fit float16.
LARGEST_SUM = 2.0**60
LARGEST_SUM_FLOAT16 = 2.0**15
# Programs that look for marked tiles, of which there is hardly ever one.
MARKED_PROGRAMS = 264


@triton.jit
def load_tile(
    x, batch, head, start, num_rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    CHECK_ROWS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """(BLOCK_ROWS, BLOCK_D) rows of a matrix from `start` on, zeros outside of it; a pointer is at its head."""
    if DESCRIPTORS:
        tile = tl.reshape(x.load([batch, head, start, 0]), [BLOCK_ROWS, BLOCK_D])
    else:
        row = start + tl.arange(0, BLOCK_ROWS)
        d = tl.arange(0, BLOCK_D)
        at = x + row[:, None].to(tl.int64) * stride + d[None, :]
        if CHECK_ROWS and BLOCK_D != D:
            tile = tl.load(at, mask=(row[:, None] < num_rows) & (d[None, :] < D), other=0.0)
        elif CHECK_ROWS:
            tile = tl.load(at, mask=row[:, None] < num_rows, other=0.0)
        elif BLOCK_D != D:
            tile = tl.load(at, mask=d[None, :] < D, other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def at_head(x, batch, head, stride_b, stride_h, DESCRIPTORS: tl.constexpr):
    """A pointer moved to the matrix of one head; a descriptor finds it by itself."""
    if DESCRIPTORS:
        at = x
    else:
        at = x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return at


@triton.jit
def store_tile(
    ptr, x, batch, head, start, num_rows, stride_b, stride_h, stride_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    at = at_head(ptr, batch, head, stride_b, stride_h, False) + row[:, None].to(tl.int64) * stride_row + d[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(row[:, None] < num_rows) & (d[None, :] < D))


@triton.jit
def load_pair(ptr, low, at):
    """High and low part of one number."""
    return tl.load(ptr + at), tl.load(ptr + low + at)


@triton.jit
def _bias(
    within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, shift, start, S,
    BLOCK_S: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """ref - lam_j - shift of the keys start .. start + BLOCK_S - 1, which lie in one block, `(BLOCK_S,)` bits."""
    s = start + tl.arange(0, BLOCK_S)
    within = tl.load(within_ptr + s, mask=s < S, other=0.0) if MASKED else tl.load(within_ptr + s)
    start_high, start_low = load_pair(starts_ptr, starts_low, start // BLOCK)
    if EXACT:
        low = tl.load(within_ptr + within_low + s, mask=s < S, other=0.0)
        # What is large cancels first: a block's own decay against the step to the next block.
        bias = ((ref_start - start_high) - within + ref_within - shift) + ((ref_low - start_low) - low)
    else:
        bias = ((ref_start - start_high) + ref_within + (ref_low - start_low) - shift) - within
    return bias


@triton.jit
def _hide(score, first_key_ptr, start_t, start, T, S, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Scores of pairs that the row does not see become -inf; a row past the last query sees nothing."""
    t = start_t + tl.arange(0, BLOCK_T)
    s = start + tl.arange(0, BLOCK_S)
    first = tl.load(first_key_ptr + t, mask=t < T, other=2147483647)
    return tl.where((s[None, :] >= first[:, None]) & (s[None, :] <= (t + S - T)[:, None]), score, float("-inf"))


@triton.jit
def _row_sums(
    within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, start_t, T, S,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """lam of the rows in three parts: the start of their block, what follows, and the low parts of both; ref - lam."""
    t = start_t + tl.arange(0, BLOCK_T)
    at = t + S - T
    start = tl.load(starts_ptr + at // BLOCK, mask=t < T, other=0.0)
    within = tl.load(within_ptr + at, mask=t < T, other=0.0)
    low = tl.load(within_ptr + within_low + at, mask=t < T, other=0.0)
    low += tl.load(starts_ptr + starts_low + at // BLOCK, mask=t < T, other=0.0)
    return start, within, low, (ref_start - start) + (ref_within - within) + (ref_low - low)


@triton.jit
def full_decay(
    within_ptr, starts_ptr, within_low, starts_low, row_start, row_within, row_low, start, S, BLOCK_S: tl.constexpr
):
    """lam_i - lam_j of the rows of `_row_sums` and the keys start .. start + BLOCK_S - 1, exact to float32; bits."""
    s = start + tl.arange(0, BLOCK_S)
    within = tl.load(within_ptr + s, mask=s < S, other=0.0)
    low = tl.load(within_ptr + within_low + s, mask=s < S, other=0.0)
    start_high, start_low = load_pair(starts_ptr, starts_low, start // BLOCK)
    decay = (row_start - start_high)[:, None] - within[None, :] + row_within[:, None]
    return decay + ((row_low - start_low)[:, None] - low[None, :])


@triton.jit
def _online(
    q, k, v, batch, kv_head, k_stride, v_stride, within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within,
    ref_low, first_key_ptr, start_t, begin, end, T, S, score_scale,
    EXACT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys begin .. end - 1: acc, the rows' maxima and their sums.

    The maxima are relative to `ref`, with EXACT to lam_i. A row that sees no key has a sum of 0 and a maximum of -inf.
    """
    row_start, row_within, row_low, _ = _row_sums(
        within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, start_t, T, S, BLOCK_T
    )
    row_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_S, num_stages=1):
        key = load_tile(k, batch, kv_head, start, S, k_stride, D, BLOCK_D, BLOCK_S, True, DESCRIPTORS)
        # Scale after the product, in float32: scaling q would round it once more.
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION) * score_scale
        if EXACT:
            # Relative to lam_i itself: on the diagonal the parts on both sides of `ref` have opposite signs.
            score += full_decay(
                within_ptr, starts_ptr, within_low, starts_low, row_start, row_within, row_low, start, S, BLOCK_S
            )
        else:
            bias = _bias(
                within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, 0.0, start, S,
                BLOCK_S, True, False,
            )  # fmt: skip
            score += bias[None, :]
        score = _hide(score, first_key_ptr, start_t, start, T, S, BLOCK_T, BLOCK_S)
        new_max = tl.maximum(row_max, tl.max(score, axis=1))
        # A row that has seen no key yet stays at -inf; subtracting that would give NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.math.exp2(score - shift[:, None])
        rescale = tl.math.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        value = load_tile(v, batch, kv_head, start, S, v_stride, D, BLOCK_D, BLOCK_S, True, DESCRIPTORS)
        acc = tl.dot(p.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _frozen_step(
    acc, row_sum, q, k, v, batch, kv_head, k_stride, v_stride, within_ptr, starts_ptr, within_low, starts_low,
    ref_start, ref_within, ref_low, anchor, first_key_ptr, start_t, start, T, S, score_scale,
    MASKED: tl.constexpr, EXACT: tl.constexpr, ONE_ANCHOR: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    key = load_tile(k, batch, kv_head, start, S, k_stride, D, BLOCK_D, BLOCK_S, MASKED, DESCRIPTORS)
    bias = _bias(
        within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, anchor if ONE_ANCHOR else 0.0,
        start, S, BLOCK_S, MASKED, EXACT,
    )  # fmt: skip
    score = tl.dot(q, tl.trans(key), input_precision=PRECISION) * score_scale + bias[None, :]
    if not ONE_ANCHOR:
        score -= anchor[:, None]
    if MASKED:
        score = _hide(score, first_key_ptr, start_t, start, T, S, BLOCK_T, BLOCK_S)
    p = tl.math.exp2(score)
    value = load_tile(v, batch, kv_head, start, S, v_stride, D, BLOCK_D, BLOCK_S, MASKED, DESCRIPTORS)
    acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, row_sum + tl.sum(p, axis=1)


@triton.jit
def _frozen(
    acc, row_sum, q, k, v, batch, kv_head, k_stride, v_stride, within_ptr, starts_ptr, within_low, starts_low,
    ref_start, ref_within, ref_low, anchor, first_key_ptr, start_t, begin, middle, end, T, S, score_scale,
    EXACT: tl.constexpr, ONE_ANCHOR: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The keys middle .. end - 1, which every row sees, then begin .. middle - 1, with `anchor` as the maximum.

    `anchor` is one number for all rows or, without ONE_ANCHOR, `(rows,)`.
    """
    for start in tl.range(middle, end, BLOCK_S, num_stages=NUM_STAGES):
        acc, row_sum = _frozen_step(
            acc, row_sum, q, k, v, batch, kv_head, k_stride, v_stride, within_ptr, starts_ptr, within_low, starts_low,
            ref_start, ref_within, ref_low, anchor, first_key_ptr, start_t, start, T, S, score_scale, False, EXACT,
            ONE_ANCHOR, D, BLOCK_D, BLOCK_T, BLOCK_S, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    for start in tl.range(begin, middle, BLOCK_S, num_stages=1):
        acc, row_sum = _frozen_step(
            acc, row_sum, q, k, v, batch, kv_head, k_stride, v_stride, within_ptr, starts_ptr, within_low, starts_low,
            ref_start, ref_within, ref_low, anchor, first_key_ptr, start_t, start, T, S, score_scale, True, EXACT,
            ONE_ANCHOR, D, BLOCK_D, BLOCK_T, BLOCK_S, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    return acc, row_sum


@triton.jit
def _attend_tile(
    batch_head, start_t, q, k, v, o, within_ptr, starts_ptr, first_key_ptr, lse_ptr, score_scale, T, S, H, N,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    o_stride_b, o_stride_h, o_stride_t, within_low, starts_low,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr, ANCHOR: tl.constexpr,
    LARGEST_SUM: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """The queries of one head from start_t on; with MARKED all by a running maximum."""
    EXACT: tl.constexpr = PRECISION != "tf32"
    batch, head = batch_head // H, batch_head % H
    kv_head = head // G
    row = batch_head.to(tl.int64)
    offset = S - T
    q = at_head(q, batch, head, q_stride_b, q_stride_h, DESCRIPTORS)
    k = at_head(k, batch, kv_head, k_stride_b, k_stride_h, DESCRIPTORS)
    v = at_head(v, batch, kv_head, v_stride_b, v_stride_h, DESCRIPTORS)
    within_ptr += row * S
    starts_ptr += row * N
    first_key_ptr += row * T

    # 1. Its queries, and the keys they see: [diagonal, end) hold their own, [full, diagonal) are seen by every row,
    # [first_tile, full) in part.
    query = load_tile(q, batch, head, start_t, T, q_stride_t, D, BLOCK_D, BLOCK_T, True, DESCRIPTORS)
    lowest = tl.load(first_key_ptr + start_t)
    highest = tl.load(first_key_ptr + tl.minimum(start_t + BLOCK_T, T) - 1)
    diagonal = (start_t + offset) // BLOCK_S * BLOCK_S
    end = tl.minimum(start_t + BLOCK_T + offset, S)
    first_tile = lowest // BLOCK_S * BLOCK_S
    full = tl.minimum(tl.maximum((highest + BLOCK_S - 1) // BLOCK_S * BLOCK_S, first_tile), diagonal)
    at = start_t + offset
    ref_start, ref_start_low = load_pair(starts_ptr, starts_low, at // BLOCK)
    ref_within, ref_within_low = load_pair(within_ptr, within_low, at)
    ref_low = ref_start_low + ref_within_low

    # 2. The diagonal gives every row a maximum.
    begin = first_tile if MARKED else tl.maximum(diagonal, first_tile)
    acc, row_max, row_sum = _online(
        query, k, v, batch, kv_head, k_stride_s, v_stride_s, within_ptr, starts_ptr, within_low, starts_low, ref_start,
        ref_within, ref_low, first_key_ptr, start_t, begin, end, T, S, score_scale, EXACT, D, BLOCK_D, BLOCK_T,
        BLOCK_S, PRECISION, DESCRIPTORS,
    )  # fmt: skip

    # 3. All other keys take it as given.
    if not MARKED and (first_tile < diagonal):
        sees_none = row_max == float("-inf")
        highest_row = tl.max(row_max, axis=0)
        lowest_row = tl.min(tl.where(sees_none, highest_row, row_max), axis=0)
        if ANCHOR and (highest_row - lowest_row <= LARGEST_SPREAD):
            shrink = tl.math.exp2(row_max - highest_row)
            acc, row_sum = _frozen(
                acc * shrink[:, None], row_sum * shrink, query, k, v, batch, kv_head, k_stride_s, v_stride_s,
                within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, highest_row,
                first_key_ptr, start_t, first_tile, full, diagonal, T, S, score_scale, EXACT, True, D, BLOCK_D,
                BLOCK_T, BLOCK_S, PRECISION, NUM_STAGES, DESCRIPTORS,
            )  # fmt: skip
            row_max = tl.zeros_like(row_max) + highest_row
        else:
            if EXACT:
                anchor = row_max + _row_sums(
                    within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, start_t, T, S,
                    BLOCK_T,
                )[3]  # fmt: skip
            else:
                anchor = row_max
            anchor = tl.where(sees_none, 0.0, anchor)
            acc, row_sum = _frozen(
                acc, row_sum, query, k, v, batch, kv_head, k_stride_s, v_stride_s, within_ptr, starts_ptr, within_low,
                starts_low, ref_start, ref_within, ref_low, anchor, first_key_ptr, start_t, first_tile, full,
                diagonal, T, S, score_scale, EXACT, False, D, BLOCK_D, BLOCK_T, BLOCK_S, PRECISION, NUM_STAGES,
                DESCRIPTORS,
            )  # fmt: skip

        # 4. Where that outgrew its range (or a value is no number), all is done again with a running maximum.
        largest = tl.max(tl.max(tl.abs(acc), axis=1), axis=0)
        if not ((tl.max(row_sum, axis=0) < LARGEST_SUM) & (largest < float("inf"))):
            acc, row_max, row_sum = _online(
                query, k, v, batch, kv_head, k_stride_s, v_stride_s, within_ptr, starts_ptr, within_low, starts_low,
                ref_start, ref_within, ref_low, first_key_ptr, start_t, first_tile, end, T, S, score_scale, EXACT, D,
                BLOCK_D, BLOCK_T, BLOCK_S, PRECISION, DESCRIPTORS,
            )  # fmt: skip

    # 5. Normalize and store. A row that saw nothing is 0; its log-sum-exp is +inf so that p = 0 in the backward pass.
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    if not EXACT:
        row_max -= _row_sums(
            within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, start_t, T, S, BLOCK_T
        )[3]
    lse = tl.where(empty, float("inf"), row_max + tl.math.log2(row_sum))
    t = start_t + tl.arange(0, BLOCK_T)
    tl.store(lse_ptr + row * T + t, lse, mask=t < T)
    out = acc / row_sum[:, None]
    if DESCRIPTORS:
        o.store([batch, head, start_t, 0], tl.reshape(out.to(o.dtype), [1, 1, BLOCK_T, BLOCK_D]))
    else:
        store_tile(o, out, batch, head, start_t, T, o_stride_b, o_stride_h, o_stride_t, D, BLOCK_D, BLOCK_T)


# Each kind of number is one more kernel to compile; these two only say where a tile is.
@triton.jit(do_not_specialize=["num_heads", "section"])
def forgetting_attention_forward_kernel(
    q, k, v, o, within_ptr, starts_ptr, first_key_ptr, lse_ptr, marks_ptr, any_ptr, score_scale, T, S, H, N, num_tiles,
    num_heads, section, q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h,
    v_stride_s, o_stride_b, o_stride_h, o_stride_t, within_low, starts_low,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr, ANCHOR: tl.constexpr,
    LARGEST_SUM: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """A program, a tile; with MARKED few programs do the tiles that gluon_forward.py marked, two marks a tile."""
    program = tl.program_id(0)
    if MARKED:
        if tl.load(any_ptr) != 0:
            for work in tl.range(program, num_tiles * num_heads, tl.num_programs(0), num_stages=1):
                batch_head, tile = work // num_tiles, work % num_tiles
                mark = marks_ptr + 2 * work.to(tl.int64)
                if (tl.load(mark) != 0) | (tl.load(mark + 1) != 0):
                    _attend_tile(
                        batch_head, tile * BLOCK_T, q, k, v, o, within_ptr, starts_ptr, first_key_ptr, lse_ptr,
                        score_scale, T, S, H, N, q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h,
                        k_stride_s, v_stride_b, v_stride_h, v_stride_s, o_stride_b, o_stride_h, o_stride_t,
                        within_low, starts_low, G, D, BLOCK_D, BLOCK_T, BLOCK_S, PRECISION, NUM_STAGES, DESCRIPTORS,
                        ANCHOR, LARGEST_SUM, True,
                    )  # fmt: skip
    else:
        # Heads go in sections whose keys and values fit the L2 cache; within a section the last queries, which have
        # the most keys, start first.
        first_head = program // (section * num_tiles) * section
        in_section = program % (section * num_tiles)
        heads = tl.minimum(section, num_heads - first_head)
        _attend_tile(
            first_head + in_section % heads, (num_tiles - 1 - in_section // heads) * BLOCK_T, q, k, v, o, within_ptr,
            starts_ptr, first_key_ptr, lse_ptr, score_scale, T, S, H, N, q_stride_b, q_stride_h, q_stride_t,
            k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s, o_stride_b, o_stride_h,
            o_stride_t, within_low, starts_low, G, D, BLOCK_D, BLOCK_T, BLOCK_S, PRECISION, NUM_STAGES, DESCRIPTORS,
            ANCHOR, LARGEST_SUM, False,
        )  # fmt: skip


def dot_precision(dtype: torch.dtype) -> str:
    """Of `tl.dot`: float32 in three tf32 products, right to about 2**-22 and many times faster than full ones.

    AMD has no such mode and multiplies in full precision. 16-bit inputs ignore it.
    """
    if dtype != torch.float32:
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"


def use_descriptors(arch: int, *tensors: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can address all of them: 16-byte steps, no expanded dimension.

    float32 tiles take pointers: their products in three parts spill more with descriptors.
    """
    if arch < 90 or TensorDescriptor is None or tensors[0].element_size() != 2:
        return False
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(
            n == 1 or (step > 0 and step * x.element_size() % 16 == 0)
            for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)
        )
        for x in tensors
    )


def use_gluon(arch: int, q: torch.Tensor) -> bool:
    """Whether the kernels in Gluon take these queries; FOX_KERNELS_GLUON=0 leaves all to their twins in Triton."""
    return (
        gluon_forward is not None
        and os.environ.get("FOX_KERNELS_GLUON", "1") != "0"
        and arch == 90
        and q.dtype == torch.bfloat16
        and 33 <= q.shape[-1] <= 128
        and q.shape[2] >= 128
    )


def descriptor(x: torch.Tensor, rows: int, dim: int) -> "TensorDescriptor":
    """A `(B, H, L, D)` tensor to be read in tiles of `rows` by `dim`, zeros outside of it."""
    return TensorDescriptor(x, list(x.shape), descriptor_strides(x), [1, 1, rows, dim])


def heads_in_l2(num_keys: int, dim: int, element_size: int) -> int:
    """How many heads' keys and values fit 32 MB, the part of an H100's L2 cache that they may take; a power of two."""
    fit = max(1, 32 * 2**20 // (2 * num_keys * dim * element_size))
    return 1 << (fit.bit_length() - 1)


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
    batch, num_heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    arch = architecture(q.device)
    tiles = tiles or forward_tiles(dim, q.element_size(), arch, num_queries)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    num_tiles = -(-num_queries // tiles.block_t)
    block_d = padded_head_dim(dim)
    descriptors = use_descriptors(arch, q, k, v, out)
    section = heads_in_l2(num_keys, dim, q.element_size())
    largest_sum = LARGEST_SUM_FLOAT16 if q.dtype == torch.float16 else LARGEST_SUM
    num_programs = num_tiles * batch * num_heads
    marks = None
    if descriptors and use_gluon(arch, q):
        assert tiles.block_t == 128, "two groups of gluon_forward.py: a mark for each"
        marks = gluon_forward.new_marks(batch, num_heads, num_queries, q.device)
        gluon_forward.forward(q, k, v, out, lse, marks, sums, first_key, scale * LOG2_E, largest_sum, section)
        num_programs = min(num_programs, MARKED_PROGRAMS)
        descriptors = False  # four of them would cost more to make than this launch takes
    tensors = (q, k, v, out)
    if descriptors:
        rows = (tiles.block_t, tiles.block_s, tiles.block_s, tiles.block_t)
        tensors = [described(descriptor, x, n, block_d) for x, n in zip(tensors, rows, strict=True)]
    launch(
        forgetting_attention_forward_kernel, (num_programs,),
        (*tensors, sums.within, sums.starts, first_key, lse, *(marks or (first_key, first_key))[:2]),
        (scale * LOG2_E, num_queries, num_keys, num_heads, sums.starts.shape[-1], num_tiles, batch * num_heads,
         section, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], sums.within.stride(0),
         sums.starts.stride(0)),
        G=num_heads // k.shape[1], D=dim, BLOCK_D=block_d, BLOCK_T=tiles.block_t, BLOCK_S=tiles.block_s,
        PRECISION=dot_precision(q.dtype), NUM_STAGES=tiles.num_stages, DESCRIPTORS=descriptors,
        ANCHOR=q.dtype == torch.bfloat16, LARGEST_SUM=largest_sum, MARKED=marks is not None, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse
