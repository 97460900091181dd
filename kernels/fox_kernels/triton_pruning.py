"""Adaptive computation pruning as Triton kernels: `pruning.prune` in at most four launches.

Under the paper's rule a program decides for 8 blocks of queries and writes the first key of each of their rows; every
operation is done as in pruning.py, so that both choose the same blocks. Under the tight rule one kernel finds what the
gates decide; where they leave blocks to win, others read the keys and then, a block of queries each, the queries.

Letters:  B batch, H query heads, H_kv key heads, G query heads per key head, T queries (the last of the keys), S keys,
    D head dim, M blocks of queries, N blocks of `GATE_BLOCK` keys.
"""

import math

import torch
import triton
import triton.language as tl

from .gates import GateSums
from .launch import launch
from .tile_sizes import architecture, padded_head_dim
from .triton_norms import largest_norms, largest_of
from .triton_summaries import (
    BLOCK_S,
    BLOCK_T,
    GATE_BLOCK,
    LEAST_NORM,
    LOG2_E,
    MIN_GAIN,
    PAPER_SLACK,
    WINDOW,
    WINDOWS,
    gate_tables_kernel,
    key_summaries_kernel,
    largest_finite,
    load_part,
    paper_mass,
    running_sum,
    threshold_bits,
)

# Of a product q . k relative to ||q|| ||k||, as in pruning.py.
DOT_ERROR = {torch.float32: 2.0**-8, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-12}
CENTER_ERROR = {torch.float32: 2.0**-7, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-8}
SPREAD_ERROR = {torch.float32: 2.0**-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-11}
ROW_BLOCKS = 8  # blocks of queries of one program
GROUPS = 4  # groups of `GATE_BLOCK` keys of one program
GATE_GROUPS = 32  # the same where only gates are read, and blocks of queries
TIGHT_SLACK = tl.constexpr(2.0**-5)
LEAST_LOG_TOLERANCE = tl.constexpr(-60.0)
NEAR_CENTERS = tl.constexpr(16)
FAR_CENTERS = tl.constexpr(48)
SPREAD_DIM = 128
NO_ROW = tl.constexpr(-1e300)  # below every running sum, and finite: -inf would subtract to NaN


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _smaller(x, y):
    return tl.minimum(x, y)


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
        q_norm = largest_of(norm_ptr + (heads + head) * num_chunks, num_chunks, WIDTH)
        k_norm = largest_of(norm_ptr + (heads + H + head // (H // H_KV)) * num_chunks, num_chunks, WIDTH)
        bound = scale * q_norm * k_norm
    threshold = threshold_bits(bound, budget)

    # 2. lam at the first query of each block, or at a later block's where that is larger: a gate above 0.
    m = tl.program_id(1) * ROW_BLOCKS + tl.arange(0, ROW_BLOCKS)
    running = running_sum(within_ptr, starts_ptr, S - T + m * BLOCK_T, m < M, within_low, starts_low)
    running = tl.associative_scan(tl.where(m < M, running, NO_ROW), 0, _larger, reverse=True)
    later = tl.full([WIDTH], NO_ROW, tl.float64)
    for start in tl.range((tl.program_id(1) + 1) * ROW_BLOCKS, M, WIDTH):
        other = start + tl.arange(0, WIDTH)
        lam = running_sum(within_ptr, starts_ptr, S - T + other * BLOCK_T, other < M, within_low, starts_low)
        later = tl.maximum(later, tl.where(other < M, lam, NO_ROW))
    limit = threshold.to(tl.float64) - tl.maximum(running, tl.max(later, axis=0))

    # 3. Blocks of keys whose end has -lam below the limit.
    low = tl.zeros([ROW_BLOCKS], tl.int32)
    high = tl.zeros([ROW_BLOCKS], tl.int32) + S // BLOCK_S
    for _ in tl.range(0, num_steps):
        middle = (low + high) // 2
        searching = low < high
        end = running_sum(within_ptr, starts_ptr, middle * BLOCK_S + BLOCK_S - 1, searching, within_low, starts_low)
        dropped = -end < limit
        low = tl.where(searching & dropped, middle + 1, low)
        high = tl.where(searching & ~dropped, middle, high)

    # 4. The first key of every row.
    _store_first_keys(first_visible_ptr + batch_head * T, first_key_ptr + batch_head * T, low, m, S, T)


@triton.jit
def _scores(
    q, q_ptr, t, full, q_stride, k_ptr, s, visible, k_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the `BLOCK_T` rows with the keys s."""
    score = tl.zeros([BLOCK_T, s.shape[0]], tl.float32)
    for start in tl.static_range(0, BLOCK_D, CHUNK_D):
        k = load_part(k_ptr, s, visible, k_stride, start, D, CHUNK_D)
        # A wide head is taken in parts, and its queries are read again: all of it does not fit the registers.
        part = q if BLOCK_D == CHUNK_D else load_part(q_ptr, t, full, q_stride, start, D, CHUNK_D)
        score = tl.dot(part, tl.trans(k), score, input_precision=PRECISION)
    return score


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
def _row_norms(
    q, q_ptr, t, full, q_stride, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr
):  # fmt: skip
    square = tl.zeros([BLOCK_T], tl.float32)
    for start in tl.static_range(0, BLOCK_D, CHUNK_D):
        x = q if BLOCK_D == CHUNK_D else load_part(q_ptr, t, full, q_stride, start, D, CHUNK_D)
        square += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
    norm = tl.sqrt(square)
    return tl.where(norm < LEAST_NORM, LEAST_NORM, norm)  # a NaN stays one


@triton.jit
def _least_log_sum(
    q, q_ptr, t, full, q_stride, window_ptr, norm_ptr, center_ptr, lam_high, lam_low, first, cut, window_low,
    scale_bits, q_error,
    CENTER_ERROR: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """At most the log of the sum of each row's weights, bits, less the row's decay; see `pruning._least_log_sum`.

    Args:
        lam_high, lam_low: lam at the block's first query.
        cut: The first key that all rows see.
        q_error: `|scale| ||q||`, bits, times the largest norm of a key.
    """
    c = tl.arange(0, NEAR_CENTERS + FAR_CENTERS)
    near = c < NEAR_CENTERS
    end = first // WINDOW - NEAR_CENTERS
    start = tl.where(near, end + c, (end // WINDOWS - (NEAR_CENTERS + FAR_CENTERS) + c) * WINDOWS)
    valid = (start >= 0) & (start * WINDOW >= cut)
    group = start // WINDOWS
    row = group * (WINDOWS + 1) + tl.where(near, start % WINDOWS, WINDOWS)
    score = _scores(q, q_ptr, t, full, q_stride, center_ptr, row, valid, BLOCK_D, D, BLOCK_D, CHUNK_D, PRECISION)
    # Numbers of a group as sums of two: loaded as a vector, every thread would load the columns of its scores.
    high = tl.arange(0, 2)[None, :] == 0
    low = tl.where(high, 0, window_low)
    norm = tl.load(norm_ptr + tl.where(high, group[:, None], 0), mask=high & valid[:, None], other=0.0)
    decay = tl.load(window_ptr + low + start[:, None] - 1, mask=(valid & (start > 0))[:, None], other=0.0)
    decay = tl.where(high, lam_high, lam_low) - decay + tl.where(high, tl.where(near, 4.0, 7.0)[:, None], 0.0)
    decay = tl.sum(tl.where((norm > LEAST_NORM) | (low > 0), decay, float("-inf")), axis=1)
    norm = tl.sum(norm, axis=1)
    exponent = score * (norm * scale_bits)[None, :] + decay[None, :]
    largest = tl.max(exponent, axis=1)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.math.exp2(exponent - shift[:, None]), axis=1)
    return largest + tl.math.log2(total) - q_error * CENTER_ERROR


@triton.jit
def _far_groups(
    ends_ptr, norm_ptr, spread_ptr, lam_first, to_row, top, norm_bound, row_bits, bound, k_norm, count, log_eps,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Of the first `count` groups of keys those that hold half of eps, and the share; see `pruning._far_groups`."""
    reach = largest_finite(to_row + row_bits)
    largest_norm = largest_finite(norm_bound)
    ratio = tl.where(largest_norm > bound, largest_norm / bound, 1.0)
    linear = (1.0 + largest_norm) * tl.math.exp2(top - reach)
    room = log_eps - 1.0 - reach
    far = 0
    share = tl.full([], 0.0, tl.float32)
    if (reach < float("inf")) & (reach > float("-inf")):
        if count > WIDTH:
            # Ends so far away that all of them together spend 2**-10 of the room are not added up.
            limit = (room - 17.0 - tl.math.log2(count.to(tl.float32))).to(tl.float64) - lam_first
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
            factor = ratio * ratio * spread + linear
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
    window_ptr, possible_ptr, dropped_ptr, mass_ptr, scale, budget, log_tolerance, T, S, N, M, B, H, H_KV, within_low,
    starts_low, window_low, bound_stride_b, bound_stride_h, q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h,
    k_stride_s,
    HAS_BOUND: tl.constexpr, NEGATIVE: tl.constexpr, DOT_ERROR: tl.constexpr, CENTER_ERROR: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What one block of queries drops, see `pruning.tight_rule`: dropped and mass (B, H, M)."""
    # The last blocks first: they have the most keys to test.
    batch_head = (tl.program_id(0) % (B * H)).to(tl.int64)
    m = M - 1 - tl.program_id(0) // (B * H)
    batch, head = batch_head // H, batch_head % H
    first_visible_ptr += batch_head * T

    # 1. Blocks that can be won, and those that are hidden or dropped by the gates.
    possible = tl.load(possible_ptr + batch_head * M + m)
    first_visible = tl.load(first_visible_ptr + m * BLOCK_T)
    hidden = first_visible // BLOCK_S
    dropped = hidden
    if HAS_BOUND:
        dropped = tl.load(dropped_ptr + batch_head * M + m)
        bound = tl.load(bound_ptr + batch * bound_stride_b + head * bound_stride_h).to(tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    better = tl.full([], False, tl.int1)
    if possible - dropped >= (MIN_GAIN if HAS_BOUND else 1):
        # 2. The rows. What a row does not see, or is padding, has no mass to lose.
        kv_row = batch * H_KV + head // (H // H_KV)
        within_ptr += batch_head * S
        starts_ptr += batch_head * N
        ends_ptr += batch_head * tl.cdiv(S, BLOCK_S)
        window_ptr += batch_head * tl.cdiv(S, WINDOW)
        norm_ptr += kv_row * N
        q_ptr += batch * q_stride_b + head * q_stride_h
        k_ptr += batch * k_stride_b + (head // (H // H_KV)) * k_stride_h
        first = S - T + m * BLOCK_T
        t = m * BLOCK_T + tl.arange(0, BLOCK_T)
        row_first = tl.load(first_visible_ptr + t, mask=t < T, other=0)
        full = (t < T) & (row_first <= t + (S - T))
        cut = tl.max(tl.where(full, row_first, 0), axis=0)
        lam_first = running_sum(within_ptr, starts_ptr, first, True, within_low, starts_low)
        lam_high = lam_first.to(tl.float32)
        lam_low = (lam_first - lam_high.to(tl.float64)).to(tl.float32)
        q = load_part(q_ptr, t, full, q_stride_t, 0, D, CHUNK_D)
        q_norm = _row_norms(q, q_ptr, t, full, q_stride_t, D, BLOCK_D, CHUNK_D)
        k_norm = largest_of(norm_ptr, (tl.minimum(first + BLOCK_T, S) - 1) // GATE_BLOCK + 1, WIDTH)
        norm_bound = tl.abs(scale) * (1.0 + PAPER_SLACK) * q_norm * tl.where(k_norm < float("inf"), k_norm, 0.0)
        row_bound = norm_bound
        if HAS_BOUND:
            row_bound = tl.minimum(norm_bound, bound)
        else:
            bound = tl.where(k_norm < float("inf"), largest_finite(norm_bound), float("inf"))
            limit = threshold_bits(bound, budget).to(tl.float64) - lam_first
            by_gates = _count_ends(ends_ptr, limit, possible, WIDTH)
            if by_gates > hidden:
                dropped = by_gates
                mass = paper_mass(dropped, bound, (lam_first - tl.load(ends_ptr + dropped - 1)).to(tl.float32))
        worth = (possible - dropped >= MIN_GAIN) & (cut <= first)
        if worth & (bound < float("inf")) & (log_tolerance >= LEAST_LOG_TOLERANCE):
            # 3. At most so much is the log of the sum of a row's weights.
            q_error = tl.abs(scale) * LOG2_E * q_norm * k_norm
            log_sum = _least_log_sum(
                q, q_ptr, t, full, q_stride_t, window_ptr, norm_ptr,
                center_ptr + kv_row * N * (WINDOWS + 1) * BLOCK_D, lam_high, lam_low,
                first, cut, window_low, scale * LOG2_E, q_error,
                CENTER_ERROR, D, BLOCK_D, CHUNK_D, PRECISION,
            )  # fmt: skip
            # A row's own key weighs at least exp(-u), and decays by nothing.
            row_bits = row_bound * ((1.0 + PAPER_SLACK) * LOG2_E)
            log_sum = tl.where(q_error < float("inf"), tl.maximum(log_sum, -row_bits), log_sum)
            # A row weighs a key by exp2(score + to_row + lam_first - lam_s): its own decay is in both.
            to_row = tl.where(full, -log_sum, float("-inf"))

            # 4. Without scores.
            log_eps = (log_tolerance - TIGHT_SLACK) * LOG2_E
            top = largest_finite(to_row)
            tested, share = _far_groups(
                ends_ptr, norm_ptr, spread_ptr + kv_row * N, lam_first, to_row, top, norm_bound, row_bits, bound,
                k_norm, first // GATE_BLOCK, log_eps, WIDTH,
            )  # fmt: skip
            eps = tl.math.exp2(tl.full([], 0.0, tl.float32) + log_eps)
            spent = tl.zeros([BLOCK_T], tl.float32) + tl.where(tested > hidden, 0.5 * eps * share, 0.0)
            tested = tl.maximum(tested, hidden)

            # 5. With scores, block after block, until a row has spent eps. A loop with a condition would say it
            # better; Triton 3.6 fails to lay out a tensor that one carries.
            to_row += q_error * DOT_ERROR
            # Relative to the largest row: one addition less per score. What underflows weighs nothing in any row, as
            # no row counts less than 2**-100 of the largest one.
            anchor = tl.where((top > float("-inf")) & (top < float("inf")), top, 0.0)
            factor = to_row - anchor
            factor = tl.where(full, 4.0 * tl.math.exp2(tl.where(factor < -100.0, -100.0, factor)), 0.0)
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
                        if NEGATIVE:
                            score = -score
                        # Four keys weigh at most four times the largest of them, as near as the last of the window.
                        # These four of 16 are those that a thread holds after a product on Hopper.
                        score = tl.reshape(score, [BLOCK_T, BLOCK_S // WINDOW, 2, WINDOW // 4, 2])
                        score = tl.max(tl.max(score, axis=4), axis=2)
                        w = block * (BLOCK_S // WINDOW) + tl.arange(0, BLOCK_S // WINDOW)
                        decay = lam_high - tl.load(window_ptr + w)
                        decay += lam_low - tl.load(window_ptr + window_low + w)
                        weight = tl.math.exp2(
                            score * (tl.abs(scale) * LOG2_E) + (decay + anchor)[None, :, None]
                        )  # fmt: skip
                        spent += factor * tl.sum(tl.reshape(weight, [BLOCK_T, BLOCK_S // 4]), axis=1)
                        passed += (spent <= eps).to(tl.int32)
                    going = tl.min(passed, axis=0) == chunk + AT_ONCE - tested
            tested += tl.min(passed, axis=0)
            if tested > dropped:
                dropped = tested
                mass = eps
                better = tl.full([], True, tl.int1)
    if HAS_BOUND:
        if better:
            tl.store(dropped_ptr + batch_head * M + m, dropped)
            tl.store(mass_ptr + batch_head * M + m, mass)
    else:
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


def _bound_and_strides(logit_bound, batch, num_heads, other):
    """`logit_bound` of every head and its strides; `other`, which is never read, where there is none."""
    if logit_bound is None:
        return other, (0, 0)
    bound = logit_bound.expand(batch, num_heads)
    return bound, bound.stride()


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
    norms = largest_norms(q, k, key_start) if logit_bound is None else sums.starts  # which is never read
    bound, bound_strides = _bound_and_strides(logit_bound, batch, num_heads, sums.starts)
    first_key = torch.empty_like(first_visible)
    launch(
        paper_rule_kernel, (batch * num_heads, -(-num_blocks // ROW_BLOCKS)),
        (*sums, first_visible, bound, norms, first_key),
        (abs(scale), math.log(num_keys) - log_tolerance, num_queries, num_keys, sums.starts.shape[-1], num_blocks,
         num_heads, num_kv_heads, norms.shape[-1], (num_keys // BLOCK_S.value).bit_length(), sums.within.stride(0),
         sums.starts.stride(0), *bound_strides),
        HAS_BOUND=logit_bound is not None, ROW_BLOCKS=ROW_BLOCKS, WIDTH=256,
    )  # fmt: skip
    return first_key


def _warps(usual: int, arch: int) -> int:
    """Triton before 3.9 has no layout for a sum over what Blackwell's tensor memory holds; 16 warps do without it."""
    return 16 if arch >= 100 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else usual


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
    """`first_key` as `pruning.prune` and the mass of `pruning.tight_rule`; four launches."""
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    num_blocks, num_groups = -(-num_queries // BLOCK_T.value), sums.starts.shape[-1]
    rows, kv_rows = batch * num_heads, batch * num_kv_heads
    block_d = padded_head_dim(dim)
    num_programs = -(-num_groups // GATE_GROUPS)
    device = q.device
    # One allocation each: to take a tensor apart costs the host twice as much.
    ends = torch.empty(rows, -(-num_keys // BLOCK_S.value), dtype=torch.float64, device=device)
    window = torch.empty(2, rows, -(-num_keys // WINDOW.value), dtype=torch.float32, device=device)
    norm = torch.empty(kv_rows, num_groups, dtype=torch.float32, device=device)
    spread = torch.empty_like(norm)
    center = torch.empty(kv_rows, num_groups, WINDOWS.value + 1, block_d, dtype=k.dtype, device=device)
    mass = torch.empty(batch, num_heads, num_blocks, dtype=torch.float32, device=device)
    possible = torch.empty(rows, num_blocks, dtype=torch.int32, device=device)
    dropped = torch.empty_like(possible)
    active = torch.empty(rows, num_programs, dtype=torch.int32, device=device)
    first_key = torch.empty_like(first_visible)
    bound, bound_strides = _bound_and_strides(logit_bound, batch, num_heads, mass)
    lows = (sums.within.stride(0), sums.starts.stride(0), window.stride(0))
    budget = math.log(num_keys) - log_tolerance
    precision, arch = _precision(), architecture(device)
    is_hopper = arch == 90 and q.element_size() == 2
    launch(
        gate_tables_kernel, (rows, num_programs),
        (*sums, first_visible, bound, ends, window, possible, dropped, mass, active),
        (log_tolerance, budget, num_queries, num_keys, num_groups, num_blocks, num_heads, *lows, *bound_strides),
        HAS_BOUND=logit_bound is not None, GROUPS=GATE_GROUPS, WIDTH=64, num_warps=4,
    )  # fmt: skip
    part_d = min(block_d, SPREAD_DIM)
    launch(
        key_summaries_kernel, (kv_rows, -(-num_groups // GROUPS)),
        (k, k if key_start is None else key_start, active, norm, spread, center),
        (num_keys, num_groups, num_kv_heads, num_heads // num_kv_heads * num_programs, *k.stride()[:3]),
        HAS_KEY_START=key_start is not None, HAS_ACTIVE=logit_bound is not None, SPREAD_ERROR=SPREAD_ERROR[k.dtype],
        D=dim, BLOCK_D=block_d, PART_D=part_d, GROUPS=GROUPS, PRECISION=precision, WIDTH=128,
        num_warps=_warps(8 if part_d == 128 and not is_hopper else 4, arch),
        num_stages=3 if block_d * k.element_size() <= 512 else 1,
    )  # fmt: skip
    # Hopper, 16384 tokens: four programs on a multiprocessor 0.149 ms (48 heads of 64), three 0.163; 32 heads of 128:
    # three 0.211 ms, two with a tile of keys more in flight 0.231.
    chunk_d = min(block_d, 256 // q.element_size())
    registers = {"maxnreg": 128 if block_d <= 64 else 168} if is_hopper and block_d == chunk_d else {}
    launch(
        tight_rule_kernel, (rows * num_blocks,),
        (q, k, *sums, first_visible, bound, norm, spread, center, ends, window, possible, dropped, mass),
        (scale, budget, log_tolerance, num_queries, num_keys, num_groups, num_blocks, batch, num_heads, num_kv_heads,
         *lows, *bound_strides, *q.stride()[:3], *k.stride()[:3]),
        HAS_BOUND=logit_bound is not None, NEGATIVE=scale < 0, DOT_ERROR=DOT_ERROR[q.dtype],
        CENTER_ERROR=CENTER_ERROR[q.dtype], D=dim, BLOCK_D=block_d, CHUNK_D=chunk_d, PRECISION=precision, WIDTH=256,
        AT_ONCE=8, STAGES=2 if block_d == chunk_d else 1, num_warps=_warps(4 if registers else 8, arch), **registers,
    )  # fmt: skip
    launch(
        first_keys_kernel, (rows, -(-num_blocks // ROW_BLOCKS)),
        (dropped, first_visible, first_key),
        (num_queries, num_keys, num_blocks),
        ROW_BLOCKS=ROW_BLOCKS, WIDTH=256,
    )  # fmt: skip
    return first_key, mass
