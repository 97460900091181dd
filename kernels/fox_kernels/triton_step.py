"""What stands between the products of a decoding step and its attention, as one Triton kernel.

From one row of products a sequence: the token shift of keys and values, the norms of queries and keys, the forget
gates, and the key, the value and the decay in their page. One program per key head; every rounding is where the model
rounds, so that both give the same numbers.

Letters and tensors as in triton_paged.py.
"""

import torch
import triton
import triton.language as tl

from .launch import launch
from .tile_sizes import architecture, padded_head_dim
from .triton_paged import append_decay
from .triton_slices import early, may_overlap, power_of_2, wait


@triton.jit
def _log_sigmoid(x):
    """`-log(1 + exp(-x))`, right to 3e-6 of itself: GPUs know no logarithm that is exact next to 1."""
    u = tl.exp(-tl.abs(x))
    series = 1.0 - u * (1 / 2 - u * (1 / 3 - u * (1 / 4 - u * (1 / 5 - u * (1 / 6 - u * (1 / 7 - u / 8))))))
    return tl.minimum(x, 0.0) - tl.where(u < 0.1, u * series, tl.log(1.0 + u))


@triton.jit
def _shifted(own, past_ptr, logit_ptr, is_dim):
    """`own` mixed with what `past_ptr` holds, in the dtype of `own`, which takes its place."""
    past = tl.load(past_ptr, mask=is_dim, other=0.0)
    weight = 1.0 / (1.0 + tl.exp(-tl.load(logit_ptr).to(tl.float32)))
    mixed = own.to(tl.float32) + weight * (past.to(tl.float32) - own.to(tl.float32))
    # Nobody writes before all have read.
    tl.debug_barrier()
    tl.store(past_ptr, own, mask=is_dim)
    return mixed.to(own.dtype)


@triton.jit
def _normalized(x, weight, eps, D: tl.constexpr):
    """The last dimension of `x` as an RMSNorm gives it, times `weight`."""
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, axis=-1, keep_dims=True) / D
    unit = (wide * tl.math.rsqrt(mean + eps)).to(x.dtype)
    return (unit.to(tl.float32) * weight.to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit(do_not_specialize=["table_len"])
def step_pages_kernel(
    parts_ptr, past_key_ptr, past_value_ptr, q_norm_ptr, k_norm_ptr, bias_ptr, q_ptr, keys_ptr, values_ptr, within_ptr,
    starts_ptr, total_ptr, table_ptr, length_ptr, eps, H_kv, table_len, parts_stride, query_at, key_at, value_at,
    key_shift_at, value_shift_at, gate_at, KEY_SHIFT: tl.constexpr, VALUE_SHIFT: tl.constexpr, NORM: tl.constexpr,
    NORM_SHARED: tl.constexpr, LOGITS: tl.constexpr, BIAS: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token of one key head; the length counts it already."""
    wait(OVERLAP)
    program = tl.program_id(0).to(tl.int64)
    batch, kv_head = program // H_kv, program % H_kv
    position = tl.load(length_ptr).to(tl.int32) - 1
    slot = position % PAGE
    page = tl.load(table_ptr + program * table_len + ((position // PAGE) & (table_len - 1))).to(tl.int64)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    is_head, is_dim = g < G, d < D
    head = kv_head * G + g
    parts_ptr += batch * parts_stride

    # 1. Decay.
    gate = tl.zeros([BLOCK_G], tl.float32)
    if LOGITS:
        gate += tl.load(parts_ptr + gate_at + head, mask=is_head, other=0.0).to(tl.float32)
    if BIAS:
        gate += tl.load(bias_ptr + head, mask=is_head, other=0.0)
    if LOGITS or BIAS:
        gate = _log_sigmoid(gate)
    total = tl.load(total_ptr + program * G + g, mask=is_head, other=0.0)
    total = append_decay(gate, total, within_ptr, starts_ptr, page, slot, g, is_head, G, PAGE)

    # 2. Key and value.
    k = tl.load(parts_ptr + key_at + kv_head * D + d, mask=is_dim, other=0.0)
    v = tl.load(parts_ptr + value_at + kv_head * D + d, mask=is_dim, other=0.0)
    if KEY_SHIFT:
        k = _shifted(k, past_key_ptr + program * D + d, parts_ptr + key_shift_at + kv_head, is_dim)
    if VALUE_SHIFT:
        v = _shifted(v, past_value_ptr + program * D + d, parts_ptr + value_shift_at + kv_head, is_dim)
    if NORM:
        own = 0 if NORM_SHARED else kv_head * D
        k = _normalized(k, tl.load(k_norm_ptr + own + d, mask=is_dim, other=0.0), eps, D)
    to = (page * PAGE + slot) * D + d
    tl.store(keys_ptr + to, k, mask=is_dim)
    tl.store(values_ptr + to, v, mask=is_dim)

    # 3. Queries.
    is_element = is_head[:, None] & is_dim[None, :]
    q = tl.load(parts_ptr + query_at + head[:, None] * D + d[None, :], mask=is_element, other=0.0)
    if NORM:
        rows = 0 * head if NORM_SHARED else head
        weight = tl.load(q_norm_ptr + rows[:, None] * D + d[None, :], mask=is_element, other=0.0)
        q = _normalized(q, weight, eps, D)
    tl.store(q_ptr + (batch * H_kv * G + head[:, None]) * D + d[None, :], q, mask=is_element)
    tl.store(total_ptr + program * G + g, total, mask=is_head)


def prepare(
    parts: torch.Tensor,
    columns: tuple[int | None, ...],
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    eps: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    within: torch.Tensor,
    starts: torch.Tensor,
    totals: torch.Tensor,
    table: torch.Tensor,
    length: torch.Tensor,
) -> torch.Tensor:
    """Launch the kernel; arguments as in `paged_step.paged_step`. Returns the queries, `(B, H, D)`."""
    batch, num_kv_heads, table_len = table.shape
    groups, page_size, dim = within.shape[2], keys.shape[1], keys.shape[2]
    q = parts.new_empty(batch, num_kv_heads * groups, dim)
    overlap = may_overlap(architecture(parts.device))
    tensors = [parts if x is None else x for x in (past_key, past_value, q_norm, k_norm, gate_bias)]
    launch(
        step_pages_kernel, (batch * num_kv_heads,),
        (parts, *tensors, q, keys, values, within, starts, totals, table, length),
        (eps, num_kv_heads, table_len, parts.stride(0), *(x or 0 for x in columns)),
        KEY_SHIFT=past_key is not None, VALUE_SHIFT=past_value is not None, NORM=q_norm is not None,
        NORM_SHARED=q_norm is not None and q_norm.dim() == 1, LOGITS=columns[5] is not None,
        BIAS=gate_bias is not None, G=groups, BLOCK_G=power_of_2(groups), D=dim, BLOCK_D=padded_head_dim(dim),
        PAGE=page_size, OVERLAP=overlap, num_warps=1, enable_fp_fusion=False, **early(overlap),
    )  # fmt: skip
    return q
