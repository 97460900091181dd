"""A decoding step over pages from one row of products a sequence: what a layer does before and in its attention.

Letters:  B batch, H query heads, H_kv key heads, D head dim, N columns of the products.
"""

import torch
import torch.nn.functional as F

from .forgetting_attention import _require_triton, on_device_of
from .paged import PagedKeys
from .paged_attention import _is_capturing, attend_to_live, check_kind, paged_attention

try:
    from . import triton_step
except ImportError:  # no Triton: `_require_triton` gives the reason
    triton_step = None


def paged_step(
    parts: torch.Tensor,
    cache: PagedKeys,
    layer: int,
    columns: tuple[int | None, ...],
    *,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
) -> torch.Tensor:
    """Shift, norms, gates and `paged_attention` of one token a sequence; on a GPU three or four kernels.

    A step goes through the layers from 0 on, all of them: the first one counts the token for all.

    Args:
        parts: Products of the token, `(B, N)`, dtype of the cache.
        columns: Where in `parts` start the queries `(H * D)`, keys and values `(H_kv * D)`, the logits of the shifts
            of keys and of values `(H_kv)`, and those of the forget gates `(H)`; None for what there is not.
        past_key: Keys of the token before, before its shift, `(B, 1, H_kv, D)`, contiguous: `w * past + (1 - w) * own`
            with w the sigmoid of the logit takes the place of the own ones, which take that of `past_key`. None
            without a shift. past_value: the same of values.
        q_norm: Weight of an RMSNorm over D, `(H, D)` or `(D,)`, and k_norm, `(H_kv, D)` or `(D,)`; None without.
        gate_bias: `(H,)` float32, added to the logits; None for none. Gates are open with neither.
        eps: Of the norms.
        scale: Factor on `q . k`. Default: `D ** -0.5`.

    Returns:
        `(B, H, D)`, dtype of `parts`, with the promise of `paged_attention`.

    Raises:
        ValueError: If a shape, dtype or device is not one of the above.
        ImportError: For CUDA tensors without Triton.
    """
    cache.check_whole()
    dim = cache.head_dim
    sizes = (cache.num_heads * dim, *[cache.num_kv_heads * dim] * 2, *[cache.num_kv_heads] * 2, cache.num_heads)
    ends = [at + size for at, size in zip(columns, sizes, strict=True) if at is not None]
    if parts.dim() != 2 or len(parts) != cache.batch or max(ends) > parts.shape[1] or None in columns[:3]:
        raise ValueError(
            f"parts must be ({cache.batch}, {max(ends)} or more), a row for each sequence with queries, keys and "
            f"values; got {tuple(parts.shape)} and columns {columns}."
        )
    check_kind("parts", parts, cache)
    expected = (cache.batch, 1, cache.num_kv_heads, dim)
    for name, x in (("past_key", past_key), ("past_value", past_value)):
        if x is not None and (x.shape != expected or not x.is_contiguous() or x.dtype != parts.dtype):
            raise ValueError(
                f"{name} must be {expected} {parts.dtype}, contiguous, as it is written to; got {tuple(x.shape)} "
                f"{x.dtype} with strides {x.stride()}."
            )
    scale = float(dim**-0.5 if scale is None else scale)
    beside = (past_key, past_value, q_norm, k_norm, gate_bias)
    with torch.inference_mode(False), torch.no_grad(), on_device_of(parts):
        if parts.device.type != "cuda":
            return _plain(parts, cache, layer, columns, sizes, *beside, eps, scale)
        _require_triton()
        if not _is_capturing(parts):
            cache.make_room(layer, 1)
        cache.is_whole = False
        if layer == 0:
            cache.lengths.add_(1)
        cache.num_keys[layer] += 1
        pool = (cache.keys, cache.values, cache.within, cache.starts)
        table, length = cache.table[layer], cache.lengths[layer]
        q = triton_step.prepare(parts, columns, *beside, eps, *pool, cache.totals[layer], table, length)
        out = attend_to_live(q[:, :, None], cache, layer, scale)[:, :, 0]
        cache.is_whole = True
        return out


def _plain(parts, cache, layer, columns, sizes, past_key, past_value, q_norm, k_norm, gate_bias, eps, scale):
    """The same, one operation after the other."""
    found = [None if at is None else parts[:, at : at + size] for at, size in zip(columns, sizes, strict=True)]
    q, k, v = (x.unflatten(-1, (-1, cache.head_dim)) for x in found[:3])
    k, v = _shifted(k, found[3], past_key), _shifted(v, found[4], past_value)
    q, k = _normalized(q, q_norm, eps), _normalized(k, k_norm, eps)
    gate = torch.zeros(q.shape[:2])
    if gate_bias is not None or found[5] is not None:
        for x in (gate_bias, found[5]):
            gate = gate if x is None else gate + x.float()
        gate = F.logsigmoid(gate)
    return paged_attention(*(x[:, :, None] for x in (q, k, v, gate)), cache, layer, scale=scale)[:, :, 0]


def _shifted(own, logits, past):
    if past is None:
        return own
    weight = logits.float().sigmoid().unsqueeze(-1)
    mixed = torch.lerp(own.float(), past[:, 0].float(), weight).to(own.dtype)
    past.copy_(own[:, None])
    return mixed


def _normalized(states, weight, eps):
    return states if weight is None else F.rms_norm(states, states.shape[-1:], None, eps) * weight.to(states.dtype)


__all__ = ["paged_step"]
