"""Forgetting attention, forward pass, in Gluon for Hopper: bfloat16 heads of 33 to 128 channels.

The mathematics and the numbers are those of triton_forward.py, its twin for everything else; what differs is who does
what. A program has three partitions. One warp fetches tiles by the tensor memory accelerator. Two warpgroups own 64
queries each; while one multiplies, the other takes exponentials (the ping-pong of FlashAttention-3, arXiv:2407.08608),
and within a warpgroup the product of one tile's weights with the values runs beside the next tile's softmax.

A tile whose sum outgrew `LARGEST_SUM` is only marked here; the twin does the marked ones again.

Letters, names, units and frame as in triton_forward.py.
"""

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
from .tile_sizes import descriptor_strides, padded_head_dim

# Renamed between Triton 3.6 and 3.9.
load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_async = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

ROWS = gl.constexpr(64)  # of a warpgroup
KEYS = gl.constexpr(GATE_BLOCK)  # of a tile
LARGEST_SPREAD = gl.constexpr(60.0)
NO_KEY = gl.constexpr(2147483647)


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


@gluon.jit
def load_sum(within, starts, within_low, starts_low, at):
    """lam at one key: the start of its block, what follows, and the low parts of both together."""
    n = at // KEYS
    return (
        gl.load(starts + n),
        gl.load(within + at),
        gl.load(starts + starts_low + n) + gl.load(within + within_low + at),
    )


@gluon.jit
def load_sums(within, starts, within_low, starts_low, at, mask):
    """`load_sum` of a vector of keys."""
    n = at // KEYS
    low = gl.load(starts + starts_low + n, mask=mask, other=0.0)
    low += gl.load(within + within_low + at, mask=mask, other=0.0)
    return gl.load(starts + n, mask=mask, other=0.0), gl.load(within + at, mask=mask, other=0.0), low


@gluon.jit
def _fetch(
    q, k, v, q_tile, k_tile, v_tile, bias_tile, q_full, k_full, k_empty, v_full, v_empty, within, starts, within_low,
    starts_low, batch, head, kv_head, start_t, first, count, T, S, STAGES: gl.constexpr,
):  # fmt: skip
    """The partition that loads: the queries, then `count` tiles of keys and values leftwards from `first`.

    With the keys goes their bias, ref - lam_j in bits.
    """
    for group in gl.static_range(2):
        mbarrier.expect(q_full.index(group), q.block_type.nbytes)
        load_async(q, [batch, head, start_t + group * ROWS, 0], q_full.index(group), q_tile.index(group))
    s = gl.arange(0, KEYS, layout=gl.BlockedLayout([4], [32], [1], [0]))
    ref_start, ref_within, ref_low = load_sum(within, starts, within_low, starts_low, start_t + S - T)
    for i in range(count):
        stage = i % STAGES
        free = ((i // STAGES) & 1) ^ 1
        n = first - i
        at = n * KEYS + s
        inside = gl.load(within + at, mask=at < S, other=0.0)
        low = ref_low - gl.load(starts + starts_low + n)
        bias = ((ref_start - gl.load(starts + n)) + ref_within + low) - inside
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
        load_async(k, [batch, kv_head, n * KEYS, 0], k_full.index(stage), k_tile.index(stage))
        bias_tile.index(stage).store(bias)
        mbarrier.arrive(k_full.index(stage), count=1)
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
        load_async(v, [batch, kv_head, n * KEYS, 0], v_full.index(stage), v_tile.index(stage))


@gluon.jit
def _begin(i, query, k_tile, k_full, D: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr):
    """Start the scores of tile i."""
    stage = i % STAGES
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    key = k_tile.index(stage).reshape([KEYS, D])
    return warpgroup_mma(
        query, key.permute((1, 0)), gl.zeros([ROWS, KEYS], gl.float32, layout=SCORES), use_acc=False, is_async=True
    )


@gluon.jit
def _add_values(i, p, acc, v_tile, v_full, D: gl.constexpr, STAGES: gl.constexpr):
    """Start acc += p v of tile i."""
    stage = i % STAGES
    mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
    return warpgroup_mma(p, v_tile.index(stage).reshape([KEYS, D]), acc, is_async=True)


@gluon.jit
def _step(
    i, n, p, acc, row_sum, anchor, query, k_tile, v_tile, bias_tile, k_full, k_empty, v_full, v_empty, first_key,
    t_key, s, score_scale,
    GROUP: gl.constexpr, MASKED: gl.constexpr, ONE_ANCHOR: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Scores and weights of tile i, the keys of block n, while the values of tile i - 1 are added."""
    wait_turn("14" if GROUP == 0 else "15")
    score = _begin(i, query, k_tile, k_full, D, STAGES, SCORES)
    acc = _add_values(i - 1, p, acc, v_tile, v_full, D, STAGES)
    pass_turn("15" if GROUP == 0 else "14")
    bias = bias_tile.index(i % STAGES).load(gl.SliceLayout(0, SCORES))
    if ONE_ANCHOR:
        bias -= anchor
    score = warpgroup_mma_wait(1, deps=(score,))
    mbarrier.arrive(k_empty.index(i % STAGES), count=1)
    score = score * score_scale + bias[None, :]
    if not ONE_ANCHOR:
        score -= anchor[:, None]
    if MASKED:
        at = n * KEYS + s
        score = gl.where((at[None, :] >= first_key[:, None]) & (at[None, :] <= t_key[:, None]), score, float("-inf"))
    weight = gl.exp2(score)
    row_sum += gl.sum(weight, 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index((i - 1) % STAGES), count=1)
    return gl.convert_layout(weight.to(gl.bfloat16), WEIGHTS), acc, row_sum


@gluon.jit
def _masked_scores(
    i, n, query, k_tile, bias_tile, k_full, k_empty, first_key, t_key, s, score_scale,
    D: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    score = _begin(i, query, k_tile, k_full, D, STAGES, SCORES)
    bias = bias_tile.index(i % STAGES).load(gl.SliceLayout(0, SCORES))
    score = warpgroup_mma_wait(0, deps=(score,))
    mbarrier.arrive(k_empty.index(i % STAGES), count=1)
    at = n * KEYS + s
    score = score * score_scale + bias[None, :]
    return gl.where((at[None, :] >= first_key[:, None]) & (at[None, :] <= t_key[:, None]), score, float("-inf"))


@gluon.jit
def _attend(
    o, q_tile, k_tile, v_tile, bias_tile, q_full, k_full, k_empty, v_full, v_empty, within, starts, first_key_ptr,
    lse_ptr, marks_ptr, within_low, starts_low, batch, head, start_t, first, count, num_diagonal, num_full, T, S,
    score_scale, largest_sum, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries against `count` tiles of keys, of which the first `num_diagonal` hold a row's own key.

    The next `num_full` are seen by every row of the program, those after them in part.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)

    # 1. The rows.
    t = start_t + GROUP * ROWS + gl.arange(0, ROWS, layout=ROW)
    t_key = t + (S - T)
    s = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    first_key = gl.load(first_key_ptr + t, mask=t < T, other=NO_KEY)
    query = q_tile.index(GROUP).reshape([ROWS, D])
    mbarrier.wait(q_full.index(GROUP), 0)

    # 2. Tiles on the diagonal: online softmax, one product after the other. All but the last add their values here;
    # tiles of 128 queries and as many keys that lie on each other have one.
    acc = gl.zeros([ROWS, D], gl.float32, layout=OUT)
    row_max = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW)
    row_sum = gl.zeros([ROWS], gl.float32, layout=ROW)
    for i in range(num_diagonal - 1):
        score = _masked_scores(
            i, first - i, query, k_tile, bias_tile, k_full, k_empty, first_key, t_key, s, score_scale, D, STAGES,
            SCORES,
        )  # fmt: skip
        new_max = gl.maximum(row_max, gl.max(score, 1))
        shift = gl.where(new_max == float("-inf"), 0.0, new_max)
        weight = gl.exp2(score - shift[:, None])
        rescale = gl.exp2(row_max - shift)
        row_sum = row_sum * rescale + gl.sum(weight, 1)
        acc = acc * gl.convert_layout(rescale, OUT_ROW)[:, None]
        acc = _add_values(i, gl.convert_layout(weight.to(gl.bfloat16), WEIGHTS), acc, v_tile, v_full, D, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(i % STAGES), count=1)
        row_max = new_max

    # 3. The last of them settles what all other weights are relative to: the largest maximum of the rows, or each
    # row's own where they lie too far apart. Its values are added beside the next tile's softmax.
    i = num_diagonal - 1
    score = _masked_scores(
        i, first - i, query, k_tile, bias_tile, k_full, k_empty, first_key, t_key, s, score_scale, D, STAGES, SCORES,
    )  # fmt: skip
    new_max = gl.maximum(row_max, gl.max(score, 1))
    sees_none = new_max == float("-inf")
    highest = gl.max(new_max, 0)
    lowest = gl.min(gl.where(sees_none, highest, new_max), 0)
    one_anchor = highest - lowest <= LARGEST_SPREAD
    anchor = gl.where(sees_none, 0.0, new_max)
    if one_anchor:
        anchor = anchor * 0.0 + highest
    weight = gl.exp2(score - anchor[:, None])
    rescale = gl.exp2(row_max - anchor)
    row_sum = row_sum * rescale + gl.sum(weight, 1)
    acc = acc * gl.convert_layout(rescale, OUT_ROW)[:, None]
    narrow = weight.to(gl.bfloat16)
    # A row with few keys must not be off by the rounding of their weights, which nothing averages out.
    rounding = gl.sum(narrow.to(gl.float32) - weight, 1)
    p = gl.convert_layout(narrow, WEIGHTS)

    # 4. All other tiles, the warpgroups by turns.
    if GROUP == 1:
        pass_turn("14")
    if one_anchor:
        for i in range(num_diagonal, num_diagonal + num_full):
            p, acc, row_sum = _step(
                i, first - i, p, acc, row_sum, highest, query, k_tile, v_tile, bias_tile, k_full, k_empty, v_full,
                v_empty, first_key, t_key, s, score_scale, GROUP, False, True, D, STAGES, SCORES, WEIGHTS,
            )  # fmt: skip
    else:
        for i in range(num_diagonal, num_diagonal + num_full):
            p, acc, row_sum = _step(
                i, first - i, p, acc, row_sum, anchor, query, k_tile, v_tile, bias_tile, k_full, k_empty, v_full,
                v_empty, first_key, t_key, s, score_scale, GROUP, False, False, D, STAGES, SCORES, WEIGHTS,
            )  # fmt: skip
    for i in range(num_diagonal + num_full, count):
        p, acc, row_sum = _step(
            i, first - i, p, acc, row_sum, anchor, query, k_tile, v_tile, bias_tile, k_full, k_empty, v_full, v_empty,
            first_key, t_key, s, score_scale, GROUP, True, False, D, STAGES, SCORES, WEIGHTS,
        )  # fmt: skip
    if GROUP == 0:
        wait_turn("14")
    acc = _add_values(count - 1, p, acc, v_tile, v_full, D, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    # 5. Mark what left the range of float32, normalize and store.
    largest = gl.max(gl.max(gl.abs(acc), 1), 0)
    in_range = (gl.max(row_sum, 0) < largest_sum) & (largest < float("inf"))
    gl.store(marks_ptr + GROUP, gl.where(in_range, 0, 1))
    empty = row_sum == 0.0
    row_sum = gl.where(empty, 1.0, row_sum)
    ref_start, ref_within, ref_low = load_sum(within, starts, within_low, starts_low, start_t + S - T)
    start, inside, low = load_sums(within, starts, within_low, starts_low, t_key, t < T)
    to_frame = (ref_start - start) + (ref_within - inside) + (ref_low - low)
    lse = gl.where(empty, float("inf"), anchor - to_frame + gl.log2(row_sum))
    gl.store(lse_ptr + t, lse, mask=t < T)
    out = acc * gl.convert_layout(1.0 / (row_sum + rounding), OUT_ROW)[:, None]
    query.store(out.to(gl.bfloat16))
    fence_async_shared()
    store_async(o, [batch, head, start_t + GROUP * ROWS, 0], q_tile.index(GROUP))
    tma.store_wait(0)


@gluon.jit
def gluon_forward_kernel(
    q, k, v, o, within_ptr, starts_ptr, first_key_ptr, lse_ptr, marks_ptr, score_scale, largest_sum, T, S, H, N,
    num_tiles, num_heads, section, within_low, starts_low,
    G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    # 1. Which tile is this program's? As in triton_forward.py.
    program = gl.program_id(0)
    first_head = program // (section * num_tiles) * section
    in_section = program % (section * num_tiles)
    heads = gl.minimum(section, num_heads - first_head)
    tile = num_tiles - 1 - in_section // heads
    start_t = tile * (2 * ROWS)
    batch_head = first_head + in_section % heads
    batch, head = batch_head // H, batch_head % H
    kv_head = head // G
    row = batch_head.to(gl.int64)
    within = within_ptr + row * S
    starts = starts_ptr + row * N
    first_key = first_key_ptr + row * T
    lse = lse_ptr + row * T
    marks = marks_ptr + 2 * (row * num_tiles + tile)

    # 2. Its blocks of keys, from `first` leftwards.
    offset = S - T
    lowest = gl.load(first_key + start_t)
    highest = gl.load(first_key + gl.minimum(start_t + 2 * ROWS, T) - 1)
    first = (gl.minimum(start_t + 2 * ROWS + offset, S) - 1) // KEYS
    diagonal = (start_t + offset) // KEYS
    last = gl.minimum(lowest // KEYS, diagonal)
    full = gl.minimum(gl.maximum((highest + KEYS - 1) // KEYS, last), diagonal)
    count = first - last + 1
    num_diagonal = first - diagonal + 1
    num_full = diagonal - full

    # 3. Shared memory and who waits for whom.
    q_tile = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, ROWS, D], q.layout)
    k_tile = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, KEYS, D], k.layout)
    v_tile = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, KEYS, D], v.layout)
    bias_tile = gl.allocate_shared_memory(gl.float32, [STAGES, KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_attend, (
                o, q_tile, k_tile, v_tile, bias_tile, q_full, k_full, k_empty, v_full, v_empty, within, starts,
                first_key, lse, marks, within_low, starts_low, batch, head, start_t, first, count, num_diagonal,
                num_full, T, S, score_scale, largest_sum, 0, D, STAGES,
            )),
            (_attend, (
                o, q_tile, k_tile, v_tile, bias_tile, q_full, k_full, k_empty, v_full, v_empty, within, starts,
                first_key, lse, marks, within_low, starts_low, batch, head, start_t, first, count, num_diagonal,
                num_full, T, S, score_scale, largest_sum, 1, D, STAGES,
            )),
            (_fetch, (
                q, k, v, q_tile, k_tile, v_tile, bias_tile, q_full, k_full, k_empty, v_full, v_empty, within, starts,
                within_low, starts_low, batch, head, kv_head, start_t, first, count, T, S, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def gluon_descriptor(x, rows: int, dim: int) -> TensorDescriptor:
    """As `triton_forward.descriptor`, with the swizzle that the products read."""
    block = [1, 1, rows, dim]
    dtype = {2: gl.bfloat16, 4: gl.float32}[x.element_size()]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), descriptor_strides(x), block, layout)


def forward(q, k, v, out, lse, marks, sums, first_key, score_scale, largest_sum, section, block_t):
    """Launch the kernel; fills out, lse `(B, H, T)` and marks `(B, H, tiles of block_t = 128 queries, 2)` int32."""
    batch, num_heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    dim = padded_head_dim(q.shape[3])
    assert block_t == 2 * ROWS.value, "the twin does marked tiles again: its tiles must be these"
    num_tiles = marks.shape[2]
    rows = (ROWS.value, KEYS.value, KEYS.value, ROWS.value)
    tensors = [gluon_descriptor(x, n, dim) for x, n in zip((q, k, v, out), rows, strict=True)]
    gluon_forward_kernel[(num_tiles * batch * num_heads,)](
        *tensors, sums.within, sums.starts, first_key, lse, marks, score_scale, largest_sum, num_queries, num_keys,
        num_heads, sums.starts.shape[-1], num_tiles, batch * num_heads, section, sums.within.stride(0),
        sums.starts.stride(0), G=num_heads // k.shape[1], D=dim, STAGES=4 if dim == 64 else 2,
        CONSUMER_REGISTERS=240, PRODUCER_REGISTERS=24, num_warps=4, maxnreg=168,
    )  # fmt: skip
