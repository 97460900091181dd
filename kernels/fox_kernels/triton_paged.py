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
from .pruning import DOT_ERROR
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

_LOG2_E = tl.constexpr(1.4426950408889634)
PAPER_SLACK = tl.constexpr(2.0**-16)  # pruning.PAPER_SLACK
TIGHT_SLACK = tl.constexpr(2.0**-5)  # pruning.TIGHT_SLACK, nats
PROBES = 256  # pages that one step of the search looks at, of all heads of a group together
LOWEST_GATE = tl.constexpr(-9000.0)  # paged.LOWEST_GATE


@triton.jit
def append_decay(gate, total, within_ptr, starts_ptr, page, slot, g, is_head, G: tl.constexpr, PAGE: tl.constexpr):
    """Write where one token lies in its page: `total (BLOCK_G,)` float64 bits with its `gate`, which is returned."""
    starts = starts_ptr + page * (2 * G) + g
    high = total.to(tl.float32)
    if slot == 0:
        tl.store(starts, high, mask=is_head)
        tl.store(starts + G, (total - high.to(tl.float64)).to(tl.float32), mask=is_head)
        start = total
    else:
        start = tl.load(starts, mask=is_head, other=0.0).to(tl.float64)
        start += tl.load(starts + G, mask=is_head, other=0.0).to(tl.float64)
    total += tl.where(gate < LOWEST_GATE, LOWEST_GATE, gate).to(tl.float64) * _LOG2_E
    within = total - start
    high = within.to(tl.float32)
    at = within_ptr + page * (2 * G * PAGE) + g * PAGE + slot
    tl.store(at, high, mask=is_head)
    tl.store(at + G * PAGE, (within - high.to(tl.float64)).to(tl.float32), mask=is_head)
    return total


@triton.jit(do_not_specialize=["table_len"])
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
        gate = tl.load(gate_at + t * gate_stride_t, mask=is_head, other=0.0)
        total = append_decay(gate, total, within_ptr, starts_ptr, page, slot, g, is_head, G, PAGE)
        k = tl.load(k_ptr + batch * k_stride_b + kv_head * k_stride_h + t * k_stride_t + d, mask=d < D, other=0.0)
        v = tl.load(v_ptr + batch * v_stride_b + kv_head * v_stride_h + t * v_stride_t + d, mask=d < D, other=0.0)
        to = (page * PAGE + slot) * D + d
        tl.store(keys_ptr + to, k, mask=d < D)
        tl.store(values_ptr + to, v, mask=d < D)
    tl.store(total_ptr + program * G + g, total, mask=is_head)


@triton.jit
def _near_mass(
    q_ptr, keys_ptr, within_ptr, starts_ptr, table, bound, lam_query, lowest, num_keys, score_scale, T, batch, kv_head,
    table_len, q_stride_b, q_stride_h, q_stride_t, G: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, NEAR: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
    DOT_ERROR: tl.constexpr,
):  # fmt: skip
    """As `triton_decode._far_mass_of_rows`: of every head the largest `U + lam_i - lam_p - L_i` of its rows, bits.

    `lam_query (BLOCK_G,)` is lam_p, float64.
    """
    d, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    s = tl.maximum(num_keys - NEAR, 0) + tl.arange(0, NEAR)
    # What no row sees is not read: it may be anything.
    is_key = (s >= lowest) & (s < num_keys)
    here = tl.load(table + ((s // PAGE) & (table_len - 1)), mask=is_key, other=0).to(tl.int64)
    k = load_rows(keys_ptr, here * PAGE + s % PAGE, D, is_key, d, D, BLOCK_D)
    k_norm = tl.sqrt(tl.max(tl.sum(k.to(tl.float32) * k.to(tl.float32), axis=1), axis=0))
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for row in range(0, G * T, BLOCK_R):
        r = row + tl.arange(0, BLOCK_R)
        is_row = r < G * T
        of_group, t = r // T, r % T
        position = num_keys - T + t
        q = load_queries(
            q_ptr, batch, kv_head * G + of_group, t, is_row, q_stride_b, q_stride_h, q_stride_t, D, BLOCK_D
        )
        q_norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1))
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        page = tl.load(table + ((position // PAGE) & (table_len - 1)), mask=is_row, other=0).to(tl.int64)
        lam_row = _lam_at(within_ptr, starts_ptr, page, position % PAGE, of_group, is_row, G, PAGE)
        visible = is_row[:, None] & is_key[None, :] & (s[None, :] <= position[:, None])
        lam_key = _lam_at(
            within_ptr, starts_ptr, here[None, :], (s % PAGE)[None, :], of_group[:, None], visible, G, PAGE
        )
        error = tl.abs(score_scale) * DOT_ERROR * q_norm * k_norm
        weighed = score - error[:, None] + (lam_row[:, None] - lam_key).to(tl.float32)
        weighed = tl.where(visible, weighed, float("-inf"))
        most = tl.max(weighed, axis=1)
        shift = tl.where(most == float("-inf"), 0.0, most)
        total = tl.sum(tl.math.exp2(weighed - shift[:, None]), axis=1)
        log_sum = shift + tl.math.log2(tl.where(total == 0.0, 1.0, total))
        is_own = of_group[:, None] == g[None, :]
        row_bound = tl.max(tl.where(is_own, bound[None, :], float("-inf")), axis=1)
        lam_first = tl.sum(tl.where(is_own, lam_query[None, :], 0.0), axis=1)
        # A row's own key weighs at least -U.
        mass = row_bound + (lam_row - lam_first).to(tl.float32) - tl.maximum(log_sum, -row_bound)
        seen = is_own & (is_row & (lowest <= position))[:, None]
        largest = tl.maximum(largest, tl.max(tl.where(seen, mass[:, None], float("-inf")), axis=0))
    return largest


@triton.jit
def _lam_at(within_ptr, starts_ptr, page, slot, g, mask, G: tl.constexpr, PAGE: tl.constexpr):
    """Running sums of gates, float64 bits; everything but the pointers broadcasts."""
    starts = starts_ptr + page * (2 * G) + g
    within = within_ptr + page * (2 * G * PAGE) + g * PAGE + slot
    lam = tl.load(starts, mask=mask, other=0.0).to(tl.float64)
    lam += tl.load(starts + G, mask=mask, other=0.0).to(tl.float64)
    lam += tl.load(within, mask=mask, other=0.0).to(tl.float64)
    return lam + tl.load(within + G * PAGE, mask=mask, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["table_len"])
def plan_pages_kernel(
    q_ptr, keys_ptr, within_ptr, starts_ptr, table_ptr, lowest_ptr, key_start_ptr, length_ptr, bound_ptr, evicted_ptr,
    evicted_at_ptr, plan_ptr, log_tolerance, score_scale, T, H_kv, table_len, q_stride_b, q_stride_h, q_stride_t,
    HAS_KEY_START: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, NEAR: tl.constexpr, PAGE: tl.constexpr, PROBES: tl.constexpr, PRECISION: tl.constexpr,
    DOT_ERROR: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """First key that this step reads of a key head: the tight rule of decoding, what was dropped counted with it."""
    wait(OVERLAP)
    program = tl.program_id(0).to(tl.int64)
    batch, kv_head = program // H_kv, program % H_kv
    num_keys = tl.load(length_ptr).to(tl.int32)
    table = table_ptr + program * table_len
    lowest = tl.load(lowest_ptr + program).to(tl.int32)
    if HAS_KEY_START:
        lowest = tl.maximum(lowest, tl.load(key_start_ptr + batch).to(tl.int32))
    g = tl.arange(0, BLOCK_G)
    is_head = g < G
    query = num_keys - T
    page = tl.load(table + ((query // PAGE) & (table_len - 1))).to(tl.int64)
    lam_query = _lam_at(within_ptr, starts_ptr, page, query % PAGE, g, is_head, G, PAGE)
    bound = tl.load(bound_ptr + kv_head * G + g, mask=is_head, other=0.0).to(tl.float32)
    bound = bound * (1.0 + PAPER_SLACK) * _LOG2_E
    room = _near_mass(
        q_ptr, keys_ptr, within_ptr, starts_ptr, table, bound, lam_query, lowest, num_keys, score_scale, T, batch,
        kv_head, table_len, q_stride_b, q_stride_h, q_stride_t, G, BLOCK_G, D, BLOCK_D, BLOCK_R, NEAR, PAGE,
        PRECISION, DOT_ERROR,
    )  # fmt: skip
    room += (TIGHT_SLACK - log_tolerance) * _LOG2_E
    room = tl.where(is_head, room, float("-inf"))
    # What is no number ends the search at once.
    room = tl.where(room != room, float("inf"), room)
    gone = tl.load(evicted_ptr + program * G + g, mask=is_head, other=float("-inf")) * _LOG2_E
    gone += lam_query - tl.load(evicted_at_ptr + program * G + g, mask=is_head, other=0.0)
    so_far = tl.where(gone == float("-inf"), 0.0, tl.math.exp2(gone.to(tl.float32) + room))

    # The pages before that of the first query, a chunk at a time; page n ends where page n + 1 starts.
    last = query // PAGE
    n = tl.minimum(lowest // PAGE, last)
    is_going = n < last
    while is_going:
        index = n + tl.arange(0, PROBES)
        valid = index < last
        after = tl.load(table + ((index + 1) & (table_len - 1)), mask=valid, other=0).to(tl.int64)
        starts = starts_ptr + after[None, :] * (2 * G) + g[:, None]
        is_pair = is_head[:, None] & valid[None, :]
        end = tl.load(starts, mask=is_pair, other=0.0).to(tl.float64)
        end += tl.load(starts + G, mask=is_pair, other=0.0).to(tl.float64)
        weight = PAGE * tl.math.exp2((lam_query[:, None] - end).to(tl.float32) + room[:, None])
        weight = tl.where(is_pair, weight, 0.0)
        mass = so_far[:, None] + tl.cumsum(weight, axis=1)
        # Masses only grow, and what is NaN is not little: so those that all heads may lose are a prefix.
        is_little = tl.where(is_head[:, None], (mass <= 1.0 - 2.0**-10).to(tl.int32), 1)
        found = tl.sum(tl.where(valid, tl.min(is_little, axis=0), 0), axis=0)
        so_far += tl.sum(weight, axis=1)
        n += found
        is_going = (found == PROBES) & (n < last)
    tl.store(plan_ptr + program, n * PAGE)


@triton.jit(do_not_specialize=["table_len"])
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


def plan(
    q: torch.Tensor,
    keys: torch.Tensor,
    within: torch.Tensor,
    starts: torch.Tensor,
    table: torch.Tensor,
    lowest: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    key_start: torch.Tensor | None,
    logit_bound: torch.Tensor,
    evicted: torch.Tensor,
    evicted_at: torch.Tensor,
    log_tolerance: float,
) -> torch.Tensor:
    """Launch the kernel that finds the first key that a step reads, `(B, H_kv)` int32, in place of `lowest`.

    Args:
        logit_bound: `(H,)` float64 nats.
        evicted, evicted_at: `(B, H)` float64, contiguous, as in `paged.PagedKeys`.
        Others as in `forward`.
    """
    _, num_heads, num_queries, dim = q.shape
    batch, num_kv_heads, table_len = table.shape
    groups, block_d = num_heads // num_kv_heads, padded_head_dim(dim)
    block_g, memory = power_of_2(groups), 32768 if q.element_size() == 2 else 16384
    overlap = may_overlap(architecture(q.device))
    out = torch.empty_like(lowest)
    launch(
        plan_pages_kernel, (batch * num_kv_heads,),
        (q, keys, within, starts, table, lowest, lowest if key_start is None else key_start, length, logit_bound,
         evicted, evicted_at, out),
        (float(log_tolerance), scale * LOG2_E, num_queries, num_kv_heads, table_len, *q.stride()[:3]),
        HAS_KEY_START=key_start is not None, G=groups, BLOCK_G=block_g, D=dim, BLOCK_D=block_d,
        BLOCK_R=max(16, min(32, power_of_2(groups * num_queries))),
        NEAR=min(128, memory // (block_d * q.element_size())), PAGE=keys.shape[1],
        PROBES=max(PROBES // block_g, 64), PRECISION=dot_precision(q.dtype), DOT_ERROR=DOT_ERROR[q.dtype],
        OVERLAP=overlap, num_warps=8, **early(overlap),
    )  # fmt: skip
    return out


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
