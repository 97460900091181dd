"""Forgetting attention in plain PyTorch: dense, O(T * S) memory. The definition all else answers to."""

import torch

from .gates import first_visible_key, split_resets


def forgetting_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_fgate: torch.Tensor,
    *,
    scale: float | None = None,
    key_start: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal softmax attention whose scores decay by a forget gate, written out as a dense matrix.

    `o_i = sum_j softmax_j(scale * q_i . k_j + sum_{l=j+1..i} log f_l) v_j` over the visible keys `j <= i`. Products
    are taken in the dtype of `q` and the softmax in float32 (float64 for float64 inputs), as PyTorch's own attention
    does, so the same function gives the truth (pass float64) and PyTorch's error in a low precision (pass bfloat16).
    Source: "Forgetting Transformer", arXiv:2503.02130, section 3.

    Args:
        q: Queries, `(B, H, T, D)`, any floating dtype. They are the last `T` of the `S` positions.
        k: Keys, `(B, H_kv, S, D)`; `H_kv` divides `H`.
        v: Values, shape of `k`.
        log_fgate: Natural log of each position's gate, `(B, H, S)`, `<= 0`. At `-inf` (below -1e4) nothing before the
            position is visible from it or after it.
        scale: Factor on `q . k`. Default: `D ** -0.5`.
        key_start: `(B,)` integers; the keys before it are padding.
        window: A query sees at most so many keys, its own included. Default: None, all before it.

    Returns:
        `(B, H, T, D)`, dtype of `q`. Rows without a visible key are 0.
    """
    num_heads, num_queries, head_dim = q.shape[1:]
    num_keys = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    groups = num_heads // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

    gates, _ = split_resets(log_fgate.double())
    running = gates.cumsum(dim=-1)
    # The queries are the last positions of the keys (decoding, chunked prefill).
    decay = running[:, :, num_keys - num_queries :, None] - running[:, :, None, :]  # (B, H, T, S), nats, float64
    first = first_visible_key(log_fgate, key_start, num_queries)  # (B, H, T)
    key = torch.arange(num_keys, device=q.device)
    query = torch.arange(num_keys - num_queries, num_keys, device=q.device)
    visible = (key >= first[..., None]) & (key <= query[:, None])
    if window is not None:
        visible &= key > query[:, None] - window

    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(accumulate) * scale + decay.to(accumulate)
    scores = scores.masked_fill(~visible, float("-inf"))
    empty = ~visible.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
    return weights.to(q.dtype) @ v
