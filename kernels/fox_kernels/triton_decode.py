"""Decoding as Triton kernels: up to 16 queries against a long cache, split over the keys that survive.

    o_i = sum_{j = first_i .. i} p_ij v_j,   p_i = softmax_j(scale * q_i . k_j + lam_i - lam_j)

Three launches, no look at the device from the host, a grid that does not depend on what survives:

1. `plan_kernel` finds the first key of every row: padding, closed gates, pruning. Left out if there is none of them.
2. `forgetting_attention_decode_kernel`: the tiles of keys that survive, of all heads one after another, are cut into
   equal slices, one per program; the lengths of heads differ a hundredfold, so equal parts of each head would leave
   most of the GPU idle. All queries that share a key head are rows of the same products: keys and values are read
   once. What a program finds for a head, (maximum, sum, output), goes to slot `program + head`; both only grow along
   the slices, so no two share a slot, and those of a head are neighbors.
3. `combine_kernel` adds up the slots of each row.

Letters:  B batch, H query heads, G query heads per key head, T queries (the last of the keys), R rows = G * T,
    D head dim, P programs; a unit is the part of a key head's rows that fits a tile (nearly always all of them).
Tensors:  q, o (B, H, T, D);  k, v (B, H // G, >= S, D);  within (2, B, H, >= S) and starts (2, B, H, >= S / 128) as in
    gates.py;  first (B, H, T) and lowest (B, H // G) int32, the first key of a row and of all rows of a key head.
Units:    bits inside the kernels, nats outside.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gates import LOG2_E, GateSums
from .tile_sizes import architecture, padded_head_dim, programs_at_once
from .triton_forward import dot_precision

GATE_BLOCK = tl.constexpr(128)
PRUNING_BLOCK = tl.constexpr(64)  # pruning.PRUNING_BLOCK_S
PAPER_SLACK = tl.constexpr(2.0**-16)  # pruning.PAPER_SLACK
CLOSED_GATE = tl.constexpr(-1e4)
_LOG2_E = tl.constexpr(1.4426950408889634)
PROBES = 128  # block ends that one step of the search for the boundary looks at
UNIT_COST = tl.constexpr(2)  # tiles that take as long as a program's start on another head
SLOTS = 16  # partial results that `combine_kernel` reads at a time


def _cdiv(x: int, y: int) -> int:
    """As `triton.cdiv`, which kernels can call as well and which therefore takes 5 us on the host."""
    return -(-x // y)


def _power_of_2(x: int) -> int:
    """The least that is not below x; as `triton.next_power_of_2`."""
    return 1 << (x - 1).bit_length()


class DecodeTiles(NamedTuple):
    """`block_r` rows by `block_s` keys, `programs_per_sm` slices for each multiprocessor."""

    block_r: int
    block_s: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


@lru_cache
def decode_tiles(head_dim: int, element_size: int, arch: int, num_rows: int) -> DecodeTiles:
    """Tiles by the bytes of one stage: 16 KiB of keys and values, at most as much for the decay of every pair.

    What is in flight decides, not the arithmetic. Of 36 sizes on an H100 with 64 channels in bfloat16 the one that is
    best where pruning leaves heads of all lengths, and within 3 % of the best where it does not.
    """
    dim = padded_head_dim(head_dim)
    most = min(32, 4096 // dim) if element_size >= 4 else min(64, 8192 // dim)
    block_r = max(16, min(most, _power_of_2(num_rows)))
    block_s = max(16, min(GATE_BLOCK.value, 16384 // (2 * dim * element_size), 8192 // element_size // block_r))
    return DecodeTiles(block_r, block_s, 4, 3 if arch else 2, 3)


@triton.jit
def _num_keys(num_keys, length_ptr, ON_DEVICE: tl.constexpr):
    """The number of keys in use: an argument, or, for graphs that are replayed at a greater length, in memory."""
    if ON_DEVICE:
        return tl.load(length_ptr).to(tl.int32)
    return num_keys


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


@triton.jit(do_not_specialize=["num_keys"])
def plan_kernel(
    first_key_ptr, key_start_ptr, bound_ptr, within_ptr, starts_ptr, length_ptr, first_ptr, lowest_ptr,
    budget, num_keys, window, T, H_kv, bound_stride_b, bound_stride_h, within_stride_b, within_stride_h, within_low,
    starts_stride_b, starts_stride_h, starts_low,
    HAS_FIRST_KEY: tl.constexpr, HAS_KEY_START: tl.constexpr, HAS_WINDOW: tl.constexpr, PRUNED: tl.constexpr,
    ON_DEVICE: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, LEVELS: tl.constexpr,
    PROBES: tl.constexpr,
):  # fmt: skip
    """First key of each row of one key head, and the smallest of them."""
    program = tl.program_id(0).to(tl.int64)
    batch, kv_head = program // H_kv, program % H_kv
    num_keys = _num_keys(num_keys, length_ptr, ON_DEVICE)
    g = tl.arange(0, BLOCK_G)
    is_head = g < G
    head = kv_head * G + g
    kept = tl.zeros([BLOCK_G], tl.int32)
    if PRUNED:
        # pruning.py: a block of 64 keys goes if its last key decays by more than the threshold up to the first query.
        bound = tl.load(bound_ptr + batch * bound_stride_b + head * bound_stride_h, mask=is_head, other=0.0)
        threshold = (2.0 * bound.to(tl.float32) + budget) * -(1.0 + PAPER_SLACK) * _LOG2_E
        limit = tl.where(threshold != threshold, float("-inf"), threshold).to(tl.float64)
        within_ptr += batch * within_stride_b + head * within_stride_h
        starts_ptr += batch * starts_stride_b + head * starts_stride_h
        query = num_keys - T
        at_query = _pair(starts_ptr + query // GATE_BLOCK, starts_low, is_head)
        at_query += _pair(within_ptr + query, within_low, is_head)
        num_blocks = tl.zeros([BLOCK_G], tl.int32) + query // GATE_BLOCK
        dropped = _blocks_dropped(starts_ptr, starts_low, at_query, limit, num_blocks, is_head, LEVELS, PROBES)
        kept = dropped * GATE_BLOCK
        # The first half of the next block.
        has_half = is_head & (kept + PRUNING_BLOCK <= query)
        end = _pair(starts_ptr + dropped, starts_low, has_half)
        end += _pair(within_ptr + kept + (PRUNING_BLOCK - 1), within_low, has_half)
        kept += tl.where(has_half & (at_query - end < limit), PRUNING_BLOCK, 0)
    if HAS_KEY_START:
        kept = tl.maximum(kept, tl.load(key_start_ptr + batch).to(tl.int32))
    t = tl.arange(0, BLOCK_T)
    at = (batch * H_kv * G + head)[:, None] * T + t[None, :]
    is_row = is_head[:, None] & (t < T)[None, :]
    first = tl.zeros([BLOCK_G, BLOCK_T], tl.int32) + kept[:, None]
    if HAS_FIRST_KEY:
        first = tl.maximum(first, tl.load(first_key_ptr + at, mask=is_row, other=0).to(tl.int32))
    if HAS_WINDOW:
        first = tl.maximum(first, (num_keys - T - (window - 1)) + t[None, :])
    tl.store(first_ptr + at, first, mask=is_row)
    # Every head keeps a tile, even if all of it is padding: the slots of the partial results rely on it.
    lowest = tl.min(tl.min(tl.where(is_row, first, num_keys), axis=1), axis=0)
    tl.store(lowest_ptr + program, tl.minimum(lowest, num_keys - 1))


@triton.jit
def _unit_tiles(lowest_ptr, num_tiles, num_units, HAS_FIRST: tl.constexpr, UNITS_PER_HEAD: tl.constexpr,
                BLOCK_S: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Of every unit (one per lane) its length in tiles of keys, UNIT_COST included, and the sum up to its end."""
    lane = tl.arange(0, LANES)
    tiles = tl.zeros([LANES], tl.int32) + num_tiles
    if HAS_FIRST:
        tiles -= tl.load(lowest_ptr + lane // UNITS_PER_HEAD, mask=lane < num_units, other=0) // BLOCK_S
    tiles = tl.where(lane < num_units, tiles + UNIT_COST, 0)
    return lane, tiles, tl.cumsum(tiles, axis=0)


@triton.jit
def _own_tiles(lane, tiles, ends, num_units):
    """This program, its tiles begin .. end - 1 of all units in a row, and the first and last unit that have some."""
    total = tl.sum(tiles, axis=0)
    program = tl.program_id(0).to(tl.int64)
    num_programs = tl.minimum(tl.num_programs(0), total)
    begin = (program * total // num_programs).to(tl.int32)
    end = ((program + 1) * total // num_programs).to(tl.int32)
    first_unit = tl.sum((ends <= begin).to(tl.int32) * (lane < num_units).to(tl.int32), axis=0)
    last_unit = tl.sum((ends < end).to(tl.int32) * (lane < num_units).to(tl.int32), axis=0)
    return program, begin, end, first_unit, last_unit


@triton.jit
def _at(lane, index, values):
    return tl.sum(tl.where(lane == index, values, 0), axis=0)


@triton.jit
def _load_rows(ptr, row, stride, is_row, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(len(row), BLOCK_D) rows of a matrix, zeros where `is_row` is not."""
    at = ptr + row[:, None] * stride + d[None, :]
    if BLOCK_D != D:
        return tl.load(at, mask=is_row[:, None] & (d[None, :] < D), other=0.0)
    return tl.load(at, mask=is_row[:, None], other=0.0)


@triton.jit(do_not_specialize=["num_keys"])
def forgetting_attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, within_ptr, starts_ptr, first_ptr, lowest_ptr, length_ptr, partial_ptr, stats_ptr,
    score_scale, num_keys, T, H_kv, num_units, num_rows, stats_sum,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    within_stride_b, within_stride_h, within_low, starts_stride_b, starts_stride_h, starts_low,
    HAS_FIRST: tl.constexpr, ON_DEVICE: tl.constexpr, G: tl.constexpr, UNITS_PER_HEAD: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, LANES: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    # 1. Which tiles are this program's? Programs beyond the number of tiles have none.
    num_keys = _num_keys(num_keys, length_ptr, ON_DEVICE)
    num_tiles = (num_keys + BLOCK_S - 1) // BLOCK_S
    lane, tiles, ends = _unit_tiles(lowest_ptr, num_tiles, num_units, HAS_FIRST, UNITS_PER_HEAD, BLOCK_S, LANES)
    program, begin, end, first_unit, last_unit = _own_tiles(lane, tiles, ends, num_units)
    d = tl.arange(0, BLOCK_D)

    for unit in range(first_unit, tl.minimum(last_unit + 1, num_units)):
        # 2. What stays for the tiles of this unit.
        kv_program = unit // UNITS_PER_HEAD
        batch, kv_head = (kv_program // H_kv).to(tl.int64), (kv_program % H_kv).to(tl.int64)
        row = tl.arange(0, BLOCK_R)
        r = (unit % UNITS_PER_HEAD) * BLOCK_R + row
        is_row = r < G * T
        head = kv_head * G + r // T
        t = r % T
        position = num_keys - T + t
        q_at = q_ptr + batch * q_stride_b + head * q_stride_h + t * q_stride_t
        q = tl.load(q_at[:, None] + d[None, :], mask=is_row[:, None] & (d[None, :] < D), other=0.0)
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
            lowest = tl.load(lowest_ptr + kv_program)
        k_base = k_ptr + batch * k_stride_b + kv_head * k_stride_h
        v_base = v_ptr + batch * v_stride_b + kv_head * v_stride_h
        row_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        unit_end = _at(lane, unit, ends)
        unit_begin = unit_end - _at(lane, unit, tiles)
        # Of the sequence, not of the slices: the last tile of a unit is number num_tiles - 1. The first UNIT_COST ones
        # stand for time and no keys; a program with nothing else leaves an empty partial result.
        to_sequence = num_tiles - unit_end
        first_tile = unit_begin + UNIT_COST + to_sequence

        # 3. Online softmax, as in triton_forward.py.
        for tile in tl.range(
            tl.maximum(begin + to_sequence, first_tile), tl.minimum(end, unit_end) + to_sequence,
            num_stages=NUM_STAGES,
        ):  # fmt: skip
            start = tile * BLOCK_S
            key = tl.arange(0, BLOCK_S)
            s = start + key
            # Nothing before the boundary is read: an evicting cache may have given that memory to somebody else.
            is_key = (s >= lowest) & (s < num_keys)
            k = _load_rows(k_base + start.to(tl.int64) * k_stride_s, key, k_stride_s, is_key, d, D, BLOCK_D)
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
            score = tl.where(visible, score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, axis=1))
            # A row that has seen no key yet stays at -inf; subtracting that would give NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.math.exp2(score - shift[:, None])
            rescale = tl.math.exp2(row_max - shift)
            row_sum = row_sum * rescale + tl.sum(p, axis=1)
            row_max = new_max
            v = _load_rows(v_base + start.to(tl.int64) * v_stride_s, key, v_stride_s, is_key, d, D, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

        # 4. The partial result.
        slot = (program + unit) * num_rows + row
        is_row = is_row & (row < num_rows)
        tl.store(stats_ptr + slot, row_max, mask=is_row)
        tl.store(stats_ptr + stats_sum + slot, row_sum, mask=is_row)
        tl.store(partial_ptr + slot[:, None] * D + d[None, :], acc, mask=is_row[:, None] & (d[None, :] < D))


@triton.jit(do_not_specialize=["num_keys"])
def combine_kernel(
    partial_ptr, stats_ptr, out_ptr, lowest_ptr, length_ptr, num_keys, T, H_kv, num_units, num_rows, stats_sum,
    grid_programs, o_stride_b, o_stride_h, o_stride_t,
    HAS_FIRST: tl.constexpr, ON_DEVICE: tl.constexpr, G: tl.constexpr, UNITS_PER_HEAD: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, LANES: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Output of one row, from the slots of its unit."""
    program = tl.program_id(0).to(tl.int64)
    t, batch_head = program % T, program // T
    batch, head = batch_head // (H_kv * G), batch_head % (H_kv * G)
    r = (head % G) * T + t
    unit = ((batch * H_kv + head // G) * UNITS_PER_HEAD + r // BLOCK_R).to(tl.int32)
    num_keys = _num_keys(num_keys, length_ptr, ON_DEVICE)
    num_tiles = (num_keys + BLOCK_S - 1) // BLOCK_S
    lane, tiles, ends = _unit_tiles(lowest_ptr, num_tiles, num_units, HAS_FIRST, UNITS_PER_HEAD, BLOCK_S, LANES)
    total = tl.sum(tiles, axis=0).to(tl.int64)
    num_programs = tl.minimum(grid_programs, total)
    end = _at(lane, unit, ends).to(tl.int64)
    begin = end - _at(lane, unit, tiles)
    # The program of tile x is the last p with p * total // num_programs <= x.
    first_slot = ((begin + 1) * num_programs - 1) // total + unit
    last_slot = (end * num_programs - 1) // total + unit

    d = tl.arange(0, BLOCK_D)
    row_max = tl.full([], float("-inf"), tl.float32)
    row_sum = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first_slot, last_slot + 1, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        is_slot = slot <= last_slot
        at = slot * num_rows + r % BLOCK_R
        part_max = tl.load(stats_ptr + at, mask=is_slot, other=float("-inf"))
        part_sum = tl.load(stats_ptr + stats_sum + at, mask=is_slot, other=0.0)
        part = tl.load(partial_ptr + at[:, None] * D + d[None, :], mask=is_slot[:, None] & (d[None, :] < D), other=0.0)
        new_max = tl.maximum(row_max, tl.max(part_max, axis=0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.math.exp2(part_max - shift)
        rescale = tl.math.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(part_sum * weight, axis=0)
        acc = acc * rescale + tl.sum(part * weight[:, None], axis=0)
        row_max = new_max
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)
    at = out_ptr + batch * o_stride_b + head * o_stride_h + t * o_stride_t + d
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["num_keys"])
def append_gates_kernel(
    gate_ptr, within_ptr, starts_ptr, total_ptr, length_ptr, num_keys, T, H, gate_stride_b, gate_stride_h,
    gate_stride_t, within_stride_b, within_stride_h, within_low, starts_stride_b, starts_stride_h, starts_low,
    total_stride_b, total_stride_h, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Add T gates to the sums of one head, block by block; see `decode.append_gates`."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // H, program % H
    num_keys = _num_keys(num_keys, length_ptr, ON_DEVICE)
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
        num_blocks = _cdiv(num_blocks, probes) - 1
        levels += 1
    return levels


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """First key of every row, `(B, H, T)`, and the smallest of each key head, `(B, H_kv)`; int32.

    Args:
        shape: B, H, H_kv, T.
        logit_bound: `(B, H)` float32, strides may be 0; None prunes nothing.
        Others as in `forward`.
    """
    batch, num_heads, num_kv_heads, num_queries = shape
    device = sums.within.device
    groups = num_heads // num_kv_heads
    first = torch.empty(batch, num_heads, num_queries, dtype=torch.int32, device=device)
    lowest = torch.empty(batch, num_kv_heads, dtype=torch.int32, device=device)
    unused = first
    plan_kernel[(batch * num_kv_heads,)](
        unused if first_key is None else first_key, unused if key_start is None else key_start,
        unused if logit_bound is None else logit_bound, sums.within, sums.starts, unused if length is None else length,
        first, lowest, budget, num_keys, 0 if window is None else window, num_queries, num_kv_heads,
        *((0, 0) if logit_bound is None else logit_bound.stride()), *sums.within.stride()[1:3],
        sums.within.stride(0), *sums.starts.stride()[1:3], sums.starts.stride(0),
        HAS_FIRST_KEY=first_key is not None, HAS_KEY_START=key_start is not None, HAS_WINDOW=window is not None,
        PRUNED=logit_bound is not None, ON_DEVICE=length is not None, G=groups, BLOCK_G=_power_of_2(groups),
        BLOCK_T=_power_of_2(num_queries),
        LEVELS=search_levels(sums.starts.shape[-1]) if logit_bound is not None else 0, PROBES=PROBES,
    )  # fmt: skip
    return first, lowest


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
    """
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads = k.shape[1]
    groups = num_heads // num_kv_heads
    tiles = tiles or decode_tiles(dim, q.element_size(), architecture(q.device), groups * num_queries)
    units_per_head = _cdiv(groups * num_queries, tiles.block_r)
    num_units = batch * num_kv_heads * units_per_head
    num_rows = min(tiles.block_r, groups * num_queries)
    num_programs = min(
        programs_at_once(q.device, tiles.programs_per_sm),
        num_units * (_cdiv(num_keys, tiles.block_s) + UNIT_COST.value),
    )
    out = torch.empty_like(q)
    num_slots = num_programs + num_units
    partial = torch.empty(num_slots, num_rows, dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(2, num_slots, num_rows, dtype=torch.float32, device=q.device)
    has_first = any(x is not None for x in (first_key, key_start, logit_bound, window))
    first = lowest = stats  # never read
    if has_first:
        first, lowest = plan(
            (batch, num_heads, num_kv_heads, num_queries), sums, num_keys, length, first_key, key_start, logit_bound,
            budget, window,
        )  # fmt: skip
    common = dict(
        HAS_FIRST=has_first, ON_DEVICE=length is not None, G=groups, UNITS_PER_HEAD=units_per_head, D=dim,
        BLOCK_D=padded_head_dim(dim), BLOCK_R=tiles.block_r, BLOCK_S=tiles.block_s,
        LANES=_power_of_2(num_units),
    )  # fmt: skip
    length = stats if length is None else length
    forgetting_attention_decode_kernel[(num_programs,)](
        q, k, v, sums.within, sums.starts, first, lowest, length, partial, stats, scale * LOG2_E, num_keys,
        num_queries, num_kv_heads, num_units, num_rows, stats.stride(0), *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *sums.within.stride()[1:3], sums.within.stride(0), *sums.starts.stride()[1:3],
        sums.starts.stride(0), **common, PRECISION=dot_precision(q.dtype), NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    combine_kernel[(batch * num_heads * num_queries,)](
        partial, stats, out, lowest, length, num_keys, num_queries, num_kv_heads, num_units, num_rows,
        stats.stride(0), num_programs, *out.stride()[:3], **common, SLOTS=SLOTS, num_warps=4,
    )  # fmt: skip
    return out


def append_gates(
    sums: GateSums, totals: torch.Tensor, log_fgate: torch.Tensor, num_keys: int, length: torch.Tensor | None
) -> None:
    """Launch the kernel that adds `log_fgate (B, H, T)` to the sums; `num_keys` or `length` keys are in them."""
    batch, num_heads, num_new = log_fgate.shape
    append_gates_kernel[(batch * num_heads,)](
        log_fgate, sums.within, sums.starts, totals, totals if length is None else length, num_keys, num_new,
        num_heads, *log_fgate.stride(), *sums.within.stride()[1:3], sums.within.stride(0),
        *sums.starts.stride()[1:3], sums.starts.stride(0), *totals.stride()[:2], ON_DEVICE=length is not None,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
