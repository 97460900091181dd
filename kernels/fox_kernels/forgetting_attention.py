"""The public operator: argument checks, pruning threshold, and the custom ops that autograd and torch.compile see.

Letters:  B batch, H query heads, H_kv key heads, T queries, S keys, D head dim; the queries are the last T of the S
    positions.
"""

import contextlib

import torch
from torch.autograd.function import once_differentiable

from . import blockwise
from ._ops import add_op_namespace_prefix
from .dispatch import needs_op
from .gates import GATE_BLOCK, GateSums, first_visible_key, gate_gradient, prepare
from .pruning import PRUNING_RULES, PruningStats, prune, statistics

try:
    from . import triton_backward, triton_forward
except ImportError as error:  # no Triton: CPU tensors work, CUDA tensors get the reason below
    triton_forward = triton_backward = None
    _TRITON_ERROR = error

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def forgetting_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_fgate: torch.Tensor,
    *,
    scale: float | None = None,
    log_pruning_tolerance: float | None = None,
    pruning_rule: str = "tight",
    logit_bound: float | torch.Tensor | None = None,
    key_start: torch.Tensor | None = None,
    window: int | None = None,
    deterministic: bool | None = None,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, PruningStats]:
    """Causal softmax attention whose scores decay by a learned forget gate, optionally pruned with a proof.

    `o_i = sum_j softmax_j(scale * q_i . k_j + sum_{l=j+1..i} log f_l) v_j` for `j <= i`: with every gate open
    (`log_fgate == 0`) this is ordinary causal attention. Differentiable in `q`, `k`, `v` and `log_fgate`; the T x S
    matrix is never stored. CUDA tensors run Triton kernels, CPU tensors blockwise PyTorch. Under autocast `q`, `k`,
    `v` take its dtype, the gates stay float32. Sequences packed into one: `forgetting_attention_varlen`; few queries
    against a cache: `forgetting_attention_decode`. Sources: "Forgetting Transformer", arXiv:2503.02130; pruning:
    arXiv:2504.06949.

    Args:
        q: Queries, `(B, H, T, D)`, float32, float16 or bfloat16, `D <= 256`. They are the last `T` of the `S`
            positions. Any strides; only a last dimension that is not contiguous is copied.
        k: Keys, `(B, H_kv, S, D)`, dtype of `q`. `H_kv` must divide `H` (grouped-query attention).
        v: Values, shape and dtype of `k`.
        log_fgate: Natural log of each position's gate, `(B, H, S)`, float32, `<= 0`. Use `logsigmoid(x.float())`: in
            bfloat16 each term is up to 0.2 % off, and a score sums up to `S` of them. A closed gate, `-inf` (anything
            up to -1e4), hides all before its position from it and from everything after it, exactly: a document
            boundary.
        scale: Factor on `q . k`. Default: `D ** -0.5`.
        log_pruning_tolerance: Adaptive computation pruning: natural log of the attention mass that a row may lose to
            skipped blocks, e.g. -10.0 for 4.5e-5. Default: None, nothing is skipped.
        pruning_rule: `"tight"`: blocks of keys are skipped as long as they hold, all together, less than eps of every
            row's attention, added up from the scores; looks at queries and keys where decay leaves something to win.
            `"paper"`: a block is skipped when its largest decay is below `-2U - log S + log eps`; looks at the gates
            only, skips less, and costs less to decide.
        logit_bound: U, at least every `|scale * q . k|`, in nats: a float, or a tensor `(H,)` or `(B, H)`. Default:
            None, measured as `|scale| * max ||q|| * max ||k||` per head in float32.
        key_start: `(B,)` int32 or int64: the keys before it are padding. Default: None, no padding. Padding on the
            right needs nothing: no query before it sees it.
        window: A query sees at most so many keys, its own included. Default: None, all before it. Whatever else hides
            keys hides them as well.
        deterministic: Gradients that are the same to the last bit on every run. On Hopper the default adds up dq in
            any order, five matrix products in place of seven; elsewhere nothing changes. Default: None, what
            `torch.are_deterministic_algorithms_enabled()` says.
        return_stats: Also return `PruningStats`: per head the share of visible pairs skipped and the bound on the
            lost mass.

    Returns:
        `(B, H, T, D)`, dtype and stride order of `q`; rows without a visible key are 0. With `return_stats` a pair of
        that and `PruningStats`.

    Raises:
        ValueError: If a shape, dtype, device or option is not one of the above. Values (`log_fgate <= 0`, a
            `logit_bound` that holds) are not checked: that would synchronise the device.
        ImportError: For CUDA tensors without Triton.
    """
    q, k, v = _under_autocast(q, k, v)
    _check_tensors(q, k, v, log_fgate, key_start)
    return _attend(
        q, k, v, log_fgate, scale=scale, log_pruning_tolerance=log_pruning_tolerance, pruning_rule=pruning_rule,
        logit_bound=logit_bound, key_start=key_start, window=window, deterministic=deterministic,
        return_stats=return_stats,
    )  # fmt: skip


def _under_autocast(*tensors):
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return [x.to(torch.get_autocast_dtype(device)) for x in tensors]


def _attend(
    q, k, v, log_fgate, *, scale, log_pruning_tolerance, pruning_rule, logit_bound, key_start=None, window=None,
    cu_seqlens=None, deterministic=None, return_stats=False,
):  # fmt: skip
    """`forgetting_attention` of tensors that are checked; `cu_seqlens` as in `gates.first_visible_key`."""
    bound = _check_pruning(q, log_pruning_tolerance, pruning_rule, logit_bound)
    _check_window(window)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    log_pruning_tolerance = None if log_pruning_tolerance is None else float(log_pruning_tolerance)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    key_start = None if key_start is None else key_start.contiguous()
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    attend = _forgetting_attention if needs_op(q, k, v, log_fgate) else _Attention.apply
    out, _, within, starts, first_key = attend(
        q, k, v, log_fgate, scale, log_pruning_tolerance, pruning_rule, bound, key_start, window, cu_seqlens,
        deterministic,
    )  # fmt: skip
    if not return_stats:
        return out
    with torch.no_grad(), on_device_of(q):
        visible = first_visible_key(log_fgate, key_start, q.shape[2], window, cu_seqlens)
        return out, statistics(
            q, k, GateSums(within, starts), visible, first_key, key_start, scale=scale, rule=pruning_rule,
            log_tolerance=log_pruning_tolerance, logit_bound=bound,
        )  # fmt: skip


def _check_tensors(q, k, v, log_fgate, key_start):
    _check_products(q, k, v)
    _check_gates(q, k, log_fgate)
    _check_key_start(q, key_start)


def _check_products(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim); got shape {tuple(x.shape)}."
            )
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16; got {x.dtype}. Cast it first.")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}; got {x.dtype}. Cast one of them.")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}; got {x.device}. Move one of them.")
    batch, num_heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        raise ValueError(f"q and k must not be empty; got shapes {tuple(q.shape)} and {tuple(k.shape)}.")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM}; got {head_dim}. Use more heads, or the reference.")
    if k.shape[0] != batch or k.shape[3] != head_dim or num_heads % k.shape[1]:
        raise ValueError(
            f"k must be ({batch}, H_kv, S, {head_dim}) with H_kv dividing {num_heads}; got {tuple(k.shape)}. "
            "Heads come before length: transpose(1, 2) turns (batch, length, heads, head_dim) around."
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}; got {tuple(v.shape)}.")
    if num_queries > num_keys:
        raise ValueError(
            f"q has {num_queries} positions but k only {num_keys}: pass the cached keys together with the new ones."
        )


def _check_gates(q, k, log_fgate):
    shape = (q.shape[0], q.shape[1], k.shape[2])
    if log_fgate.shape != shape:
        raise ValueError(f"log_fgate must be {shape}, one gate per query head and key; got {tuple(log_fgate.shape)}.")
    if log_fgate.dtype != torch.float32:
        raise ValueError(f"log_fgate must be float32, got {log_fgate.dtype}: take logsigmoid(logits.float()).")
    if log_fgate.device != q.device:
        raise ValueError(
            f"log_fgate must be on the device of q, {q.device}; got {log_fgate.device}. Move one of them."
        )


def _check_key_start(q, key_start):
    if key_start is None:
        return
    if key_start.shape != (q.shape[0],) or key_start.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"key_start must be ({q.shape[0]},) int32 or int64, one per sequence; got {tuple(key_start.shape)} "
            f"{key_start.dtype}. "
            "From a left-padded attention mask take (mask == 0).sum(-1)."
        )
    if key_start.device != q.device:
        raise ValueError(
            f"key_start must be on the device of q, {q.device}; got {key_start.device}. Move one of them."
        )


def _check_pruning(q, log_pruning_tolerance, pruning_rule, logit_bound):
    """Return `logit_bound` as a tensor that expands to (B, H), or None."""
    if pruning_rule not in PRUNING_RULES:
        raise ValueError(f"pruning_rule must be one of {PRUNING_RULES}; got {pruning_rule!r}.")
    if log_pruning_tolerance is not None and not log_pruning_tolerance < 0:
        raise ValueError(
            f"log_pruning_tolerance is the log of a probability and must be negative; got {log_pruning_tolerance}. "
            "For a tolerance of 4.5e-5 pass -10.0; to switch pruning off pass None."
        )
    if logit_bound is None:
        return None
    if not isinstance(logit_bound, torch.Tensor):
        if not logit_bound >= 0:
            raise ValueError(
                f"logit_bound must be at least 0, a bound on |scale * q . k|; got {logit_bound}. "
                "Pass None to measure it."
            )
        return torch.full((1, 1), float(logit_bound), device=q.device)
    batch, num_heads = q.shape[:2]
    if logit_bound.shape not in ((num_heads,), (batch, num_heads)):
        raise ValueError(
            f"logit_bound must be a float, ({num_heads},) or ({batch}, {num_heads}); "
            f"got shape {tuple(logit_bound.shape)}."
        )
    return logit_bound.detach().to(q.device)


def _check_window(window):
    if window is not None and not window >= 1:
        raise ValueError(f"window must be at least 1, the query's own key; got {window}. For no window pass None.")


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of a model that is spread over several."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _require_triton():
    if triton_forward is None:
        raise ImportError(
            "forgetting_attention needs Triton for CUDA tensors: pip install 'fox-transformers[kernels]', "
            "or move the tensors to the CPU."
        ) from _TRITON_ERROR


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_fgate: torch.Tensor,
    scale: float,
    log_tolerance: float | None,
    rule: str,
    logit_bound: torch.Tensor | None,
    key_start: torch.Tensor | None,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return o, then for the backward pass lse (B, H, T) in bits, the two tensors of `GateSums`, and first_key."""
    with on_device_of(q), _without_autocast(q.device.type):
        sums, first_key = prepare(log_fgate, key_start, q.shape[2], window, cu_seqlens)
        if log_tolerance is not None:
            first_key = prune(
                q, k, sums, first_key, key_start, scale=scale, rule=rule, log_tolerance=log_tolerance,
                logit_bound=logit_bound,
            )  # fmt: skip
        if q.device.type == "cpu":
            out, lse = blockwise.forward(q, k, v, sums, first_key, scale)
        else:
            _require_triton()
            out, lse = triton_forward.forward(q, k, v, sums, first_key, scale)
    return out, lse, *sums, first_key


_forgetting_attention = torch.library.custom_op(
    add_op_namespace_prefix("forgetting_attention"), _forward, mutates_args=(), device_types=("cpu", "cuda")
)


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Autocast reaches into the operator and would round the scores."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


@_forgetting_attention.register_fake
def _(
    q, k, v, log_fgate, scale, log_tolerance, rule, logit_bound, key_start, window=None, cu_seqlens=None,
    deterministic=False,
):  # fmt: skip
    rows = q.shape[:-1]
    num_blocks = -(-log_fgate.shape[-1] // GATE_BLOCK)
    return (
        torch.empty_like(q),
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty((2, *log_fgate.shape), dtype=torch.float32),
        q.new_empty((2, *log_fgate.shape[:-1], num_blocks), dtype=torch.float32),
        q.new_empty(rows, dtype=torch.int32),
    )


def _gradients(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_fgate: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    within: torch.Tensor,
    starts: torch.Tensor,
    first_key: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    sums = GateSums(within, starts)
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    with on_device_of(q):
        if q.device.type == "cpu":
            dq, dk, dv, column_sum = blockwise.backward(grad_out, q, k, v, lse, sums, first_key, scale)
        else:
            dq, dk, dv, column_sum = triton_backward.backward(
                grad_out, q, k, v, out, lse, sums, first_key, scale, deterministic
            )
        return dq, dk, dv, gate_gradient(column_sum, log_fgate, cu_seqlens)


_forgetting_attention_backward = torch.library.custom_op(
    add_op_namespace_prefix("forgetting_attention_backward"), _gradients, mutates_args=(), device_types=("cpu", "cuda")
)


@_forgetting_attention_backward.register_fake
def _(grad_out, q, k, v, log_fgate, out, lse, within, starts, first_key, cu_seqlens, scale, deterministic):
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        torch.empty(log_fgate.shape, dtype=torch.float32, device=q.device),
    )


def _setup_context(ctx, inputs, output):
    q, k, v, log_fgate, ctx.scale, *_, cu_seqlens, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, log_fgate, *output, cu_seqlens)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, *_, gradients=_forgetting_attention_backward):
    if grad_out is None:
        return (None,) * 12
    grads = gradients(grad_out, *ctx.saved_tensors, ctx.scale, ctx.deterministic)
    return (*grads, *(None,) * 8)


_forgetting_attention.register_autograd(_backward, setup_context=_setup_context)


class _Attention(torch.autograd.Function):
    """The operator for plain tensors in eager mode: what a custom op adds to a call takes as long as small kernels."""

    @staticmethod
    def forward(ctx, *inputs):  # with a setup_context of its own it would bind the arguments by name, for 0.1 ms
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, *_):
        return _backward(ctx, grad_out, gradients=_gradients)
