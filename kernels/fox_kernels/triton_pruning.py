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

# Of a product q . k relative to ||q|| ||k||, as in pruning.py.
DOT_ERROR = {torch.float32: 2.0**-8, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-12}
NORM_CHUNK = 1024  # rows of q or k whose largest norm one program finds
ROW_BLOCKS = 8  # blocks of queries of one program
BLOCK_T = tl.constexpr(128)
BLOCK_S = tl.constexpr(64)
GATE_BLOCK = tl.constexpr(128)
PAPER_SLACK = tl.constexpr(2.0**-16)
TIGHT_SLACK = tl.constexpr(2.0**-5)
MIN_GAIN = tl.constexpr(2)
LEAST_LOG_TOLERANCE = tl.constexpr(-60.0)
LOG2_E = tl.constexpr(1.4426950408889634)
NO_ROW = tl.constexpr(-1e300)  # below every running sum, and finite: -inf would subtract to NaN


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _smaller(x, y):
    return tl.minimum(x, y)


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
        q_norm = _largest_of(norm_ptr + (heads + head) * num_chunks, num_chunks, WIDTH)
        k_norm = _largest_of(norm_ptr + (heads + H + head // (H // H_KV)) * num_chunks, num_chunks, WIDTH)
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
def _count_below(within_ptr, starts_ptr, limit, count, within_low, starts_low, WIDTH: tl.constexpr):
    """How many of the first `count` block ends have -lam below the limit: they come first. WIDTH probes at a time."""
    low = 0
    high = count
    while low < high:
        step = (high - low + WIDTH - 1) // WIDTH
        at = low + (tl.arange(0, WIDTH) + 1) * step - 1
        end = _running(within_ptr, starts_ptr, at * BLOCK_S + BLOCK_S - 1, at < high, within_low, starts_low)
        low += tl.sum(((at < high) & (-end < limit)).to(tl.int32), axis=0) * step
        high = tl.minimum(high, low + step - 1)
    return low


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
    """(BLOCK_T, BLOCK_S) products of the rows with the keys s, and the largest norm of these keys."""
    square = tl.zeros([BLOCK_S], tl.float32)
    score = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for start in tl.static_range(0, BLOCK_D, CHUNK_D):
        k = _load_part(k_ptr, s, visible, k_stride, start, D, CHUNK_D)
        # A wide head is taken in parts, and its queries are read again: all of it does not fit the registers.
        part = q if BLOCK_D == CHUNK_D else _load_part(q_ptr, t, full, q_stride, start, D, CHUNK_D)
        score = tl.dot(part, tl.trans(k), score, input_precision=PRECISION)
        x = k.to(tl.float32)
        square += tl.sum(x * x, axis=1)
    return score, tl.sqrt(tl.max(square, axis=0))


@triton.jit
def _high_and_low(x):
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _least_log_sum(
    q, q_ptr, t, full, q_stride, k_ptr, k_stride, within_ptr, starts_ptr, within_low, starts_low, lam, lam_first,
    first, first_visible, row_first, t_key, S, scale, dot_error,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """At most the log of the sum of each row's weights, bits: its keys from 64 before the block's first query on."""
    lam_high, lam_low = _high_and_low(lam)
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    near_norm = tl.full([], 0.0, tl.float32)
    for tile in tl.range(0, 3, num_stages=1):
        # Own keys first: then every row that sees anything has a largest score.
        s = first + tl.where(tile == 2, -BLOCK_S, tile * BLOCK_S) + tl.arange(0, BLOCK_S)
        visible = (s >= first_visible) & (s < S)
        score, k_norm = _scores(
            q, q_ptr, t, full, q_stride, k_ptr, s, visible, k_stride, D, BLOCK_D, CHUNK_D, PRECISION
        )
        near_norm = tl.maximum(near_norm, k_norm)
        # In two floats: next to the diagonal large decays must cancel.
        high, low = _high_and_low(_running(within_ptr, starts_ptr, s, visible, within_low, starts_low) - lam_first)
        decay = (lam_high[:, None] - high[None, :]) + (lam_low[:, None] - low[None, :])
        seen = full[:, None] & (s[None, :] >= row_first[:, None]) & (s[None, :] <= t_key[:, None])
        score = tl.where(seen, score * (scale * LOG2_E) + decay, float("-inf"))
        new = tl.maximum(largest, tl.max(score, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.math.exp2(largest - shift) + tl.sum(tl.math.exp2(score - shift[:, None]), axis=1)
        largest = new
    return tl.where(full, largest, 0.0) + tl.math.log2(tl.where(full, total, 1.0)) - dot_error * near_norm


@triton.jit
def tight_rule_kernel(
    q_ptr, k_ptr, within_ptr, starts_ptr, first_visible_ptr, bound_ptr, norm_ptr, dropped_ptr, mass_ptr, scale, budget,
    log_tolerance, T, S, N, M, H, H_KV, num_chunks, within_low, starts_low, bound_stride_b, bound_stride_h,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s,
    HAS_BOUND: tl.constexpr, DOT_ERROR: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    PRECISION: tl.constexpr, NORM_CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What one block of queries drops, see `pruning.tight_rule`: dropped and mass (B, H, M)."""
    batch_head = (tl.program_id(0) // M).to(tl.int64)
    m = tl.program_id(0) % M
    batch, head = batch_head // H, batch_head % H
    kv_head = head // (H // H_KV)
    within_ptr += batch_head * S
    starts_ptr += batch_head * N
    first_visible_ptr += batch_head * T
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + kv_head * k_stride_h

    # 1. What decay alone decides: blocks that are hidden, can be won, and are dropped by the paper's rule.
    first = S - T + m * BLOCK_T
    end = first // BLOCK_S
    lam_first = _running(within_ptr, starts_ptr, first, True, within_low, starts_low)
    first_visible = tl.load(first_visible_ptr + m * BLOCK_T)
    hidden = first_visible // BLOCK_S
    limit = log_tolerance * LOG2_E - lam_first
    possible = _count_below(within_ptr, starts_ptr, limit, end, within_low, starts_low, WIDTH)
    dropped = tl.full([], 0, tl.int32)
    bound = tl.full([], 0.0, tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    if HAS_BOUND:
        bound = tl.load(bound_ptr + batch * bound_stride_b + head * bound_stride_h).to(tl.float32)
        limit = _threshold_bits(bound, budget).to(tl.float64) - lam_first
        dropped = _count_below(within_ptr, starts_ptr, limit, possible, within_low, starts_low, WIDTH)
    gain = possible - tl.maximum(dropped, hidden)
    if gain >= (MIN_GAIN if HAS_BOUND else 1):
        # 2. The rows. What a row does not see, or is padding, has no mass to lose.
        t = m * BLOCK_T + tl.arange(0, BLOCK_T)
        t_key = t + (S - T)
        row_first = tl.load(first_visible_ptr + t, mask=t < T, other=0)
        full = (t < T) & (row_first <= t_key)
        square = tl.zeros([BLOCK_T], tl.float32)
        q = _load_part(q_ptr, t, full, q_stride_t, 0, D, CHUNK_D)
        for start in tl.static_range(0, BLOCK_D, CHUNK_D):
            x = _load_part(q_ptr, t, full, q_stride_t, start, D, CHUNK_D).to(tl.float32)
            square += tl.sum(x * x, axis=1)
        q_norm = tl.sqrt(square)
        row_bound = tl.zeros([BLOCK_T], tl.float32) + bound
        if not HAS_BOUND:
            chunks = (tl.minimum(first + BLOCK_T, S) - 1) // NORM_CHUNK + 1
            k_norm = _largest_of(norm_ptr + (batch * H_KV + kv_head) * num_chunks, chunks, WIDTH)
            row_bound = tl.abs(scale) * (1.0 + PAPER_SLACK) * q_norm * tl.where(k_norm < float("inf"), k_norm, 0.0)
            bound = tl.max(tl.where(row_bound != row_bound, float("inf"), row_bound), axis=0)
            bound = tl.where(k_norm < float("inf"), bound, float("inf"))
            limit = _threshold_bits(bound, budget).to(tl.float64) - lam_first
            dropped = _count_below(within_ptr, starts_ptr, limit, possible, within_low, starts_low, WIDTH)
            gain = possible - tl.maximum(dropped, hidden)
        if (gain >= MIN_GAIN) & (bound < float("inf")) & (log_tolerance >= LEAST_LOG_TOLERANCE):
            dot_error = tl.abs(scale) * LOG2_E * DOT_ERROR * q_norm
            # 3. At most so much is the log of the sum of a row's weights, from the nearest keys.
            lam = _running(within_ptr, starts_ptr, t_key, t < T, within_low, starts_low) - lam_first
            lse = _least_log_sum(
                q, q_ptr, t, full, q_stride_t, k_ptr, k_stride_s, within_ptr, starts_ptr, within_low, starts_low, lam,
                lam_first, first, first_visible, row_first, t_key, S, scale, dot_error, D, BLOCK_D, CHUNK_D, PRECISION,
            )  # fmt: skip
            # A row weighs a key by exp2(score + to_row + lam_first - lam_s).
            to_row = tl.where(full, lam.to(tl.float32) - lse, float("-inf"))

            # 4. Without scores: the bound of the row on every key, 64 keys for every block. It may spend half of eps.
            log_eps = (log_tolerance - TIGHT_SLACK) * LOG2_E
            reach = to_row + row_bound * ((1.0 + PAPER_SLACK) * LOG2_E)
            farthest = tl.max(tl.where(reach != reach, float("inf"), reach), axis=0)
            if (farthest < float("inf")) & (farthest > float("-inf")):
                room = log_eps - 1.0 - farthest  # log of the sum of decays that may be spent
                # Ends so far away that all of them together spend 2**-10 of it are not added up.
                limit = (room - 16.0 - tl.math.log2(tl.maximum(end, 1).to(tl.float32))).to(tl.float64) - lam_first
                tested = _count_below(within_ptr, starts_ptr, limit, end, within_low, starts_low, WIDTH)
                share = tl.where(tested > hidden, 2.0**-10, 0.0)  # spent of the room
                tested = tl.maximum(tested, hidden)
                going = tested < end
                while going:
                    n = tested + tl.arange(0, WIDTH)
                    lam_n = _running(
                        within_ptr, starts_ptr, n * BLOCK_S + BLOCK_S - 1, n < end, within_low, starts_low
                    )
                    part = (lam_first - lam_n).to(tl.float32) + 6.0 - room
                    part = tl.where(n < end, tl.math.exp2(tl.minimum(part, 100.0)), 0.0)
                    count = tl.sum(((n < end) & (share + tl.cumsum(part, axis=0) <= 1.0)).to(tl.int32), axis=0)
                    share += tl.sum(tl.where(n < tested + count, part, 0.0), axis=0)
                    tested += count
                    going = (count == WIDTH) & (tested < end)
                spent = tl.math.exp2(reach - farthest + (log_eps - 1.0)) * share

                # 5. With scores, block after block, until eps is spent. A loop with a condition would say it better;
                # Triton 3.6 fails to lay out a tensor that one carries.
                eps = tl.math.exp2(tl.full([], 0.0, tl.float32) + log_eps)
                going = tested < end
                for block in tl.range(tested, end, num_stages=1):
                    if going:
                        s = block * BLOCK_S + tl.arange(0, BLOCK_S)
                        score, k_norm = _scores(
                            q, q_ptr, t, full, q_stride_t, k_ptr, s, s >= first_visible, k_stride_s, D, BLOCK_D,
                            CHUNK_D, PRECISION,
                        )  # fmt: skip
                        lam_s = _running(within_ptr, starts_ptr, s, True, within_low, starts_low)
                        decay = (lam_first - lam_s).to(tl.float32)
                        weight = tl.math.exp2(score * (scale * LOG2_E) + (decay[None, :] + to_row[:, None]))
                        weight = tl.sum(weight, axis=1) * tl.math.exp2(dot_error * k_norm)
                        going = tl.min((spent + weight <= eps).to(tl.int32), axis=0) == 1
                        spent = tl.where(going, spent + weight, spent)
                        tested += going.to(tl.int32)
                if tested > dropped:
                    dropped = tested
                    mass = tl.max(spent, axis=0)

    # 6. Of what the paper's rule drops, the mass is at most that of so many of the nearest of them.
    if (mass == 0.0) & (dropped > hidden):
        nearest = _running(within_ptr, starts_ptr, dropped * BLOCK_S - 1, True, within_low, starts_low)
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


def _largest_norms(q: torch.Tensor, k: torch.Tensor, key_start: torch.Tensor | None) -> torch.Tensor:
    """Largest norms of chunks of rows, `(B, H + H_kv, chunks)` float32, the heads of q before those of k.

    A q without heads leaves those of k.
    """
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
    """`first_key` as `pruning.prune` and the mass of `pruning.tight_rule`; two launches, three without a bound."""
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    num_blocks = triton.cdiv(num_queries, BLOCK_T.value)
    bound = norms = sums.starts  # the one that is not given is never read
    bound_strides, num_chunks = (0, 0), 0
    if logit_bound is None:
        norms = _largest_norms(q[:, :0], k, key_start)
        num_chunks = norms.shape[-1]
    else:
        bound = logit_bound.expand(batch, num_heads)
        bound_strides = bound.stride()
    dropped = torch.empty(batch, num_heads, num_blocks, dtype=torch.int32, device=q.device)
    mass = torch.empty(batch, num_heads, num_blocks, dtype=torch.float32, device=q.device)
    block_d = padded_head_dim(dim)
    chunk_d = min(block_d, 256 // q.element_size())
    # Compiled for sm_80, sm_90 and sm_100, 8 warps never spill; 4 do not on Hopper, and leave room for two programs.
    num_warps = 4 if architecture(q.device) == 90 and block_d == chunk_d else 8
    tight_rule_kernel[(batch * num_heads * num_blocks,)](
        q, k, *sums, first_visible, bound, norms, dropped, mass, scale, math.log(num_keys) - log_tolerance,
        log_tolerance, num_queries, num_keys, sums.starts.shape[-1], num_blocks, num_heads, num_kv_heads, num_chunks,
        sums.within.stride(0), sums.starts.stride(0), *bound_strides, *q.stride()[:3], *k.stride()[:3],
        HAS_BOUND=logit_bound is not None, DOT_ERROR=DOT_ERROR[q.dtype], D=dim, BLOCK_D=block_d,
        CHUNK_D=chunk_d, PRECISION=_precision(), NORM_CHUNK=NORM_CHUNK, WIDTH=128, num_warps=num_warps,
    )  # fmt: skip
    first_key = torch.empty_like(first_visible)
    first_keys_kernel[(batch * num_heads, triton.cdiv(num_blocks, ROW_BLOCKS))](
        dropped, first_visible, first_key, num_queries, num_keys, num_blocks, ROW_BLOCKS=ROW_BLOCKS, WIDTH=256
    )
    return first_key, mass
