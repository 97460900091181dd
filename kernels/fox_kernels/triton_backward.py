"""Forgetting attention, backward pass, as Triton kernels.

With p from the saved log-sum-exp and delta_i = dO_i . o_i:

    dS_ij = p_ij (dO_i . v_j - delta_i),   dq_i = scale sum_j dS_ij k_j,   dk_j = scale sum_i dS_ij q_i,
    dv_j = sum_i p_ij dO_i,                dlam_i += sum_j dS_ij,          dlam_j -= sum_i dS_ij

The row sums of dS would be 0 if delta_i were exactly the mean of dO_i . v_j under p_i. From an o rounded to 16 bits it
is not, and the gate gradient, a sum over all later rows, collects what is left of each until it is 9 % wrong at
T = 4096 in bfloat16. So the kernel that owns queries adds up that residue in float32 and hands delta_i + residue_i to
the kernel that owns keys. There the rows cancel to float32 rounding, and the column sums alone are dlam.

No atomics: gradients are bitwise the same on every run. On Hopper gluon_backward.py does five products in place of
these seven for whoever does not ask for that.

Both visit the pairs of the forward pass, `first_key_i <= j <= i`, and no others.

Letters, names, units and frame as in triton_forward.py; M tiles of queries.
"""

import torch
import triton
import triton.language as tl

from .gates import LOG2_E, GateSums
from .launch import described, launch
from .tile_sizes import TileSizes, architecture, backward_key_tiles, backward_query_tiles, padded_head_dim
from .triton_forward import (
    BLOCK,
    _bias,
    _hide,
    _row_sums,
    at_head,
    descriptor,
    dot_precision,
    full_decay,
    heads_in_l2,
    load_pair,
    load_tile,
    store_tile,
    use_descriptors,
    use_gluon,
)

try:
    from . import gluon_backward
except (ImportError, AttributeError):  # as in triton_forward.py
    gluon_backward = None

ROWS = 128  # of a program of the first kernel


@triton.jit
def backward_rows_kernel(
    o_ptr, grad_ptr, within_ptr, starts_ptr, lse_ptr, delta_ptr, row_bits_ptr, refs_ptr, T, S, H, N, M, padded,
    o_stride_b, o_stride_h, o_stride_t, g_stride_b, g_stride_h, g_stride_t, within_low, starts_low, refs_low,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of every query delta and `row_bits` = lam - ref - lse, and of every tile of queries its ref.

    Both have `padded` rows a head; those past the last query have 0 and -inf, the weight of nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    start = tl.program_id(1) * ROWS
    t = start + tl.arange(0, ROWS)
    inside = t < T
    at = row * padded + t
    o = o_ptr + batch * o_stride_b + head * o_stride_h
    grad = grad_ptr + batch * g_stride_b + head * g_stride_h
    out = load_tile(o, batch, head, start, T, o_stride_t, D, BLOCK_D, ROWS, True, False).to(tl.float32)
    grad_out = load_tile(grad, batch, head, start, T, g_stride_t, D, BLOCK_D, ROWS, True, False).to(tl.float32)
    tl.store(delta_ptr + at, tl.sum(out * grad_out, axis=1), mask=t < padded)

    tile = t // BLOCK_T
    key = t + S - T
    ref_key = tile * BLOCK_T + S - T
    starts = starts_ptr + row * N
    within = within_ptr + row * S
    ref_start = tl.load(starts + ref_key // BLOCK, mask=inside, other=0.0)
    ref_within = tl.load(within + ref_key, mask=inside, other=0.0)
    ref_low = tl.load(starts + starts_low + ref_key // BLOCK, mask=inside, other=0.0)
    ref_low += tl.load(within + within_low + ref_key, mask=inside, other=0.0)
    lam_start = tl.load(starts + key // BLOCK, mask=inside, other=0.0)
    lam_within = tl.load(within + key, mask=inside, other=0.0)
    lam_low = tl.load(starts + starts_low + key // BLOCK, mask=inside, other=0.0)
    lam_low += tl.load(within + within_low + key, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + row * T + t, mask=inside, other=float("inf"))
    row_bits = (lam_start - ref_start) + (lam_within - ref_within) + (lam_low - ref_low) - lse
    tl.store(row_bits_ptr + at, row_bits, mask=t < padded)
    first_of_tile = inside & (t == tile * BLOCK_T)
    high = ref_start + ref_within
    tl.store(refs_ptr + row * M + tile, high, mask=first_of_tile)
    tl.store(refs_ptr + refs_low + row * M + tile, (ref_start - high) + ref_within + ref_low, mask=first_of_tile)


@triton.jit
def key_tile_rows_kernel(
    first_key_ptr, rows_ptr, T, S, num_tiles, steps, rows_any, BLOCK_S: tl.constexpr, TILES: tl.constexpr
):
    """For each tile of keys, how many queries see all of it and how many any of it, causality aside.

    `first_key (B, H, T)` never decreases, so both are a binary search; `steps` halvings for T + 1 answers.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    first_key_ptr += row * T
    for which in tl.static_range(2):
        key = tile * BLOCK_S
        if which == 1:
            key = tl.minimum(key + BLOCK_S, S) - 1
        low, high = tl.zeros([TILES], tl.int32), tl.zeros([TILES], tl.int32) + T
        for _ in range(steps):
            middle = (low + high) // 2
            sees = tl.load(first_key_ptr + middle, mask=middle < high, other=S) <= key
            low = tl.where(sees, middle + 1, low)
            high = tl.where(sees, high, tl.minimum(middle, high))
        tl.store(rows_ptr + which * rows_any + row * num_tiles + tile, low, mask=tile < num_tiles)


@triton.jit
def _query_step(
    dq, residue, q, grad, delta, row_bits, lse, k, v, batch, kv_head, k_stride, v_stride, within_ptr, starts_ptr,
    within_low, starts_low, ref_start, ref_within, ref_low, first_key_ptr, start_t, start, T, S, score_scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add the keys start .. start + BLOCK_S - 1 to dq and to the residue of the rows."""
    EXACT: tl.constexpr = PRECISION != "tf32"
    key = load_tile(k, batch, kv_head, start, S, k_stride, D, BLOCK_D, BLOCK_S, MASKED, DESCRIPTORS)
    value = load_tile(v, batch, kv_head, start, S, v_stride, D, BLOCK_D, BLOCK_S, MASKED, DESCRIPTORS)
    score = tl.dot(q, tl.trans(key), input_precision=PRECISION) * score_scale
    if MASKED and EXACT:
        row_start, row_within, row_low, _ = _row_sums(
            within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, start_t, T, S, BLOCK_T
        )
        score += full_decay(
            within_ptr, starts_ptr, within_low, starts_low, row_start, row_within, row_low, start, S, BLOCK_S
        )
        score -= lse[:, None]
    else:
        bias = _bias(
            within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, 0.0, start, S, BLOCK_S,
            MASKED, EXACT,
        )  # fmt: skip
        score += bias[None, :] + row_bits[:, None]
    if MASKED:
        score = _hide(score, first_key_ptr, start_t, start, T, S, BLOCK_T, BLOCK_S)
    p = tl.math.exp2(score)
    d_score = p * (tl.dot(grad, tl.trans(value), input_precision=PRECISION) - delta[:, None])
    residue += tl.sum(d_score, axis=1)
    dq = tl.dot(d_score.to(key.dtype), key, dq, input_precision=PRECISION)
    return dq, residue


@triton.jit
def forgetting_attention_backward_query_kernel(
    q, k, v, grad, dq, within_ptr, starts_ptr, first_key_ptr, lse_ptr, delta_ptr, score_scale, scale, T, S, H, N,
    num_tiles, num_heads, section,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    g_stride_b, g_stride_h, g_stride_t, dq_stride_b, dq_stride_h, dq_stride_t, within_low, starts_low,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    # 1. Which tile is this program's? As in the forward kernel.
    program = tl.program_id(0)
    first_head = program // (section * num_tiles) * section
    in_section = program % (section * num_tiles)
    heads = tl.minimum(section, num_heads - first_head)
    start_t = (num_tiles - 1 - in_section // heads) * BLOCK_T
    batch_head = first_head + in_section % heads
    batch, head = batch_head // H, batch_head % H
    kv_head = head // G
    row = batch_head.to(tl.int64)
    offset = S - T
    q = at_head(q, batch, head, q_stride_b, q_stride_h, DESCRIPTORS)
    k = at_head(k, batch, kv_head, k_stride_b, k_stride_h, DESCRIPTORS)
    v = at_head(v, batch, kv_head, v_stride_b, v_stride_h, DESCRIPTORS)
    grad = at_head(grad, batch, head, g_stride_b, g_stride_h, DESCRIPTORS)
    within_ptr += row * S
    starts_ptr += row * N
    first_key_ptr += row * T

    # 2. What stays for the whole loop.
    t = start_t + tl.arange(0, BLOCK_T)
    query = load_tile(q, batch, head, start_t, T, q_stride_t, D, BLOCK_D, BLOCK_T, True, DESCRIPTORS)
    grad_out = load_tile(grad, batch, head, start_t, T, g_stride_t, D, BLOCK_D, BLOCK_T, True, DESCRIPTORS)
    delta = tl.load(delta_ptr + row * T + t, mask=t < T, other=0.0)
    lse = tl.load(lse_ptr + row * T + t, mask=t < T, other=float("inf"))
    lowest = tl.load(first_key_ptr + start_t)
    highest = tl.load(first_key_ptr + tl.minimum(start_t + BLOCK_T, T) - 1)
    at = start_t + offset
    ref_start, ref_start_low = load_pair(starts_ptr, starts_low, at // BLOCK)
    ref_within, ref_within_low = load_pair(within_ptr, within_low, at)
    ref_low = ref_start_low + ref_within_low
    row_bits = (
        -lse
        - _row_sums(
            within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, start_t, T, S, BLOCK_T
        )[3]
    )
    dq_tile = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    residue = tl.zeros([BLOCK_T], tl.float32)

    # 3. The same three ranges of keys as the forward kernel. The pipelined one comes last and the other two are one
    # loop: ptxas (of CUDA 12.8) else finds a reason to wait for every product by itself.
    diagonal = at // BLOCK_S * BLOCK_S
    first_tile = lowest // BLOCK_S * BLOCK_S
    full = tl.minimum(tl.maximum((highest + BLOCK_S - 1) // BLOCK_S * BLOCK_S, first_tile), diagonal)
    end = tl.minimum(start_t + BLOCK_T + offset, S)
    for part in range(2):
        for start in tl.range(
            tl.where(part == 0, first_tile, tl.maximum(diagonal, first_tile)), tl.where(part == 0, full, end), BLOCK_S,
            num_stages=1,
        ):  # fmt: skip
            dq_tile, residue = _query_step(
                dq_tile, residue, query, grad_out, delta, row_bits, lse, k, v, batch, kv_head, k_stride_s, v_stride_s,
                within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, first_key_ptr, start_t,
                start, T, S, score_scale, True, D, BLOCK_D, BLOCK_T, BLOCK_S, PRECISION, DESCRIPTORS,
            )  # fmt: skip
    for start in tl.range(full, diagonal, BLOCK_S, num_stages=NUM_STAGES):
        dq_tile, residue = _query_step(
            dq_tile, residue, query, grad_out, delta, row_bits, lse, k, v, batch, kv_head, k_stride_s, v_stride_s,
            within_ptr, starts_ptr, within_low, starts_low, ref_start, ref_within, ref_low, first_key_ptr, start_t,
            start, T, S, score_scale, False, D, BLOCK_D, BLOCK_T, BLOCK_S, PRECISION, DESCRIPTORS,
        )  # fmt: skip

    # 4. Store.
    tl.store(delta_ptr + row * T + t, delta + residue, mask=t < T)
    store_tile(
        dq, dq_tile * scale, batch, head, start_t, T, dq_stride_b, dq_stride_h, dq_stride_t, D, BLOCK_D, BLOCK_T
    )


@triton.jit
def _key_step(
    dk, dv, column_sum, k, v, q, grad, batch, head, q_stride, g_stride, delta_ptr, row_bits_ptr, refs_ptr,
    refs_low, lse_ptr, first_key_ptr, within_ptr, starts_ptr, within_low, starts_low, to_key, end_start,
    end_within, end_low, start_s, start, T, S, score_scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add the queries start .. start + BLOCK_T - 1 to dk, dv and the column sums of dS; tiles are (S, T)."""
    EXACT: tl.constexpr = PRECISION != "tf32"
    t = start + tl.arange(0, BLOCK_T)
    query = load_tile(q, batch, head, start, T, q_stride, D, BLOCK_D, BLOCK_T, MASKED, DESCRIPTORS)
    grad_out = load_tile(grad, batch, head, start, T, g_stride, D, BLOCK_D, BLOCK_T, MASKED, DESCRIPTORS)
    ref_high, ref_low = load_pair(refs_ptr, refs_low, start // BLOCK_T)
    if MASKED:
        row_bits = tl.load(row_bits_ptr + t, mask=t < T, other=float("-inf"))
        delta = tl.load(delta_ptr + t, mask=t < T, other=0.0)
    else:
        row_bits = tl.load(row_bits_ptr + t)
        delta = tl.load(delta_ptr + t)
    score = tl.dot(k, tl.trans(query), input_precision=PRECISION) * score_scale
    if MASKED and EXACT:
        s = start_s + tl.arange(0, BLOCK_S)
        row_start, row_within, row_low, _ = _row_sums(
            within_ptr, starts_ptr, within_low, starts_low, 0.0, 0.0, 0.0, start, T, S, BLOCK_T
        )
        within = tl.load(within_ptr + s, mask=s < S, other=0.0)
        low = tl.load(within_ptr + within_low + s, mask=s < S, other=0.0)
        start_high, start_low = load_pair(starts_ptr, starts_low, start_s // BLOCK)
        lse = tl.load(lse_ptr + t, mask=t < T, other=float("inf"))
        decay = (row_start - start_high)[None, :] - within[:, None] + row_within[None, :]
        score += decay + ((row_low - start_low)[None, :] - low[:, None]) - lse[None, :]
    else:
        step = (ref_high - end_start) - end_within + (ref_low - end_low)
        score += (row_bits + step)[None, :] + to_key[:, None]
    if MASKED:
        score = tl.trans(_hide(tl.trans(score), first_key_ptr, start, start_s, T, S, BLOCK_T, BLOCK_S))
    p = tl.math.exp2(score)
    dv = tl.dot(p.to(grad_out.dtype), grad_out, dv, input_precision=PRECISION)
    d_score = p * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - delta[None, :])
    column_sum += tl.sum(d_score, axis=1)
    dk = tl.dot(d_score.to(query.dtype), query, dk, input_precision=PRECISION)
    return dk, dv, column_sum


@triton.jit
def forgetting_attention_backward_key_kernel(
    q, k, v, grad, dk, dv, within_ptr, starts_ptr, first_key_ptr, lse_ptr, delta_ptr, row_bits_ptr, refs_ptr,
    column_sum_ptr, rows_ptr, score_scale, scale, T, S, H, N, M, num_tiles, num_heads, section,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    g_stride_b, g_stride_h, g_stride_t, dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    within_low, starts_low, refs_low, rows_any,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    # 1. Which tile of keys is this program's? The first keys are seen by the most queries: they start first.
    program = tl.program_id(0)
    first_head = program // (section * num_tiles) * section
    in_section = program % (section * num_tiles)
    heads = tl.minimum(section, num_heads - first_head)
    tile = in_section // heads
    start_s = tile * BLOCK_S
    batch_kv = first_head + in_section % heads
    batch, kv_head = batch_kv // (H // G), batch_kv % (H // G)
    k = at_head(k, batch, kv_head, k_stride_b, k_stride_h, DESCRIPTORS)
    v = at_head(v, batch, kv_head, v_stride_b, v_stride_h, DESCRIPTORS)
    s = start_s + tl.arange(0, BLOCK_S)
    key = load_tile(k, batch, kv_head, start_s, S, k_stride_s, D, BLOCK_D, BLOCK_S, True, DESCRIPTORS)
    value = load_tile(v, batch, kv_head, start_s, S, v_stride_s, D, BLOCK_D, BLOCK_S, True, DESCRIPTORS)
    dk_tile = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    last = tl.minimum(start_s + BLOCK_S, S) - 1
    offset = S - T
    first_row = tl.maximum(start_s - offset, 0) // BLOCK_T * BLOCK_T
    # From this tile on every query comes after the last key.
    after = tl.maximum(last - offset + BLOCK_T - 1, 0) // BLOCK_T * BLOCK_T

    # 2. Every query head that shares these keys; their gradients add up in registers.
    for member in range(0, G):
        head = kv_head * G + member
        row = (batch * H + head).to(tl.int64)
        within = within_ptr + row * S
        starts = starts_ptr + row * N
        end_start, end_start_low = load_pair(starts, starts_low, start_s // BLOCK)
        end_within, end_low = load_pair(within, within_low, last)
        to_key = end_within - tl.load(within + s, mask=s < S, other=0.0)
        to_key += end_low - tl.load(within + within_low + s, mask=s < S, other=0.0)
        end_low += end_start_low
        query = at_head(q, batch, head, q_stride_b, q_stride_h, DESCRIPTORS)
        grad_out = at_head(grad, batch, head, g_stride_b, g_stride_h, DESCRIPTORS)
        delta = delta_ptr + row * T
        row_bits = row_bits_ptr + row * T
        refs = refs_ptr + row * M
        lse = lse_ptr + row * T
        first_key = first_key_ptr + row * T
        # Queries before `seen_by_all` see every key of the tile, from `seen_by_any` on they see none.
        seen_by_all = tl.load(rows_ptr + row * num_tiles + tile) // BLOCK_T * BLOCK_T
        seen_by_any = tl.load(rows_ptr + rows_any + row * num_tiles + tile)
        full_stop = tl.maximum(seen_by_all, after)
        column_sum = tl.zeros([BLOCK_S], tl.float32)
        for part in range(2):
            for start in tl.range(
                tl.where(part == 0, first_row, full_stop),
                tl.where(part == 0, tl.minimum(after, seen_by_any), seen_by_any), BLOCK_T, num_stages=1,
            ):  # fmt: skip
                dk_tile, dv_tile, column_sum = _key_step(
                    dk_tile, dv_tile, column_sum, key, value, query, grad_out, batch, head, q_stride_t,
                    g_stride_t, delta, row_bits, refs, refs_low, lse, first_key, within, starts, within_low,
                    starts_low, to_key, end_start, end_within, end_low, start_s, start, T, S, score_scale, True, D,
                    BLOCK_D, BLOCK_T, BLOCK_S, PRECISION, DESCRIPTORS,
                )  # fmt: skip
        for start in tl.range(after, full_stop, BLOCK_T, num_stages=NUM_STAGES):
            dk_tile, dv_tile, column_sum = _key_step(
                dk_tile, dv_tile, column_sum, key, value, query, grad_out, batch, head, q_stride_t,
                g_stride_t, delta, row_bits, refs, refs_low, lse, first_key, within, starts, within_low,
                starts_low, to_key, end_start, end_within, end_low, start_s, start, T, S, score_scale, False, D,
                BLOCK_D, BLOCK_T, BLOCK_S, PRECISION, DESCRIPTORS,
            )  # fmt: skip
        tl.store(column_sum_ptr + row * S + s, column_sum, mask=s < S)

    # 3. Store.
    store_tile(
        dk, dk_tile * scale, batch, kv_head, start_s, S, dk_stride_b, dk_stride_h, dk_stride_s, D, BLOCK_D, BLOCK_S
    )
    store_tile(dv, dv_tile, batch, kv_head, start_s, S, dv_stride_b, dv_stride_h, dv_stride_s, D, BLOCK_D, BLOCK_S)


def queries_of_key_tiles(first_key: torch.Tensor, num_keys: int, block_s: int) -> torch.Tensor:
    """For each tile of keys, how many queries see all of it and how many any of it. `(2, B, H, tiles)` int32."""
    batch, num_heads, num_queries = first_key.shape
    num_tiles = -(-num_keys // block_s)
    rows = torch.empty(2, batch, num_heads, num_tiles, dtype=torch.int32, device=first_key.device)
    launch(
        key_tile_rows_kernel, (batch * num_heads, -(-num_tiles // 128)),
        (first_key, rows),
        (num_queries, num_keys, num_tiles, num_queries.bit_length(), rows.stride(0)),
        BLOCK_S=block_s, TILES=128,
    )  # fmt: skip
    return rows


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sums: GateSums,
    first_key: torch.Tensor,
    scale: float,
    deterministic: bool = False,
    query_tiles: TileSizes | None = None,
    key_tiles: TileSizes | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels: `dq`, `dk`, `dv` like their tensors, the sums of dS over queries `(B, H, S)` float32."""
    dim = q.shape[3]
    arch = architecture(q.device)
    query_tiles = query_tiles or backward_query_tiles(dim, q.element_size(), arch)
    key_tiles = key_tiles or backward_key_tiles(dim, q.element_size(), arch)
    # At 256 channels products of tiles from descriptors spill, 110 times in a loop on Hopper; pointers do not.
    shared = dict(
        G=q.shape[1] // k.shape[1], D=dim, BLOCK_D=padded_head_dim(dim), PRECISION=dot_precision(q.dtype),
        DESCRIPTORS=dim <= 128 and use_descriptors(arch, q, k, v, grad_out),
    )  # fmt: skip
    if shared["DESCRIPTORS"] and not deterministic and use_gluon(arch, q):
        delta, row_bits, refs = _launch_rows(grad_out, out, lse, sums, gluon_backward.ROWS.value, padded=True)
        seen = queries_of_key_tiles(first_key, k.shape[2], gluon_backward.KEYS.value)
        section = max(1, heads_in_l2(q.shape[2], dim, q.element_size()) // 2)
        return gluon_backward.backward(grad_out, q, k, v, sums, first_key, delta, row_bits, refs, seen, scale, section)
    delta, row_bits, refs = _launch_rows(grad_out, out, lse, sums, key_tiles.block_t)
    dq = torch.empty_like(q)
    # dq takes the residue along. Over many queries that is one rounding among others; a few get a second pass with the
    # delta that the first one corrected.
    for _ in range(2 if q.shape[2] <= 128 and q.dtype != torch.float32 else 1):
        _launch_queries(grad_out, q, k, v, dq, lse, sums, first_key, delta, scale, query_tiles, shared)
    dk, dv, column_sum = _launch_keys(
        grad_out, q, k, v, lse, sums, first_key, delta, row_bits, refs, scale, key_tiles, shared
    )
    return dq, dk, dv, column_sum


def _launch_rows(grad_out, out, lse, sums, block_t, padded=False):
    batch, num_heads, num_queries, dim = out.shape
    num_tiles = -(-num_queries // block_t)
    num_rows = num_tiles * block_t if padded else num_queries
    delta, row_bits = (torch.empty(batch, num_heads, num_rows, dtype=torch.float32, device=out.device) for _ in "12")
    refs = torch.empty(2, batch, num_heads, num_tiles, dtype=torch.float32, device=out.device)
    launch(
        backward_rows_kernel, (batch * num_heads, -(-num_queries // ROWS)),
        (out, grad_out, sums.within, sums.starts, lse, delta, row_bits, refs),
        (num_queries, sums.within.shape[-1], num_heads, sums.starts.shape[-1], num_tiles, num_rows, *out.stride()[:3],
         *grad_out.stride()[:3], sums.within.stride(0), sums.starts.stride(0), refs.stride(0)),
        D=dim, BLOCK_D=padded_head_dim(dim), BLOCK_T=block_t, ROWS=ROWS,
    )  # fmt: skip
    return delta, row_bits, refs


def _launch_queries(grad_out, q, k, v, dq, lse, sums, first_key, delta, scale, tiles, shared):
    batch, num_heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    num_tiles = -(-num_queries // tiles.block_t)
    tensors = (q, k, v, grad_out)
    if shared["DESCRIPTORS"]:
        rows = (tiles.block_t, tiles.block_s, tiles.block_s, tiles.block_t)
        tensors = [described(descriptor, x, n, shared["BLOCK_D"]) for x, n in zip(tensors, rows, strict=True)]
    launch(
        forgetting_attention_backward_query_kernel, (num_tiles * batch * num_heads,),
        (*tensors, dq, sums.within, sums.starts, first_key, lse, delta),
        (scale * LOG2_E, scale, num_queries, num_keys, num_heads, sums.starts.shape[-1], num_tiles, batch * num_heads,
         heads_in_l2(num_keys, dim, q.element_size()), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
         *grad_out.stride()[:3], *dq.stride()[:3], sums.within.stride(0), sums.starts.stride(0)),
        BLOCK_T=tiles.block_t, BLOCK_S=tiles.block_s, NUM_STAGES=tiles.num_stages, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages, **shared,
    )  # fmt: skip


def _launch_keys(grad_out, q, k, v, lse, sums, first_key, delta, row_bits, refs, scale, tiles, shared):
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    column_sum = torch.empty(batch, num_heads, num_keys, dtype=torch.float32, device=q.device)
    seen = queries_of_key_tiles(first_key, num_keys, tiles.block_s)
    num_tiles = seen.shape[-1]
    tensors = (q, k, v, grad_out)
    if shared["DESCRIPTORS"]:
        rows = (tiles.block_t, tiles.block_s, tiles.block_s, tiles.block_t)
        tensors = [described(descriptor, x, n, shared["BLOCK_D"]) for x, n in zip(tensors, rows, strict=True)]
    section = max(1, heads_in_l2(num_queries, dim, q.element_size()) // 2)
    launch(
        forgetting_attention_backward_key_kernel, (num_tiles * batch * num_kv_heads,),
        (*tensors, dk, dv, sums.within, sums.starts, first_key, lse, delta, row_bits, refs, column_sum, seen),
        (scale * LOG2_E, scale, num_queries, num_keys, num_heads, sums.starts.shape[-1], refs.shape[-1], num_tiles,
         batch * num_kv_heads, section, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3],
         *dk.stride()[:3], *dv.stride()[:3], sums.within.stride(0), sums.starts.stride(0), refs.stride(0),
         seen.stride(0)),
        BLOCK_T=tiles.block_t, BLOCK_S=tiles.block_s, NUM_STAGES=tiles.num_stages, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages, **shared,
    )  # fmt: skip
    return dk, dv, column_sum
