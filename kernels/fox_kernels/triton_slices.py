"""A few queries against many keys, shared out among programs in equal slices: what rows and pages have in common.

The tiles of keys that survive, of all heads one after another, are cut into equal slices, one per program; the lengths
of heads differ a hundredfold, so equal parts of each head would leave most of the GPU idle. All queries that share a
key head are rows of the same products: keys and values are read once. What a program finds for a head, (maximum, sum,
output), goes to slot `program + head`; both only grow along the slices, so no two share a slot, and those of a head
are neighbors. `combine_kernel` adds up the slots of each row.

From Hopper on the kernels of a call are launched one into the other: each is set up while the one before it still
runs, and waits for its end before it reads anything.

Letters and units as in triton_decode.py; a unit is the part of a key head's rows that fits a tile (nearly always all
of them).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .gates import GATE_BLOCK
from .launch import launch
from .tile_sizes import padded_head_dim, programs_at_once

UNIT_COST = tl.constexpr(2)  # tiles that take as long as a program's start on another head
MOST_SLOTS = 256  # partial results that `combine_kernel` reads at a time, where they fit the registers


def cdiv(x: int, y: int) -> int:
    """As `triton.cdiv`, which kernels can call as well and which therefore takes 5 us on the host."""
    return -(-x // y)


def power_of_2(x: int) -> int:
    """The least that is not below x; as `triton.next_power_of_2`."""
    return 1 << (x - 1).bit_length()


class DecodeTiles(NamedTuple):
    """`block_r` rows by `block_s` keys, `programs_per_sm` slices for each multiprocessor.

    `max_registers` of a thread, where the compiler would take so many that fewer programs fit.
    """

    block_r: int
    block_s: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    max_registers: int | None = None


@lru_cache
def decode_tiles(head_dim: int, element_size: int, arch: int, num_rows: int, uneven: bool) -> DecodeTiles:
    """Tiles by the bytes of one stage: 16 KiB of keys and values, at most as much for the decay of every pair.

    What is in flight decides, not the arithmetic. An H100 in bfloat16, 13 sizes: as many programs as its registers
    hold, two of four warps a multiprocessor, are the best where all keys are read; a third takes its turn after them
    and makes it 12 % slower at 128 channels and 131072 keys. Where heads are of uneven length and have 64 channels,
    three with fewer registers are 3 % faster than two.

    Args:
        uneven: Whether some keys are not read.
    """
    dim = padded_head_dim(head_dim)
    most = min(32, 4096 // dim) if element_size >= 4 else min(64, 8192 // dim)
    block_r = max(16, min(most, power_of_2(num_rows)))
    block_s = max(16, min(GATE_BLOCK, 16384 // (2 * dim * element_size), 8192 // element_size // block_r))
    if uneven and dim <= 64 and arch >= 90:
        return DecodeTiles(block_r, block_s, 4, 3, 3, 168)
    return DecodeTiles(block_r, block_s, 4, 3 if arch else 2, 2)


@triton.jit
def keys_in_use(num_keys, length_ptr, ON_DEVICE: tl.constexpr):
    """The number of keys in use: an argument, or, for graphs that are replayed at a greater length, in memory."""
    if ON_DEVICE:
        return tl.load(length_ptr).to(tl.int32)
    return num_keys


@triton.jit
def unit_tiles(lowest_ptr, num_tiles, num_units, HAS_FIRST: tl.constexpr, UNITS_PER_HEAD: tl.constexpr,
                BLOCK_S: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Of every unit (one per lane) its length in tiles of keys, UNIT_COST included, and the sum up to its end."""
    lane = tl.arange(0, LANES)
    tiles = tl.zeros([LANES], tl.int32) + num_tiles
    if HAS_FIRST:
        tiles -= tl.load(lowest_ptr + lane // UNITS_PER_HEAD, mask=lane < num_units, other=0) // BLOCK_S
    tiles = tl.where(lane < num_units, tiles + UNIT_COST, 0)
    return lane, tiles, tl.cumsum(tiles, axis=0)


@triton.jit
def _shares(total, grid_programs):
    """Programs that get tiles, the least that each gets, and how many get one more, which are the first.

    In 32 bits: a division of 64 takes a hundred instructions, and this is what a program starts with.
    """
    num_programs = tl.minimum(grid_programs, total)
    least = total // num_programs
    return num_programs, least, total - least * num_programs


@triton.jit
def own_tiles(lane, tiles, ends, num_units):
    """This program, its tiles begin .. end - 1 of all units in a row, and the first and last unit that have some."""
    num_programs, least, longer = _shares(tl.sum(tiles, axis=0), tl.num_programs(0))
    program = tl.program_id(0)
    begin = tl.minimum(program, num_programs) * least + tl.minimum(program, longer)
    end = begin + tl.where(program < num_programs, least + (program < longer).to(tl.int32), 0)
    is_unit = lane < num_units
    first_unit = tl.sum((is_unit & (ends <= begin)).to(tl.int32), axis=0)
    last_unit = tl.sum((is_unit & (ends < end)).to(tl.int32), axis=0)
    return program.to(tl.int64), begin, end, first_unit, last_unit


@triton.jit
def _program_of(tile, least, longer):
    """The program that has this tile."""
    in_longer = longer * (least + 1)
    return tl.where(tile < in_longer, tile // (least + 1), longer + (tile - in_longer) // least)


@triton.jit
def lane_value(lane, index, values):
    return tl.sum(tl.where(lane == index, values, 0), axis=0)


@triton.jit
def load_rows(ptr, row, stride, is_row, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(len(row), BLOCK_D) rows of a matrix, zeros where `is_row` is not."""
    at = ptr + row[:, None] * stride + d[None, :]
    if BLOCK_D != D:
        return tl.load(at, mask=is_row[:, None] & (d[None, :] < D), other=0.0)
    return tl.load(at, mask=is_row[:, None], other=0.0)


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """For the kernel before to end, where this one may start earlier; and allow the next one to be set up."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch_ahead(
    ptr, first, last, stride, D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Ask for ROWS rows from `first` on to be brought to the L2 cache while a program still waits for its queries.

    The compiler loads queries before it starts the pipeline of the keys, one wait for memory after the other.
    """
    LINE: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    LINES: tl.constexpr = triton.next_power_of_2((D + LINE - 1) // LINE)
    row = tl.minimum(first + tl.arange(0, ROWS), last).to(tl.int64)
    line = tl.minimum(tl.arange(0, LINES) * LINE, D - 1)
    at = (ptr + row[:, None] * stride + line[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def unit_rows(unit, num_keys, T, H_kv, G: tl.constexpr, UNITS_PER_HEAD: tl.constexpr, BLOCK_R: tl.constexpr):
    """Of a unit: batch and key head; of its rows the number, whether it exists, head of the group, query, position."""
    kv_program = unit // UNITS_PER_HEAD
    row = tl.arange(0, BLOCK_R)
    r = (unit % UNITS_PER_HEAD) * BLOCK_R + row
    t = r % T
    return (
        (kv_program // H_kv).to(tl.int64),
        (kv_program % H_kv).to(tl.int64),
        row,
        r < G * T,
        r // T,
        t,
        num_keys - T + t,
    )


@triton.jit
def load_queries(q_ptr, batch, head, t, is_row, q_stride_b, q_stride_h, q_stride_t, D: tl.constexpr,
                  BLOCK_D: tl.constexpr):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    at = q_ptr + batch * q_stride_b + head * q_stride_h + t * q_stride_t
    return tl.load(at[:, None] + d[None, :], mask=is_row[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def tiles_of_unit(lane, unit, tiles, ends, begin, end, num_tiles):
    """First tile of this program in the unit and the one after its last, counted from the start of the sequence.

    The last tile of a unit is number num_tiles - 1. Its first UNIT_COST ones stand for time and no keys; a program
    with nothing else leaves an empty partial result.
    """
    unit_end = lane_value(lane, unit, ends)
    to_sequence = num_tiles - unit_end
    first = unit_end - lane_value(lane, unit, tiles) + UNIT_COST
    return tl.maximum(begin, first) + to_sequence, tl.minimum(end, unit_end) + to_sequence


@triton.jit
def add_tile(score, v, row_max, row_sum, acc, PRECISION: tl.constexpr):
    """A step of the online softmax; scores in bits, -inf where a key is hidden."""
    new_max = tl.maximum(row_max, tl.max(score, axis=1))
    # A row that has seen no key yet stays at -inf; subtracting that would give NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.math.exp2(score - shift[:, None])
    rescale = tl.math.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit
def store_partial(partial_ptr, stats_at, program, unit, row, is_row, num_rows, num_slots, row_max, row_sum, acc,
                   D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """What the program found for the rows of the unit, in slot program + unit."""
    d = tl.arange(0, BLOCK_D)
    slot = (program + unit) * num_rows + row
    is_row = is_row & (row < num_rows)
    stats_ptr = partial_ptr + stats_at
    tl.store(stats_ptr + slot, row_max, mask=is_row)
    tl.store(stats_ptr + num_slots * num_rows + slot, row_sum, mask=is_row)
    tl.store(partial_ptr + slot[:, None] * D + d[None, :], acc, mask=is_row[:, None] & (d[None, :] < D))


@triton.jit(do_not_specialize=["num_keys"])
def combine_kernel(
    partial_ptr, out_ptr, first_ptr, length_ptr, num_keys, T, H_kv, num_units, num_rows, num_slots, lowest_at,
    stats_at, grid_programs, o_stride_b, o_stride_h, o_stride_t,
    HAS_FIRST: tl.constexpr, ON_DEVICE: tl.constexpr, G: tl.constexpr, UNITS_PER_HEAD: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, LANES: tl.constexpr,
    SLOTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Output of one row, from the slots of its unit.

    What `plan_kernel` found is there before this one is set up: the kernel between waited for it. So it waits itself
    only before it reads what that one writes.
    """
    lowest_ptr = first_ptr + lowest_at
    stats_ptr = partial_ptr + stats_at
    program = tl.program_id(0).to(tl.int64)
    t, batch_head = program % T, program // T
    batch, head = batch_head // (H_kv * G), batch_head % (H_kv * G)
    r = (head % G) * T + t
    unit = ((batch * H_kv + head // G) * UNITS_PER_HEAD + r // BLOCK_R).to(tl.int32)
    num_keys = keys_in_use(num_keys, length_ptr, ON_DEVICE)
    num_tiles = (num_keys + BLOCK_S - 1) // BLOCK_S
    lane, tiles, ends = unit_tiles(lowest_ptr, num_tiles, num_units, HAS_FIRST, UNITS_PER_HEAD, BLOCK_S, LANES)
    _, least, longer = _shares(tl.sum(tiles, axis=0), grid_programs)
    end = lane_value(lane, unit, ends)
    first_slot = _program_of(end - lane_value(lane, unit, tiles), least, longer) + unit
    last_slot = _program_of(end - 1, least, longer) + unit

    d = tl.arange(0, BLOCK_D)
    row_max = tl.full([], float("-inf"), tl.float32)
    row_sum = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    if OVERLAP:
        # As `gdc_wait`, but after the slots are known: ptxas moves a wait that does not depend on them to the front.
        first_slot = tl.inline_asm_elementwise(
            "{ .reg .pred known; setp.ge.s32 known, $1, 0; @known griddepcontrol.wait; mov.b32 $0, $1; }", "=r,r",
            [first_slot], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    for start in range(first_slot, last_slot + 1, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        is_slot = slot <= last_slot
        at = slot.to(tl.int64) * num_rows + r % BLOCK_R
        part_max = tl.load(stats_ptr + at, mask=is_slot, other=float("-inf"))
        part_sum = tl.load(stats_ptr + num_slots * num_rows + at, mask=is_slot, other=0.0)
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


class Slices(NamedTuple):
    """How the tiles of keys are shared out, and memory for what each program finds.

    Attributes:
        partial: `num_slots * num_rows * (D + 2)` float32: outputs, maxima and sums of the rows of each slot.
        sizes: What both kernels take: num_units, num_rows, num_slots, lowest_at, stats_at.
        options: Constants that both kernels take.
    """

    num_programs: int
    partial: torch.Tensor
    sizes: tuple[int, int, int, int, int]
    options: dict

    @classmethod
    def of(
        cls, q: torch.Tensor, num_kv_heads: int, tiles: DecodeTiles, arch: int, lowest_at: int = 0,
        most_keys: int | None = None,
    ):  # fmt: skip
        """For queries `(B, H, T, D)`; `most_keys` None: more than the programs of the GPU can share."""
        batch, num_heads, num_queries, dim = q.shape
        groups = num_heads // num_kv_heads
        units_per_head = cdiv(groups * num_queries, tiles.block_r)
        num_units = batch * num_kv_heads * units_per_head
        num_rows = min(tiles.block_r, groups * num_queries)
        num_programs = programs_at_once(q.device, tiles.programs_per_sm)
        if most_keys is not None:
            num_programs = min(num_programs, num_units * (cdiv(most_keys, tiles.block_s) + UNIT_COST.value))
        num_slots = num_programs + num_units
        stats_at = num_slots * num_rows * dim
        partial = torch.empty(stats_at + 2 * num_slots * num_rows, dtype=torch.float32, device=q.device)
        options = dict(
            G=groups, UNITS_PER_HEAD=units_per_head, D=dim, BLOCK_D=padded_head_dim(dim), BLOCK_R=tiles.block_r,
            BLOCK_S=tiles.block_s, LANES=power_of_2(num_units), OVERLAP=may_overlap(arch),
        )  # fmt: skip
        return cls(num_programs, partial, (num_units, num_rows, num_slots, lowest_at, stats_at), options)

    def combine(self, q, first, length, num_keys: int, num_kv_heads: int, **options) -> torch.Tensor:
        """Add up what the programs found: `o (B, H, T, D)` strided as `q`."""
        out = torch.empty_like(q)
        batch, num_heads, num_queries, _ = q.shape
        launch(
            combine_kernel, (batch * num_heads * num_queries,), (self.partial, out, first, length),
            (num_keys, num_queries, num_kv_heads, *self.sizes, self.num_programs, *out.stride()[:3]),
            **options, **self.options, SLOTS=min(MOST_SLOTS, 16384 // self.options["BLOCK_D"]),
            num_warps=8, **early(self.options["OVERLAP"]),
        )  # fmt: skip
        return out


def may_overlap(arch: int) -> bool:
    """Whether a kernel may be set up while the one before it runs: programmatic dependent launch, from Hopper on."""
    return arch >= 90


def early(overlap: bool) -> dict:
    """Options of a launch that waits in the kernel, by `wait`, for the one before it."""
    return {"launch_pdl": True} if overlap else {}


def registers(tiles: DecodeTiles) -> dict:
    """Options of a launch that keep a kernel to the registers that `tiles` gives it."""
    return {} if tiles.max_registers is None else {"maxnreg": tiles.max_registers}
