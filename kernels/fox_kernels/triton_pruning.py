"""Adaptive computation pruning as Triton kernels: `pruning.prune` in at most three launches.

Under the paper's rule a program decides for 8 blocks of queries and writes the first key of each of their rows; every
operation is done as in pruning.py, so that both choose the same blocks. Under the tight rule a program decides for one
block of queries; it reads queries and keys only where there are blocks left to win.

Letters:  B batch, H query heads, H_kv key heads, G query heads per key head, T queries (the last of the keys), S keys,
    D head dim, M blocks of queries, N blocks of `GATE_BLOCK` keys.
"""

import math

import torch
import triton
import triton.language as tl

from .gates import GateSums
from .tile_sizes import architecture, padded_head_dim
from .triton_norms import largest_norms, largest_of

# Of a product q . k relative to ||q|| ||k||, as in pruning.py.
DOT_ERROR = {torch.float32: 2.0**-8, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-12}
CENTER_ERROR = {torch.float32: 2.0**-7, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-8}
SPREAD_ERROR = {torch.float32: 2.0**-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-11}
ROW_BLOCKS = 8  # blocks of queries of one program
GROUPS = 4  # groups of `GATE_BLOCK` keys of one program
BLOCK_T = tl.constexpr(128)
BLOCK_S = tl.constexpr(64)
GATE_BLOCK = tl.constexpr(128)
PAPER_SLACK = tl.constexpr(2.0**-16)
TIGHT_SLACK = tl.constexpr(2.0**-5)
MIN_GAIN = tl.constexpr(2)
LEAST_LOG_TOLERANCE = tl.constexpr(-60.0)
ROW_ERROR = tl.constexpr(2.0**-22)
LEAST_NORM = tl.constexpr(2.0**-50)
CENTERS = 64
SPREAD_DIM = 128
LOG2_E = tl.constexpr(1.4426950408889634)
NO_ROW = tl.constexpr(-1e300)  # below every running sum, and finite: -inf would subtract to NaN


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _smaller(x, y):
    return tl.minimum(x, y)


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
def _threshold_bits(bound, budget):
    """Of the paper's rule; what is not a number prunes nothing."""
    threshold = (2.0 * bound + budget) * -(1.0 + PAPER_SLACK) * LOG2_E
    return tl.where(threshold != threshold, float("-inf"), threshold)


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
        q_norm = largest_of(norm_ptr + (heads + head) * num_chunks, num_chunks, WIDTH)
        k_norm = largest_of(norm_ptr + (heads + H + head // (H // H_KV)) * num_chunks, num_chunks, WIDTH)
        bound = scale * q_norm * k_norm
    threshold = _threshold_bits(bound, budget)

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


@triton.jit
def _load_part(ptr, row, valid, stride, start_d, D: tl.constexpr, CHUNK_D: tl.constexpr):
    d = start_d + tl.arange(0, CHUNK_D)
    at = ptr + row[:, None].to(tl.int64) * stride + d[None, :]
    return tl.load(at, mask=valid[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def _scores(
    q, q_ptr, t, full, q_stride, k_ptr, s, visible, k_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the `BLOCK_T` rows with the keys s."""
    score = tl.zeros([BLOCK_T, s.shape[0]], tl.float32)
    for start in tl.static_range(0, BLOCK_D, CHUNK_D):
        k = _load_part(k_ptr, s, visible, k_stride, start, D, CHUNK_D)
        # A wide head is taken in parts, and its queries are read again: all of it does not fit the registers.
        part = q if BLOCK_D == CHUNK_D else _load_part(q_ptr, t, full, q_stride, start, D, CHUNK_D)
        score = tl.dot(part, tl.trans(k), score, input_precision=PRECISION)
    return score


@triton.jit
def _largest_finite(x):
    """Of a vector; a NaN makes it infinite."""
    return tl.max(tl.where(x != x, float("inf"), x), axis=0)


@triton.jit
def key_summaries_kernel(
    k_ptr, within_ptr, starts_ptr, key_start_ptr, norm_ptr, spread_ptr, center_ptr, ends_ptr, decay_ptr, S, N, H, H_KV,
    within_low, starts_low, k_stride_b, k_stride_h, k_stride_s,
    HAS_KEY_START: tl.constexpr, SPREAD_ERROR: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PART_D: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of `GROUPS` groups of keys what `pruning._KeySummaries` tells, and the decay to the end of each block of keys.

    norm and spread (B, H_kv, N), center (B, H_kv, N, BLOCK_D); ends (B, H, blocks) float64 bits, lam at the end of a
    block of keys; decay (B, H, S) bits, from each key to the end of its block, at most 0.
    """
    batch_head = tl.program_id(0).to(tl.int64)
    batch, kv_head = batch_head // H_KV, batch_head % H_KV
    start = tl.program_id(1) * GROUPS
    padding = 0
    if HAS_KEY_START:
        padding = tl.load(key_start_ptr + batch).to(tl.int32)
    k_ptr += batch * k_stride_b + kv_head * k_stride_h

    # 1. The keys.
    for group in tl.range(start, tl.minimum(start + GROUPS, N)):
        s = group * GATE_BLOCK + tl.arange(0, GATE_BLOCK)
        visible = (s < S) & (s >= padding)
        square = tl.zeros([GATE_BLOCK], tl.float32)
        for first_d in tl.static_range(0, BLOCK_D, PART_D):
            x = _load_part(k_ptr, s, visible, k_stride_s, first_d, D, PART_D).to(tl.float32)
            square += tl.sum(x * x, axis=1)
        largest = _largest_finite(square)
        norm = tl.maximum(tl.sqrt(largest), LEAST_NORM)
        usable = (norm > LEAST_NORM) & (largest < float("inf"))
        factor = tl.where(usable, 1.0 / (GATE_BLOCK * tl.where(usable, norm, 1.0)), 0.0)
        spread = tl.full([], 1.0, tl.float32)
        for first_d in tl.static_range(0, BLOCK_D, PART_D):
            k = _load_part(k_ptr, s, visible, k_stride_s, first_d, D, PART_D)
            center = tl.where(usable, tl.sum(k.to(tl.float32), axis=0) * factor, 0.0)
            d = first_d + tl.arange(0, PART_D)
            tl.store(center_ptr + (batch_head * N + group) * BLOCK_D + d, center.to(center_ptr.dtype.element_ty))
            if BLOCK_D == PART_D:
                product = tl.dot(tl.trans(k), k, input_precision=PRECISION)
                row = _largest_finite(tl.sum(tl.abs(product), axis=1))
                spread = row / (GATE_BLOCK * tl.where(usable, largest, 1.0)) * (1.0 + 2.0**-10) + SPREAD_ERROR
                spread = tl.where(usable & (spread < 1.0), spread, 1.0)
        tl.store(norm_ptr + batch_head * N + group, norm)
        tl.store(spread_ptr + batch_head * N + group, spread)

    # 2. The gates of the query heads that share these keys.
    n = start * (GATE_BLOCK // BLOCK_S) + tl.arange(0, GROUPS * (GATE_BLOCK // BLOCK_S))
    s = n[:, None] * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    for head in tl.range(kv_head * (H // H_KV), (kv_head + 1) * (H // H_KV)):
        row = batch * H + head
        high = tl.load(within_ptr + row * S + s, mask=s < S, other=0.0)
        low = tl.load(within_ptr + within_low + row * S + s, mask=s < S, other=0.0)
        last = s == tl.minimum(n * BLOCK_S + BLOCK_S, S)[:, None] - 1
        high_end = tl.sum(tl.where(last, high, 0.0), axis=1)
        low_end = tl.sum(tl.where(last, low, 0.0), axis=1)
        tl.store(decay_ptr + row * S + s, (high_end[:, None] - high) + (low_end[:, None] - low), mask=s < S)
        valid = n * BLOCK_S < S
        at = starts_ptr + row * N + n // (GATE_BLOCK // BLOCK_S)
        end = tl.load(at, mask=valid, other=0.0).to(tl.float64)
        end += tl.load(at + starts_low, mask=valid, other=0.0).to(tl.float64)
        end += high_end.to(tl.float64) + low_end.to(tl.float64)
        tl.store(ends_ptr + row * tl.cdiv(S, BLOCK_S) + n, end, mask=valid)


@triton.jit
def _count_ends(ends_ptr, limit, count, WIDTH: tl.constexpr):
    """How many of the first `count` block ends have -lam below the limit: they come first. WIDTH probes at a time."""
    low = 0
    high = count
    while low < high:
        step = (high - low + WIDTH - 1) // WIDTH
        at = low + (tl.arange(0, WIDTH) + 1) * step - 1
        end = tl.load(ends_ptr + at, mask=at < high, other=0.0)
        low += tl.sum(((at < high) & (-end < limit)).to(tl.int32), axis=0) * step
        high = tl.minimum(high, low + step - 1)
    return low


@triton.jit
def _add_weights(largest, total, exponent, factor):
    """An online sum of `factor exp2(exponent)` over the columns, relative to the largest."""
    new = tl.maximum(largest, tl.max(exponent, axis=1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.math.exp2(largest - shift) + factor * tl.sum(tl.math.exp2(exponent - shift[:, None]), axis=1)
    return new, total


@triton.jit
def _least_log_sum(
    q, q_ptr, t, full, q_stride, k_ptr, k_stride, starts_ptr, ends_ptr, decay_ptr, norm_ptr, center_ptr, since, t_key,
    lam_first, first, cut, first_visible, end, S, starts_low, scale_bits, q_error,
    DOT_ERROR: tl.constexpr, CENTER_ERROR: tl.constexpr, CENTERS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """At most the log of the sum of each row's weights, bits, less the row's decay; see `pruning._least_log_sum`.

    Args:
        since: Decay from the block's first query to each row and key t_key.
        cut: The first key that all rows see.
        q_error: `|scale| ||q||`, bits, times the largest norm of a key.
    """
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)

    # 1. The keys of the rows themselves, half of them at a time.
    lower, upper = tl.split(tl.trans(tl.reshape(since, [2, BLOCK_S])))
    for half in tl.range(0, 2, num_stages=1):
        s = first + half * BLOCK_S + tl.arange(0, BLOCK_S)
        visible = (s >= first_visible) & (s < S)
        score = _scores(q, q_ptr, t, full, q_stride, k_ptr, s, visible, k_stride, D, BLOCK_D, CHUNK_D, PRECISION)
        exponent = tl.where(
            s[None, :] <= t_key[:, None],
            score * scale_bits - tl.where(half == 0, lower, upper)[None, :],
            float("-inf"),
        )
        largest, total = _add_weights(largest, total, exponent, 1.0)

    # 2. The block before them.
    s = (end - 1) * BLOCK_S + tl.arange(0, BLOCK_S)
    score = _scores(
        q, q_ptr, t, full, q_stride, k_ptr, s, s >= first_visible, k_stride, D, BLOCK_D, CHUNK_D, PRECISION
    )
    decay = tl.load(decay_ptr + s) + (lam_first - tl.load(ends_ptr + end - 1)).to(tl.float32)
    decay = tl.where(s >= cut, decay, float("-inf"))
    largest, total = _add_weights(largest, total, score * scale_bits + decay[None, :], 1.0)

    # 3. The groups before it, as if all keys were their mean and decayed as the first of them.
    group = (end - 1) // (GATE_BLOCK // BLOCK_S) - CENTERS + tl.arange(0, CENTERS)
    valid = (group >= 0) & (group * GATE_BLOCK >= cut)
    score = _scores(q, q_ptr, t, full, q_stride, center_ptr, group, valid, BLOCK_D, D, BLOCK_D, CHUNK_D, PRECISION)
    first_high = lam_first.to(tl.float32)
    first_low = (lam_first - first_high.to(tl.float64)).to(tl.float32)
    decay = first_high - tl.load(starts_ptr + group, mask=valid, other=0.0)
    decay += first_low - tl.load(starts_ptr + starts_low + group, mask=valid, other=0.0)
    norm = tl.load(norm_ptr + group, mask=valid, other=0.0)
    decay = tl.where(norm > LEAST_NORM, decay + 7.0, float("-inf"))
    norm *= scale_bits
    largest, total = _add_weights(
        largest, total, score * norm[None, :] + decay[None, :], tl.math.exp2(q_error * -CENTER_ERROR)
    )
    return largest + tl.math.log2(total) - (q_error * DOT_ERROR + ROW_ERROR * tl.max(tl.abs(since), axis=0))


@triton.jit
def _far_groups(
    ends_ptr, norm_ptr, spread_ptr, lam_first, to_row, norm_bound, row_bound, k_norm, count, hidden, log_eps,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Of the first `count` groups of keys those that hold half of eps, and the share; see `pruning._far_groups`."""
    row_bits = row_bound * ((1.0 + PAPER_SLACK) * LOG2_E)
    reach = _largest_finite(to_row + row_bits)
    larger = norm_bound > row_bound
    ratio = tl.where(larger, norm_bound / tl.where(larger & (row_bound > 0.0), row_bound, 1e-30), 1.0)
    square = tl.math.exp2(_largest_finite(to_row + (row_bits + 2.0 * tl.math.log2(ratio))) - reach)
    linear = tl.math.exp2(_largest_finite(to_row + tl.math.log2(1.0 + norm_bound)) - reach)
    room = log_eps - 1.0 - reach
    far = 0
    share = tl.full([], 0.0, tl.float32)
    if (reach < float("inf")) & (reach > float("-inf")):
        # Ends so far away that all of them together spend 2**-10 of the room are not added up.
        limit = (room - 17.0 - tl.math.log2(tl.maximum(count, 1).to(tl.float32))).to(tl.float64) - lam_first
        far = _count_ends(ends_ptr, limit, count * (GATE_BLOCK // BLOCK_S), WIDTH) // (GATE_BLOCK // BLOCK_S)
        share = tl.where(far > 0, 2.0**-10, 0.0)
        going = far < count
        while going:
            group = far + tl.arange(0, WIDTH)
            valid = group < count
            end = tl.load(ends_ptr + group * 2 + 1, mask=valid, other=0.0)
            relative = tl.load(norm_ptr + group, mask=valid, other=0.0) / k_norm
            spread = tl.load(spread_ptr + group, mask=valid, other=0.0) * tl.where(
                relative < 1.0, relative * relative, 1.0
            )
            factor = square * spread + linear
            factor = tl.where(factor < 1.0, factor, 1.0)
            part = tl.math.exp2(tl.minimum((lam_first - end).to(tl.float32) + (7.0 - room), 100.0)) * factor
            part = tl.where(valid, part, 0.0)
            passed = tl.sum((valid & (share + tl.cumsum(part, axis=0) <= 1.0)).to(tl.int32), axis=0)
            share += tl.sum(tl.where(group < far + passed, part, 0.0), axis=0)
            far += passed
            going = (passed == WIDTH) & (far < count)
    return far * (GATE_BLOCK // BLOCK_S), share


@triton.jit
def tight_rule_kernel(
    q_ptr, k_ptr, within_ptr, starts_ptr, first_visible_ptr, bound_ptr, norm_ptr, spread_ptr, center_ptr, ends_ptr,
    decay_ptr, dropped_ptr, mass_ptr, scale, budget, log_tolerance, T, S, N, M, B, H, H_KV, within_low, starts_low,
    bound_stride_b, bound_stride_h, q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s,
    HAS_BOUND: tl.constexpr, DOT_ERROR: tl.constexpr, CENTER_ERROR: tl.constexpr, CENTERS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What one block of queries drops, see `pruning.tight_rule`: dropped and mass (B, H, M)."""
    # The last blocks first: they have the most keys to test.
    batch_head = (tl.program_id(0) % (B * H)).to(tl.int64)
    m = M - 1 - tl.program_id(0) // (B * H)
    batch, head = batch_head // H, batch_head % H
    kv_row = batch * H_KV + head // (H // H_KV)
    within_ptr += batch_head * S
    starts_ptr += batch_head * N
    ends_ptr += batch_head * tl.cdiv(S, BLOCK_S)
    decay_ptr += batch_head * S
    first_visible_ptr += batch_head * T

    # 1. What decay alone decides: blocks that are hidden, can be won, and are dropped by the paper's rule.
    first = S - T + m * BLOCK_T
    end = first // BLOCK_S
    lam_first = _running(within_ptr, starts_ptr, first, True, within_low, starts_low)
    first_visible = tl.load(first_visible_ptr + m * BLOCK_T)
    hidden = first_visible // BLOCK_S
    possible = _count_ends(ends_ptr, log_tolerance * LOG2_E - lam_first, end, WIDTH)
    dropped = tl.full([], 0, tl.int32)
    bound = tl.full([], 0.0, tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    if HAS_BOUND:
        bound = tl.load(bound_ptr + batch * bound_stride_b + head * bound_stride_h).to(tl.float32)
        limit = _threshold_bits(bound, budget).to(tl.float64) - lam_first
        dropped = _count_ends(ends_ptr, limit, possible, WIDTH)
    gain = possible - tl.maximum(dropped, hidden)
    if gain >= (MIN_GAIN if HAS_BOUND else 1):
        # 2. The rows. What a row does not see, or is padding, has no mass to lose.
        norm_ptr += kv_row * N
        q_ptr += batch * q_stride_b + head * q_stride_h
        k_ptr += batch * k_stride_b + (head // (H // H_KV)) * k_stride_h
        t = m * BLOCK_T + tl.arange(0, BLOCK_T)
        t_key = t + (S - T)
        row_first = tl.load(first_visible_ptr + t, mask=t < T, other=0)
        full = (t < T) & (row_first <= t_key)
        cut = tl.max(tl.where(full, row_first, 0), axis=0)
        q = _load_part(q_ptr, t, full, q_stride_t, 0, D, CHUNK_D)
        square = tl.zeros([BLOCK_T], tl.float32)
        for start in tl.static_range(0, BLOCK_D, CHUNK_D):
            x = _load_part(q_ptr, t, full, q_stride_t, start, D, CHUNK_D).to(tl.float32)
            square += tl.sum(x * x, axis=1)
        q_norm = tl.sqrt(square)
        q_norm = tl.where(q_norm < LEAST_NORM, LEAST_NORM, q_norm)  # a NaN stays one
        k_norm = largest_of(norm_ptr, (tl.minimum(first + BLOCK_T, S) - 1) // GATE_BLOCK + 1, WIDTH)
        norm_bound = tl.abs(scale) * (1.0 + PAPER_SLACK) * q_norm * tl.where(k_norm < float("inf"), k_norm, 0.0)
        row_bound = norm_bound
        if HAS_BOUND:
            row_bound = tl.minimum(norm_bound, bound)
        else:
            bound = tl.where(k_norm < float("inf"), _largest_finite(norm_bound), float("inf"))
            limit = _threshold_bits(bound, budget).to(tl.float64) - lam_first
            dropped = _count_ends(ends_ptr, limit, possible, WIDTH)
            gain = possible - tl.maximum(dropped, hidden)
        worth = (gain >= MIN_GAIN) & (cut <= first)
        if worth & (bound < float("inf")) & (log_tolerance >= LEAST_LOG_TOLERANCE):
            # 3. At most so much is the log of the sum of a row's weights.
            lam = _running(within_ptr, starts_ptr, t_key, t < T, within_low, starts_low)
            since = tl.where(t < T, lam - lam_first, 0.0).to(tl.float32)
            q_error = tl.abs(scale) * LOG2_E * q_norm * k_norm
            log_sum = _least_log_sum(
                q, q_ptr, t, full, q_stride_t, k_ptr, k_stride_s, starts_ptr, ends_ptr, decay_ptr, norm_ptr,
                center_ptr + kv_row * N * BLOCK_D, since, t_key, lam_first, first, cut, first_visible, end, S,
                starts_low, scale * LOG2_E, q_error, DOT_ERROR, CENTER_ERROR, CENTERS, D, BLOCK_D, CHUNK_D, PRECISION,
            )  # fmt: skip
            # A row weighs a key by exp2(score + to_row + lam_first - lam_s): its own decay is in both.
            to_row = tl.where(full, -log_sum, float("-inf"))

            # 4. Without scores.
            log_eps = (log_tolerance - TIGHT_SLACK) * LOG2_E
            tested, share = _far_groups(
                ends_ptr, norm_ptr, spread_ptr + kv_row * N, lam_first, to_row, norm_bound, row_bound, k_norm,
                first // GATE_BLOCK, hidden, log_eps, WIDTH,
            )  # fmt: skip
            eps = tl.math.exp2(tl.full([], 0.0, tl.float32) + log_eps)
            spent = tl.zeros([BLOCK_T], tl.float32) + tl.where(tested > hidden, 0.5 * eps * share, 0.0)
            tested = tl.maximum(tested, hidden)

            # 5. With scores, block after block, until a row has spent eps. A loop with a condition would say it
            # better; Triton 3.6 fails to lay out a tensor that one carries.
            to_row += q_error * DOT_ERROR
            # Relative to the largest row: one addition less per score. What underflows weighs nothing in any row, as
            # no row counts less than 2**-100 of the largest one.
            anchor = tl.max(to_row, axis=0)
            anchor = tl.where((anchor > float("-inf")) & (anchor < float("inf")), anchor, 0.0)
            factor = to_row - anchor
            factor = tl.where(full, tl.math.exp2(tl.where(factor < -100.0, -100.0, factor)), 0.0)
            passed = tl.zeros([BLOCK_T], tl.int32)
            going = tested < possible
            for chunk in tl.range(tested, possible, AT_ONCE):
                if going:
                    for block in tl.range(chunk, tl.minimum(chunk + AT_ONCE, possible), num_stages=STAGES):
                        s = block * BLOCK_S + tl.arange(0, BLOCK_S)
                        score = _scores(
                            q, q_ptr, t, full, q_stride_t, k_ptr, s, s >= first_visible, k_stride_s, D, BLOCK_D,
                            CHUNK_D, PRECISION,
                        )  # fmt: skip
                        decay = tl.load(decay_ptr + s)
                        decay += (lam_first - tl.load(ends_ptr + block)).to(tl.float32)
                        weight = tl.math.exp2(score * (scale * LOG2_E) + (decay + anchor)[None, :])
                        spent += factor * tl.sum(weight, axis=1)
                        passed += (spent <= eps).to(tl.int32)
                    going = tl.min(passed, axis=0) == chunk + AT_ONCE - tested
            tested += tl.min(passed, axis=0)
            if tested > dropped:
                dropped = tested
                mass = eps

    # 6. Of what the paper's rule drops, the mass is at most that of so many of the nearest of them.
    if (mass == 0.0) & (dropped > hidden):
        nearest = tl.load(ends_ptr + dropped - 1)
        exponent = 2.0 * LOG2_E * bound + (lam_first - nearest).to(tl.float32)
        mass = (dropped * BLOCK_S).to(tl.float32) * tl.math.exp2(exponent)
    dropped = tl.maximum(dropped, hidden)
    tl.store(dropped_ptr + batch_head * M + m, dropped)
    tl.store(mass_ptr + batch_head * M + m, mass)


@triton.jit
def first_keys_kernel(
    dropped_ptr, first_visible_ptr, first_key_ptr, T, S, M, ROW_BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    """`first_key` of the rows of 8 blocks. It must not decrease: a block drops what all later ones drop, too."""
    batch_head = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * ROW_BLOCKS + tl.arange(0, ROW_BLOCKS)
    dropped_ptr += batch_head * M
    dropped = tl.load(dropped_ptr + m, mask=m < M, other=S)
    dropped = tl.associative_scan(dropped, 0, _smaller, reverse=True)
    later = tl.zeros([WIDTH], tl.int32) + S
    for start in tl.range((tl.program_id(1) + 1) * ROW_BLOCKS, M, WIDTH):
        other = start + tl.arange(0, WIDTH)
        later = tl.minimum(later, tl.load(dropped_ptr + other, mask=other < M, other=S))
    dropped = tl.minimum(dropped, tl.min(later, axis=0))
    _store_first_keys(first_visible_ptr + batch_head * T, first_key_ptr + batch_head * T, dropped, m, S, T)


def _precision() -> str:
    """Of `tl.dot` with float32 inputs; DOT_ERROR covers tf32, which AMD does not have."""
    return "ieee" if torch.version.hip else "tf32"


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
    num_blocks = -(-num_queries // BLOCK_T.value)
    bound = norms = sums.starts  # the one that is not given is never read
    bound_strides, num_chunks = (0, 0), 0
    if logit_bound is None:
        norms = largest_norms(q, k, key_start)
        num_chunks = norms.shape[-1]
    else:
        bound = logit_bound.expand(batch, num_heads)
        bound_strides = bound.stride()
    first_key = torch.empty_like(first_visible)
    paper_rule_kernel[(batch * num_heads, -(-num_blocks // ROW_BLOCKS))](
        *sums, first_visible, bound, norms, first_key, abs(scale), math.log(num_keys) - log_tolerance, num_queries,
        num_keys, sums.starts.shape[-1], num_blocks, num_heads, num_kv_heads, num_chunks,
        (num_keys // BLOCK_S.value).bit_length(), sums.within.stride(0), sums.starts.stride(0), *bound_strides,
        HAS_BOUND=logit_bound is not None, ROW_BLOCKS=ROW_BLOCKS, WIDTH=256,
    )  # fmt: skip
    return first_key


def tight_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    sums: GateSums,
    first_visible: torch.Tensor,
    key_start: torch.Tensor | None,
    *,
    scale: float,
    log_tolerance: float,
    logit_bound: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`first_key` as `pruning.prune` and the mass of `pruning.tight_rule`; three launches."""
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    num_blocks, num_groups = -(-num_queries // BLOCK_T.value), sums.starts.shape[-1]
    rows = batch * num_heads
    block_d = padded_head_dim(dim)
    norm, spread = torch.empty(2, batch, num_kv_heads, num_groups, dtype=torch.float32, device=q.device)
    center = torch.empty(batch, num_kv_heads, num_groups, block_d, dtype=k.dtype, device=q.device)
    ends = torch.empty(rows, -(-num_keys // BLOCK_S.value), dtype=torch.float64, device=q.device)
    decay = torch.empty(rows, num_keys, dtype=torch.float32, device=q.device)
    lows = (sums.within.stride(0), sums.starts.stride(0))
    part_d = min(block_d, SPREAD_DIM)
    key_summaries_kernel[(batch * num_kv_heads, -(-num_groups // GROUPS))](
        k, *sums, k if key_start is None else key_start, norm, spread, center, ends, decay, num_keys, num_groups,
        num_heads, num_kv_heads, *lows, *k.stride()[:3], HAS_KEY_START=key_start is not None,
        SPREAD_ERROR=SPREAD_ERROR[k.dtype], D=dim, BLOCK_D=block_d, PART_D=part_d, GROUPS=GROUPS,
        PRECISION=_precision(), num_warps=8 if part_d == 128 else 4,
    )  # fmt: skip
    bound, bound_strides = norm, (0, 0)  # never read if it is not given
    if logit_bound is not None:
        bound = logit_bound.expand(batch, num_heads)
        bound_strides = bound.stride()
    dropped = torch.empty(batch, num_heads, num_blocks, dtype=torch.int32, device=q.device)
    mass = torch.empty(batch, num_heads, num_blocks, dtype=torch.float32, device=q.device)
    chunk_d = min(block_d, 256 // q.element_size())
    # Compiled for sm_80 and sm_100, 8 warps never spill; 4 do not on Hopper, and leave room for two programs.
    num_warps = 4 if architecture(q.device) == 90 and block_d == chunk_d else 8
    tight_rule_kernel[(rows * num_blocks,)](
        q, k, *sums, first_visible, bound, norm, spread, center, ends, decay, dropped, mass, scale,
        math.log(num_keys) - log_tolerance, log_tolerance, num_queries, num_keys, num_groups, num_blocks, batch,
        num_heads, num_kv_heads, *lows, *bound_strides, *q.stride()[:3], *k.stride()[:3],
        HAS_BOUND=logit_bound is not None, DOT_ERROR=DOT_ERROR[q.dtype], CENTER_ERROR=CENTER_ERROR[q.dtype],
        CENTERS=CENTERS, D=dim, BLOCK_D=block_d, CHUNK_D=chunk_d, PRECISION=_precision(), WIDTH=256, AT_ONCE=8,
        STAGES=3, num_warps=num_warps,
    )  # fmt: skip
    first_key = torch.empty_like(first_visible)
    first_keys_kernel[(rows, -(-num_blocks // ROW_BLOCKS))](
        dropped, first_visible, first_key, num_queries, num_keys, num_blocks, ROW_BLOCKS=ROW_BLOCKS, WIDTH=256
    )
    return first_key, mass
