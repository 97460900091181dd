"""What the tight rule knows before it decides: decays of blocks of keys, what the gates alone drop, sums over keys.

Letters:  B batch, H query heads, H_kv key heads, T queries (the last of the keys), S keys, D head dim, M blocks of
    queries, N groups of `GATE_BLOCK` keys.
"""

import triton
import triton.language as tl

BLOCK_T = tl.constexpr(128)
BLOCK_S = tl.constexpr(64)
GATE_BLOCK = tl.constexpr(128)
WINDOW = tl.constexpr(16)
WINDOWS = tl.constexpr(8)  # of a group
PAPER_SLACK = tl.constexpr(2.0**-16)
MIN_GAIN = tl.constexpr(2)
LEAST_NORM = tl.constexpr(2.0**-50)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def running_sum(within_ptr, starts_ptr, s, mask, within_low, starts_low):
    """lam at the positions s, bits, float64."""
    n = s // GATE_BLOCK
    within = tl.load(within_ptr + s, mask=mask, other=0.0).to(tl.float64)
    within += tl.load(within_ptr + within_low + s, mask=mask, other=0.0).to(tl.float64)
    starts = tl.load(starts_ptr + n, mask=mask, other=0.0).to(tl.float64)
    starts += tl.load(starts_ptr + starts_low + n, mask=mask, other=0.0).to(tl.float64)
    return within + starts


@triton.jit
def threshold_bits(bound, budget):
    """Of the paper's rule; what is not a number prunes nothing."""
    threshold = (2.0 * bound + budget) * -(1.0 + PAPER_SLACK) * LOG2_E
    return tl.where(threshold != threshold, float("-inf"), threshold)


@triton.jit
def load_part(ptr, row, valid, stride, start_d, D: tl.constexpr, CHUNK_D: tl.constexpr):
    d = start_d + tl.arange(0, CHUNK_D)
    at = ptr + row[:, None].to(tl.int64) * stride + d[None, :]
    # A head that fills its block needs no other mask.
    return tl.load(at, mask=valid[:, None] & ((d[None, :] < D) | (D % CHUNK_D == 0)), other=0.0)


@triton.jit
def largest_finite(x):
    """Of a vector; a NaN makes it infinite."""
    return tl.max(tl.where(x != x, float("inf"), x), axis=0)


@triton.jit
def paper_mass(dropped, bound, decay):
    """At most what so many blocks of keys weigh, all as near as the nearest of them."""
    return (dropped * BLOCK_S).to(tl.float32) * tl.math.exp2(decay + 2.0 * LOG2_E * bound)


@triton.jit
def gate_tables_kernel(
    within_ptr, starts_ptr, first_visible_ptr, bound_ptr, ends_ptr, window_ptr, possible_ptr, dropped_ptr, mass_ptr,
    active_ptr, log_tolerance, budget, T, S, N, M, H, within_low, starts_low, window_low,
    bound_stride_b, bound_stride_h,
    HAS_BOUND: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What the gates decide for `GROUPS` blocks of queries, and the decays of as many groups of keys.

    ends (B, H, blocks) float64 bits, lam at the end of a block of keys; window (2, B, H, S / 16) bits, lam at the end
    of `WINDOW` keys as a high and a low float32. possible (B, H, M), blocks of keys that may be won at all; dropped
    and mass (B, H, M), by the paper's rule where there is a bound; active (B, H, programs), whether any block of
    queries may win more.
    """
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // H, batch_head % H
    within_ptr += batch_head * S
    starts_ptr += batch_head * N
    num_blocks = tl.cdiv(S, BLOCK_S)

    # 1. The tables.
    group = tl.program_id(1) * GROUPS
    n = group * (GATE_BLOCK // BLOCK_S) + tl.arange(0, GROUPS * (GATE_BLOCK // BLOCK_S))
    end = running_sum(
        within_ptr, starts_ptr, tl.minimum((n + 1) * BLOCK_S, S) - 1, n < num_blocks, within_low, starts_low
    )
    tl.store(ends_ptr + batch_head * num_blocks + n, end, mask=n < num_blocks)
    w = group * (WINDOWS) + tl.arange(0, GROUPS * (WINDOWS))
    valid = w * WINDOW < S
    lam_w = running_sum(within_ptr, starts_ptr, tl.minimum((w + 1) * WINDOW, S) - 1, valid, within_low, starts_low)
    high = lam_w.to(tl.float32)
    window_ptr += batch_head * tl.cdiv(S, WINDOW) + w
    tl.store(window_ptr, high, mask=valid)
    tl.store(window_ptr + window_low, (lam_w - high.to(tl.float64)).to(tl.float32), mask=valid)

    # 2. Blocks of keys that have decayed below the tolerance, and below the threshold of the paper's rule.
    m = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    first = S - T + m * BLOCK_T
    lam_first = running_sum(within_ptr, starts_ptr, first, m < M, within_low, starts_low)
    hidden = tl.load(first_visible_ptr + batch_head * T + m * BLOCK_T, mask=m < M, other=0) // BLOCK_S
    limit = log_tolerance * LOG2_E - lam_first
    paper_limit = limit
    bound = tl.full([], 0.0, tl.float32)
    if HAS_BOUND:
        bound = tl.load(bound_ptr + batch * bound_stride_b + head * bound_stride_h).to(tl.float32)
        paper_limit = threshold_bits(bound, budget).to(tl.float64) - lam_first
    counts = tl.zeros([GROUPS, WIDTH], tl.int32)
    paper_counts = tl.zeros([GROUPS, WIDTH], tl.int32)
    blocks_before = tl.where(m < M, first // BLOCK_S, 0)
    for start in tl.range(0, tl.max(blocks_before, axis=0), WIDTH):
        at = start + tl.arange(0, WIDTH)
        at_end = at * BLOCK_S + BLOCK_S - 1  # of the last block perhaps behind the last key: no query drops it
        lam = running_sum(within_ptr, starts_ptr, at_end, at_end < S, within_low, starts_low)
        before = at[None, :] < blocks_before[:, None]
        counts += (before & (-lam[None, :] < limit[:, None])).to(tl.int32)
        if HAS_BOUND:
            paper_counts += (before & (-lam[None, :] < paper_limit[:, None])).to(tl.int32)
    possible = tl.sum(counts, axis=1)
    dropped = tl.sum(paper_counts, axis=1)
    tl.store(possible_ptr + batch_head * M + m, possible, mask=m < M)
    gain = possible - tl.maximum(dropped, hidden)
    active = tl.max(tl.where(m < M, gain, 0), axis=0) >= MIN_GAIN
    tl.store(active_ptr + batch_head * tl.num_programs(1) + tl.program_id(1), active.to(tl.int32))
    if HAS_BOUND:
        last = tl.where(dropped > 0, dropped * BLOCK_S - 1, 0)
        nearest = running_sum(within_ptr, starts_ptr, last, m < M, within_low, starts_low)
        mass = paper_mass(dropped, bound, (lam_first - nearest).to(tl.float32))
        tl.store(mass_ptr + batch_head * M + m, tl.where(dropped > hidden, mass, 0.0), mask=m < M)
        tl.store(dropped_ptr + batch_head * M + m, tl.maximum(dropped, hidden), mask=m < M)


@triton.jit
def key_summaries_kernel(
    k_ptr, key_start_ptr, active_ptr, norm_ptr, spread_ptr, center_ptr, S, N, H_KV, num_flags,
    k_stride_b, k_stride_h, k_stride_s,
    HAS_KEY_START: tl.constexpr, HAS_ACTIVE: tl.constexpr, SPREAD_ERROR: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PART_D: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of `GROUPS` groups of keys what `pruning._KeySummaries` tells, where a query head of theirs is active.

    norm and spread (B, H_kv, N), center (B, H_kv, N, 9, BLOCK_D).
    """
    batch_head = tl.program_id(0).to(tl.int64)
    batch, kv_head = batch_head // H_KV, batch_head % H_KV
    start = tl.program_id(1) * GROUPS
    end = tl.minimum(start + GROUPS, N)
    if HAS_ACTIVE:
        flag = tl.zeros([WIDTH], tl.int32)
        for first in tl.range(0, num_flags, WIDTH):
            at = first + tl.arange(0, WIDTH)
            flag = tl.maximum(flag, tl.load(active_ptr + batch_head * num_flags + at, mask=at < num_flags, other=0))
        end = tl.where(tl.max(flag, axis=0) > 0, end, start)
    padding = 0
    if HAS_KEY_START:
        padding = tl.load(key_start_ptr + batch).to(tl.int32)
    k_ptr += batch * k_stride_b + kv_head * k_stride_h

    # Means of windows are a product: row r of the other factor picks the keys of window r.
    window = tl.arange(0, 16)
    picked = (tl.arange(0, GATE_BLOCK)[None, :] // WINDOW == window[:, None]).to(k_ptr.dtype.element_ty)
    for group in tl.range(start, end):
        s = group * GATE_BLOCK + tl.arange(0, GATE_BLOCK)
        visible = (s < S) & (s >= padding)
        square = tl.zeros([GATE_BLOCK], tl.float32)
        for first_d in tl.static_range(0, BLOCK_D, PART_D):
            x = load_part(k_ptr, s, visible, k_stride_s, first_d, D, PART_D).to(tl.float32)
            square += tl.sum(x * x, axis=1)
        largest = largest_finite(square)
        norm = tl.maximum(tl.sqrt(largest), LEAST_NORM)
        usable = (norm > LEAST_NORM) & (largest < float("inf"))
        factor = tl.where(usable, 1.0 / (WINDOW * tl.where(usable, norm, 1.0)), 0.0)
        spread = tl.full([], 1.0, tl.float32)
        for first_d in tl.static_range(0, BLOCK_D, PART_D):
            k = load_part(k_ptr, s, visible, k_stride_s, first_d, D, PART_D)
            if BLOCK_D == PART_D:
                product = tl.dot(tl.trans(k), k, input_precision=PRECISION)
                row = largest_finite(tl.sum(tl.abs(product), axis=1))
                spread = row / (GATE_BLOCK * tl.where(usable, largest, 1.0)) * (1.0 + 2.0**-10) + SPREAD_ERROR
                spread = tl.where(usable & (spread < 1.0), spread, 1.0)
            means = tl.where(usable, tl.dot(picked, k, input_precision=PRECISION) * factor, 0.0)
            mean = tl.sum(means, axis=0) * (1.0 / WINDOWS)
            d = first_d + tl.arange(0, PART_D)
            at = center_ptr + (batch_head * N + group) * (WINDOWS + 1) * BLOCK_D
            element = center_ptr.dtype.element_ty
            of_window = window[:, None] < WINDOWS
            tl.store(at + window[:, None] * BLOCK_D + d[None, :], means.to(element), mask=of_window)
            tl.store(at + WINDOWS * BLOCK_D + d, mean.to(element))
        tl.store(norm_ptr + batch_head * N + group, norm)
        tl.store(spread_ptr + batch_head * N + group, spread)
