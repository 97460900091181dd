"""Decoding as Triton kernels: up to 16 queries against a long cache, split over the keys that survive.

    o_i = sum_{j = first_i .. i} p_ij v_j,   p_i = softmax_j(scale * q_i . k_j + lam_i - lam_j)

Three launches, no look at the device from the host, a grid that does not depend on what survives:

1. `plan_kernel` finds the first key of every row: padding, closed gates, pruning. Left out if there is none of them.
2. `forgetting_attention_decode_kernel` goes through the tiles that survive, in equal slices of all heads one after
   another (triton_slices.py).
3. `combine_kernel` adds up what the slices found.

Letters:  B batch, H query heads, G query heads per key head, T queries (the last of the keys), R rows = G * T,
    D head dim, P programs.
Tensors:  q, o (B, H, T, D);  k, v (B, H // G, >= S, D);  within (2, B, H, >= S) and starts (2, B, H, >= S / 128) as in
    gates.py;  first (B, H, T) and lowest (B, H // G) int32, the first key of a row and of all rows of a key head.
Units:    bits inside the kernels, nats outside.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .gates import LOG2_E, GateSums
from .launch import launch
from .pruning import DOT_ERROR
from .tile_sizes import architecture, padded_head_dim
from .triton_forward import dot_precision
from .triton_slices import (
    DecodeTiles,
    Slices,
    add_tile,
    cdiv,
    decode_tiles,
    early,
    fetch_ahead,
    keys_in_use,
    load_queries,
    load_rows,
    may_overlap,
    own_tiles,
    power_of_2,
    registers,
    store_partial,
    tiles_of_unit,
    unit_rows,
    unit_tiles,
    wait,
)

GATE_BLOCK = tl.constexpr(128)
PRUNING_BLOCK = tl.constexpr(64)  # pruning.PRUNING_BLOCK_S
PAPER_SLACK = tl.constexpr(2.0**-16)  # pruning.PAPER_SLACK
TIGHT_SLACK = tl.constexpr(2.0**-5)  # pruning.TIGHT_SLACK, nats
CLOSED_GATE = tl.constexpr(-1e4)
_LOG2_E = tl.constexpr(1.4426950408889634)
PROBES = 1024  # block ends that one step of the search for the boundary looks at, of all heads together


@triton.jit
def _pair(ptr, low, mask):
    """A number that is stored as a high and a low float32, float64."""
    high = tl.load(ptr, mask=mask, other=0.0).to(tl.float64)
    return high + tl.load(ptr + low, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _blocks_dropped(starts_ptr, starts_low, at_query, limit, num_blocks, is_head, LEVELS: tl.constexpr,
                    PROBES: tl.constexpr):  # fmt: skip
    """How many of the first num_blocks blocks end with a decay below `limit` bits at the query; vectors over heads.

    The decay of later blocks is never larger, so those are a prefix. Each level looks at the ends of PROBES equal
    parts and goes on within one: two levels for 2 million keys.
    """
    index = tl.arange(0, PROBES)[None, :] + 1
    low = tl.zeros_like(num_blocks)
    left = num_blocks
    for _ in tl.static_range(LEVELS):
        step = (left + PROBES - 1) // PROBES
        n = low[:, None] + index * step[:, None]  # number of blocks: the last of them ends where block n starts
        valid = (step[:, None] > 0) & (n <= (low + left)[:, None]) & is_head[:, None]
        decay = at_query[:, None] - _pair(starts_ptr[:, None] + n, starts_low, valid)
        found = tl.sum((valid & (decay < limit[:, None])).to(tl.int32), axis=1) * step
        left = tl.maximum(tl.minimum(step - 1, left - found), 0)
        low += found
    return low


@triton.jit
def _far_mass_of_rows(
    q_ptr, k_ptr, within_ptr, starts_ptr, first_ptr, bound, num_keys, lowest, score_scale, T, H_kv, batch, kv_head,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, within_stride_h, within_low,
    starts_stride_h, starts_low, G: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr, DOT_ERROR: tl.constexpr,
):  # fmt: skip
    """Of every head the largest `U + lam_i - lam_p - L_i`, bits, of its rows i that see a key; p is the first query.

    L_i is a lower bound on the log of the row's normaliser, from the last NEAR keys.
    """
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    begin = tl.maximum(num_keys - NEAR, 0)
    key = tl.arange(0, NEAR)
    s = begin + key
    # What no row sees is not read: it may be anything.
    is_key = (s >= lowest) & (s < num_keys)
    k_base = k_ptr + batch * k_stride_b + kv_head * k_stride_h + begin.to(tl.int64) * k_stride_s
    k = load_rows(k_base, key, k_stride_s, is_key, d, D, BLOCK_D)
    k_square = tl.sum(k.to(tl.float32) * k.to(tl.float32), axis=1)
    k_norm = tl.sqrt(tl.max(k_square, axis=0))
    query = num_keys - T
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for row in range(0, G * T, BLOCK_R):
        r = row + tl.arange(0, BLOCK_R)
        is_row = r < G * T
        head = kv_head * G + r // T
        t = r % T
        position = query + t
        q = load_queries(q_ptr, batch, head, t, is_row, q_stride_b, q_stride_h, q_stride_t, D, BLOCK_D)
        q_norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1))
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        within_rows = within_ptr + head * within_stride_h
        starts_rows = starts_ptr + head * starts_stride_h
        lam_high = tl.load(within_rows + position, mask=is_row, other=0.0)
        lam_low = tl.load(within_rows + within_low + position, mask=is_row, other=0.0)
        start_high = tl.load(starts_rows + position // GATE_BLOCK, mask=is_row, other=0.0)
        start_low = tl.load(starts_rows + starts_low + position // GATE_BLOCK, mask=is_row, other=0.0)
        first = tl.load(first_ptr + (batch * H_kv * G + head) * T + t, mask=is_row, other=0)
        visible = (s[None, :] >= first[:, None]) & (s[None, :] <= position[:, None]) & is_row[:, None]
        high = tl.load(within_rows[:, None] + s[None, :], mask=visible, other=0.0)
        low = tl.load(within_rows[:, None] + within_low + s[None, :], mask=visible, other=0.0)
        blocks = starts_rows[:, None] + (s // GATE_BLOCK)[None, :]
        block_high = tl.load(blocks, mask=visible, other=0.0)
        block_low = tl.load(blocks + starts_low, mask=visible, other=0.0)
        decay = (start_high[:, None] - block_high) + (start_low[:, None] - block_low)
        decay += (lam_high[:, None] - high) + (lam_low[:, None] - low)
        error = tl.abs(score_scale) * DOT_ERROR * q_norm * k_norm
        weighed = tl.where(visible, score - error[:, None] + decay, float("-inf"))
        most = tl.max(weighed, axis=1)
        shift = tl.where(most == float("-inf"), 0.0, most)
        # Rows that do not exist have a sum of 0; those that do see their own key.
        total = tl.sum(tl.math.exp2(weighed - shift[:, None]), axis=1)
        log_sum = shift + tl.math.log2(tl.where(total == 0.0, 1.0, total))
        # lam_i - lam_p, at most 0.
        since = (start_high - tl.load(starts_rows + query // GATE_BLOCK, mask=is_row, other=0.0)) + (
            start_low - tl.load(starts_rows + starts_low + query // GATE_BLOCK, mask=is_row, other=0.0)
        )
        since += (lam_high - tl.load(within_rows + query, mask=is_row, other=0.0)) + (
            lam_low - tl.load(within_rows + within_low + query, mask=is_row, other=0.0)
        )
        own = is_row[:, None] & ((r // T)[:, None] == g[None, :]) & (first <= position)[:, None]
        row_bound = tl.max(tl.where((r // T)[:, None] == g[None, :], bound[None, :], float("-inf")), axis=1)
        # A row's own key weighs at least -U.
        mass = row_bound + since - tl.maximum(log_sum, -row_bound)
        largest = tl.maximum(largest, tl.max(tl.where(own, mass[:, None], float("-inf")), axis=0))
    return largest


@triton.jit
def _blocks_of_little_mass(
    starts_ptr, starts_low, at_query, room, num_blocks, is_head, LEVELS: tl.constexpr, PROBES: tl.constexpr
):  # fmt: skip
    """How many of the first num_blocks blocks weigh at most the tolerance together; vectors over heads.

    A block that ends with a decay of d bits at the query weighs at most 2 ** (d + room) tolerances. Those that weigh
    less than 2 ** -10 of it together, whatever their number, are found by a search and count as that.
    """
    skipped = tl.zeros_like(num_blocks)
    last = num_blocks
    if LEVELS > 1:
        far = -room.to(tl.float64) - 34.0  # 2 ** 24 blocks
        near = -room.to(tl.float64)
        skipped = _blocks_dropped(starts_ptr, starts_low, at_query, far, num_blocks, is_head, LEVELS, PROBES)
        last = _blocks_dropped(starts_ptr, starts_low, at_query, near, num_blocks, is_head, LEVELS, PROBES)
    found = skipped
    so_far = tl.zeros_like(room)
    index = tl.arange(0, PROBES)[None, :] + 1
    for step in range(0, tl.max(last - skipped, axis=0), PROBES):
        n = skipped[:, None] + step + index
        valid = (n <= last[:, None]) & is_head[:, None]
        decay = (at_query[:, None] - _pair(starts_ptr[:, None] + n, starts_low, valid)).to(tl.float32)
        weight = tl.where(valid, tl.math.exp2(decay + room[:, None]), 0.0)
        mass = so_far[:, None] + tl.cumsum(weight, axis=1)
        found += tl.sum((valid & (mass <= 1.0 - 2.0**-10)).to(tl.int32), axis=1)
        so_far += tl.sum(weight, axis=1)
    return found


@triton.jit(do_not_specialize=["num_keys"])
def plan_kernel(
    q_ptr, k_ptr, first_key_ptr, key_start_ptr, bound_ptr, within_ptr, starts_ptr, length_ptr, first_ptr, lowest_at,
    budget, log_tolerance, score_scale, num_keys, window, T, H_kv, q_stride_b, q_stride_h, q_stride_t, k_stride_b,
    k_stride_h, k_stride_s, bound_stride_b, bound_stride_h, within_stride_b, within_stride_h, within_low,
    starts_stride_b, starts_stride_h, starts_low,
    HAS_FIRST_KEY: tl.constexpr, HAS_KEY_START: tl.constexpr, HAS_WINDOW: tl.constexpr, PRUNED: tl.constexpr,
    TIGHT: tl.constexpr, ON_DEVICE: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
    LEVELS: tl.constexpr, PROBES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    NEAR: tl.constexpr, PRECISION: tl.constexpr, DOT_ERROR: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """First key of each row of one key head, and the smallest of them."""
    if OVERLAP:
        gdc_launch_dependents()
    program = tl.program_id(0).to(tl.int64)
    batch, kv_head = program // H_kv, program % H_kv
    num_keys = keys_in_use(num_keys, length_ptr, ON_DEVICE)
    # 1. What each row may see.
    g = tl.arange(0, BLOCK_G)
    is_head = g < G
    head = kv_head * G + g
    t = tl.arange(0, BLOCK_T)
    at = (batch * H_kv * G + head)[:, None] * T + t[None, :]
    is_row = is_head[:, None] & (t < T)[None, :]
    first = tl.zeros([BLOCK_G, BLOCK_T], tl.int32)
    if HAS_KEY_START:
        first += tl.load(key_start_ptr + batch).to(tl.int32)
    if HAS_FIRST_KEY:
        first = tl.maximum(first, tl.load(first_key_ptr + at, mask=is_row, other=0).to(tl.int32))
    if HAS_WINDOW:
        first = tl.maximum(first, (num_keys - T - (window - 1)) + t[None, :])

    # 2. What pruning drops.
    if PRUNED:
        within_ptr += batch * within_stride_b
        starts_ptr += batch * starts_stride_b
        # pruning.py: a block of 64 keys goes if its last key decays by more than the threshold up to the first query.
        bound = tl.load(bound_ptr + batch * bound_stride_b + head * bound_stride_h, mask=is_head, other=0.0)
        bound = bound.to(tl.float32)
        threshold = (2.0 * bound + budget) * -(1.0 + PAPER_SLACK) * _LOG2_E
        limit = tl.where(threshold != threshold, float("-inf"), threshold).to(tl.float64)
        within_heads = within_ptr + head * within_stride_h
        starts_heads = starts_ptr + head * starts_stride_h
        query = num_keys - T
        at_query = _pair(starts_heads + query // GATE_BLOCK, starts_low, is_head)
        at_query += _pair(within_heads + query, within_low, is_head)
        num_blocks = tl.zeros([BLOCK_G], tl.int32) + query // GATE_BLOCK
        dropped = _blocks_dropped(starts_heads, starts_low, at_query, limit, num_blocks, is_head, LEVELS, PROBES)
        kept = dropped * GATE_BLOCK
        # The first half of the next block.
        has_half = is_head & (kept + PRUNING_BLOCK <= query)
        end = _pair(starts_heads + dropped, starts_low, has_half)
        end += _pair(within_heads + kept + (PRUNING_BLOCK - 1), within_low, has_half)
        kept += tl.where(has_half & (at_query - end < limit), PRUNING_BLOCK, 0)
        if TIGHT:
            # The rows' first keys go through memory: below they are wanted in another order.
            tl.store(first_ptr + at, first, mask=is_row)
            tl.debug_barrier()
            bound = bound * (1.0 + PAPER_SLACK) * _LOG2_E
            lowest = tl.min(tl.min(tl.where(is_row, first, num_keys), axis=1), axis=0)
            room = _far_mass_of_rows(
                q_ptr, k_ptr, within_ptr, starts_ptr, first_ptr, bound, num_keys, lowest, score_scale, T, H_kv, batch,
                kv_head, q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, within_stride_h,
                within_low, starts_stride_h, starts_low, G, BLOCK_G, D, BLOCK_D, BLOCK_R, NEAR, PRECISION, DOT_ERROR,
            )  # fmt: skip
            # 128 keys a block.
            room += 7.0 + (TIGHT_SLACK - log_tolerance) * _LOG2_E
            room = tl.where(room != room, float("inf"), room)
            dropped = _blocks_of_little_mass(
                starts_heads, starts_low, at_query, room, num_blocks, is_head, LEVELS, PROBES
            )
            kept = tl.maximum(kept, dropped * GATE_BLOCK)
        first = tl.maximum(first, kept[:, None])
    tl.store(first_ptr + at, first, mask=is_row)
    # Every head keeps a tile, even if all of it is padding: the slots of the partial results rely on it.
    lowest = tl.min(tl.min(tl.where(is_row, first, num_keys), axis=1), axis=0)
    tl.store(first_ptr + lowest_at + program, tl.minimum(lowest, num_keys - 1))


@triton.jit(do_not_specialize=["num_keys"])
def forgetting_attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, within_ptr, starts_ptr, first_ptr, length_ptr, partial_ptr, score_scale, num_keys, T, H_kv,
    num_units, num_rows, num_slots, lowest_at, stats_at, q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h,
    k_stride_s, v_stride_b, v_stride_h, v_stride_s, within_stride_b, within_stride_h, within_low, starts_stride_b,
    starts_stride_h, starts_low,
    HAS_FIRST: tl.constexpr, ON_DEVICE: tl.constexpr, G: tl.constexpr, UNITS_PER_HEAD: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, LANES: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # 1. Which tiles are this program's? Programs beyond the number of tiles have none.
    wait(OVERLAP)
    num_keys = keys_in_use(num_keys, length_ptr, ON_DEVICE)
    num_tiles = (num_keys + BLOCK_S - 1) // BLOCK_S
    lowest_ptr = first_ptr + lowest_at
    lane, tiles, ends = unit_tiles(lowest_ptr, num_tiles, num_units, HAS_FIRST, UNITS_PER_HEAD, BLOCK_S, LANES)
    program, begin, end, first_unit, last_unit = own_tiles(lane, tiles, ends, num_units)
    d = tl.arange(0, BLOCK_D)

    for unit in range(first_unit, tl.minimum(last_unit + 1, num_units)):
        # 2. What stays for the tiles of this unit.
        batch, kv_head, row, is_row, g, t, position = unit_rows(unit, num_keys, T, H_kv, G, UNITS_PER_HEAD, BLOCK_R)
        head = kv_head * G + g
        k_base = k_ptr + batch * k_stride_b + kv_head * k_stride_h
        v_base = v_ptr + batch * v_stride_b + kv_head * v_stride_h
        from_tile, to_tile = tiles_of_unit(lane, unit, tiles, ends, begin, end, num_tiles)
        if OVERLAP:
            last_key = tl.maximum(tl.minimum(to_tile * BLOCK_S, num_keys) - 1, 0)
            fetch_ahead(k_base, from_tile * BLOCK_S, last_key, k_stride_s, D, 2 * BLOCK_S)
            fetch_ahead(v_base, from_tile * BLOCK_S, last_key, v_stride_s, D, 2 * BLOCK_S)
        q = load_queries(q_ptr, batch, head, t, is_row, q_stride_b, q_stride_h, q_stride_t, D, BLOCK_D)
        within_rows = within_ptr + batch * within_stride_b + head * within_stride_h
        starts_rows = starts_ptr + batch * starts_stride_b + head * starts_stride_h
        start_high = tl.load(starts_rows + position // GATE_BLOCK, mask=is_row, other=0.0)
        start_low = tl.load(starts_rows + starts_low + position // GATE_BLOCK, mask=is_row, other=0.0)
        lam_high = tl.load(within_rows + position, mask=is_row, other=0.0)
        lam_low = tl.load(within_rows + within_low + position, mask=is_row, other=0.0)
        first = tl.zeros([BLOCK_R], tl.int32)
        lowest = 0
        if HAS_FIRST:
            first = tl.load(first_ptr + (batch * H_kv * G + head) * T + t, mask=is_row, other=0)
            lowest = tl.load(lowest_ptr + unit // UNITS_PER_HEAD)
        row_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

        # 3. Online softmax, as in triton_forward.py.
        for tile in tl.range(from_tile, to_tile, num_stages=NUM_STAGES):
            start = tile * BLOCK_S
            key = tl.arange(0, BLOCK_S)
            s = start + key
            # Nothing before the boundary is read: an evicting cache may have given that memory to somebody else.
            is_key = (s >= lowest) & (s < num_keys)
            k = load_rows(k_base + start.to(tl.int64) * k_stride_s, key, k_stride_s, is_key, d, D, BLOCK_D)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
            block = start // GATE_BLOCK
            block_high = tl.load(starts_rows + block, mask=is_row, other=0.0)
            block_low = tl.load(starts_rows + starts_low + block, mask=is_row, other=0.0)
            from_start = (start_high - block_high) + (start_low - block_low)
            if G == 1:
                # All rows are queries of one head and share its decay.
                key_ptr = within_ptr + batch * within_stride_b + kv_head * within_stride_h + s
                high = tl.load(key_ptr, mask=is_key, other=0.0)[None, :]
                if PRECISION != "tf32":
                    low = tl.load(key_ptr + within_low, mask=is_key, other=0.0)[None, :]
            else:
                key_ptr = within_rows[:, None] + s[None, :]
                is_pair = is_row[:, None] & is_key[None, :]
                high = tl.load(key_ptr, mask=is_pair, other=0.0)
                if PRECISION != "tf32":
                    low = tl.load(key_ptr + within_low, mask=is_pair, other=0.0)
            if PRECISION != "tf32":
                score += ((lam_high[:, None] - high) + (lam_low[:, None] - low)) + from_start[:, None]
            else:
                score += (lam_high + from_start)[:, None] - high
            visible = (s[None, :] >= first[:, None]) & (s[None, :] <= position[:, None])
            v = load_rows(v_base + start.to(tl.int64) * v_stride_s, key, v_stride_s, is_key, d, D, BLOCK_D)
            row_max, row_sum, acc = add_tile(
                tl.where(visible, score, float("-inf")), v, row_max, row_sum, acc, PRECISION
            )

        # 4. The partial result.
        store_partial(
            partial_ptr, stats_at, program, unit, row, is_row, num_rows, num_slots, row_max, row_sum, acc, D, BLOCK_D
        )


@triton.jit(do_not_specialize=["num_keys"])
def append_gates_kernel(
    gate_ptr, within_ptr, starts_ptr, total_ptr, length_ptr, num_keys, T, H, gate_stride_b, gate_stride_h,
    gate_stride_t, within_stride_b, within_stride_h, within_low, starts_stride_b, starts_stride_h, starts_low,
    total_stride_b, total_stride_h, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Add T gates to the sums of one head, block by block; see `decode.append_gates`."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // H, program % H
    num_keys = keys_in_use(num_keys, length_ptr, ON_DEVICE)
    gate_ptr += batch * gate_stride_b + head * gate_stride_h
    within_ptr += batch * within_stride_b + head * within_stride_h
    starts_ptr += batch * starts_stride_b + head * starts_stride_h
    total_ptr += batch * total_stride_b + head * total_stride_h
    first_block = num_keys // GATE_BLOCK
    # Sum of all gates before the block, and of those in it that were there before; nats.
    before = tl.load(total_ptr + first_block - 1, mask=first_block > 0, other=0.0)
    running = tl.load(total_ptr + first_block, mask=num_keys % GATE_BLOCK > 0, other=0.0)
    running = tl.where(num_keys % GATE_BLOCK > 0, running, before)
    for n in range(first_block, (num_keys + T - 1) // GATE_BLOCK + 1):
        s = n * GATE_BLOCK + tl.arange(0, GATE_BLOCK)
        is_new = (s >= num_keys) & (s < num_keys + T)
        gate = tl.load(gate_ptr + (s - num_keys).to(tl.int64) * gate_stride_t, mask=is_new, other=0.0)
        gate = tl.where(gate <= CLOSED_GATE, 0.0, gate).to(tl.float64)
        start = before * _LOG2_E
        within = (running + tl.cumsum(gate, axis=0)) * _LOG2_E - start
        high = within.to(tl.float32)
        tl.store(within_ptr + s, high, mask=is_new)
        tl.store(within_ptr + within_low + s, (within - high.to(tl.float64)).to(tl.float32), mask=is_new)
        start_high = start.to(tl.float32)
        tl.store(starts_ptr + n, start_high)
        tl.store(starts_ptr + starts_low + n, (start - start_high.to(tl.float64)).to(tl.float32))
        running += tl.sum(gate, axis=0)
        before = running
        tl.store(total_ptr + n, running)


def search_levels(num_blocks: int, probes: int = PROBES) -> int:
    """Levels that `_blocks_dropped` needs for up to this many blocks."""
    levels = 0
    while num_blocks > 0:
        num_blocks = cdiv(num_blocks, probes) - 1
        levels += 1
    return levels


class TightInputs(NamedTuple):
    """What the tight rule needs besides: queries `(B, H, T, D)`, keys `(B, H_kv, >= S, D)`, scale, log eps."""

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    log_tolerance: float


def plan(
    shape: tuple[int, int, int, int],
    sums: GateSums,
    num_keys: int,
    length: torch.Tensor | None,
    first_key: torch.Tensor | None,
    key_start: torch.Tensor | None,
    logit_bound: torch.Tensor | None,
    budget: float,
    window: int | None = None,
    tight: TightInputs | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """First key of every row, `(B, H, T)`, and the smallest of each key head, `(B, H_kv)`; int32.

    Args:
        shape: B, H, H_kv, T.
        logit_bound: `(B, H)` float32, strides may be 0; None prunes nothing.
        tight: None prunes by the paper's rule.
        Others as in `forward`.
    """
    batch, num_heads, num_kv_heads, num_queries = shape
    overlap = may_overlap(architecture(sums.within.device))
    found = _plan(shape, sums, num_keys, length, first_key, key_start, logit_bound, budget, window, tight, overlap)
    first, lowest = found.split((batch * num_heads * num_queries, batch * num_kv_heads))
    return first.view(batch, num_heads, num_queries), lowest.view(batch, num_kv_heads)


def _plan(
    shape, sums, num_keys, length, first_key, key_start, logit_bound, budget, window, tight, overlap
) -> torch.Tensor:
    """What `plan` gives, one after the other in one piece of memory."""
    batch, num_heads, num_kv_heads, num_queries = shape
    groups = num_heads // num_kv_heads
    lowest_at = batch * num_heads * num_queries
    found = torch.empty(lowest_at + batch * num_kv_heads, dtype=torch.int32, device=sums.within.device)
    num_blocks = sums.starts.shape[-1] if logit_bound is not None else 0
    block_g = power_of_2(groups)
    probes = min(max(PROBES // block_g, 64), power_of_2(num_blocks + 1))
    if tight is None:
        q = k = sums.within  # never read
        strides, scale, log_tolerance, constants = (0,) * 6, 0.0, 0.0, _NO_SCORES
    else:
        q, k, scale, log_tolerance = tight
        strides, constants = (*q.stride()[:3], *k.stride()[:3]), _scores(q, groups * num_queries)
    launch(
        plan_kernel, (batch * num_kv_heads,),
        (q, k, found if first_key is None else first_key, found if key_start is None else key_start,
         found if logit_bound is None else logit_bound, sums.within, sums.starts, found if length is None else length,
         found),
        (lowest_at, float(budget), float(log_tolerance), scale * LOG2_E, num_keys, 0 if window is None else window,
         num_queries, num_kv_heads, *strides, *((0, 0) if logit_bound is None else logit_bound.stride()),
         *sums.within.stride()[1:3], sums.within.stride(0), *sums.starts.stride()[1:3], sums.starts.stride(0)),
        HAS_FIRST_KEY=first_key is not None, HAS_KEY_START=key_start is not None, HAS_WINDOW=window is not None,
        PRUNED=logit_bound is not None, TIGHT=tight is not None, ON_DEVICE=length is not None, G=groups,
        BLOCK_G=block_g, BLOCK_T=power_of_2(num_queries), LEVELS=search_levels(num_blocks, probes), PROBES=probes,
        **constants, OVERLAP=overlap,
    )  # fmt: skip
    return found


_NO_SCORES = dict(D=1, BLOCK_D=16, BLOCK_R=16, NEAR=16, PRECISION="tf32", DOT_ERROR=0.0, num_warps=4)


def _scores(q: torch.Tensor, num_rows: int) -> dict:
    """Constants of the tight rule's scores: 128 near keys, or what 32 KiB hold of them (16 in float32, at least T)."""
    dim = padded_head_dim(q.shape[-1])
    memory = 32768 if q.element_size() == 2 else 16384
    return dict(
        D=q.shape[-1], BLOCK_D=dim, BLOCK_R=max(16, min(32, power_of_2(num_rows))),
        NEAR=min(GATE_BLOCK.value, memory // (dim * q.element_size())), PRECISION=dot_precision(q.dtype),
        DOT_ERROR=DOT_ERROR[q.dtype], num_warps=4 if dim <= 64 else 8,
    )  # fmt: skip


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sums: GateSums,
    num_keys: int,
    length: torch.Tensor | None,
    scale: float,
    first_key: torch.Tensor | None = None,
    key_start: torch.Tensor | None = None,
    logit_bound: torch.Tensor | None = None,
    budget: float = 0.0,
    window: int | None = None,
    tight: float | None = None,
    tiles: DecodeTiles | None = None,
) -> torch.Tensor:
    """Launch the kernels. Returns `o (B, H, T, D)` strided as `q`.

    Args:
        num_keys: Keys in use if `length` is None, else the most that there can be.
        length: One integer on the device, keys in use, or None.
        first_key: `(B, H, T)` int32, contiguous, or None; key_start: `(B,)` integers or None.
        logit_bound: `(B, H)` float32, strides may be 0; None prunes nothing.
        budget: `pruning.paper_budget`, nats.
        window: Keys that a query sees at most, or None.
        tight: Log of the tolerance, to prune by the tight rule; None: by the paper's.
    """
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads = k.shape[1]
    groups = num_heads // num_kv_heads
    arch = architecture(q.device)
    has_first = not (first_key is None and key_start is None and logit_bound is None and window is None)
    tiles = tiles or decode_tiles(dim, q.element_size(), arch, groups * num_queries, has_first)
    slices = Slices.of(q, num_kv_heads, tiles, arch, batch * num_heads * num_queries, num_keys)
    overlap = slices.options["OVERLAP"]
    first = slices.partial  # never read
    if has_first:
        shape = (batch, num_heads, num_kv_heads, num_queries)
        inputs = None if tight is None else TightInputs(q, k, scale, tight)
        first = _plan(
            shape, sums, num_keys, length, first_key, key_start, logit_bound, budget, window, inputs, overlap
        )
    optional = dict(HAS_FIRST=has_first, ON_DEVICE=length is not None)
    length = slices.partial if length is None else length
    launch(
        forgetting_attention_decode_kernel, (slices.num_programs,),
        (q, k, v, sums.within, sums.starts, first, length, slices.partial),
        (scale * LOG2_E, num_keys, num_queries, num_kv_heads, *slices.sizes, *q.stride()[:3], *k.stride()[:3],
         *v.stride()[:3], *sums.within.stride()[1:3], sums.within.stride(0), *sums.starts.stride()[1:3],
         sums.starts.stride(0)),
        **optional, **slices.options,
        PRECISION=dot_precision(q.dtype), NUM_STAGES=tiles.num_stages, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages, **registers(tiles), **early(has_first and overlap),
    )  # fmt: skip
    return slices.combine(q, first, length, num_keys, num_kv_heads, **optional)


def append_gates(
    sums: GateSums, totals: torch.Tensor, log_fgate: torch.Tensor, num_keys: int, length: torch.Tensor | None
) -> None:
    """Launch the kernel that adds `log_fgate (B, H, T)` to the sums; `num_keys` or `length` keys are in them."""
    batch, num_heads, num_new = log_fgate.shape
    launch(
        append_gates_kernel, (batch * num_heads,),
        (log_fgate, sums.within, sums.starts, totals, totals if length is None else length),
        (num_keys, num_new, num_heads, *log_fgate.stride(), *sums.within.stride()[1:3], sums.within.stride(0),
         *sums.starts.stride()[1:3], sums.starts.stride(0), *totals.stride()[:2]),
        ON_DEVICE=length is not None,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
