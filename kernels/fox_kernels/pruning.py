"""Adaptive computation pruning: which keys a query may skip, and the proof of what it loses at most.

Letters:  B batch, H query heads, H_kv key heads, T queries, S keys, D head dim; the queries are the last T of the S
    positions.
Units:    nats, unless a name ends in `_bits`.
"""

import math
from typing import NamedTuple

import torch

from .gates import LOG2_E, GateSums

try:
    from . import triton_pruning
except ImportError:  # no Triton: forgetting_attention.py gives the reason when a CUDA tensor comes
    triton_pruning = None

# Pruning decides on blocks of this many queries by this many keys, on every device, so that results do not depend on
# the tile sizes of a GPU.
PRUNING_BLOCK_T = 128
PRUNING_BLOCK_S = 64

PRUNING_RULES = ("paper",)

# The paper's rule takes its threshold this much lower, relative: the float32 norms of up to 256 channels and the
# threshold's own operations are off by less than 2**-20, the running sums by 2**-47 of themselves.
PAPER_SLACK = 2.0**-16


class PruningStats(NamedTuple):
    """What adaptive computation pruning did in one call.

    Attributes:
        pruned_fraction: `(H,)` float32. Share of the visible (query, key) pairs of a head that were skipped.
        lost_mass_bound: `(H,)` float32. No row of the head lost more attention mass than this to skipping.
    """

    pruned_fraction: torch.Tensor
    lost_mass_bound: torch.Tensor


def prune(
    q: torch.Tensor,
    k: torch.Tensor,
    sums: GateSums,
    first_visible: torch.Tensor,
    key_start: torch.Tensor | None,
    *,
    scale: float,
    rule: str,
    log_tolerance: float,
    logit_bound: torch.Tensor | None,
) -> torch.Tensor:
    """First key that each query attends to after pruning, `(B, H, T)` int32, `>= first_visible`, never decreasing.

    On a GPU one kernel, or two where the bound has to be measured, and nothing waits for the device.

    Args:
        q: `(B, H, T, D)`, last dimension contiguous.
        k: `(B, H_kv, S, D)`, last dimension contiguous.
        sums: From `gates.gate_sums`.
        first_visible: `(B, H, T)` int32, from `gates.first_visible_key`.
        key_start: `(B,)` integers; what is before it may hold anything.
        rule: One of `PRUNING_RULES`.
        log_tolerance: Log of the attention mass that a row may lose.
        logit_bound: At least every `|scale * q . k|`, nats; expands to `(B, H)`. None: measured.
    """
    if q.device.type == "cuda" and triton_pruning is not None:
        return triton_pruning.paper_rule(
            q, k, sums, first_visible, key_start, scale=scale, log_tolerance=log_tolerance, logit_bound=logit_bound
        )
    if logit_bound is None:
        logit_bound = measured_logit_bound(q, k, scale, key_start)
    threshold = pruning_threshold(logit_bound.expand(q.shape[:2]), k.shape[2], log_tolerance)
    return first_kept_key(sums, first_visible, threshold)


def measured_logit_bound(
    q: torch.Tensor, k: torch.Tensor, scale: float, key_start: torch.Tensor | None
) -> torch.Tensor:
    """`|scale| * max ||q|| * max ||k||` of each head, at least every `|logit|` (Cauchy-Schwarz). `(B, H)` float32.

    Summed in float64, so that the order of the sums does not matter: in bfloat16 the bound itself is off by up to 2.6
    nats and the guarantee is gone.
    """
    q_norm, k_norm = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in (q, k))
    if key_start is not None:
        position = torch.arange(k.shape[2], device=k.device)
        padding = position < key_start[:, None, None]
        k_norm = k_norm.masked_fill(padding, 0.0)
        q_norm = q_norm.masked_fill(padding[..., k.shape[2] - q.shape[2] :], 0.0)
    groups = q.shape[1] // k.shape[1]
    return abs(scale) * q_norm.amax(dim=-1).float() * k_norm.amax(dim=-1).float().repeat_interleave(groups, dim=1)


def pruning_threshold(logit_bound: torch.Tensor, num_keys: int, log_pruning_tolerance: float) -> torch.Tensor:
    """A pair may be dropped when its decay is below `-2U - log S + log eps` nats. `(B, H)` float32, as `logit_bound`.

    A pair below it weighs less than `exp(U) * exp(-2U) * eps / S` before normalisation, and the row's own key at least
    `exp(-U)`: the at most S dropped pairs of a row hold less than eps of its mass. Source: "Adaptive Computation
    Pruning for the Forgetting Transformer", arXiv:2504.06949. Lower than that by `PAPER_SLACK`, for rounding.
    """
    threshold = (2.0 * logit_bound.float() + paper_budget(num_keys, log_pruning_tolerance)) * -(1.0 + PAPER_SLACK)
    # A bound that is not a number (padding can hold anything) must never prune.
    return threshold.nan_to_num(nan=float("-inf"))


def paper_budget(num_keys: int, log_pruning_tolerance: float) -> float:
    """`log S - log eps`, nats."""
    return math.log(num_keys) - log_pruning_tolerance


def first_kept_key(sums: GateSums, first_visible: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """First key that each query attends to under the paper's rule, `(B, H, T)` int32, `>= first_visible`.

    A block is dropped when its largest decay, from its last key to its first query, is below the threshold. The
    running sum never increases, so the dropped blocks of a row of blocks are a prefix and one sorted search finds its
    end.

    Args:
        sums: From `gates.gate_sums`.
        first_visible: `(B, H, T)` int32, from `first_visible_key`.
        threshold: `(B, H)` float32, nats, from `pruning_threshold`.
    """
    num_keys, num_queries = sums.within.shape[-1], first_visible.shape[-1]
    offset = num_keys - num_queries
    running = sums.running()
    at_block_end = running[..., PRUNING_BLOCK_S - 1 :: PRUNING_BLOCK_S].contiguous()
    # Gates above 0 are not allowed, but must not break the order that the backward pass relies on.
    at_first_query = running[..., offset::PRUNING_BLOCK_T].flip(-1).cummax(dim=-1).values.flip(-1)
    # Dropped: running[first query] - running[block end] < threshold.
    limit = (threshold * LOG2_E).double()[..., None] - at_first_query
    num_dropped = torch.searchsorted(-at_block_end, limit.contiguous())  # (B, H, blocks of queries)
    return _expand_to_rows(num_dropped, first_visible, num_keys)


def _expand_to_rows(num_dropped: torch.Tensor, first_visible: torch.Tensor, num_keys: int) -> torch.Tensor:
    """First key of every row, `(B, H, T)` int32, from the blocks of keys that its block of queries drops."""
    num_queries, device = first_visible.shape[-1], first_visible.device
    # A block that reaches past its first query holds a decay of 0: never drop it, whatever the gates are.
    first_query = torch.arange(num_keys - num_queries, num_keys, PRUNING_BLOCK_T, device=device)
    num_dropped = torch.minimum(num_dropped, first_query // PRUNING_BLOCK_S)
    kept = (num_dropped * PRUNING_BLOCK_S).to(torch.int32)
    block_of_query = torch.arange(num_queries, device=device) // PRUNING_BLOCK_T
    return torch.maximum(first_visible, kept[..., block_of_query]).contiguous()


def statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    sums: GateSums,
    first_visible: torch.Tensor,
    first_key: torch.Tensor,
    key_start: torch.Tensor | None,
    *,
    scale: float,
    rule: str,
    log_tolerance: float | None,
    logit_bound: torch.Tensor | None,
) -> PruningStats:
    """What `prune` did, from its arguments and its result; a `log_tolerance` of None means that it was not called."""
    if log_tolerance is None:
        return pruning_stats(sums, first_visible, first_key, None)
    if logit_bound is None:
        logit_bound = measured_logit_bound(q, k, scale, key_start)
    return pruning_stats(sums, first_visible, first_key, logit_bound.expand(q.shape[:2]))


def pruning_stats(
    sums: GateSums, first_visible: torch.Tensor, first_key: torch.Tensor, logit_bound: torch.Tensor | None
) -> PruningStats:
    """Count what was skipped and bound what it can have weighed; see `PruningStats`.

    The bound of a row is `skipped * exp(2U + decay of the nearest skipped key)`.
    """
    num_keys, num_queries = sums.within.shape[-1], first_key.shape[-1]
    offset = num_keys - num_queries
    query = torch.arange(offset, num_keys, device=first_key.device)
    # Clamped: a row of padding sees nothing, so it can skip nothing.
    visible = (query + 1 - first_visible).clamp_(min=0)
    skipped = torch.minimum((first_key - first_visible).clamp_(min=0), visible)
    fraction = skipped.double().sum(dim=(0, 2)) / visible.double().sum(dim=(0, 2)).clamp_(min=1)
    if logit_bound is None:
        return PruningStats(fraction.float(), torch.zeros_like(fraction, dtype=torch.float32))
    running = sums.running() / LOG2_E
    nearest = running.gather(-1, (first_key.long() - 1).clamp_(min=0))
    bound = skipped * torch.exp(2.0 * logit_bound.double()[..., None] + running[..., offset:] - nearest)
    bound = torch.where(skipped > 0, bound, 0.0)
    return PruningStats(fraction.float(), bound.amax(dim=(0, 2)).float())
