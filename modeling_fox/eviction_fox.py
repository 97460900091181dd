# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""A cache that forgets for good what the gates have decayed away, with a bound on what that can change.

With QK-norm every score lies in [-U, U], U from the norm weights alone. A token that has decayed by D weighs at most
exp(U + D) against exp(-U) of the query's own token, now and, as D only falls further, at every later query. So once

    log sum of exp(D) over a prefix  <=  log_tolerance - 2 U      for every head and sequence

the prefix can never again hold more than `exp(log_tolerance)` of any row of attention, and is dropped. The sum runs
over everything dropped so far as well: the tolerance is spent once, not at every eviction. What this needs: static
norms (QK-norm) and no way back, so `crop` is refused, and it does not hold after the weights change.

Letters:  B batch, H query heads, S cached tokens.
"""

import copy

import torch
from transformers.cache_utils import Cache

from .cache_fox import FoxDynamicLayer
from .modeling_fox import FoxAttention


class FoxEvictingLayer(FoxDynamicLayer):
    """`FoxDynamicLayer` that can drop its oldest tokens, and start single sequences of the batch over.

    Attributes:
        start: First cached token of each sequence that belongs to its present episode, `(B,)` int64.
        evicted_mass: Log of the sum of exp(D) over all dropped tokens, as of the newest token, `(B, H)` fp32 nats.
    """

    _layer_type = None  # a subclass that keeps the name would become every FoX model's layer once it is imported

    def _drop_own_states(self):
        super()._drop_own_states()
        self.start: torch.Tensor | None = None
        self.evicted_mass: torch.Tensor | None = None

    def update_gate(self, log_fgate: torch.Tensor) -> torch.Tensor:
        """As in `FoxDynamicLayer`; what was dropped decays with the rest."""
        if self.start is None:
            self.start = torch.zeros(log_fgate.shape[0], dtype=torch.long, device=log_fgate.device)
            self.evicted_mass = torch.full(log_fgate.shape[:2], -torch.inf, device=log_fgate.device)
        self.evicted_mass = self.evicted_mass + log_fgate.detach().sum(dim=-1)
        return super().update_gate(log_fgate)

    def start_over(self, which: torch.Tensor) -> None:
        """The next token of the sequences `which`, `(B,)` bool, is the first of an episode and sees nothing before."""
        if self.start is None:
            return
        self.start = torch.where(which, self.get_seq_length(), self.start)
        self.evicted_mass = self.evicted_mass.masked_fill(which[:, None], -torch.inf)
        for name in ("shift_keys", "shift_values"):
            state = getattr(self, name)
            if state is not None:
                # Not in place: with gradients it may be a part of the graph.
                setattr(self, name, state.masked_fill(which[:, None, None, None], 0.0))

    def num_droppable(self, largest_mass: torch.Tensor) -> int:
        """Oldest tokens that may be dropped.

        Args:
            largest_mass: `log_tolerance - 2 U` per head, `(H,)` fp32.
        """
        gates = self.log_fgate
        # D of token j: the gates after j. Summed from the end, so that it is exact where it is small.
        decay = gates.flip(-1).cumsum(dim=-1).flip(-1) - gates
        position = torch.arange(gates.shape[-1], device=gates.device)
        decay = decay.masked_fill((position < self.start[:, None])[:, None], -torch.inf)
        mass = torch.logaddexp(decay.logcumsumexp(dim=-1), self.evicted_mass[..., None])
        return int((mass <= largest_mass[:, None]).all(dim=0).all(dim=0).sum())

    def drop(self, num_tokens: int) -> None:
        """Forget the oldest `num_tokens` and give their memory back."""
        gates = self.log_fgate
        decay = gates.flip(-1).cumsum(dim=-1).flip(-1) - gates
        position = torch.arange(gates.shape[-1], device=gates.device)
        decay = decay.masked_fill((position < self.start[:, None])[:, None], -torch.inf)
        dropped = decay[..., :num_tokens].logsumexp(dim=-1)
        self.evicted_mass = torch.logaddexp(self.evicted_mass, dropped)
        self.keys = self.keys[:, :, num_tokens:].clone()
        self.values = self.values[:, :, num_tokens:].clone()
        self.log_fgate = gates[..., num_tokens:].clone()
        self.start = (self.start - num_tokens).clamp(min=0)
        for memory in self._memory.values():
            memory.memory = None
        self._drop_sums()

    def memory_bytes(self) -> int:
        """Bytes held: keys, values, gates with the room they grow into, running sums and shifts."""
        states = [self.shift_keys, self.shift_values, self.start, self.evicted_mass]
        for name, memory in self._memory.items():
            states.append(getattr(self, name) if memory.memory is None else memory.memory)
        if self._sums is not None:
            states += [*self._sums.sums, self._sums.totals]
        return sum(x.numel() * x.element_size() for x in states if x is not None)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused unless nothing is removed.

        Raises:
            ValueError: What was dropped was dropped for queries after the newest token, not for earlier ones.
        """
        if tokens_to_remove:
            raise ValueError(
                f"`tokens_to_remove` must be 0 in an evicting cache; got {tokens_to_remove}. It cannot go back: use "
                "DynamicCache(config=model.config) for speculative decoding."
            )
        super().crop(tokens_to_remove)

    def _map_own_states(self, change) -> None:
        super()._map_own_states(change)
        for name in ("start", "evicted_mass"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))


class FoxEvictingCache(Cache):
    """Cache whose memory stays bounded over endless sequences, for any model that is built of FoX layers.

    All layers hold the same tokens: a prefix goes when the slowest head of the model has forgotten it. With several
    sequences pass `attention_mask=cache.attention_mask(T)` to the model; it hides what lies before `start_over`.

    Args:
        model: The model that will write to the cache; its QK-norm weights give the bound on the scores.
        log_tolerance: Natural log of the attention mass that all dropped tokens together may have had in a row,
            negative; -10.0 allows 4.5e-5.
        every: Tokens between two looks at what may be dropped.

    Raises:
        ValueError: Without QK-norm there is no static bound; with RoPE the positions would shift.
    """

    def __init__(self, model: torch.nn.Module, log_tolerance: float = -10.0, every: int = 32):
        attention = [module for module in model.modules() if isinstance(module, FoxAttention)]
        if not attention:
            raise ValueError(f"`model` must have FoX layers; got {type(model).__name__} without any.")
        config = attention[0].config
        if not config.use_qk_norm:
            raise ValueError(
                "`use_qk_norm` must be True for safe eviction; got False. Without it a later query could be long "
                "enough to see what was dropped."
            )
        if config.use_rope:
            raise ValueError("`use_rope` must be False for eviction; got True: positions count the cached tokens.")
        if log_tolerance >= 0:
            raise ValueError(
                f"`log_tolerance` is the log of a probability and must be negative; got {log_tolerance}. "
                "For 4.5e-5 pass -10.0."
            )
        if every < 1:
            raise ValueError(f"`every` must be at least 1; got {every}.")
        super().__init__(layers=[FoxEvictingLayer() for _ in attention])
        self.log_tolerance, self.every = log_tolerance, every
        self._attention = attention
        self._version = self.weight_version()
        self._since = 0
        dtype = attention[0].q_proj.weight.dtype
        heads = config.num_attention_heads
        # The bound has a margin for rounding the scores; 1e-3 is one for the fp32 sums over gates.
        self._largest_mass = [log_tolerance - 1e-3 - 2 * module.logit_bound(heads, dtype) for module in attention]

    def __deepcopy__(self, memo):
        # A copy of the cached tokens, for a look ahead; the model is the same.
        memo |= {id(module): module for module in self._attention}
        copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def weight_version(self) -> int:
        """Changes whenever an optimizer, or anything else that works in place, touches a weight of the layers."""
        return sum(parameter._version for module in self._attention for parameter in module.parameters())

    def check_weights(self) -> None:
        """Refuse to go on after a weight update.

        Raises:
            ValueError: If the weights are not those with which the cached tokens were computed.
        """
        if self.get_seq_length() and self.weight_version() != self._version:
            raise ValueError(
                "`past_key_values` must be computed with the present weights; they were updated since. Build a new "
                "cache, and feed the tokens that should be remembered again."
            )

    def attention_mask(self, num_new: int = 1) -> torch.Tensor | None:
        """`(B, S + num_new)` int64, 0 before the present episode of each sequence; None if none started over."""
        start = self.layers[0].start
        if start is None or not bool(start.any()):
            return None
        position = torch.arange(self.get_seq_length() + num_new, device=start.device)
        return (position >= start[:, None]).long()

    def start_over(self, which: torch.Tensor) -> None:
        """The next token of the sequences `which`, `(B,)` bool, is the first of a new episode."""
        for layer in self.layers:
            layer.start_over(which)

    @torch.no_grad()
    def evict(self, force: bool = False) -> int:
        """Drop what can never matter again; returns the number of tokens. Call it after every forward pass.

        Looks only every `every` calls, and drops only what is an eighth of the cache or 32 tokens, because it copies
        the rest.

        Args:
            force: Look now, and drop whatever there is.
        """
        self._since += 1
        if not force and self._since < self.every:
            return 0
        self._since = 0
        length = self.get_seq_length()
        if length == 0:
            return 0
        number = min(
            layer.num_droppable(largest.to(layer.log_fgate.device))
            for layer, largest in zip(self.layers, self._largest_mass, strict=True)
        )
        if number == 0 or (not force and number < min(32, length // 8)):
            return 0
        for layer in self.layers:
            layer.drop(number)
        return number

    def lost_mass_bound(self) -> float:
        """Largest share of a row of attention that the dropped tokens can have had; at most exp(log_tolerance)."""
        bounds = [
            float((layer.evicted_mass.cpu() + self.log_tolerance - 1e-3 - largest.cpu()).max())
            for layer, largest in zip(self.layers, self._largest_mass, strict=True)
            if layer.evicted_mass is not None
        ]
        return float(torch.tensor(max(bounds, default=-torch.inf)).exp())

    def memory_bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.memory_bytes() for layer in self.layers)


__all__ = ["FoxEvictingCache", "FoxEvictingLayer"]
