"""Forgetting attention, backward pass, in one pass of Gluon for Hopper: bfloat16 heads of 33 to 128 channels.

Five products a tile in place of the seven of triton_backward.py, whose mathematics, frame and letters these are. A
program owns 128 keys. One warp fetches queries; two warpgroups own 64 keys each and take turns at the tensor cores,
so that one multiplies while the other takes exponentials:

    softmax  p = exp2(score), dS = p (dP - delta) of block i of queries
    turn     dv += p dO, dk += dS q of block i;  dq of block i - 1;  score and dP of block i + 1

dq is a sum over all keys, which many programs hold. Each warpgroup multiplies half of its channels by the dS of both,
and the tensor memory accelerator adds that to dq in the L2 cache, in float32 and in any order: the last bits of dq
differ from run to run. So is the residue of the rows (see triton_backward.py), which is taken from the sums of dS over
queries at the end.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gates import GATE_BLOCK, LOG2_E, GateSums
from .gluon_forward import NO_KEY, gluon_descriptor, load_async, store_async
from .launch import described, launch
from .tile_sizes import padded_head_dim

if hasattr(tma, "async_atomic_add"):
    add_async = tma.async_atomic_add
else:
    # Triton 3.6 has the instruction and no name for it.
    from triton._C.libtriton import ir

    @builtin
    def add_async(tensor_desc, coord, src, _semantic=None):
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


BLOCK = gl.constexpr(GATE_BLOCK)
KEYS = gl.constexpr(128)  # of a program
PART = gl.constexpr(64)  # keys of a warpgroup
ROWS = gl.constexpr(64)  # queries of a step
SLOTS = gl.constexpr(4)  # of dS: the other warpgroup is done with the one that is written


@gluon.jit
def pass_turn(TURN: gl.constexpr):
    """Let the other warpgroup go on past its `wait_turn`."""
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(
        "bar.arrive " + TURN + ", 256; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_turn(TURN: gl.constexpr):
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(
        "bar.sync " + TURN + ", 256; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
    )


def _transposing_sum() -> str:
    """PTX that sums 16 values over the 8 threads that differ in the upper bits of their lane, 2 of the sums a thread.

    Each of three steps halves what a thread holds: it keeps one half, gives the other to the thread that differs in
    one bit, and adds what that one gives. A thread ends with the sums of 2 neighbours, and a warp writes 64 in a row.
    """
    code = ["{", ".reg .pred upper;", ".reg .b32 lane, bit;", ".reg .b64 at;", ".reg .f32 sent, kept<14>;"]
    code.append("mov.u32 lane, %laneid;")
    values, count = [f"${16 + i}" for i in range(16)], 0
    for bit in (16, 8, 4):
        code.append(f"and.b32 bit, lane, {bit}; setp.ne.u32 upper, bit, 0;")
        half = len(values) // 2
        kept = [f"kept{count + i}" for i in range(half)]
        for low, high, mine in zip(values[:half], values[half:], kept, strict=True):
            code.append(f"selp.f32 sent, {low}, {high}, upper; selp.f32 {mine}, {high}, {low}, upper;")
            code.append(f"shfl.sync.bfly.b32 sent, sent, {bit}, 31, 0xffffffff; add.f32 {mine}, {mine}, sent;")
        values, count = kept, count + half
    code.append("mul.wide.u32 at, lane, 8; add.s64 at, at, $32;")
    code.append(f"red.relaxed.gpu.global.add.v2.f32 [at], {{{values[0]}, {values[1]}}};")
    code += [f"mov.b32 ${i}, 0;" for i in range(16)]
    return " ".join([*code, "}"])


TRANSPOSING_SUM = gl.constexpr(_transposing_sum())
OPERANDS = gl.constexpr(",".join(["=r"] * 16 + ["f"] * 16 + ["l"] * 16))


@gluon.jit
def _bounds(rows, rows_any, S, T, start_s):
    """Of the queries that see any of the keys: the first and how many blocks; from and to where they see all."""
    offset = S - T
    last = gl.minimum(start_s + KEYS, S) - 1
    first = gl.maximum(start_s - offset, 0) // ROWS * ROWS
    end = gl.load(rows + rows_any)
    count = gl.maximum(end - first + ROWS - 1, 0) // ROWS
    full_begin = gl.maximum(last - offset + ROWS - 1, 0) // ROWS * ROWS
    full_end = gl.load(rows) // ROWS * ROWS
    return first, count, full_begin, full_end


@gluon.jit
def _fetch(
    q, grad, q_tile, grad_tile, bits_tile, delta_tile, q_full, q_empty, row_bits_ptr, delta_ptr, refs_ptr, within_ptr,
    starts_ptr, rows_ptr, within_low, starts_low, refs_low, rows_any, batch, kv_head, tile, num_tiles, H, T, S, N, M,
    padded, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The partition that loads: blocks of queries, dO, and per row `row_bits` relative to the last key, and delta."""
    VECTOR: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    lane = gl.arange(0, ROWS, layout=VECTOR)
    start_s = tile * KEYS
    last = gl.minimum(start_s + KEYS, S) - 1
    step = 0
    for member in range(G):
        head = kv_head * G + member
        row = (batch * H + head).to(gl.int64)
        first, count, _, _ = _bounds(rows_ptr + row * num_tiles + tile, rows_any, S, T, start_s)
        within = within_ptr + row * S
        starts = starts_ptr + row * N
        end_start = gl.load(starts + start_s // BLOCK)
        end_within = gl.load(within + last)
        end_low = gl.load(starts + starts_low + start_s // BLOCK) + gl.load(within + within_low + last)
        refs = refs_ptr + row * M
        for i in range(count):
            start = first + i * ROWS
            at = row * padded + start + lane
            bits = gl.load(row_bits_ptr + at)
            delta = gl.load(delta_ptr + at)
            n = start // ROWS
            bits += (gl.load(refs + n) - end_start) - end_within + (gl.load(refs + refs_low + n) - end_low)
            stage = step % STAGES
            mbarrier.wait(q_empty.index(stage), ((step // STAGES) & 1) ^ 1)
            full = q_full.index(stage)
            mbarrier.expect(full, q.block_type.nbytes + grad.block_type.nbytes)
            load_async(q, [batch, head, start, 0], full, q_tile.index(stage))
            load_async(grad, [batch, head, start, 0], full, grad_tile.index(stage))
            bits_tile.index(stage).store(bits)
            delta_tile.index(stage).store(delta)
            mbarrier.arrive(full, count=1)
            step += 1


@gluon.jit
def _scores(query, key_left, key_right, D: gl.constexpr, SCORES: gl.constexpr):
    """Start the scores (keys, queries) of a block of queries; both halves of the channels."""
    zeros = gl.zeros([PART, ROWS], gl.float32, layout=SCORES)
    left = query.slice(0, D // 2, dim=1).permute((1, 0))
    right = query.slice(D // 2, D // 2, dim=1).permute((1, 0))
    score = warpgroup_mma(key_left, left, zeros, use_acc=False, is_async=True)
    return warpgroup_mma(key_right, right, score, is_async=True)


@gluon.jit
def _d_weights(grad_out, value, SCORES: gl.constexpr):
    """Start dP (keys, queries) of a block of queries."""
    zeros = gl.zeros([PART, ROWS], gl.float32, layout=SCORES)
    return warpgroup_mma(value, grad_out.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _by_key(d_score):
    """Sums over queries, as far as each thread holds them: (warp, key, thread of four)."""
    return gl.sum(gl.sum(gl.reshape(d_score, [4, 16, ROWS // 8, 4, 2]), 4), 2)


@gluon.jit
def _add_by_query(d_score, residue_ptr):
    """Add the sums over the keys of each warp to `residue_ptr` of 64 queries.

    In the layout of a product a thread holds 16 queries of its 2 keys, and 8 threads with other keys the same ones.
    See `_transposing_sum`: 14 exchanges and one addition to memory a thread, where a reduction of each query by itself
    takes 48 and 16.
    """
    pairs = gl.sum(gl.reshape(d_score, [4, 2, 8, ROWS]), 1)
    PAIRS: gl.constexpr = pairs.type.layout
    address = gl.full(pairs.shape, residue_ptr.to(gl.int64), gl.int64, layout=PAIRS)
    gl.inline_asm_elementwise(TRANSPOSING_SUM, OPERANDS, [pairs, address], dtype=gl.int32, is_pure=False, pack=16)


@gluon.jit
def _softmax(
    score, d_p, column_sum, step, start, to_key, s, bits_tile, delta_tile, d_score_tile, first_key_ptr, residue_ptr,
    full_begin, full_end, T, S, score_scale, GROUP: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
    OPERAND: gl.constexpr,
):  # fmt: skip
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    stage = step % STAGES
    bits = bits_tile.index(stage).load(COLUMN)
    delta = delta_tile.index(stage).load(COLUMN)
    score = score * score_scale + bits[None, :] + to_key[:, None]
    if (start < full_begin) | (start >= full_end):
        t = start + gl.arange(0, ROWS, layout=COLUMN)
        first_key = gl.load(first_key_ptr + t, mask=t < T, other=NO_KEY)
        seen = (s[:, None] >= first_key[None, :]) & (s[:, None] <= (t + S - T)[None, :])
        score = gl.where(seen, score, float("-inf"))
    p = gl.exp2(score)
    d_score = p * (d_p - delta[None, :])
    column_sum += _by_key(d_score)
    _add_by_query(d_score, residue_ptr + start)
    narrow = d_score.to(gl.bfloat16)
    d_score_tile.index(step % SLOTS).slice(GROUP * PART, PART, dim=0).store(narrow)
    fence_async_shared()
    return (
        gl.convert_layout(p.to(gl.bfloat16), OPERAND),
        gl.convert_layout(narrow, OPERAND),
        column_sum,
    )


@gluon.jit
def _dq(step, d_score_tile, key_half, DQ: gl.constexpr, D: gl.constexpr):
    """Start half of the channels of dq of a step, (queries, D / 2)."""
    return warpgroup_mma(
        d_score_tile.index(step % SLOTS).permute((1, 0)), key_half,
        gl.zeros([ROWS, D // 2], gl.float32, layout=DQ), use_acc=False, is_async=True,
    )  # fmt: skip


@gluon.jit
def _add_dq(dq, part, dq_tile, batch, head, start, GROUP: gl.constexpr, D: gl.constexpr):
    tma.store_wait(0)
    dq_tile.index(GROUP).reshape([ROWS, D // 2]).store(part)
    fence_async_shared()
    add_async(dq, [batch, head, start, GROUP * (D // 2)], dq_tile.index(GROUP))


@gluon.jit
def _keys(
    dq, dk, dv, q_tile, grad_tile, k_tile, v_tile, bits_tile, delta_tile, d_score_tile, dq_tile, q_full, q_empty,
    k_full, within_ptr, first_key_ptr, residue_ptr, column_sum_ptr, rows_ptr, within_low, rows_any, batch, kv_head,
    tile, num_tiles, score_scale, scale, H, T, S, padded,
    GROUP: gl.constexpr, G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 keys against all queries that see them."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    MINE: gl.constexpr = "14" if GROUP == 0 else "15"
    OTHER: gl.constexpr = "15" if GROUP == 0 else "14"
    start_s = tile * KEYS
    last = gl.minimum(start_s + KEYS, S) - 1
    s = start_s + GROUP * PART + gl.arange(0, PART, layout=ROW)
    dk_tile = gl.zeros([PART, D], gl.float32, layout=WIDE)
    dv_tile = gl.zeros([PART, D], gl.float32, layout=WIDE)
    mbarrier.wait(k_full, 0)
    key_left = k_tile.index(0).reshape([KEYS, D // 2]).slice(GROUP * PART, PART, dim=0)
    key_right = k_tile.index(1).reshape([KEYS, D // 2]).slice(GROUP * PART, PART, dim=0)
    key_half = k_tile.index(GROUP).reshape([KEYS, D // 2])
    value = v_tile.index(GROUP).reshape([PART, D])
    step = 0
    if GROUP == 1:
        pass_turn("14")
    for member in range(G):
        head = kv_head * G + member
        row = (batch * H + head).to(gl.int64)
        first, count, full_begin, full_end = _bounds(rows_ptr + row * num_tiles + tile, rows_any, S, T, start_s)
        # What decays from a key to the last of the tile; a key that does not exist weighs nothing.
        within = within_ptr + row * S
        to_key = gl.load(within + last) - gl.load(within + s, mask=s < S, other=float("inf"))
        to_key += gl.load(within + within_low + last) - gl.load(within + within_low + s, mask=s < S, other=0.0)
        first_key = first_key_ptr + row * T
        residue = residue_ptr + row * padded
        column_sum = _by_key(gl.zeros([PART, ROWS], gl.float32, layout=SCORES))
        if count > 0:
            stage = step % STAGES
            mbarrier.wait(q_full.index(stage), (step // STAGES) & 1)
            score = _scores(q_tile.index(stage).reshape([ROWS, D]), key_left, key_right, D, SCORES)
            d_p = _d_weights(grad_tile.index(stage).reshape([ROWS, D]), value, SCORES)
            score, d_p = warpgroup_mma_wait(0, deps=(score, d_p))
            for i in range(count - 1):
                start = first + i * ROWS
                p, d_score, column_sum = _softmax(
                    score, d_p, column_sum, step, start, to_key, s, bits_tile, delta_tile, d_score_tile, first_key,
                    residue, full_begin, full_end, T, S, score_scale, GROUP, STAGES, SCORES, OPERAND,
                )  # fmt: skip
                stage = step % STAGES
                after = (step + 1) % STAGES
                mbarrier.wait(q_full.index(after), ((step + 1) // STAGES) & 1)
                wait_turn(MINE)
                # Of the first block there is none before: a dq of what lies in shared memory, added nowhere.
                dq_part = _dq(step + SLOTS - 1, d_score_tile, key_half, DQ, D)
                dv_tile = warpgroup_mma(p, grad_tile.index(stage).reshape([ROWS, D]), dv_tile, is_async=True)
                if D > 64:  # registers are short
                    d_score = d_score_tile.index(step % SLOTS).slice(GROUP * PART, PART, dim=0)
                dk_tile = warpgroup_mma(d_score, q_tile.index(stage).reshape([ROWS, D]), dk_tile, is_async=True)
                if D <= 64:
                    score = _scores(q_tile.index(after).reshape([ROWS, D]), key_left, key_right, D, SCORES)
                    d_p = _d_weights(grad_tile.index(after).reshape([ROWS, D]), value, SCORES)
                    pass_turn(OTHER)
                    dq_part, dv_tile, dk_tile, score, d_p = warpgroup_mma_wait(
                        0, deps=(dq_part, dv_tile, dk_tile, score, d_p)
                    )
                    mbarrier.arrive(q_empty.index(stage), count=1)
                    _add_dq(dq, dq_part, dq_tile, batch, head, gl.where(i == 0, T + ROWS, start - ROWS), GROUP, D)
                else:
                    # The registers hold the next scores only when p and dS are gone, and dP when dq is.
                    pass_turn(OTHER)
                    dq_part, dv_tile, dk_tile = warpgroup_mma_wait(0, deps=(dq_part, dv_tile, dk_tile))
                    mbarrier.arrive(q_empty.index(stage), count=1)
                    score = _scores(q_tile.index(after).reshape([ROWS, D]), key_left, key_right, D, SCORES)
                    _add_dq(dq, dq_part, dq_tile, batch, head, gl.where(i == 0, T + ROWS, start - ROWS), GROUP, D)
                    d_p = _d_weights(grad_tile.index(after).reshape([ROWS, D]), value, SCORES)
                    score, d_p = warpgroup_mma_wait(0, deps=(score, d_p))
                step += 1
            start = first + (count - 1) * ROWS
            p, d_score, column_sum = _softmax(
                score, d_p, column_sum, step, start, to_key, s, bits_tile, delta_tile, d_score_tile, first_key,
                residue, full_begin, full_end, T, S, score_scale, GROUP, STAGES, SCORES, OPERAND,
            )  # fmt: skip
            stage = step % STAGES
            wait_turn(MINE)
            dq_part = _dq(step + SLOTS - 1, d_score_tile, key_half, DQ, D)
            dv_tile = warpgroup_mma(p, grad_tile.index(stage).reshape([ROWS, D]), dv_tile, is_async=True)
            if D > 64:  # registers are short
                d_score = d_score_tile.index(step % SLOTS).slice(GROUP * PART, PART, dim=0)
            dk_tile = warpgroup_mma(d_score, q_tile.index(stage).reshape([ROWS, D]), dk_tile, is_async=True)
            pass_turn(OTHER)
            dq_part, dv_tile, dk_tile = warpgroup_mma_wait(0, deps=(dq_part, dv_tile, dk_tile))
            mbarrier.arrive(q_empty.index(stage), count=1)
            _add_dq(dq, dq_part, dq_tile, batch, head, gl.where(count == 1, T + ROWS, start - ROWS), GROUP, D)
            wait_turn(MINE)
            dq_part = _dq(step, d_score_tile, key_half, DQ, D)
            pass_turn(OTHER)
            dq_part = warpgroup_mma_wait(0, deps=(dq_part,))
            _add_dq(dq, dq_part, dq_tile, batch, head, start, GROUP, D)
            step += 1
        column_sum = gl.convert_layout(gl.reshape(gl.sum(column_sum, 2), [PART]), ROW)
        gl.store(column_sum_ptr + row * S + s, column_sum, mask=s < S)
    if GROUP == 0:
        wait_turn("14")
    # Nobody reads queries any more: their place takes the results.
    q_tile.index(GROUP).reshape([ROWS, D]).store((dk_tile * scale).to(gl.bfloat16))
    grad_tile.index(GROUP).reshape([ROWS, D]).store(dv_tile.to(gl.bfloat16))
    fence_async_shared()
    store_async(dk, [batch, kv_head, start_s + GROUP * PART, 0], q_tile.index(GROUP))
    store_async(dv, [batch, kv_head, start_s + GROUP * PART, 0], grad_tile.index(GROUP))
    tma.store_wait(0)


@gluon.jit
def gluon_backward_kernel(
    q, k, v, grad, dq, dk, dv, within_ptr, starts_ptr, first_key_ptr, delta_ptr, row_bits_ptr, refs_ptr, residue_ptr,
    column_sum_ptr, rows_ptr, score_scale, scale, T, S, H, N, M, padded, num_tiles, num_heads, section,
    within_low, starts_low, refs_low, rows_any,
    G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    # 1. Which tile of keys is this program's? As in triton_backward.py.
    program = gl.program_id(0)
    first_head = program // (section * num_tiles) * section
    in_section = program % (section * num_tiles)
    heads = gl.minimum(section, num_heads - first_head)
    tile = in_section // heads
    batch_kv = first_head + in_section % heads
    batch, kv_head = batch_kv // (H // G), batch_kv % (H // G)

    # 2. Shared memory and who waits for whom.
    q_tile = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, ROWS, D], q.layout)
    grad_tile = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, ROWS, D], grad.layout)
    k_tile = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, KEYS, D // 2], k.layout)
    v_tile = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, PART, D], v.layout)
    d_score_tile = gl.allocate_shared_memory(
        gl.bfloat16, [SLOTS, KEYS, ROWS], gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], gl.bfloat16)
    )
    dq_tile = gl.allocate_shared_memory(gl.float32, [2, 1, 1, ROWS, D // 2], dq.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bits_tile = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    delta_tile = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(q_empty.index(i), count=2)
    start_s = tile * KEYS
    mbarrier.expect(k_full, 2 * (k.block_type.nbytes + v.block_type.nbytes))
    for group in gl.static_range(2):
        # Keys by halves of the channels, as dq wants them; values by warpgroup.
        load_async(k, [batch, kv_head, start_s, group * (D // 2)], k_full, k_tile.index(group))
        load_async(v, [batch, kv_head, start_s + group * PART, 0], k_full, v_tile.index(group))
    gl.warp_specialize(
        [
            (_keys, (
                dq, dk, dv, q_tile, grad_tile, k_tile, v_tile, bits_tile, delta_tile, d_score_tile, dq_tile, q_full,
                q_empty, k_full, within_ptr, first_key_ptr, residue_ptr, column_sum_ptr, rows_ptr, within_low,
                rows_any, batch, kv_head, tile, num_tiles, score_scale, scale, H, T, S, padded, 0, G, D, STAGES,
            )),
            (_keys, (
                dq, dk, dv, q_tile, grad_tile, k_tile, v_tile, bits_tile, delta_tile, d_score_tile, dq_tile, q_full,
                q_empty, k_full, within_ptr, first_key_ptr, residue_ptr, column_sum_ptr, rows_ptr, within_low,
                rows_any, batch, kv_head, tile, num_tiles, score_scale, scale, H, T, S, padded, 1, G, D, STAGES,
            )),
            (_fetch, (
                q, grad, q_tile, grad_tile, bits_tile, delta_tile, q_full, q_empty, row_bits_ptr, delta_ptr, refs_ptr,
                within_ptr, starts_ptr, rows_ptr, within_low, starts_low, refs_low, rows_any, batch, kv_head, tile,
                num_tiles, H, T, S, N, M, padded, G, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@triton.jit
def finish_dq_kernel(
    sum_ptr, dq_ptr, residue_ptr, column_sum_ptr, scale, T, S, H, padded, stride_b, stride_h, stride_t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round dq, and take the residue of every row from the sums of dS over queries."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (t[:, None] < T) & (d[None, :] < D)
    x = tl.load(sum_ptr + (row * T + t)[:, None] * D + d[None, :], mask=mask, other=0.0) * scale
    at = dq_ptr + batch * stride_b + head * stride_h + t[:, None].to(tl.int64) * stride_t + d[None, :]
    tl.store(at, x.to(dq_ptr.dtype.element_ty), mask=mask)
    residue = tl.load(residue_ptr + row * padded + t, mask=t < T, other=0.0)
    key = row * S + S - T + t
    tl.store(column_sum_ptr + key, tl.load(column_sum_ptr + key, mask=t < T, other=0.0) - residue, mask=t < T)


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sums: GateSums,
    first_key: torch.Tensor,
    delta: torch.Tensor,
    row_bits: torch.Tensor,
    refs: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    section: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels: `dq`, `dk`, `dv` like their tensors, the sums of dS over queries `(B, H, S)` float32.

    `delta` and `row_bits` are `(B, H, T padded to blocks of 64)`, 0 and -inf behind T; `refs` `(2, B, H, blocks)` of
    64 queries; `seen` of `triton_backward.queries_of_key_tiles` for tiles of 128 keys.
    """
    batch, num_heads, num_queries, dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    num_tiles = seen.shape[-1]
    width = padded_head_dim(dim)
    total = torch.zeros(batch, num_heads, num_queries, dim, dtype=torch.float32, device=q.device)
    padded = row_bits.shape[-1]
    residue = torch.zeros(batch, num_heads, padded, dtype=torch.float32, device=q.device)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    column_sum = torch.empty(batch, num_heads, num_keys, dtype=torch.float32, device=q.device)
    tensors = [
        described(gluon_descriptor, x, rows, columns)
        for x, rows, columns in (
            (q, 64, width), (k, 128, width // 2), (v, 64, width), (grad_out, 64, width), (total, 64, width // 2),
            (dk, 64, width), (dv, 64, width),
        )
    ]  # fmt: skip
    launch(
        gluon_backward_kernel, (num_tiles * batch * num_kv_heads,),
        (*tensors, sums.within, sums.starts, first_key, delta, row_bits, refs, residue, column_sum, seen),
        (scale * LOG2_E, scale, num_queries, num_keys, num_heads, sums.starts.shape[-1], refs.shape[-1], padded,
         num_tiles, batch * num_kv_heads, section, sums.within.stride(0), sums.starts.stride(0), refs.stride(0),
         seen.stride(0)),
        G=num_heads // num_kv_heads, D=width, STAGES=4 if width == 64 else 2, CONSUMER_REGISTERS=240,
        PRODUCER_REGISTERS=24, num_warps=4, maxnreg=168,
    )  # fmt: skip
    launch(
        finish_dq_kernel, (batch * num_heads, -(-num_queries // 64)),
        (total, dq, residue, column_sum),
        (scale, num_queries, num_keys, num_heads, padded, *dq.stride()[:3]),
        D=dim, BLOCK_D=width, ROWS=64,
    )  # fmt: skip
    return dq, dk, dv, column_sum
