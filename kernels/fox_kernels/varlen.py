"""Forgetting attention of packed sequences, laid out and named as FlashAttention's functions of variable length.

Letters:  B sequences, H query heads, H_kv key heads, D head dim; total_q and total_k: positions of all sequences.
"""

import torch

from .forgetting_attention import _attend, _check_tensors, _under_autocast, forgetting_attention
from .pruning import PruningStats


def forgetting_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_fgate: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    log_pruning_tolerance: float | None = None,
    pruning_rule: str = "tight",
    logit_bound: float | torch.Tensor | None = None,
    window: int | None = None,
    deterministic: bool | None = None,
    return_stats: bool = False,
    check_boundaries: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, PruningStats]:
    """`forgetting_attention` of sequences of different lengths, packed one after another without padding.

    No sequence sees another, and gradients, of the gates too, are those of one call per sequence; only what is not
    finite reaches neighbours within the same tile. Tensors are read where they are. There is no `max_seqlen` to give,
    and `causal` is always true.

    As many queries as keys: the boundaries then agree, and it is one call whatever the number of sequences, with
    nothing read back from the device. Its pruning is that of one sequence of `total_k` keys: a bound on the logits
    holds for all sequences, so that the paper's rule keeps `log(total_k / S)` nats more than for a sequence of S
    keys alone.

    Fewer queries than keys, chunked prefill: the queries of a sequence are its last positions, and it is one call per
    sequence. The boundaries are read on the host: on a GPU a synchronisation, unless they are given on the CPU, and a
    break in the graph of `torch.compile`.

    Args:
        q: Queries, `(total_q, H, D)`, float32, float16 or bfloat16, `D <= 256`. Any strides; only a last dimension
            that is not contiguous is copied.
        k: Keys, `(total_k, H_kv, D)`, dtype of `q`. `H_kv` must divide `H`.
        v: Values, shape and dtype of `k`.
        log_fgate: Natural log of each position's gate, `(total_k, H)`, float32, `<= 0`. The first gate of a sequence
            decays nothing, and its gradient is 0 but for rounding.
        cu_seqlens_q: `(B + 1,)` int32 or int64: sequence b has the queries `cu_seqlens_q[b]` to
            `cu_seqlens_q[b + 1] - 1`. From 0 to total_q, never decreasing; a sequence may be empty.
        cu_seqlens_k: The same of the keys, at least as many in each sequence. Default: None, `cu_seqlens_q`.
        scale: Factor on `q . k`. Default: `D ** -0.5`.
        log_pruning_tolerance: See `forgetting_attention`, as for the next two.
        pruning_rule: `"tight"` or `"paper"`.
        logit_bound: A float or `(H,)`.
        window: A query sees at most so many keys, its own included. Default: None, all of its sequence before it.
        deterministic: See `forgetting_attention`.
        return_stats: Also return `PruningStats` over all sequences; only with as many queries as keys.
        check_boundaries: Also check the values of the boundaries on a GPU, which waits for it. On a CPU they are
            always checked. Wrong boundaries that are not checked give undefined outputs.

    Returns:
        `(total_q, H, D)`, dtype and stride order of `q`. With `return_stats` a pair of that and `PruningStats`.

    Raises:
        ValueError: If a shape, dtype, device or option is not one of the above.
        ImportError: For CUDA tensors without Triton.
    """
    q, k, v = _under_autocast(q, k, v)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check_packed(q, k, v, log_fgate, cu_seqlens_q, cu_seqlens_k)
    on_cpu = cu_seqlens_q.device.type == cu_seqlens_k.device.type == "cpu"
    if (on_cpu or check_boundaries) and not torch.compiler.is_compiling():
        _check_values(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    options = dict(
        scale=scale, log_pruning_tolerance=log_pruning_tolerance, pruning_rule=pruning_rule, logit_bound=logit_bound,
        window=window, deterministic=deterministic,
    )  # fmt: skip
    if q.shape[0] != k.shape[0]:
        if return_stats:
            raise ValueError(
                f"return_stats needs as many queries as keys; got {q.shape[0]} and {k.shape[0]}. Call "
                "forgetting_attention for each sequence."
            )
        return _one_by_one(q, k, v, log_fgate, cu_seqlens_q, cu_seqlens_k, options)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    # No sequence has fewer keys than queries, and in all there are as many: the boundaries are the same.
    cu_seqlens = cu_seqlens_q.to(q.device).contiguous()
    out = _attend(q, k, v, log_fgate.T[None], cu_seqlens=cu_seqlens, return_stats=return_stats, **options)
    if return_stats:
        return out[0][0].transpose(0, 1), out[1]
    return out[0].transpose(0, 1)


def _one_by_one(q, k, v, log_fgate, cu_seqlens_q, cu_seqlens_k, options):
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    outs = []
    for of_q, of_k, of_v, of_gates in zip(
        q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), log_fgate.split(lengths_k), strict=True
    ):
        if len(of_q):
            tensors = (x.transpose(0, 1)[None] for x in (of_q, of_k, of_v))
            out = forgetting_attention(*tensors, of_gates.T[None], **options)
            outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _check_packed(q, k, v, log_fgate, cu_seqlens_q, cu_seqlens_k):
    for name, x, shape in (
        ("q", q, "(total_q, H, D)"),
        ("k", k, "(total_k, H_kv, D)"),
        ("v", v, "(total_k, H_kv, D)"),
    ):
        if x.dim() != 3:
            raise ValueError(
                f"{name} must be {shape}, all sequences one after another; got {tuple(x.shape)}. For a batch of equal "
                "lengths call forgetting_attention."
            )
    if log_fgate.shape != (k.shape[0], q.shape[1]):
        raise ValueError(
            f"log_fgate must be {(k.shape[0], q.shape[1])}, one gate per key and query head; "
            f"got {tuple(log_fgate.shape)}."
        )
    _check_tensors(*(x.transpose(0, 1)[None] for x in (q, k, v)), log_fgate.T[None], None)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        is_tensor = isinstance(x, torch.Tensor)
        if not is_tensor or x.dim() != 1 or len(x) < 2 or x.dtype not in (torch.int32, torch.int64):
            got = f"{tuple(x.shape)} {x.dtype}" if is_tensor else repr(x)
            raise ValueError(
                f"{name} must be (B + 1,) int32 or int64, from 0 to the number of positions; got {got}. "
                "From the lengths take torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()."
            )
    if len(cu_seqlens_k) != len(cu_seqlens_q):
        raise ValueError(
            f"cu_seqlens_k must have as many boundaries as cu_seqlens_q, {len(cu_seqlens_q)}; got {len(cu_seqlens_k)}."
        )


def _check_values(cu_seqlens_q, cu_seqlens_k, total_q, total_k):
    for name, x, total in (("cu_seqlens_q", cu_seqlens_q, total_q), ("cu_seqlens_k", cu_seqlens_k, total_k)):
        boundaries = x.tolist()
        if boundaries[0] != 0 or boundaries[-1] != total or boundaries != sorted(boundaries):
            raise ValueError(f"{name} must go from 0 to {total}, the positions, and never decrease; got {boundaries}.")
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    short = [b for b, (queries, keys) in enumerate(zip(lengths_q, lengths_k, strict=True)) if queries > keys]
    if short:
        b = short[0]
        raise ValueError(
            f"cu_seqlens_k must give every sequence at least as many keys as queries; sequence {b} has {lengths_q[b]} "
            f"queries but {lengths_k[b]} keys. Pass the cached keys together with the new ones."
        )
