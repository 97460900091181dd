"""Products of a few rows with a large matrix, and what a decoding step does before and after them, as a Triton kernel.

    out = residual + act(x) W^T,  act: a norm of the row, or of its heads with an output gate;  or  silu(gate) * up

A program owns some rows of W. A step of a few tokens waits for one kernel after the other and for memory, so each is
set up while the one before it runs, and asks for its part of W, which nobody writes, before it waits.

Letters:  B rows of x, K columns of x and of W, N rows of W.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import launch
from .tile_sizes import architecture
from .triton_forward import dot_precision
from .triton_slices import early, fetch_ahead, may_overlap, power_of_2

MOST_ROWS = 32  # of one program
STAGES_BYTES = 98_304
GATES = {None: 0, "silu": 1, "sigmoid": 2}


@triton.jit
def _load_weights(w_ptr, n, k, N, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """`(BLOCK_N, BLOCK_K)` of W, zeros beyond it."""
    inside = (n < N)[:, None]
    if K % BLOCK_K:
        inside = inside & (k < K)[None, :]
    return tl.load(w_ptr + n.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["B"])
def row_products_kernel(
    x_ptr, norm_ptr, gate_ptr, w_ptr, residual_ptr, out_ptr, eps, B, N, x_stride, gate_stride, residual_stride,
    out_stride, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, HEAD: tl.constexpr, GATE: tl.constexpr, GLU: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See `row_products`. N counts the rows of the output: with GLU those of W are twice as many."""
    begin = tl.program_id(0) * BLOCK_N
    if OVERLAP:
        gdc_launch_dependents()
        fetch_ahead(w_ptr, begin, N - 1, K, K, BLOCK_N)
        if GLU:
            fetch_ahead(w_ptr, begin + N, 2 * N - 1, K, K, BLOCK_N)
        gdc_wait()
    n, b = begin + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    is_row = (b < B)[:, None]
    acc = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_B], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        k = start + tl.arange(0, BLOCK_K)
        inside = is_row & (k < K)[None, :]
        x = tl.load(x_ptr + b[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
        if NORM or HEAD > 0 or GATE > 0:
            wide = x.to(tl.float32)
            if NORM:
                square += tl.sum(wide * wide, axis=1)
            if HEAD > 0:
                heads = tl.reshape(wide, [BLOCK_B, BLOCK_K // HEAD, HEAD])
                mean = tl.sum(heads * heads, axis=2, keep_dims=True) / HEAD
                wide = tl.reshape(heads * tl.math.rsqrt(mean + eps), [BLOCK_B, BLOCK_K])
            if NORM or HEAD > 0:
                wide *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            if GATE > 0:
                gate = tl.load(gate_ptr + b[:, None] * gate_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
                open_part = 1.0 / (1.0 + tl.exp(-gate))
                wide *= gate * open_part if GATE == 1 else open_part
            x = wide.to(x.dtype)
        w = _load_weights(w_ptr, n, k, N, K, BLOCK_K)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        if GLU:
            w = _load_weights(w_ptr, n + N, k, 2 * N, K, BLOCK_K)
            up = tl.dot(x, tl.trans(w), up, input_precision=PRECISION)
    if NORM:
        # One factor a row: the products need not wait for it.
        scale = tl.math.rsqrt(square / K + eps)[:, None]
        acc *= scale
        up *= scale
    if GLU:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    inside = is_row & (n < N)[None, :]
    if RESIDUAL:
        at = residual_ptr + b[:, None] * residual_stride + n[None, :]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + b[:, None] * out_stride + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


def row_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    head_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gate: torch.Tensor | None = None,
    gate_act: str | None = None,
    glu: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernel: `(B, N)`, dtype of `x`.

    Args:
        x: `(B, K)`, float32 or bfloat16 (float16 times a norm's weight may overflow).
        weight: `(N, K)`, contiguous, dtype of `x`.
        norm: `(K,)`: rows pass an RMSNorm with this weight first.
        head_norm: `(H, D)` with `H * D == K` and D a power of 2, at most 256: each head passes one.
        eps: Of either norm.
        gate: `(B, K)`: times `gate_act` of it, "silu" or "sigmoid", after the norm of the heads.
        glu: The upper half of the weight are gates, the lower half is what they open: `silu(upper) * lower`,
            `(B, N / 2)`.
        residual: `(B, N)`, is added.
    """
    batch, columns = x.shape
    num_rows = len(weight) // 2 if glu else len(weight)
    out = x.new_empty(batch, num_rows)
    overlap = may_overlap(architecture(x.device))
    # As many programs as multiprocessors where that leaves each enough; a tensor core takes 16 rows at least. float32
    # takes three products, and spills where more of them are in flight.
    block_n, block_b = 16 if num_rows <= 8192 else 64, min(MOST_ROWS, max(16, power_of_2(batch)))
    head = 0 if head_norm is None else head_norm.shape[1]
    block_k = 256 if x.element_size() == 2 else max(64, head)
    # Bytes of x, its gates and W at a time; two programs or more fit a multiprocessor.
    stage = block_k * x.element_size() * (block_b * (1 if gate is None else 2) + block_n * (2 if glu else 1))
    num_stages = max(1, min(4, STAGES_BYTES // stage))
    beside = [x if y is None else y for y in (norm if head_norm is None else head_norm, gate)]
    launch(
        row_products_kernel, (-(-num_rows // block_n), -(-batch // block_b)),
        (x, *beside, weight, x if residual is None else residual, out),
        (eps, batch, num_rows, x.stride(0), 0 if gate is None else gate.stride(0),
         0 if residual is None else residual.stride(0), num_rows),
        K=columns, BLOCK_K=block_k, BLOCK_B=block_b, BLOCK_N=block_n, NORM=norm is not None, HEAD=head,
        GATE=GATES[gate_act], GLU=glu, RESIDUAL=residual is not None, PRECISION=dot_precision(x.dtype),
        NUM_STAGES=num_stages, OVERLAP=overlap, num_warps=4, **early(overlap),
    )  # fmt: skip
    return out
