"""The sums over gates as Triton kernels: `gates.prepare` and `gates.gate_gradient` in one or two launches each.

A chunk of 1024 positions belongs to one program. It adds up the totals of all chunks before it (after it, for the
gradient), which a first kernel leaves behind; a single chunk needs no first kernel. All sums are in float64.

Several sequences packed into one are told apart by their boundaries `cu_seqlens`, which every position searches.

Letters:  B batch, H query heads, T queries (the last of the keys), S keys, N blocks of `GATE_BLOCK` keys.
"""

import torch
import triton
import triton.language as tl

from .launch import launch

CHUNK = 1024  # 16384 chunks are 16M tokens, the most that the sum over chunk totals holds in one program
LEAST_CHUNKS = 128  # every power of two from here on is one more kernel to compile
GATE_BLOCK = tl.constexpr(128)
CLOSED_GATE = tl.constexpr(-1e4)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _sum_of_sequence(total, ended, x, ends):
    """Of a running sum and what comes next: it starts anew where `ends` is not 0."""
    return tl.where(ends != 0, x, total + x), ended | ends


@triton.jit
def _sequence_start(cu_ptr, s, num_sequences, steps):
    """The last boundary that is not after the positions s; `steps` halvings for num_sequences + 1 boundaries."""
    low = tl.zeros_like(s)
    high = low + num_sequences
    for _ in tl.range(0, steps):
        middle = (low + high + 1) // 2
        starts_before = tl.load(cu_ptr + middle).to(tl.int32) <= s
        low = tl.where(starts_before, middle, low)
        high = tl.where(starts_before, high, tl.maximum(middle - 1, low))
    return tl.load(cu_ptr + low).to(tl.int32)


@triton.jit
def _load_gates(gate_ptr, batch, head, s, S, stride_b, stride_h, stride_s):
    """Gates at the positions s, and whether they are closed; open (0) outside of the sequence."""
    at = gate_ptr + batch * stride_b + head * stride_h + s.to(tl.int64) * stride_s
    gate = tl.load(at, mask=s < S, other=0.0)
    closed = gate <= CLOSED_GATE
    return tl.where(closed, 0.0, gate), closed


@triton.jit(do_not_specialize=["num_chunks"])
def chunk_totals_kernel(
    gate_ptr, total_ptr, reset_ptr, S, H, num_chunks, stride_b, stride_h, stride_s, CHUNK: tl.constexpr
):
    """Of every chunk the sum of its gates, nats, and the position of its last closed gate, 0 if it has none."""
    batch_head = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    s = chunk * CHUNK + tl.arange(0, CHUNK)
    gate, closed = _load_gates(gate_ptr, batch_head // H, batch_head % H, s, S, stride_b, stride_h, stride_s)
    tl.store(total_ptr + batch_head * num_chunks + chunk, tl.sum(gate.to(tl.float64), axis=0))
    tl.store(reset_ptr + batch_head * num_chunks + chunk, tl.max(tl.where(closed, s, 0), axis=0))


@triton.jit(do_not_specialize=["num_chunks"])
def running_sums_kernel(
    gate_ptr, key_start_ptr, cu_ptr, total_ptr, reset_ptr, within_ptr, starts_ptr, first_key_ptr, T, S, N, H,
    num_chunks, window, num_sequences, steps, stride_b, stride_h, stride_s, within_low, starts_low,
    HAS_KEY_START: tl.constexpr, HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """`within`, `starts` and `first_key` of one chunk. CHUNKS: the power of two that holds num_chunks."""
    batch_head = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    batch = batch_head // H
    s = chunk * CHUNK + tl.arange(0, CHUNK)
    gate, closed = _load_gates(gate_ptr, batch, batch_head % H, s, S, stride_b, stride_h, stride_s)

    # 1. What came before this chunk.
    before = tl.full([], 0.0, tl.float64)
    reset = tl.full([], 0, tl.int32)
    if CHUNKS > 1:
        other = tl.arange(0, CHUNKS)
        earlier = other < chunk
        before = tl.sum(tl.load(total_ptr + batch_head * num_chunks + other, mask=earlier, other=0.0), axis=0)
        reset = tl.max(tl.load(reset_ptr + batch_head * num_chunks + other, mask=earlier, other=0), axis=0)
    if HAS_KEY_START:
        reset = tl.maximum(reset, tl.load(key_start_ptr + batch).to(tl.int32))

    # 2. The sums: from the start of each block, and of the blocks.
    blocks = tl.reshape(gate.to(tl.float64), [CHUNK // GATE_BLOCK, GATE_BLOCK])
    within = tl.reshape(tl.cumsum(blocks, axis=1), [CHUNK]) * LOG2_E
    total = tl.sum(blocks, axis=1)
    starts = (before + tl.cumsum(total, axis=0) - total) * LOG2_E
    high = within.to(tl.float32)
    at = within_ptr + batch_head * S + s
    tl.store(at, high, mask=s < S)
    tl.store(at + within_low, (within - high.to(tl.float64)).to(tl.float32), mask=s < S)
    n = chunk * (CHUNK // GATE_BLOCK) + tl.arange(0, CHUNK // GATE_BLOCK)
    high = starts.to(tl.float32)
    at = starts_ptr + batch_head * N + n
    tl.store(at, high, mask=n < N)
    tl.store(at + starts_low, (starts - high.to(tl.float64)).to(tl.float32), mask=n < N)

    # 3. The first visible key of the queries among these positions.
    first = tl.maximum(tl.associative_scan(tl.where(closed, s, 0), 0, _larger), reset)
    if HAS_WINDOW:
        first = tl.maximum(first, s - (window - 1))
    if PACKED:
        first = tl.maximum(first, _sequence_start(cu_ptr, s, num_sequences, steps))
    t = s - (S - T)
    tl.store(first_key_ptr + batch_head * T + t, first, mask=(t >= 0) & (s < S))


@triton.jit
def chunk_gradients_kernel(
    column_ptr, cu_ptr, total_ptr, S, num_chunks, num_sequences, steps, PACKED: tl.constexpr, CHUNK: tl.constexpr
):
    """Of every chunk the sum of `column_sum`; of packed sequences only up to the first boundary in it."""
    batch_head = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    s = chunk * CHUNK + tl.arange(0, CHUNK)
    counts = s < S
    if PACKED:
        is_start = _sequence_start(cu_ptr, s, num_sequences, steps) == s
        counts = counts & (s < tl.min(tl.where(is_start, s, S), axis=0))
    column_sum = tl.load(column_ptr + batch_head * S + s, mask=counts, other=0.0).to(tl.float64)
    tl.store(total_ptr + batch_head * num_chunks + chunk, tl.sum(column_sum, axis=0))


@triton.jit
def gate_gradient_kernel(
    gate_ptr, column_ptr, cu_ptr, total_ptr, dgate_ptr, S, H, num_chunks, num_sequences, steps, stride_b, stride_h,
    stride_s, PACKED: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`dgate_t = -sum_{s >= t} column_sum_s`, over t's own sequence; 0 at closed gates."""
    batch_head = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    # The last position comes first: a sum that starts anew needs its operands in order.
    s = chunk * CHUNK + (CHUNK - 1) - tl.arange(0, CHUNK)
    _, closed = _load_gates(gate_ptr, batch_head // H, batch_head % H, s, S, stride_b, stride_h, stride_s)
    after = tl.full([], 0.0, tl.float64)
    if CHUNKS > 1:
        other = tl.arange(0, CHUNKS)
        later = (other > chunk) & (other < num_chunks)
        if PACKED:
            # Up to the first boundary after this chunk; the total of the chunk that holds it stops there.
            start = _sequence_start(cu_ptr, tl.maximum(other * CHUNK - 1, 0), num_sequences, steps)
            later = later & (start < (chunk + 1) * CHUNK)
        after = tl.sum(tl.load(total_ptr + batch_head * num_chunks + other, mask=later, other=0.0), axis=0)
    column_sum = tl.load(column_ptr + batch_head * S + s, mask=s < S, other=0.0).to(tl.float64)
    if PACKED:
        is_end = _sequence_start(cu_ptr, s + 1, num_sequences, steps) == s + 1
        total, ended = tl.associative_scan((column_sum, is_end.to(tl.int32)), 0, _sum_of_sequence)
        total += tl.where(ended != 0, 0.0, after)
    else:
        total = after + tl.cumsum(column_sum, axis=0)
    tl.store(dgate_ptr + batch_head * S + s, tl.where(closed, 0.0, -total).to(tl.float32), mask=s < S)


def _chunks(num_keys: int) -> tuple[int, int]:
    """Number of chunks, and the power of two that holds them."""
    num_chunks = -(-num_keys // CHUNK)
    return num_chunks, 1 << (num_chunks - 1).bit_length()


def _boundaries(cu_seqlens: torch.Tensor | None) -> tuple[int, int]:
    """Number of packed sequences, and the halvings that a search among their boundaries takes."""
    num_sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    return num_sequences, num_sequences.bit_length()


def prepare(
    log_fgate: torch.Tensor,
    key_start: torch.Tensor | None,
    num_queries: int,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `within (2, B, H, S)`, `starts (2, B, H, N)`, both float32 bits, and `first_key (B, H, T)` int32."""
    batch, num_heads, num_keys = log_fgate.shape
    rows = (batch, num_heads)
    num_blocks = -(-num_keys // GATE_BLOCK.value)
    within = torch.empty(2, *rows, num_keys, dtype=torch.float32, device=log_fgate.device)
    starts = torch.empty(2, *rows, num_blocks, dtype=torch.float32, device=log_fgate.device)
    first_key = torch.empty(*rows, num_queries, dtype=torch.int32, device=log_fgate.device)
    num_chunks, power = _chunks(num_keys)
    grid = (batch * num_heads, num_chunks)
    total = reset = log_fgate  # never read
    if num_chunks > 1:
        total = torch.empty(*rows, num_chunks, dtype=torch.float64, device=log_fgate.device)
        reset = torch.empty(*rows, num_chunks, dtype=torch.int32, device=log_fgate.device)
        launch(
            chunk_totals_kernel, grid,
            (log_fgate, total, reset),
            (num_keys, num_heads, num_chunks, *log_fgate.stride()),
            CHUNK=CHUNK,
        )  # fmt: skip
    launch(
        running_sums_kernel, grid,
        (log_fgate, log_fgate if key_start is None else key_start, log_fgate if cu_seqlens is None else cu_seqlens,
         total, reset, within, starts, first_key),
        (num_queries, num_keys, num_blocks, num_heads, num_chunks, 0 if window is None else window,
         *_boundaries(cu_seqlens), *log_fgate.stride(), within.stride(0), starts.stride(0)),
        HAS_KEY_START=key_start is not None, HAS_WINDOW=window is not None, PACKED=cu_seqlens is not None,
        CHUNKS=power if num_chunks == 1 else max(power, LEAST_CHUNKS), CHUNK=CHUNK,
    )  # fmt: skip
    return within, starts, first_key


def gate_gradient(
    column_sum: torch.Tensor, log_fgate: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """See `gates.gate_gradient`; `column_sum` is contiguous."""
    batch, num_heads, num_keys = column_sum.shape
    dgate = torch.empty_like(column_sum)
    num_chunks, power = _chunks(num_keys)
    grid = (batch * num_heads, num_chunks)
    total = column_sum  # never read
    packed = cu_seqlens is not None
    boundaries = cu_seqlens if packed else column_sum
    if num_chunks > 1:
        total = torch.empty(batch, num_heads, num_chunks, dtype=torch.float64, device=column_sum.device)
        launch(
            chunk_gradients_kernel, grid,
            (column_sum, boundaries, total),
            (num_keys, num_chunks, *_boundaries(cu_seqlens)),
            PACKED=packed, CHUNK=CHUNK,
        )  # fmt: skip
    launch(
        gate_gradient_kernel, grid,
        (log_fgate, column_sum, boundaries, total, dgate),
        (num_keys, num_heads, num_chunks, *_boundaries(cu_seqlens), *log_fgate.stride()),
        PACKED=packed, CHUNKS=power, CHUNK=CHUNK,
    )  # fmt: skip
    return dgate
