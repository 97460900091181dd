"""Decoding from pages as Triton kernels: appending up to 16 keys, and their queries against the live pages of a head.

The slices, slots and the sum over them are those of triton_slices.py; here a tile of keys lies in a page whose number
is looked up in a table, and the first page of a head is what its cache has not given back. Launches depend on shapes
alone and the number of keys is read on the device, so that a CUDA graph replays a step as long as no tensor moves.

Letters:  B batch, H query heads, G query heads per key head, T queries (the last of the keys), R rows = G * T,
    D head dim, P pages, C columns of the table (a power of 2; page n of a sequence is in column n mod C).
Tensors:  q, o (B, H, T, D);  keys, values (P, page, D);  within (P, 2, G, page) and starts (P, 2, G), bits, high and
    low part;  table (B, H // G, C), lowest (B, H // G) int32;  totals (B, H) float64, bits.
"""

import torch
import triton
import triton.language as tl

from .gates import LOG2_E
from .launch import launch
from .tile_sizes import architecture, padded_head_dim
from .triton_forward import dot_precision
from .triton_slices import (
    DecodeTiles,
    Slices,
    add_tile,
    decode_tiles,
    early,
    load_queries,
    load_rows,
    own_tiles,
    power_of_2,
    registers,
    store_partial,
    tiles_of_unit,
    unit_rows,
    unit_tiles,
    wait,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST_GATE = tl.constexpr(-9000.0)  # paged.LOWEST_GATE


@triton.jit
def append_pages_kernel(
    k_ptr, v_ptr, gate_ptr, keys_ptr, values_ptr, within_ptr, starts_ptr, total_ptr, table_ptr, length_ptr, T, H_kv,
    table_len, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, gate_stride_b, gate_stride_h,
    gate_stride_t, G: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Write T keys, values and decays of one key head to its last pages; the length counts them already."""
    program = tl.program_id(0).to(tl.int64)
    batch, kv_head = program // H_kv, program % H_kv
    first = tl.load(length_ptr).to(tl.int32) - T
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    is_head = g < G
    total = tl.load(total_ptr + program * G + g, mask=is_head, other=0.0)
    gate_at = gate_ptr + batch * gate_stride_b + (kv_head * G + g) * gate_stride_h
    for t in range(0, T):
        position = first + t
        slot = position % PAGE
        page = tl.load(table_ptr + program * table_len + ((position // PAGE) & (table_len - 1))).to(tl.int64)
        starts = starts_ptr + page * (2 * G) + g
        high = total.to(tl.float32)
        if slot == 0:
            tl.store(starts, high, mask=is_head)
            tl.store(starts + G, (total - high.to(tl.float64)).to(tl.float32), mask=is_head)
            start = total
        else:
            start = tl.load(starts, mask=is_head, other=0.0).to(tl.float64)
            start += tl.load(starts + G, mask=is_head, other=0.0).to(tl.float64)
        gate = tl.load(gate_at + t * gate_stride_t, mask=is_head, other=0.0)
        total += tl.where(gate < LOWEST_GATE, LOWEST_GATE, gate).to(tl.float64) * _LOG2_E
        within = total - start
        high = within.to(tl.float32)
        at = within_ptr + page * (2 * G * PAGE) + g * PAGE + slot
        tl.store(at, high, mask=is_head)
        tl.store(at + G * PAGE, (within - high.to(tl.float64)).to(tl.float32), mask=is_head)
        k = tl.load(k_ptr + batch * k_stride_b + kv_head * k_stride_h + t * k_stride_t + d, mask=d < D, other=0.0)
        v = tl.load(v_ptr + batch * v_stride_b + kv_head * v_stride_h + t * v_stride_t + d, mask=d < D, other=0.0)
        to = (page * PAGE + slot) * D + d
        tl.store(keys_ptr + to, k, mask=d < D)
        tl.store(values_ptr + to, v, mask=d < D)
    tl.store(total_ptr + program * G + g, total, mask=is_head)


@triton.jit
def forgetting_attention_paged_kernel(
    q_ptr, keys_ptr, values_ptr, within_ptr, starts_ptr, table_ptr, lowest_ptr, key_start_ptr, length_ptr, partial_ptr,
    score_scale, T, H_kv, num_units, num_rows, num_slots, stats_at, table_len, q_stride_b, q_stride_h, q_stride_t,
    HAS_KEY_START: tl.constexpr, G: tl.constexpr, UNITS_PER_HEAD: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, PAGE: tl.constexpr, LANES: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # 1. Which tiles are this program's? Programs beyond the number of tiles have none.
    wait(OVERLAP)
    num_keys = tl.load(length_ptr).to(tl.int32)
    num_tiles = (num_keys + BLOCK_S - 1) // BLOCK_S
    lane, tiles, ends = unit_tiles(lowest_ptr, num_tiles, num_units, True, UNITS_PER_HEAD, BLOCK_S, LANES)
    program, begin, end, first_unit, last_unit = own_tiles(lane, tiles, ends, num_units)
    d = tl.arange(0, BLOCK_D)

    for unit in range(first_unit, tl.minimum(last_unit + 1, num_units)):
        # 2. What stays for the tiles of this unit.
        batch, kv_head, row, is_row, g, t, position = unit_rows(unit, num_keys, T, H_kv, G, UNITS_PER_HEAD, BLOCK_R)
        q = load_queries(q_ptr, batch, kv_head * G + g, t, is_row, q_stride_b, q_stride_h, q_stride_t, D, BLOCK_D)
        table = table_ptr + (batch * H_kv + kv_head) * table_len
        page = tl.load(table + ((position // PAGE) & (table_len - 1)), mask=is_row, other=0).to(tl.int64)
        start_high = tl.load(starts_ptr + page * (2 * G) + g, mask=is_row, other=0.0)
        start_low = tl.load(starts_ptr + page * (2 * G) + G + g, mask=is_row, other=0.0)
        own = within_ptr + page * (2 * G * PAGE) + g * PAGE + position % PAGE
        lam_high = tl.load(own, mask=is_row, other=0.0)
        lam_low = tl.load(own + G * PAGE, mask=is_row, other=0.0)
        first = 0
        if HAS_KEY_START:
            first = tl.load(key_start_ptr + batch).to(tl.int32)
        row_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

        # 3. Online softmax over tiles, none of which is longer than a page.
        from_tile, to_tile = tiles_of_unit(lane, unit, tiles, ends, begin, end, num_tiles)
        for tile in tl.range(from_tile, to_tile, num_stages=NUM_STAGES):
            start = tile * BLOCK_S
            here = tl.load(table + ((start // PAGE) & (table_len - 1))).to(tl.int64)
            key = tl.arange(0, BLOCK_S)
            s = start + key
            is_key = s < num_keys
            slot = start % PAGE
            k = load_rows(keys_ptr + (here * PAGE + slot) * D, key, D, is_key, d, D, BLOCK_D)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
            starts = starts_ptr + here * (2 * G) + g
            page_high = tl.load(starts, mask=is_row, other=0.0)
            page_low = tl.load(starts + G, mask=is_row, other=0.0)
            from_start = (start_high - page_high) + (start_low - page_low)
            within = within_ptr + here * (2 * G * PAGE) + slot
            if G == 1:
                high = tl.load(within + key, mask=is_key, other=0.0)[None, :]
                if PRECISION != "tf32":
                    low = tl.load(within + PAGE + key, mask=is_key, other=0.0)[None, :]
            else:
                key_ptr = within + g[:, None] * PAGE + key[None, :]
                is_pair = is_row[:, None] & is_key[None, :]
                high = tl.load(key_ptr, mask=is_pair, other=0.0)
                if PRECISION != "tf32":
                    low = tl.load(key_ptr + G * PAGE, mask=is_pair, other=0.0)
            if PRECISION != "tf32":
                score += ((lam_high[:, None] - high) + (lam_low[:, None] - low)) + from_start[:, None]
            else:
                score += (lam_high + from_start)[:, None] - high
            visible = (s[None, :] >= first) & (s[None, :] <= position[:, None])
            v = load_rows(values_ptr + (here * PAGE + slot) * D, key, D, is_key, d, D, BLOCK_D)
            row_max, row_sum, acc = add_tile(
                tl.where(visible, score, float("-inf")), v, row_max, row_sum, acc, PRECISION
            )

        # 4. The partial result.
        store_partial(
            partial_ptr, stats_at, program, unit, row, is_row, num_rows, num_slots, row_max, row_sum, acc, D, BLOCK_D
        )


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    log_fgate: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    within: torch.Tensor,
    starts: torch.Tensor,
    totals: torch.Tensor,
    table: torch.Tensor,
    length: torch.Tensor,
) -> None:
    """Launch the kernel that appends `k`, `v (B, H_kv, T, D)` and `log_fgate (B, H, T)`.

    Args:
        length: One int32 on the device: keys, these included. Their pages must be in the table.
    """
    batch, num_kv_heads, num_new, dim = k.shape
    groups = log_fgate.shape[1] // num_kv_heads
    launch(
        append_pages_kernel, (batch * num_kv_heads,),
        (k, v, log_fgate, keys, values, within, starts, totals, table, length),
        (num_new, num_kv_heads, table.shape[-1], *k.stride()[:3], *v.stride()[:3], *log_fgate.stride()),
        G=groups, BLOCK_G=power_of_2(groups), D=dim,
        BLOCK_D=padded_head_dim(dim), PAGE=keys.shape[1], num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def forward(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    within: torch.Tensor,
    starts: torch.Tensor,
    table: torch.Tensor,
    lowest: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    key_start: torch.Tensor | None = None,
    tiles: DecodeTiles | None = None,
) -> torch.Tensor:
    """Launch the kernels. Returns `o (B, H, T, D)` strided as `q`.

    Args:
        lowest: `(B, H_kv)` int32, contiguous: first key of each key head, at the start of a page.
        length: One int32 on the device: keys in use, those of the queries included.
        key_start: `(B,)` int32, or None.
    """
    _, num_heads, num_queries, dim = q.shape
    num_kv_heads, page_size = table.shape[1], keys.shape[1]
    rows = num_heads // num_kv_heads * num_queries
    arch = architecture(q.device)
    tiles = tiles or decode_tiles(dim, q.element_size(), arch, rows, True)
    slices = Slices.of(q, num_kv_heads, tiles._replace(block_s=min(tiles.block_s, page_size)), arch)
    num_units, num_rows, num_slots, _, stats_at = slices.sizes
    launch(
        forgetting_attention_paged_kernel, (slices.num_programs,),
        (q, keys, values, within, starts, table, lowest, lowest if key_start is None else key_start, length,
         slices.partial),
        (scale * LOG2_E, num_queries, num_kv_heads, num_units, num_rows, num_slots, stats_at, table.shape[-1],
         *q.stride()[:3]),
        HAS_KEY_START=key_start is not None, PAGE=page_size, **slices.options,
        PRECISION=dot_precision(q.dtype), NUM_STAGES=tiles.num_stages, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages, **registers(tiles), **early(slices.options["OVERLAP"]),
    )  # fmt: skip
    return slices.combine(q, lowest, length, 0, num_kv_heads, HAS_FIRST=True, ON_DEVICE=True)
