"""What the gates decide before any score is computed: their running sums, and which keys a query may see at all.

Letters:  B batch, H query heads, T queries, S keys, N blocks of 128 keys; the queries are the last T of the S
    positions.
Units:    nats, unless a name ends in `_bits`.

One integer per query, `first_key (B, H, T)`, carries everything that hides a prefix of the keys: padding, closed
gates, a sliding window, the sequences before its own when several are packed into one, and (pruning.py) what has
decayed away. It never decreases along T, so every kernel loops over `[first_key, query]` and forward and backward use
the same set of pairs whatever their tile sizes are.
"""

import itertools
import math
from typing import NamedTuple

import torch

try:
    from . import triton_gates
except ImportError:  # no Triton: forgetting_attention.py gives the reason when a CUDA tensor comes
    triton_gates = None

# exp(-1e4) is 0 in every floating format: at or below it a gate counts as closed, and stays out of the running sums.
CLOSED_GATE = -1e4

# Running sums start anew every so many keys, and tiles of keys divide it.
GATE_BLOCK = 128

LOG2_E = 1.0 / math.log(2.0)


class GateSums(NamedTuple):
    """Running sums of the gates in bits, `lam_j = starts[j // 128] + within[j]`, each as a high and a low float32.

    One float32 cannot hold lam: after 131072 tokens at 0.7 nats each it is 9e4 and its last bit 8e-3, an error that
    every query sharing the key sees alike. The difference of two pairs is right to about 1e-7 of itself, and within
    a block the high part alone is right to 1e-7 of the block's decay. Later tokens change no earlier entry.

    Attributes:
        within: `(2, B, H, S)` float32, bits: sum of the gates from the start of the key's block up to the key, `<= 0`.
        starts: `(2, B, H, N)` float32, bits: sum of all gates before the block.
    """

    within: torch.Tensor
    starts: torch.Tensor

    def running(self) -> torch.Tensor:
        """lam, `(B, H, S)` float64, bits."""
        within, starts = (x[0].double() + x[1].double() for x in self)
        return within + starts.repeat_interleave(GATE_BLOCK, dim=-1)[..., : within.shape[-1]]


def split_resets(log_fgate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gates with closed ones set to 0, and the mask of the closed ones; both shaped as `log_fgate`."""
    closed = log_fgate <= CLOSED_GATE
    return log_fgate.masked_fill(closed, 0.0), closed


def split_in_two(x: torch.Tensor) -> torch.Tensor:
    """A float64 tensor as float32 high and low parts, stacked in front: `(2, *x.shape)`."""
    high = x.float()
    return torch.stack((high, (x - high.double()).float()))


def gate_sums(log_fgate: torch.Tensor) -> GateSums:
    """Running sums of the gates `(B, H, S)` float32 nats; closed gates count as 0."""
    gates, _ = split_resets(log_fgate)
    running = gates.double().cumsum(dim=-1).mul_(LOG2_E)
    ends = running[..., GATE_BLOCK - 1 : -1 : GATE_BLOCK]
    starts = torch.cat((torch.zeros_like(running[..., :1]), ends), dim=-1)
    within = running - starts.repeat_interleave(GATE_BLOCK, dim=-1)[..., : running.shape[-1]]
    return GateSums(split_in_two(within), split_in_two(starts))


def first_visible_key(
    log_fgate: torch.Tensor,
    key_start: torch.Tensor | None,
    num_queries: int,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """First key that each query may see, `(B, H, T)` int32: after padding, not before the last closed gate.

    Args:
        window: At most so many keys, the query's own included.
        cu_seqlens: `(sequences + 1,)` integers, where packed sequences start and the last one ends: not before the
            query's own sequence.
    """
    num_keys = log_fgate.shape[-1]
    position = torch.arange(num_keys, device=log_fgate.device, dtype=torch.int32)
    last_reset = (
        torch.where(log_fgate <= CLOSED_GATE, position, 0).cummax(dim=-1).values[..., num_keys - num_queries :]
    )
    if key_start is not None:
        last_reset = torch.maximum(last_reset, key_start.to(torch.int32)[:, None, None])
    query = position[num_keys - num_queries :]
    if window is not None:
        last_reset = torch.maximum(last_reset, query - (window - 1))
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, query.to(cu_seqlens.dtype), right=True) - 1
        last_reset = torch.maximum(last_reset, cu_seqlens[sequence.clamp_(min=0)].to(torch.int32))
    return last_reset.to(torch.int32).contiguous()


def prepare(
    log_fgate: torch.Tensor,
    key_start: torch.Tensor | None,
    num_queries: int,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[GateSums, torch.Tensor]:
    """`gate_sums` and `first_visible_key`; on a GPU in one or two kernels."""
    arguments = (log_fgate, key_start, num_queries, window, cu_seqlens)
    if log_fgate.device.type == "cuda" and triton_gates is not None:
        within, starts, first_key = triton_gates.prepare(*arguments)
        return GateSums(within, starts), first_key
    return gate_sums(log_fgate), first_visible_key(*arguments)


def gate_gradient(
    column_sum: torch.Tensor, log_fgate: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradient of the gates `(B, H, S)` float32, from the sums of dS over queries, `(B, H, S)` float32.

    A gate at t is part of the running sum from t on: `dgate_t = sum_{s >= t} dlam_s` with `dlam = -column_sum`, as the
    sums of dS over keys are 0. Summed in float64: total minus prefix would cancel at great length. A closed gate is no
    number and has no gradient. Of packed sequences each is summed by itself: what rounding leaves of the zeros stays
    where it came from.
    """
    if column_sum.device.type == "cuda" and triton_gates is not None:
        return triton_gates.gate_gradient(column_sum, log_fgate, cu_seqlens)
    inner = [] if cu_seqlens is None else cu_seqlens.tolist()
    dgate = torch.empty_like(column_sum)
    for start, end in itertools.pairwise([0, *inner, column_sum.shape[-1]]):
        dgate[..., start:end] = -column_sum[..., start:end].double().flip(-1).cumsum(-1).flip(-1)
    return dgate.masked_fill_(split_resets(log_fgate)[1], 0.0)
