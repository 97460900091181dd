"""Forgetting attention, backward pass, as two Triton kernels without atomics: bitwise the same on every run.

With p from the saved log-sum-exp and delta_i = dO_i . o_i:

    dS_ij = p_ij (dO_i . v_j - delta_i),   dq_i = scale sum_j dS_ij k_j,   dk_j = scale sum_i dS_ij q_i,
    dv_j = sum_i p_ij dO_i,                dlam_i += sum_j dS_ij,          dlam_j -= sum_i dS_ij

The row sums of dS are 0 when delta_i is the mean of dO_i . v_j under p_i. From an o that was rounded to 16 bits it is
not: every row leaves a residue, and the gate gradient, a sum over all later rows, collects them until its error is 9 %
at T = 4096 in bfloat16. So the kernel that owns the queries adds the residue up in float32 and hands delta_i +
residue_i to the kernel that owns the keys. There the rows cancel to float32 rounding, and the column sums alone are
dlam.

Both kernels visit the pairs of the forward pass, `first_key_i <= j <= i`, and no others.

Letters, names, units and frame as in triton_forward.py.
"""

import torch
import triton
import triton.language as tl

from .gates import GateSums, split_in_two
from .tile_sizes import TileSizes, architecture, backward_key_tiles, backward_query_tiles, padded_head_dim
from .triton_forward import LOG2_E, dot_precision, load_tile


@triton.jit
def _query_step(
    dq, residue, q, grad, delta, lse, k_ptr, v_ptr, k_stride, v_stride, lam_ptr, lam_low, lam_ref_high, lam_ref_low,
    lam_t_high, lam_t_low, to_row, first, t_key, start, d, S, score_scale,
    MASKED: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys start .. start + BLOCK_S - 1 to dq and to the residue of the rows."""
    s = start + tl.arange(0, BLOCK_S)
    k = load_tile(k_ptr, s, S, k_stride, d, D, BLOCK_D, MASKED)
    v = load_tile(v_ptr, s, S, v_stride, d, D, BLOCK_D, MASKED)
    if MASKED:
        high = tl.load(lam_ptr + s, mask=s < S, other=0.0)
        low = tl.load(lam_ptr + lam_low + s, mask=s < S, other=0.0)
    else:
        high = tl.load(lam_ptr + s)
        low = tl.load(lam_ptr + lam_low + s)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
    if EXACT:
        score += (lam_t_high[:, None] - high[None, :]) + (lam_t_low[:, None] - low[None, :]) - lse[:, None]
    else:
        score += ((lam_ref_high - high) + (lam_ref_low - low))[None, :] + to_row[:, None]
    if MASKED:
        score = tl.where((s[None, :] >= first[:, None]) & (s[None, :] <= t_key[:, None]), score, float("-inf"))
    p = tl.math.exp2(score)
    d_score = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    residue += tl.sum(d_score, axis=1)
    dq = tl.dot(d_score.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, residue


@triton.jit
def forgetting_attention_backward_query_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, grad_ptr, dq_ptr, lam_ptr, first_key_ptr, lse_ptr, delta_ptr,
    score_scale, scale, T, S, H, num_tiles,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    o_stride_b, o_stride_h, o_stride_t, g_stride_b, g_stride_h, g_stride_t, dq_stride_b, dq_stride_h, dq_stride_t,
    lam_low,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, DELTA_GIVEN: tl.constexpr,
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
    lam_ptr += batch_head * S
    first_key_ptr += batch_head * T

    # 2. What stays for the whole loop.
    q = load_tile(q_ptr, t, T, q_stride_t, d, D, BLOCK_D, True)
    grad = load_tile(grad_ptr + batch * g_stride_b + head * g_stride_h, t, T, g_stride_t, d, D, BLOCK_D, True)
    out = load_tile(o_ptr + batch * o_stride_b + head * o_stride_h, t, T, o_stride_t, d, D, BLOCK_D, True)
    if DELTA_GIVEN:
        delta = tl.load(delta_ptr + batch_head * T + t, mask=t < T, other=0.0)
    else:
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    first = tl.load(first_key_ptr + t, mask=t < T, other=0)
    lowest = tl.load(first_key_ptr + start_t)
    highest = tl.load(first_key_ptr + tl.minimum(start_t + BLOCK_T, T) - 1)
    lse = tl.load(lse_ptr + batch_head * T + t, mask=t < T, other=float("inf"))
    lam_t_high = tl.load(lam_ptr + t_key, mask=t < T, other=0.0)
    lam_t_low = tl.load(lam_ptr + lam_low + t_key, mask=t < T, other=0.0)
    lam_ref_high = tl.load(lam_ptr + start_t + offset)
    lam_ref_low = tl.load(lam_ptr + lam_low + start_t + offset)
    to_row = (lam_t_high - lam_ref_high) + (lam_t_low - lam_ref_low) - lse
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    residue = tl.zeros([BLOCK_T], tl.float32)

    # 3. The same three ranges of keys as the forward kernel: partly seen, fully seen, diagonal.
    diagonal = (start_t + offset) // BLOCK_S * BLOCK_S
    first_tile = lowest // BLOCK_S * BLOCK_S
    full = tl.minimum(tl.maximum((highest + BLOCK_S - 1) // BLOCK_S * BLOCK_S, first_tile), diagonal)
    for start in tl.range(first_tile, full, BLOCK_S, num_stages=1):
        dq, residue = _query_step(
            dq, residue, q, grad, delta, lse, k_ptr, v_ptr, k_stride_s, v_stride_s, lam_ptr, lam_low, lam_ref_high,
            lam_ref_low, lam_t_high, lam_t_low, to_row, first, t_key, start, d, S, score_scale, True, False, D,
            BLOCK_D, BLOCK_S, PRECISION,
        )  # fmt: skip
    for start in tl.range(full, diagonal, BLOCK_S, num_stages=NUM_STAGES):
        dq, residue = _query_step(
            dq, residue, q, grad, delta, lse, k_ptr, v_ptr, k_stride_s, v_stride_s, lam_ptr, lam_low, lam_ref_high,
            lam_ref_low, lam_t_high, lam_t_low, to_row, first, t_key, start, d, S, score_scale, False, False, D,
            BLOCK_D, BLOCK_S, PRECISION,
        )  # fmt: skip
    for start in tl.range(
        tl.maximum(diagonal, first_tile), tl.minimum(start_t + BLOCK_T + offset, S), BLOCK_S, num_stages=1
    ):
        dq, residue = _query_step(
            dq, residue, q, grad, delta, lse, k_ptr, v_ptr, k_stride_s, v_stride_s, lam_ptr, lam_low, lam_ref_high,
            lam_ref_low, lam_t_high, lam_t_low, to_row, first, t_key, start, d, S, score_scale, True,
            PRECISION != "tf32", D, BLOCK_D, BLOCK_S, PRECISION,
        )  # fmt: skip

    # 4. Store.
    at = dq_ptr + batch * dq_stride_b + head * dq_stride_h + t[:, None].to(tl.int64) * dq_stride_t + d[None, :]
    tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=(t[:, None] < T) & (d[None, :] < D))
    tl.store(delta_ptr + batch_head * T + t, delta + residue, mask=t < T)


@triton.jit
def _key_step(
    dk, dv, column_sum, k, v, q_ptr, grad_ptr, q_stride, g_stride, delta_ptr, lse_ptr, first_key_ptr, lam_ptr, lam_low,
    lam_s_high, lam_s_low, to_key, lam_ref_high, lam_ref_low, s, start, d, T, S, score_scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the queries start .. start + BLOCK_T - 1 to dk, dv and the column sums of dS; tiles are (S, T)."""
    t = start + tl.arange(0, BLOCK_T)
    t_key = t + (S - T)
    q = load_tile(q_ptr, t, T, q_stride, d, D, BLOCK_D, MASKED)
    grad = load_tile(grad_ptr, t, T, g_stride, d, D, BLOCK_D, MASKED)
    if MASKED:
        inside = t < T
        high = tl.load(lam_ptr + t_key, mask=inside, other=0.0)
        low = tl.load(lam_ptr + lam_low + t_key, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + t, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + t, mask=inside, other=0.0)
        first = tl.load(first_key_ptr + t, mask=inside, other=0)
    else:
        high = tl.load(lam_ptr + t_key)
        low = tl.load(lam_ptr + lam_low + t_key)
        lse = tl.load(lse_ptr + t)
        delta = tl.load(delta_ptr + t)
    score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * score_scale
    if MASKED and PRECISION != "tf32":
        score += (high[None, :] - lam_s_high[:, None]) + (low[None, :] - lam_s_low[:, None]) - lse[None, :]
    else:
        score += ((high - lam_ref_high) + (low - lam_ref_low) - lse)[None, :] + to_key[:, None]
    if MASKED:
        score = tl.where((s[:, None] >= first[None, :]) & (s[:, None] <= t_key[None, :]), score, float("-inf"))
    p = tl.math.exp2(score)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    d_score = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    column_sum += tl.sum(d_score, axis=1)
    dk = tl.dot(d_score.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, column_sum


@triton.jit
def forgetting_attention_backward_key_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dk_ptr, dv_ptr, lam_ptr, first_key_ptr, lse_ptr, delta_ptr, column_sum_ptr,
    rows_ptr, score_scale, scale, T, S, H, num_tiles,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    g_stride_b, g_stride_h, g_stride_t, dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    lam_low, rows_any,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    # 1. Which tile of keys is this program's? The first keys are seen by the most queries: they start first.
    program = tl.program_id(0)
    tile = program % num_tiles
    start_s = tile * BLOCK_S
    batch_kv = (program // num_tiles).to(tl.int64)
    batch, kv_head = batch_kv // (H // G), batch_kv % (H // G)
    s = start_s + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    k = load_tile(k_ptr + batch * k_stride_b + kv_head * k_stride_h, s, S, k_stride_s, d, D, BLOCK_D, True)
    v = load_tile(v_ptr + batch * v_stride_b + kv_head * v_stride_h, s, S, v_stride_s, d, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    last = tl.minimum(start_s + BLOCK_S, S) - 1
    offset = S - T
    first_row = tl.maximum(start_s - offset, 0) // BLOCK_T * BLOCK_T
    # From this tile on every query comes after the last key.
    after = tl.maximum(last - offset + BLOCK_T - 1, 0) // BLOCK_T * BLOCK_T

    # 2. Every query head that shares these keys; their gradients add up in registers.
    for member in range(0, G):
        batch_head = batch * H + kv_head * G + member
        lam = lam_ptr + batch_head * S
        lam_s_high = tl.load(lam + s, mask=s < S, other=0.0)
        lam_s_low = tl.load(lam + lam_low + s, mask=s < S, other=0.0)
        lam_ref_high = tl.load(lam + last)
        lam_ref_low = tl.load(lam + lam_low + last)
        to_key = (lam_ref_high - lam_s_high) + (lam_ref_low - lam_s_low)
        q = q_ptr + batch * q_stride_b + (kv_head * G + member) * q_stride_h
        grad = grad_ptr + batch * g_stride_b + (kv_head * G + member) * g_stride_h
        delta = delta_ptr + batch_head * T
        lse = lse_ptr + batch_head * T
        first_key = first_key_ptr + batch_head * T
        # Queries before `seen_by_all` see every key of the tile, from `seen_by_any` on they see none.
        seen_by_all = tl.load(rows_ptr + batch_head * num_tiles + tile) // BLOCK_T * BLOCK_T
        seen_by_any = tl.load(rows_ptr + rows_any + batch_head * num_tiles + tile)
        full_stop = tl.maximum(seen_by_all, after)
        column_sum = tl.zeros([BLOCK_S], tl.float32)
        for start in tl.range(first_row, tl.minimum(after, seen_by_any), BLOCK_T, num_stages=1):
            dk, dv, column_sum = _key_step(
                dk, dv, column_sum, k, v, q, grad, q_stride_t, g_stride_t, delta, lse, first_key, lam, lam_low,
                lam_s_high, lam_s_low, to_key, lam_ref_high, lam_ref_low, s, start, d, T, S, score_scale,
                True, D, BLOCK_D, BLOCK_T, PRECISION,
            )  # fmt: skip
        for start in tl.range(after, full_stop, BLOCK_T, num_stages=NUM_STAGES):
            dk, dv, column_sum = _key_step(
                dk, dv, column_sum, k, v, q, grad, q_stride_t, g_stride_t, delta, lse, first_key, lam, lam_low,
                lam_s_high, lam_s_low, to_key, lam_ref_high, lam_ref_low, s, start, d, T, S, score_scale,
                False, D, BLOCK_D, BLOCK_T, PRECISION,
            )  # fmt: skip
        for start in tl.range(full_stop, seen_by_any, BLOCK_T, num_stages=1):
            dk, dv, column_sum = _key_step(
                dk, dv, column_sum, k, v, q, grad, q_stride_t, g_stride_t, delta, lse, first_key, lam, lam_low,
                lam_s_high, lam_s_low, to_key, lam_ref_high, lam_ref_low, s, start, d, T, S, score_scale,
                True, D, BLOCK_D, BLOCK_T, PRECISION,
            )  # fmt: skip
        tl.store(column_sum_ptr + batch_head * S + s, column_sum, mask=s < S)

    # 3. Store.
    inside = (s[:, None] < S) & (d[None, :] < D)
    at = dk_ptr + batch * dk_stride_b + kv_head * dk_stride_h + s[:, None].to(tl.int64) * dk_stride_s + d[None, :]
    tl.store(at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    at = dv_ptr + batch * dv_stride_b + kv_head * dv_stride_h + s[:, None].to(tl.int64) * dv_stride_s + d[None, :]
    tl.store(at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def queries_of_key_tiles(first_key: torch.Tensor, num_keys: int, block_s: int) -> torch.Tensor:
    """For each tile of keys, how many queries see all of it and how many any of it. `(2, B, H, tiles)` int32.

    Causality aside, which the kernel applies: `first_key (B, H, T)` never decreases, so both are a sorted search.
    """
    start = torch.arange(0, num_keys, block_s, device=first_key.device, dtype=torch.int32)
    edges = torch.stack((start, (start + block_s).clamp_(max=num_keys) - 1))  # (2, tiles): first and last key
    edges = edges.flatten().expand(*first_key.shape[:-1], -1).contiguous()
    counts = torch.searchsorted(first_key, edges, right=True, out_int32=True)
    return counts.unflatten(-1, (2, -1)).movedim(-2, 0).contiguous()


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
    query_tiles: TileSizes | None = None,
    key_tiles: TileSizes | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, None]:
    """Launch both kernels. Returns `dq`, `dk`, `dv`, the sums of dS over queries `(B, H, S)` float32, and None."""
    running_bits = split_in_two(sums.running())
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    arch = architecture(q.device)
    query_tiles = query_tiles or backward_query_tiles(dim, q.element_size(), arch)
    key_tiles = key_tiles or backward_key_tiles(dim, q.element_size(), arch)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    column_sum = torch.empty(batch, num_heads, num_keys, dtype=torch.float32, device=q.device)
    shared = dict(
        G=num_heads // num_kv_heads, D=dim, BLOCK_D=padded_head_dim(dim), PRECISION=dot_precision(q.dtype)
    )  # fmt: skip

    num_tiles = triton.cdiv(num_queries, query_tiles.block_t)
    # dq takes the residue along. Over many queries that is one rounding among others; a few get a second pass with the
    # delta that the first one corrected.
    passes = (False, True) if num_queries <= 128 and q.dtype != torch.float32 else (False,)
    for delta_given in passes:
        forgetting_attention_backward_query_kernel[(num_tiles * batch * num_heads,)](
            q, k, v, out, grad_out, dq, running_bits, first_key, lse, delta,
            scale * LOG2_E, scale, num_queries, num_keys, num_heads, num_tiles,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *grad_out.stride()[:3],
            *dq.stride()[:3],
            running_bits.stride(0),
            BLOCK_T=query_tiles.block_t, BLOCK_S=query_tiles.block_s, NUM_STAGES=query_tiles.num_stages,
            num_warps=query_tiles.num_warps, num_stages=query_tiles.num_stages,
            DELTA_GIVEN=delta_given, **shared,
        )  # fmt: skip

    rows = queries_of_key_tiles(first_key, num_keys, key_tiles.block_s)
    num_tiles = rows.shape[-1]
    forgetting_attention_backward_key_kernel[(num_tiles * batch * num_kv_heads,)](
        q, k, v, grad_out, dk, dv, running_bits, first_key, lse, delta, column_sum, rows,
        scale * LOG2_E, scale, num_queries, num_keys, num_heads, num_tiles,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        running_bits.stride(0), rows.stride(0),
        BLOCK_T=key_tiles.block_t, BLOCK_S=key_tiles.block_s, NUM_STAGES=key_tiles.num_stages,
        num_warps=key_tiles.num_warps, num_stages=key_tiles.num_stages, **shared,
    )  # fmt: skip

    return dq, dk, dv, column_sum, None
