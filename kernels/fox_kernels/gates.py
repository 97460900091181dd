"""What the gates decide before any score is computed: running sums, visible keys, and which blocks pruning drops.

Letters:  B batch, H query heads, T queries, S keys; the queries are the last T of the S positions.
Units:    nats, unless a name ends in `_bits`.

One integer per query, `first_key (B, H, T)`, carries everything that hides a prefix of the keys: padding, closed
gates and pruning. It never decreases along T, so every kernel loops over `[first_key, query]` and forward and
backward use the same set of pairs whatever their tile sizes are.
"""

import math
from typing import NamedTuple

import torch

# exp(-1e4) is 0 in every floating format: at or below it a gate counts as closed, and stays out of the running sums.
CLOSED_GATE = -1e4

# Pruning decides on blocks of this many queries by this many keys, on every device, so that results do not depend on
# the tile sizes of a GPU.
PRUNING_BLOCK_T = 128
PRUNING_BLOCK_S = 64

PRUNING_RULES = ("paper",)


class PruningStats(NamedTuple):
    """What adaptive computation pruning did in one call.

    Attributes:
        pruned_fraction: `(H,)` float32. Share of the visible (query, key) pairs of a head that were skipped.
        lost_mass_bound: `(H,)` float32. No row of the head lost more attention mass than this to skipping.
    """

    pruned_fraction: torch.Tensor
    lost_mass_bound: torch.Tensor


def split_resets(log_fgate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gates with closed ones set to 0, and the mask of the closed ones; both shaped as `log_fgate`."""
    closed = log_fgate <= CLOSED_GATE
    return log_fgate.masked_fill(closed, 0.0), closed


def running_sum_bits(log_fgate: torch.Tensor) -> torch.Tensor:
    """Running sum of the gates in bits as a pair of floats, `(2, B, H, S)` float32: high part, low part.

    One float32 cannot hold it: after 131072 tokens at 0.7 nats each the sum is 9e4 and its last bit 8e-3, an error
    that every query sharing the key sees alike. The difference of two pairs is right to about 1e-7 of itself.
    """
    gates, _ = split_resets(log_fgate)
    total = gates.double().cumsum(dim=-1).mul_(1.0 / math.log(2.0))
    high = total.float()
    return torch.stack((high, (total - high.double()).float()))


def first_visible_key(log_fgate: torch.Tensor, key_start: torch.Tensor | None, num_queries: int) -> torch.Tensor:
    """First key that each query may see: after padding, and not before the last closed gate. `(B, H, T)` int32."""
    num_keys = log_fgate.shape[-1]
    position = torch.arange(num_keys, device=log_fgate.device, dtype=torch.int32)
    last_reset = (
        torch.where(log_fgate <= CLOSED_GATE, position, 0).cummax(dim=-1).values[..., num_keys - num_queries :]
    )
    if key_start is not None:
        last_reset = torch.maximum(last_reset, key_start.to(torch.int32)[:, None, None])
    return last_reset.to(torch.int32).contiguous()


def measured_logit_bound(
    q: torch.Tensor, k: torch.Tensor, scale: float, key_start: torch.Tensor | None
) -> torch.Tensor:
    """`|scale| * max ||q|| * max ||k||` of each head, at least every `|logit|` (Cauchy-Schwarz). `(B, H)` float32.

    Measured in float32: in bfloat16 the bound itself is off by up to 2.6 nats and the guarantee is gone.
    """
    q_norm = torch.linalg.vector_norm(q, dim=-1, dtype=torch.float32)
    k_norm = torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32)
    if key_start is not None:
        position = torch.arange(k.shape[2], device=k.device)
        k_norm = k_norm.masked_fill(position < key_start[:, None, None], 0.0)
    groups = q.shape[1] // k.shape[1]
    return abs(scale) * q_norm.amax(dim=-1) * k_norm.amax(dim=-1).repeat_interleave(groups, dim=1)


def pruning_threshold(logit_bound: torch.Tensor, num_keys: int, log_pruning_tolerance: float) -> torch.Tensor:
    """A pair may be dropped when its decay is below `-2U - log S + log eps` nats. `(B, H)` float32, as `logit_bound`.

    A pair below it weighs less than `exp(U) * exp(-2U) * eps / S` before normalisation, and the row's own key at least
    `exp(-U)`: the at most S dropped pairs of a row hold less than eps of its mass. Source: "Adaptive Computation
    Pruning for the Forgetting Transformer", arXiv:2504.06949.
    """
    threshold = -2.0 * logit_bound.float() - math.log(num_keys) + log_pruning_tolerance
    # A bound that is not a number (padding can hold anything) must never prune.
    return threshold.nan_to_num(nan=float("-inf"))


def first_kept_key(running_bits: torch.Tensor, first_visible: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """First key that each query attends to after pruning, `(B, H, T)` int32, `>= first_visible`.

    A block is dropped when its largest decay, from its last key to its first query, is below the threshold. The
    running sum never increases, so the dropped blocks of a row of blocks are a prefix and one sorted search finds its
    end.

    Args:
        running_bits: `(2, B, H, S)`, from `running_sum_bits`.
        first_visible: `(B, H, T)` int32, from `first_visible_key`.
        threshold: `(B, H)` float32, nats, from `pruning_threshold`.
    """
    num_keys, num_queries = running_bits.shape[-1], first_visible.shape[-1]
    offset = num_keys - num_queries
    device = running_bits.device
    running = running_bits[0].double() + running_bits[1].double()
    at_block_end = running[..., PRUNING_BLOCK_S - 1 :: PRUNING_BLOCK_S].contiguous()
    at_first_query = running[..., offset::PRUNING_BLOCK_T]
    # Dropped: running[first query] - running[block end] < threshold.
    limit = (threshold.double() / math.log(2.0))[..., None] - at_first_query
    num_dropped = torch.searchsorted(-at_block_end, limit.contiguous())  # (B, H, blocks of queries)
    # A block that reaches past its first query holds a decay of 0: never drop it, whatever the gates are.
    first_query = torch.arange(offset, num_keys, PRUNING_BLOCK_T, device=device)
    num_dropped = torch.minimum(num_dropped, first_query // PRUNING_BLOCK_S)
    kept = (num_dropped * PRUNING_BLOCK_S).to(torch.int32)
    # Gates above 0 are not allowed, but must not break the order that the backward pass relies on.
    kept = kept.flip(-1).cummin(dim=-1).values.flip(-1)
    block_of_query = torch.arange(num_queries, device=device) // PRUNING_BLOCK_T
    return torch.maximum(first_visible, kept[..., block_of_query]).contiguous()


def pruning_stats(
    running_bits: torch.Tensor, first_visible: torch.Tensor, first_key: torch.Tensor, logit_bound: torch.Tensor | None
) -> PruningStats:
    """Count what was skipped and bound what it can have weighed; see `PruningStats`.

    The bound of a row is `skipped * exp(2U + decay of the nearest skipped key)`.
    """
    num_keys, num_queries = running_bits.shape[-1], first_key.shape[-1]
    offset = num_keys - num_queries
    query = torch.arange(offset, num_keys, device=first_key.device)
    # Clamped: a row of padding sees nothing, so it can skip nothing.
    visible = (query + 1 - first_visible).clamp_(min=0)
    skipped = torch.minimum((first_key - first_visible).clamp_(min=0), visible)
    fraction = skipped.double().sum(dim=(0, 2)) / visible.double().sum(dim=(0, 2)).clamp_(min=1)
    if logit_bound is None:
        return PruningStats(fraction.float(), torch.zeros_like(fraction, dtype=torch.float32))
    running = (running_bits[0].double() + running_bits[1].double()) * math.log(2.0)
    nearest = running.gather(-1, (first_key.long() - 1).clamp_(min=0))
    bound = skipped * torch.exp(2.0 * logit_bound.double()[..., None] + running[..., offset:] - nearest)
    bound = torch.where(skipped > 0, bound, 0.0)
    return PruningStats(fraction.float(), bound.amax(dim=(0, 2)).float())
