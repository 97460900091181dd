"""Forgetting attention, forward pass, in Gluon for Hopper: bfloat16 heads of 33 to 128 channels.

The mathematics and the numbers are those of triton_forward.py, its twin for everything else; what differs is who
does what. A program stays on its multiprocessor and takes tiles of queries from a counter until none is left. One warp
fetches, well into the next tile, by the tensor memory accelerator. Two to four warpgroups own 64 queries of the tile
each and do one thing after the other: scores, weights, values. Three or four of them on a multiprocessor, by two
programs or by one, are enough for some to multiply while others take exponentials. With two programs that holds at the
ends of tiles, too, where a group has much to do besides its blocks; and small blocks leave them the registers.

Queries whose sum outgrew `LARGEST_SUM` are only marked here; the twin does the marked ones again.

Letters, names, units and frame as in triton_forward.py; a *block* is `KEYS` keys, a *group* a warpgroup's 64 queries.
"""

import math
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .gates import GATE_BLOCK
from .launch import described, launch
from .tile_sizes import descriptor_strides, padded_head_dim, programs_at_once

# Renamed between Triton 3.6 and 3.9.
load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_async = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

ROWS = gl.constexpr(64)  # of a warpgroup
KEYS = gl.constexpr(64)  # of a tile
GATES = gl.constexpr(GATE_BLOCK)
LARGEST_SPREAD = gl.constexpr(60.0)
NO_KEY = gl.constexpr(2147483647)


@gluon.jit
def load_sum(within, starts, within_low, starts_low, at):
    """lam at one key: the start of its block, what follows, and the low parts of both together."""
    n = at // GATES
    return (
        gl.load(starts + n),
        gl.load(within + at),
        gl.load(starts + starts_low + n) + gl.load(within + within_low + at),
    )


@gluon.jit
def load_sums(within, starts, within_low, starts_low, at, mask):
    """`load_sum` of a vector of keys."""
    n = at // GATES
    low = gl.load(starts + starts_low + n, mask=mask, other=0.0)
    low += gl.load(within + within_low + at, mask=mask, other=0.0)
    return gl.load(starts + n, mask=mask, other=0.0), gl.load(within + at, mask=mask, other=0.0), low


@gluon.jit
def _place(work, num_tiles, num_heads, section, T, H, GROUPS: gl.constexpr):
    """Head and first query of a piece of work. Heads in sections, the last queries first, as in triton_forward.py.

    Tiles are laid out from the last query, rounded up to a group, leftwards: what is left over is the first queries,
    which have the fewest keys. So the first query of a tile can be negative.
    """
    first_head = work // (section * num_tiles) * section
    in_section = work % (section * num_tiles)
    heads = gl.minimum(section, num_heads - first_head)
    batch_head = first_head + in_section % heads
    start_t = (T + ROWS - 1) // ROWS * ROWS - (in_section // heads + 1) * (GROUPS * ROWS)
    return batch_head, start_t


@gluon.jit
def _right_block(start_t, num_rows, T, S):
    """The block of the last key that these queries see; of the first query's, where they lie before it."""
    return (gl.minimum(gl.maximum(start_t + num_rows, 1) + S - T, S) - 1) // KEYS


@gluon.jit
def _fetch(arguments, G: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """The partition that loads: of each tile its plan and queries, then its blocks of keys and values leftwards.

    With the keys goes their bias, ref - lam_j in bits. The plan is the piece of work and its leftmost block.
    """
    (
        q, k, v, q_tile, k_tile, v_tile, bias_tile, plan, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        within_ptr, starts_ptr, first_key_ptr, counter, within_low, starts_low, num_tiles, num_heads, section, T, S, H,
        N,
    ) = arguments  # fmt: skip
    s = gl.arange(0, KEYS, layout=gl.BlockedLayout([2], [32], [1], [0]))
    entry = gl.arange(0, 2, layout=gl.BlockedLayout([2], [32], [1], [0]))
    num_work = num_tiles * num_heads
    work = gl.program_id(0)
    tile = 0
    done = 0
    while work < num_work:
        batch_head, start_t = _place(work, num_tiles, num_heads, section, T, H, GROUPS)
        batch, head = batch_head // H, batch_head % H
        kv_head = head // G
        row = batch_head.to(gl.int64)
        within = within_ptr + row * S
        starts = starts_ptr + row * N
        first_t = gl.maximum(start_t, 0)
        first = _right_block(start_t, GROUPS * ROWS, T, S)
        last = gl.minimum(gl.load(first_key_ptr + row * T + first_t) // KEYS, (first_t + S - T) // KEYS)
        slot = tile & 1
        mbarrier.wait(q_empty.index(slot), ((tile >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), GROUPS * q.block_type.nbytes)
        for group in gl.static_range(GROUPS):
            load_async(
                q, [batch, head, gl.maximum(start_t + group * ROWS, 0), 0], q_full.index(slot),
                q_tile.index(slot * GROUPS + group),
            )  # fmt: skip
        plan.index(slot).store(gl.where(entry == 0, work, last))
        mbarrier.arrive(q_full.index(slot), count=1)
        ref_start, ref_within, ref_low = load_sum(within, starts, within_low, starts_low, first_t + S - T)
        for n in range(first, last - 1, -1):
            stage = done % STAGES
            free = ((done // STAGES) & 1) ^ 1
            at = n * KEYS + s
            inside = gl.load(within + at, mask=at < S, other=0.0)
            gates = n * KEYS // GATES
            low = ref_low - gl.load(starts + starts_low + gates)
            bias = ((ref_start - gl.load(starts + gates)) + ref_within + low) - inside
            mbarrier.wait(k_empty.index(stage), free)
            mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
            load_async(k, [batch, kv_head, n * KEYS, 0], k_full.index(stage), k_tile.index(stage))
            bias_tile.index(stage).store(bias)
            mbarrier.arrive(k_full.index(stage), count=1)
            mbarrier.wait(v_empty.index(stage), free)
            mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
            load_async(v, [batch, kv_head, n * KEYS, 0], v_full.index(stage), v_tile.index(stage))
            done += 1
        work = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        tile += 1
    slot = tile & 1
    mbarrier.wait(q_empty.index(slot), ((tile >> 1) & 1) ^ 1)
    plan.index(slot).store(gl.where(entry == 0, num_work, 0))
    mbarrier.arrive(q_full.index(slot), count=2)


@gluon.jit
def _wait_for(full, i, STAGES: gl.constexpr):
    mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)


@gluon.jit
def _scores(
    i, n, above, query, buffers, rows, score_scale,
    MASKED: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Scores of block i, the keys from n * KEYS on, less the number `above`."""
    k_tile, v_tile, bias_tile, k_full, k_empty, v_full, v_empty = buffers
    first_key, t_key, s = rows
    stage = i % STAGES
    _wait_for(k_full, i, STAGES)
    key = k_tile.index(stage).reshape([KEYS, D]).permute((1, 0))
    nothing = gl.zeros([ROWS, KEYS], gl.float32, layout=SCORES)
    score = warpgroup_mma(query, key, nothing, use_acc=False, is_async=True)
    bias = bias_tile.index(stage).load(gl.SliceLayout(0, SCORES)) - above
    score = warpgroup_mma_wait(0, deps=(score,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    score = score * score_scale + bias[None, :]
    if MASKED:
        at = n * KEYS + s
        score = gl.where((at[None, :] >= first_key[:, None]) & (at[None, :] <= t_key[:, None]), score, float("-inf"))
    return score


@gluon.jit
def _add_values(i, weight, acc, buffers, D: gl.constexpr, STAGES: gl.constexpr, WEIGHTS: gl.constexpr):
    """acc + weight v of block i."""
    k_tile, v_tile, bias_tile, k_full, k_empty, v_full, v_empty = buffers
    stage = i % STAGES
    p = gl.convert_layout(weight.to(gl.bfloat16), WEIGHTS)
    _wait_for(v_full, i, STAGES)
    acc = warpgroup_mma(p, v_tile.index(stage).reshape([KEYS, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(stage), count=1)
    return acc


@gluon.jit
def _steps(
    i_begin, i_end, begin, first, acc, row_sum, anchor, query, buffers, rows, score_scale,
    MASKED: gl.constexpr, ONE_ANCHOR: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
    WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Blocks [i_begin, i_end), relative to an anchor that stays: one number, or one of each row."""
    for i in range(i_begin, i_end):
        above = anchor if ONE_ANCHOR else 0.0
        score = _scores(begin + i, first - i, above, query, buffers, rows, score_scale, MASKED, D, STAGES, SCORES)
        if not ONE_ANCHOR:
            score -= anchor[:, None]
        weight = gl.exp2(score)
        row_sum += gl.sum(weight, 1)
        acc = _add_values(begin + i, weight, acc, buffers, D, STAGES, WEIGHTS)
    return acc, row_sum


@gluon.jit
def _online(score, acc, row_sum, row_max, OUT: gl.constexpr):
    """A step of an online softmax, without its product."""
    new_max = gl.maximum(row_max, gl.max(score, 1))
    shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    weight = gl.exp2(score - shift[:, None])
    rescale = gl.exp2(row_max - shift)
    row_sum = row_sum * rescale + gl.sum(weight, 1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
    return weight, acc, row_sum, new_max


@gluon.jit
def _settle(score, acc, row_sum, row_max, OUT: gl.constexpr):
    """The last of those steps, after which the anchor stays: that of each row, and the one of all if there is one.

    Also what the rounding of this step's weights adds to a sum: a row with few keys must not be off by it, as nothing
    averages it out.
    """
    new_max = gl.maximum(row_max, gl.max(score, 1))
    sees_none = new_max == float("-inf")
    highest_row = gl.max(new_max, 0)
    lowest_row = gl.min(gl.where(sees_none, float("inf"), new_max), 0)
    one_anchor = (highest_row > float("-inf")) & (highest_row - lowest_row <= LARGEST_SPREAD)
    anchor = gl.where(sees_none, 0.0, new_max)
    if one_anchor:
        anchor = anchor * 0.0 + highest_row
    weight = gl.exp2(score - anchor[:, None])
    rescale = gl.exp2(row_max - anchor)
    row_sum = row_sum * rescale + gl.sum(weight, 1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
    rounding = gl.sum(weight.to(gl.bfloat16).to(gl.float32) - weight, 1)
    return weight, acc, row_sum, rounding, anchor, highest_row, one_anchor


@gluon.jit
def _skip(i, count, buffers, STAGES: gl.constexpr):
    """Pass over `count` blocks from i on that only other groups see."""
    k_tile, v_tile, bias_tile, k_full, k_empty, v_full, v_empty = buffers
    for j in range(i, i + count):
        stage = j % STAGES
        # Not before they are there: what is freed twice in one round would let the loading warp overtake.
        _wait_for(k_full, j, STAGES)
        mbarrier.arrive(k_empty.index(stage), count=1)
        _wait_for(v_full, j, STAGES)
        mbarrier.arrive(v_empty.index(stage), count=1)


@gluon.jit
def _read_plan(plan, q_full, tile):
    slot = tile & 1
    mbarrier.wait(q_full.index(slot), (tile >> 1) & 1)
    entry = gl.arange(0, 2, layout=gl.BlockedLayout([2], [32], [4], [0]))
    values = plan.index(slot).load(gl.BlockedLayout([2], [32], [4], [0]))
    return gl.sum(gl.where(entry == 0, values, 0), 0), gl.sum(gl.where(entry == 1, values, 0), 0)


@gluon.jit
def _to_frame(within, starts, within_low, starts_low, first_t, t_key, exists, offset):
    """ref - lam_i of the rows, `ref` as _fetch takes it."""
    ref_t = gl.maximum(first_t, 0) + offset
    ref_start, ref_within, ref_low = load_sum(within, starts, within_low, starts_low, ref_t)
    start, inside, low = load_sums(within, starts, within_low, starts_low, t_key, exists)
    return (ref_start - start) + (ref_within - inside) + (ref_low - low)


@gluon.jit
def _attend(arguments, GROUP: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """A warpgroup: one group of every tile."""
    (
        o, q_tile, k_tile, v_tile, bias_tile, plan, q_full, q_empty, k_full, k_empty, v_full, v_empty, within_ptr,
        starts_ptr, first_key_ptr, lse_ptr, marks_ptr, marked_ptr, within_low, starts_low, num_tiles, num_heads,
        section, num_groups, T, S, H, N, score_scale, largest_sum,
    ) = arguments  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    buffers = (k_tile, v_tile, bias_tile, k_full, k_empty, v_full, v_empty)
    s = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    num_work = num_tiles * num_heads

    tile = 0
    begin = 0  # blocks of keys that all tiles before had
    work, last = _read_plan(plan, q_full, tile)
    while work < num_work:
        # 1. The rows and their blocks, numbered from `first` leftwards: [skipped, frozen) hold a row's own key,
        # [frozen, masked) are seen by every row, [masked, end) in part.
        batch_head, start_t = _place(work, num_tiles, num_heads, section, T, H, GROUPS)
        first = _right_block(start_t, GROUPS * ROWS, T, S)
        count = first - last + 1
        start_t += GROUP * ROWS
        batch, head = batch_head // H, batch_head % H
        row = batch_head.to(gl.int64)
        first_keys = first_key_ptr + row * T
        t = start_t + gl.arange(0, ROWS, layout=ROW)
        t_key = t + (S - T)
        exists = (t >= 0) & (t < T)
        rows = (gl.load(first_keys + t, mask=exists, other=NO_KEY), t_key, s)
        lowest = gl.load(first_keys + gl.maximum(start_t, 0))
        highest = gl.load(first_keys + gl.maximum(gl.minimum(start_t + ROWS, T) - 1, 0))
        skipped = first - _right_block(start_t, ROWS, T, S)
        diagonal = (gl.maximum(start_t, 0) + S - T) // KEYS
        end_n = gl.minimum(lowest // KEYS, diagonal)
        full_n = gl.minimum(gl.maximum((highest + KEYS - 1) // KEYS, end_n), diagonal)
        frozen = first - diagonal + 1
        masked = first - full_n + 1
        end = first - end_n + 1
        slot = tile & 1
        query_tile = q_tile.index(slot * GROUPS + GROUP)
        query = query_tile.reshape([ROWS, D])
        _skip(begin, skipped, buffers, STAGES)

        # 2. On the diagonal: online softmax. Groups that lie on whole blocks have one block there.
        acc = gl.zeros([ROWS, D], gl.float32, layout=OUT)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW)
        row_sum = gl.zeros([ROWS], gl.float32, layout=ROW)
        for i in range(skipped, frozen - 1):
            score = _scores(begin + i, first - i, 0.0, query, buffers, rows, score_scale, True, D, STAGES, SCORES)
            weight, acc, row_sum, row_max = _online(score, acc, row_sum, row_max, OUT)
            acc = _add_values(begin + i, weight, acc, buffers, D, STAGES, WEIGHTS)

        # 3. The last of them settles what all other weights are relative to: the largest maximum of the rows, or each
        # row's own where they lie too far apart.
        i = begin + frozen - 1
        score = _scores(i, diagonal, 0.0, query, buffers, rows, score_scale, True, D, STAGES, SCORES)
        weight, acc, row_sum, rounding, anchor, highest_row, one_anchor = _settle(score, acc, row_sum, row_max, OUT)
        acc = _add_values(i, weight, acc, buffers, D, STAGES, WEIGHTS)
        # The last tile's output has left by now: its place is free for the queries of the next.
        tma.store_wait(0)
        if tile > 0:
            mbarrier.arrive(q_empty.index(slot ^ 1), count=1)

        # 4. All other blocks.
        if one_anchor:
            acc, row_sum = _steps(
                frozen, masked, begin, first, acc, row_sum, highest_row, query, buffers, rows, score_scale, False,
                True, D, STAGES, SCORES, WEIGHTS,
            )  # fmt: skip
        else:
            acc, row_sum = _steps(
                frozen, masked, begin, first, acc, row_sum, anchor, query, buffers, rows, score_scale, False, False, D,
                STAGES, SCORES, WEIGHTS,
            )  # fmt: skip
        acc, row_sum = _steps(
            masked, end, begin, first, acc, row_sum, anchor, query, buffers, rows, score_scale, True, False, D, STAGES,
            SCORES, WEIGHTS,
        )  # fmt: skip
        _skip(begin + end, count - end, buffers, STAGES)

        # 5. Mark what left the range of float32, normalize and store.
        to_frame = _to_frame(
            within_ptr + row * S, starts_ptr + row * N, within_low, starts_low, start_t - GROUP * ROWS, t_key, exists,
            S - T,
        )  # fmt: skip
        empty = row_sum == 0.0
        lse = gl.where(empty, float("inf"), anchor - to_frame + gl.log2(gl.where(empty, 1.0, row_sum)))
        gl.store(lse_ptr + row * T + t, lse, mask=exists)
        largest = gl.convert_layout(gl.max(gl.abs(acc), 1), ROW)
        in_range = (row_sum < largest_sum) & (largest < float("inf"))
        mark = gl.max(gl.where(in_range, 0, 1), 0)
        gl.store(marks_ptr + row * num_groups + start_t // ROWS, mark, mask=start_t >= 0)
        gl.store(marked_ptr, mark, mask=mark > 0)
        divisor = gl.where(empty, 1.0, row_sum + rounding)
        out = acc * gl.convert_layout(1.0 / divisor, OUT_ROW)[:, None]
        query.store(out.to(gl.bfloat16))
        fence_async_shared()
        if start_t >= 0:
            store_async(o, [batch, head, start_t, 0], query_tile)

        begin += count
        tile += 1
        work, last = _read_plan(plan, q_full, tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_heads", "section"])
def gluon_forward_kernel(
    q, k, v, o, within_ptr, starts_ptr, first_key_ptr, lse_ptr, marks_ptr, marked_ptr, counter, score_scale,
    largest_sum, T, S, H, N, num_tiles, num_heads, section, num_groups, within_low, starts_low,
    G: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    q_tile = gl.allocate_shared_memory(gl.bfloat16, [2 * GROUPS, 1, 1, ROWS, D], q.layout)
    k_tile = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, KEYS, D], k.layout)
    v_tile = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, KEYS, D], v.layout)
    bias_tile = gl.allocate_shared_memory(gl.float32, [STAGES, KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    plan = gl.allocate_shared_memory(gl.int32, [2, 2], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(q_empty.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    attend = (
        o, q_tile, k_tile, v_tile, bias_tile, plan, q_full, q_empty, k_full, k_empty, v_full, v_empty, within_ptr,
        starts_ptr, first_key_ptr, lse_ptr, marks_ptr, marked_ptr, within_low, starts_low, num_tiles, num_heads,
        section, num_groups, T, S, H, N, score_scale, largest_sum,
    )  # fmt: skip
    fetch = (
        q, k, v, q_tile, k_tile, v_tile, bias_tile, plan, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        within_ptr, starts_ptr, first_key_ptr, counter, within_low, starts_low, num_tiles, num_heads, section, T, S, H,
        N,
    )  # fmt: skip
    if GROUPS == 4:
        gl.warp_specialize(
            [
                (_attend, (attend, 0, 4, D, STAGES)),
                (_attend, (attend, 1, 4, D, STAGES)),
                (_attend, (attend, 2, 4, D, STAGES)),
                (_attend, (attend, 3, 4, D, STAGES)),
                (_fetch, (fetch, G, GROUPS, STAGES)),
            ],
            [4, 4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif GROUPS == 3:
        gl.warp_specialize(
            [
                (_attend, (attend, 0, 3, D, STAGES)),
                (_attend, (attend, 1, 3, D, STAGES)),
                (_attend, (attend, 2, 3, D, STAGES)),
                (_fetch, (fetch, G, GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (attend, 0, 2, D, STAGES)),
                (_attend, (attend, 1, 2, D, STAGES)),
                (_fetch, (fetch, G, GROUPS, STAGES)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )


def gluon_descriptor(x, rows: int, dim: int) -> TensorDescriptor:
    """As `triton_forward.descriptor`, with the swizzle that the products read."""
    block = [1, 1, rows, dim]
    dtype = {2: gl.bfloat16, 4: gl.float32}[x.element_size()]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), descriptor_strides(x), block, layout)


class Tuned(NamedTuple):
    """Warpgroups, stages, registers of a thread that multiplies, of one that loads, and at the launch.

    `per_sm` programs are on a multiprocessor at once.
    """

    groups: int
    stages: int
    registers: int
    loading_registers: int
    launch_registers: int
    per_sm: int = 1


# Measured on an H100 (RESULTS.md): two programs are quickest where rows are short. Where they are long, what counts is
# how many queries a tile of keys is fetched for. By queries, so that all pieces of a prompt take one kernel.
SHORT, LONG, WIDE = Tuned(2, 4, 104, 24, 80, 2), Tuned(4, 8, 112, 24, 96), Tuned(3, 4, 160, 32, 128)
FEW_QUERIES = 8192


def tuned(dim: int, num_queries: int, num_heads: int, num_programs: int) -> Tuned:
    """For `num_heads` heads of all sequences, of 64 or 128 channels each; few long tiles would leave SMs idle."""
    if dim > 64:
        return WIDE
    has_tiles = num_queries * num_heads >= num_programs * LONG.groups * ROWS.value
    return LONG if num_queries > FEW_QUERIES and has_tiles else SHORT


class Marks(NamedTuple):
    """What the kernel leaves to its twin: a mark for each group, and whether there is one.

    `(B, H, an even number)` int32: the twin's tiles are two groups. `counter` hands out the tiles of the kernel.
    """

    marks: torch.Tensor
    any: torch.Tensor
    counter: torch.Tensor


def new_marks(batch: int, num_heads: int, num_queries: int, device: torch.device) -> Marks:
    shape = (batch, num_heads, -(-num_queries // (2 * ROWS.value)) * 2)
    # 16 bytes apart, so that to the compiler every call is of the same kind.
    memory = torch.zeros(8 + math.prod(shape), dtype=torch.int32, device=device)
    return Marks(memory[8:].view(shape), memory[4:5], memory[:1])


def forward(q, k, v, out, lse, marks, sums, first_key, score_scale, largest_sum, section):
    """Launch the kernel; fills out, lse `(B, H, T)` and `new_marks`."""
    batch, num_heads, num_queries, _ = q.shape
    dim = padded_head_dim(q.shape[3])
    sizes = tuned(dim, num_queries, batch * num_heads, programs_at_once(q.device))
    num_tiles = -(-num_queries // (sizes.groups * ROWS.value))
    rows = (ROWS.value, KEYS.value, KEYS.value, ROWS.value)
    tensors = [described(gluon_descriptor, x, n, dim) for x, n in zip((q, k, v, out), rows, strict=True)]
    launch(
        gluon_forward_kernel, (min(num_tiles * batch * num_heads, programs_at_once(q.device, sizes.per_sm)),),
        (*tensors, sums.within, sums.starts, first_key, lse, marks.marks, marks.any, marks.counter),
        (score_scale, largest_sum, num_queries, k.shape[2], num_heads, sums.starts.shape[-1], num_tiles,
         batch * num_heads, section, marks.marks.shape[2], sums.within.stride(0), sums.starts.stride(0)),
        G=num_heads // k.shape[1], D=dim, GROUPS=sizes.groups, STAGES=sizes.stages, CONSUMER_REGISTERS=sizes.registers,
        PRODUCER_REGISTERS=sizes.loading_registers, num_warps=4, maxnreg=sizes.launch_registers,
    )  # fmt: skip
