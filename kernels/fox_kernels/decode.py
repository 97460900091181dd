"""Decoding: a few new queries against a long cache, with the running sums of the gates in place of the gates.

A step reads the keys that survive and one number of 8 bytes per 128 keys and head of the rest. The sums grow by
`append_gates` in memory that is allocated ahead; nothing that was written before changes.

Letters:  B batch, H query heads, H_kv key heads, G query heads per key head, T queries, S keys in use, C >= S keys
    allocated, N blocks of 128 keys, D head dim; the queries are the last T of the S positions.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._ops import add_op_namespace_prefix
from .dispatch import needs_op
from .forgetting_attention import (
    _check_key_start,
    _check_products,
    _check_pruning,
    _check_window,
    _require_triton,
    on_device_of,
)
from .gates import GATE_BLOCK, LOG2_E, GateSums, prepare, split_in_two, split_resets
from .pruning import (
    DOT_ERROR,
    PAPER_SLACK,
    PRUNING_BLOCK_S,
    PRUNING_RULES,
    TIGHT_SLACK,
    paper_budget,
    pruning_threshold,
)

try:
    from . import triton_decode
except ImportError:  # no Triton: `_require_triton` gives the reason
    triton_decode = None

MAX_DECODE_QUERIES = 16


class GrowingSums(NamedTuple):
    """Gate sums of a sequence that grows, in memory allocated for C keys.

    Attributes:
        sums: `GateSums` of which the first S keys are in use.
        totals: `(B, H, N)` float64, nats: sum of all gates up to the end of each block, or up to the last key in it.
            Two floats hold 48 of its 53 bits; with all of them a sequence summed in pieces gives the bits of one
            summed at once.
    """

    sums: GateSums
    totals: torch.Tensor


def empty_sums(batch: int, num_heads: int, capacity: int, device: torch.device | str | None = None) -> GrowingSums:
    """Memory for the sums of `capacity` keys, none of them in use; 8.2 bytes per key and head."""
    num_blocks = -(-capacity // GATE_BLOCK)
    return GrowingSums(
        GateSums(
            torch.zeros(2, batch, num_heads, capacity, dtype=torch.float32, device=device),
            torch.zeros(2, batch, num_heads, num_blocks, dtype=torch.float32, device=device),
        ),
        torch.zeros(batch, num_heads, num_blocks, dtype=torch.float64, device=device),
    )


def append_gates(growing: GrowingSums, log_fgate: torch.Tensor, num_keys: int | torch.Tensor) -> None:
    """Add the gates of new keys to the sums of the `num_keys` before them, in place; the work is that of the new ones.

    On a CPU the result has the bits of `gates.gate_sums` of the whole sequence, however it is cut. On a GPU pieces of
    several keys are summed in another order, in float64. The last block keeps the sum of what was appended last: to go
    back to fewer keys, call `rewind_gates` first.

    Args:
        log_fgate: `(B, H, T)` float32 nats. A closed gate counts as 0: tell `forgetting_attention_decode` of it by
            `first_key`.
        num_keys: Keys that are in the sums: an int, or one integer in a tensor on the device, which a CUDA graph may
            replay with another value. More than C in all is an error, or with a tensor on a GPU undefined.

    Raises:
        ValueError: If a shape or dtype is not one of the above, or the keys are more than there is memory for.
    """
    within, starts = growing.sums
    if log_fgate.dim() != 3 or log_fgate.shape[:2] != within.shape[1:3] or log_fgate.dtype != torch.float32:
        raise ValueError(
            f"log_fgate must be {(*within.shape[1:3], 'T')} float32, one gate per query head and new key; got "
            f"{tuple(log_fgate.shape)} {log_fgate.dtype}."
        )
    length = num_keys if isinstance(num_keys, torch.Tensor) and within.device.type == "cuda" else None
    num_keys = 0 if length is not None else int(num_keys)
    if num_keys + log_fgate.shape[-1] > within.shape[-1]:
        raise ValueError(
            f"the sums have room for {within.shape[-1]} keys; got {log_fgate.shape[-1]} new ones after {num_keys}. "
            "Allocate more with `empty_sums` and copy, or start anew."
        )
    if log_fgate.shape[-1] == 0:
        return
    with on_device_of(within):
        if within.device.type == "cpu":
            _append_on_cpu(growing, log_fgate, num_keys)
        elif length is None and num_keys == 0 and log_fgate.shape[-1] > 8 * GATE_BLOCK:
            _fill_on_gpu(growing, log_fgate)
        else:
            _require_triton()
            triton_decode.append_gates(growing.sums, growing.totals, log_fgate, num_keys, length)


def _fill_on_gpu(growing: GrowingSums, log_fgate: torch.Tensor) -> None:
    """The first keys, many at once: the kernel that appends goes through the blocks of a head one by one."""
    num_keys = log_fgate.shape[-1]
    sums, _ = prepare(log_fgate, None, 1)
    num_blocks = sums.starts.shape[-1]
    growing.sums.within[..., :num_keys] = sums.within
    growing.sums.starts[..., :num_blocks] = sums.starts
    gates = F.pad(split_resets(log_fgate)[0].double(), (0, num_blocks * GATE_BLOCK - num_keys))
    growing.totals[..., :num_blocks] = gates.unflatten(-1, (-1, GATE_BLOCK)).sum(dim=-1).cumsum(dim=-1)


def _append_on_cpu(growing: GrowingSums, log_fgate: torch.Tensor, num_keys: int) -> None:
    (within, starts), totals = growing
    end = num_keys + log_fgate.shape[-1]
    first, last = num_keys // GATE_BLOCK, (end - 1) // GATE_BLOCK
    # The sum that each block starts from, and the one that the new keys go on from.
    before = totals[..., first - 1] if first else torch.zeros_like(totals[..., 0])
    so_far = totals[..., first] if num_keys % GATE_BLOCK else before
    gates = torch.cat((so_far[..., None], split_resets(log_fgate)[0].double()), dim=-1)
    running = gates.cumsum(dim=-1)[..., 1:]
    block_ends = (torch.arange(first + 1, last + 2) * GATE_BLOCK).clamp_(max=end) - 1 - num_keys
    new_totals = running[..., block_ends]
    block_starts = torch.cat((before[..., None], new_totals[..., :-1]), dim=-1).mul_(LOG2_E)
    block = torch.arange(num_keys, end).div_(GATE_BLOCK, rounding_mode="floor") - first
    within[..., num_keys:end] = split_in_two(running * LOG2_E - block_starts[..., block])
    starts[..., first : last + 1] = split_in_two(block_starts)
    totals[..., first : last + 1] = new_totals


def rewind_gates(growing: GrowingSums, log_fgate: torch.Tensor, num_keys: int) -> None:
    """Go back to the first `num_keys` keys, in place: the sums then go on with the bits of a sequence cut there.

    Args:
        log_fgate: `(B, H, >= num_keys)` float32 nats, the gates that were appended; only those of the last block are
            read.
    """
    start = num_keys // GATE_BLOCK * GATE_BLOCK
    append_gates(growing, log_fgate[..., start:num_keys], start)


def forgetting_attention_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_sums: GateSums,
    *,
    num_keys: int | torch.Tensor | None = None,
    scale: float | None = None,
    first_key: torch.Tensor | None = None,
    key_start: torch.Tensor | None = None,
    window: int | None = None,
    log_pruning_tolerance: float | None = None,
    pruning_rule: str = "paper",
    logit_bound: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """`forgetting_attention` of 1 to 16 queries, forward only, reading nothing of the keys that pruning drops.

    The keys, values and sums may be longer than what is in use, as in a static cache. By the paper's rule a query
    drops the keys that it drops in `forgetting_attention`. The tight rule, which looks at the scores of the last 128
    keys only, drops at least as much as the paper's, less than in training, and makes the same promise. CUDA tensors
    run Triton kernels whose launches depend on shapes alone, so that a CUDA graph can replay them with another
    `num_keys`.

    Args:
        q: Queries, `(B, H, T, D)`, float32, float16 or bfloat16, `T <= 16`, `D <= 256`; the last `T` of the keys.
        k: Keys, `(B, H_kv, C, D)`, dtype of `q`. Any strides with a contiguous last dimension. `H_kv` must divide `H`.
        v: Values, shape and dtype of `k`.
        gate_sums: Sums of the gates of all keys, for at least `C` of them: from `gates.gate_sums` or `append_gates`.
        num_keys: S, keys in use: an int, or one integer in a tensor on the device. Default: None, all `C`.
        scale: Factor on `q . k`. Default: `D ** -0.5`.
        first_key: `(B, H, T)` int32, first key that each query may see, as `gates.first_visible_key` gives it; needed
            where gates are closed, which the sums do not tell. Default: None, 0.
        key_start: `(B,)` int32 or int64: the keys before it are padding. Default: None, no padding.
        window: A query sees at most so many keys, its own included; the others are not read. Default: None, all.
        log_pruning_tolerance: Natural log of the attention mass that a row may lose to skipped keys. Default: None,
            nothing is skipped.
        pruning_rule: `"paper"` or `"tight"`; see kernels/README.md.
        logit_bound: U, at least every `|scale * q . k|`, in nats: a float, or a tensor `(H,)` or `(B, H)`. Needed for
            pruning: to measure it would take all keys.

    Returns:
        `(B, H, T, D)`, dtype and stride order of `q`; rows without a visible key are 0.

    Raises:
        ValueError: If a shape, dtype, device or option is not one of the above. Values on the device are not checked.
        ImportError: For CUDA tensors without Triton.
    """
    length = num_keys if isinstance(num_keys, torch.Tensor) else None
    capacity = k.shape[2] if k.dim() == 4 else 0
    num_keys = capacity if num_keys is None or length is not None else num_keys
    within, starts = gate_sums
    _check_decode(q, k, v, gate_sums, num_keys, length, first_key, key_start)
    if pruning_rule not in PRUNING_RULES:
        raise ValueError(f"pruning_rule must be one of {PRUNING_RULES}; got {pruning_rule!r}.")
    _check_window(window)
    bound = _check_pruning(q, log_pruning_tolerance, pruning_rule, logit_bound)
    if log_pruning_tolerance is None:
        bound = None
    elif bound is None:
        raise ValueError(
            "logit_bound must be given to prune while decoding; got None. Measuring it would read all keys: pass the "
            "bound that QK-norm gives, or log_pruning_tolerance=None."
        )
    else:
        bound = bound.to(q.device).float().expand(q.shape[:2])
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    q, k, v, within, starts = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, within, starts))
    first_key, key_start = (None if x is None else x.contiguous() for x in (first_key, key_start))
    tolerance = 0.0 if log_pruning_tolerance is None else float(log_pruning_tolerance)
    decode = _decode_op if needs_op(q, k, v, within, starts) else _decode
    with torch.no_grad():
        return decode(
            q, k, v, within, starts, num_keys, length, scale, first_key, key_start, bound, tolerance, window,
            pruning_rule == "tight" and bound is not None,
        )  # fmt: skip


def _check_decode(q, k, v, gate_sums, num_keys, length, first_key, key_start):
    within, starts = gate_sums
    _check_products(q, k, v)
    _check_key_start(q, key_start)
    batch, num_heads, num_queries, _ = q.shape
    if num_queries > MAX_DECODE_QUERIES:
        raise ValueError(
            f"q must have at most {MAX_DECODE_QUERIES} positions; got {num_queries}. Use forgetting_attention."
        )
    if not num_queries <= num_keys <= k.shape[2]:
        raise ValueError(
            f"num_keys must be between the {num_queries} positions of q and the {k.shape[2]} of k; got {num_keys}. It "
            "counts the cached keys together with the new ones."
        )
    if within.shape[:3] != (2, batch, num_heads) or within.shape[3] < k.shape[2]:
        raise ValueError(
            f"gate_sums.within must be {(2, batch, num_heads, k.shape[2])} or longer; got {tuple(within.shape)}. "
            "`gates.gate_sums` makes it from the gates of all keys."
        )
    for name, x in (("within", within), ("starts", starts)):
        if x.dtype != torch.float32 or x.device != q.device:
            raise ValueError(f"gate_sums.{name} must be float32 on {q.device}; got {x.dtype} on {x.device}.")
    if starts.shape[:3] != (2, batch, num_heads) or starts.shape[3] * GATE_BLOCK < k.shape[2]:
        raise ValueError(
            f"gate_sums.starts must be {(2, batch, num_heads, -(-k.shape[2] // GATE_BLOCK))} or longer; got "
            f"{tuple(starts.shape)}."
        )
    if length is not None and (length.numel() != 1 or length.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"num_keys must be one int32 or int64; got {tuple(length.shape)} {length.dtype}.")
    if first_key is not None and (first_key.shape != q.shape[:3] or first_key.dtype != torch.int32):
        raise ValueError(
            f"first_key must be {tuple(q.shape[:3])} int32; got {tuple(first_key.shape)} {first_key.dtype}. "
            "`gates.first_visible_key` makes it."
        )


def _decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    within: torch.Tensor,
    starts: torch.Tensor,
    num_keys: int,
    length: torch.Tensor | None,
    scale: float,
    first_key: torch.Tensor | None,
    key_start: torch.Tensor | None,
    logit_bound: torch.Tensor | None,
    log_tolerance: float,
    window: int | None = None,
    tight: bool = False,
) -> torch.Tensor:
    sums = GateSums(within, starts)
    if q.device.type == "cpu":
        # Autocast reaches into a custom op and would round the scores.
        with torch.autocast("cpu", enabled=False):
            num_keys = num_keys if length is None else int(length)
            first = first_decoded_key(
                sums, num_keys, first_key, key_start, logit_bound, log_tolerance, q.shape[2], window,
                (q, k, scale) if tight else None,
            )  # fmt: skip
            return _decode_on_cpu(q, k, v, sums, num_keys, first, scale)
    _require_triton()
    with on_device_of(q):
        return triton_decode.forward(
            q, k, v, sums, num_keys, length, scale, first_key, key_start, logit_bound,
            paper_budget(num_keys, log_tolerance), window, log_tolerance if tight else None,
        )  # fmt: skip


_decode_op = torch.library.custom_op(
    add_op_namespace_prefix("forgetting_attention_decode"), _decode, mutates_args=(), device_types=("cpu", "cuda")
)


@_decode_op.register_fake
def _(
    q, k, v, within, starts, num_keys, length, scale, first_key, key_start, logit_bound, log_tolerance, window=None,
    tight=False,
):  # fmt: skip
    return torch.empty_like(q)


def first_decoded_key(
    sums: GateSums,
    num_keys: int,
    first_key: torch.Tensor | None,
    key_start: torch.Tensor | None,
    logit_bound: torch.Tensor | None,
    log_tolerance: float,
    num_queries: int,
    window: int | None = None,
    scored: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """First key of each query, `(B, H, T)` int32: what `pruning.first_kept_key` gives, from one sum per block.

    Args:
        logit_bound: `(B, H)` float32, or None: nothing is pruned.
        scored: Queries, keys and scale, to prune by the tight rule as well; None: by the paper's.
        Others as in `forgetting_attention_decode`.
    """
    batch, num_heads = sums.within.shape[1:3]
    first = torch.zeros(batch, num_heads, num_queries, dtype=torch.int32) if first_key is None else first_key
    if key_start is not None:
        first = first.clamp(min=key_start.to(torch.int32)[:, None, None])
    if window is not None:
        first = first.clamp(min=torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32) - (window - 1))
    if logit_bound is None:
        return first
    threshold = pruning_threshold(logit_bound, num_keys, log_tolerance)
    query = num_keys - num_queries
    block = query // GATE_BLOCK
    starts = sums.starts[..., : block + 1].double().sum(dim=0)

    at_query = starts[..., block] + sums.within[..., query].double().sum(dim=0)
    limit = ((threshold * LOG2_E).double() - at_query)[..., None]  # dropped: -running[block end] < limit
    dropped = torch.searchsorted((-starts[..., 1:]).contiguous(), limit)
    kept = dropped * GATE_BLOCK
    # The first half of the next block.
    half = (kept + PRUNING_BLOCK_S - 1).clamp_(max=query)
    end = starts.gather(-1, dropped) + sums.within.gather(-1, half.expand(2, -1, -1, -1)).double().sum(dim=0)
    kept += ((kept + PRUNING_BLOCK_S <= query) & (-end < limit)) * PRUNING_BLOCK_S
    if scored is not None:
        far = _far_mass_of_rows(sums, num_keys, first, logit_bound * (1.0 + PAPER_SLACK), *scored)
        room = (far + math.log(GATE_BLOCK) + TIGHT_SLACK - log_tolerance) * LOG2_E
        decay = at_query[..., None] - starts[..., 1:]
        mass = (decay + room[..., None]).exp2_().cumsum(dim=-1)
        kept = torch.maximum(kept, (mass <= 1.0 - 2.0**-10).sum(dim=-1, keepdim=True) * GATE_BLOCK)
    return torch.maximum(first, kept.to(torch.int32))


def _far_mass_of_rows(sums, num_keys, first, logit_bound, q, k, scale) -> torch.Tensor:
    """`U + lam_i - lam_p - L_i` at its largest over the rows i that see a key, `(B, H)` float64 nats.

    L_i is a lower bound on the log of the row's normaliser, from the last 128 keys; p is the first query.
    """
    num_queries, groups = q.shape[2], q.shape[1] // k.shape[1]
    begin = max(num_keys - GATE_BLOCK, 0)
    near = k[:, :, begin:num_keys].float()
    key = torch.arange(begin, num_keys)
    query = key[-num_queries:]
    # What no row sees is not looked at: it may be anything.
    near = near.masked_fill((key < first.unflatten(1, (-1, groups)).amin((2, 3))[..., None])[..., None], 0.0)
    near = near.repeat_interleave(groups, dim=1)
    rows = q.float()
    error = DOT_ERROR[torch.bfloat16] * abs(scale) * rows.norm(dim=-1) * near.norm(dim=-1).amax(dim=-1, keepdim=True)
    running = sums.within[..., key].double().sum(dim=0) + sums.starts[..., key // GATE_BLOCK].double().sum(dim=0)
    at_row = running[..., -num_queries:] / LOG2_E
    weighed = (rows @ near.transpose(-1, -2)).double() * scale - error[..., None]
    weighed += at_row[..., None] - running[..., None, :] / LOG2_E
    weighed.masked_fill_((key > query[:, None]) | (key < first[..., None]), -torch.inf)
    bound = logit_bound[..., None].double()
    # A row's own key weighs at least -U.
    mass = bound + (at_row - at_row[..., :1]) - torch.maximum(weighed.logsumexp(dim=-1), -bound)
    return mass.masked_fill_(first > query, -torch.inf).amax(dim=-1)


def _decode_on_cpu(q, k, v, sums, num_keys, first, scale) -> torch.Tensor:
    """Key heads that start at the same key take one call of PyTorch's attention; each reads its own keys, no others.

    The decay is a mask of floats for it. lam_i - lam_j is split at the start of the key's block, so that float64 is
    needed for one number in 128 only.
    """
    num_kv_heads, num_queries = k.shape[1], q.shape[2]
    per_kv_head = (num_kv_heads, q.shape[1] // num_kv_heads)
    within, starts = (x.unflatten(2, per_kv_head) for x in sums)
    first = first.unflatten(1, per_kv_head)  # (B, H_kv, G, T), as the decay below
    lowest, highest = first.amin(dim=(2, 3)).clamp_(max=num_keys - num_queries), first.amax(dim=(2, 3))
    queries = torch.arange(num_keys - num_queries, num_keys)
    # Decay up to the start of each block that any head needs, from the start of the block or at least of the first.
    base = int(lowest.min()) // GATE_BLOCK
    block_starts = starts[..., base : (num_keys - 1) // GATE_BLOCK + 1].double().sum(dim=0)
    at_query = block_starts[..., queries // GATE_BLOCK - base] + within[..., queries].double().sum(dim=0)
    from_start = (at_query[..., None] - block_starts[..., None, :]).float()  # (B, H_kv, G, T, blocks), bits
    rows = q.unflatten(1, per_kv_head).flatten(2, 3)
    out = torch.empty(first.shape + q.shape[-1:], dtype=q.dtype)
    for heads, low, high in _equal_starts(lowest.tolist(), highest.tolist()):
        block = low // GATE_BLOCK
        spread = from_start[heads][..., block - base :, None].expand(*[-1] * 5, GATE_BLOCK).flatten(-2)
        high_part, low_part = (x[heads][..., None, low:num_keys] for x in within)
        decay = spread[..., low - block * GATE_BLOCK :][..., : num_keys - low] - high_part
        decay.sub_(low_part).mul_(1.0 / LOG2_E)
        if num_queries > 1:
            future = torch.ones(num_queries, num_queries, dtype=torch.bool).triu_(1)
            decay[..., -num_queries:].masked_fill_(future, float("-inf"))
        if high > low:
            past = torch.arange(low, min(high, num_keys)) < first[heads][..., None]
            decay[..., : past.shape[-1]].masked_fill_(past, float("-inf"))
        mixed = F.scaled_dot_product_attention(
            rows[heads], k[heads][..., low:num_keys, :], v[heads][..., low:num_keys, :], attn_mask=decay.flatten(2, 3),
            scale=scale,
        )  # fmt: skip
        out[heads] = mixed.view(decay.shape[:-1] + q.shape[-1:])
    if int(highest.max()) > num_keys - num_queries:  # a row of padding has seen nothing
        out.masked_fill_((first > queries)[..., None], 0.0)
    return torch.empty_like(q).copy_(out.flatten(1, 2))


def _equal_starts(lowest: list[list[int]], highest: list[list[int]]):
    """Indices into (B, H_kv), smallest and largest first key: of all if they start alike, else one after another."""
    if all(low == lowest[0][0] for row in lowest for low in row):
        yield (slice(None), slice(None)), lowest[0][0], max(map(max, highest))
        return
    for b, row in enumerate(lowest):
        for h, low in enumerate(row):
            yield (slice(b, b + 1), slice(h, h + 1)), low, highest[b][h]
