# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""A cache that forgets for good what the gates have decayed away, with a bound on what that can change.

With QK-norm every score lies in [-U, U], U from the norm weights alone. A token that has decayed by D weighs at most
exp(U + D) against exp(-U) of the query's own token, now and, as D only falls further, at every later query. So once

    log sum of exp(D) over a prefix  <=  log_pruning_tolerance - 2 U      for every query head that shares the keys

the prefix can never again hold more than `exp(log_pruning_tolerance)` of any row of attention, and is dropped. The sum
runs over everything dropped so far as well: the tolerance is spent once, not at every eviction. The theorem, with its
conditions and roundings, is in `kernels/README.md`.

Letters:  L layers, B batch, H query heads, H_kv key heads, T new tokens, S tokens so far, D head dim.
"""

import inspect
import math
import weakref
from importlib import import_module
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig, configuration_utils

from . import attention_fox
from .cache_fox import FoxDynamicLayer

try:
    from fox_kernels import paged, paged_attention, paged_step
except ImportError:
    paged = paged_attention = paged_step = None

STALE = (
    "`past_key_values` must be computed with the present weights; they were updated since, or are those of another "
    "model. Build a new cache, and feed the tokens that should be remembered again."
)


def operators():
    """`paged`, `paged_attention` and `paged_step` of fox_kernels, or of the kernel of the Hub in its place.

    Raises:
        ImportError: If there is neither.
    """
    if paged is not None:
        return paged, paged_attention, paged_step
    if attention_fox.hub_kernel is None:
        raise ImportError(
            "An evicting cache needs the package fox_kernels, which is not installed. Run "
            "`pip install 'fox-transformers[kernels]'`, or use DynamicCache(config=model.config)."
        )
    package = attention_fox.forgetting_attention.__module__.rpartition(".")[0]
    return tuple(import_module(f"{package}.{name}") for name in ("paged", "paged_attention", "paged_step"))


# Pages come and go by what Python knows: a compiled model leaves its graph for them. `FusedStep` need not.
outside_of_compilation = torch.compiler.disable


class CacheReport(NamedTuple):
    """What an evicting cache holds.

    Attributes:
        num_tokens: Tokens that it has read.
        live_keys: `(L, B, H_kv)` int32 on the CPU, keys that are still there.
        full_keys: Keys that a cache of everything would hold, of all layers, sequences and heads.
        memory_bytes: See `FoxEvictingCache.memory_bytes`.
        lost_mass_bound: See `FoxEvictingCache.lost_mass_bound`.
        is_proven: Whether that is at most what `log_pruning_tolerance` promises; else `max_cache_bytes` was too small.
    """

    num_tokens: int
    live_keys: torch.Tensor
    full_keys: int
    memory_bytes: int
    lost_mass_bound: float
    is_proven: bool

    def __str__(self) -> str:
        live = int(self.live_keys.sum())
        return (
            f"{self.num_tokens} tokens, {live} of {self.full_keys} keys live ({live / max(self.full_keys, 1):.2%}; "
            f"{int(self.live_keys.min()) if live else 0} to {int(self.live_keys.max()) if live else 0} a head), "
            f"{self.memory_bytes / 2**20:.1f} MiB, at most {self.lost_mass_bound:.1e} of a row of attention lost "
            f"({'proven' if self.is_proven else 'NOT within the tolerance: max_cache_bytes is too small for it'})"
        )


class Weights:
    """The weights that a model has now, to see later whether it still has them; cheap enough for every step.

    Shows weights that were written to or exchanged, and modules that others took the place of, such as adapters. What
    is written through `.data` does not show. Holds on to nothing.

    Args:
        with_address: Show, too, that the model was moved or cast, by where its first weight is. Not where weights are
            sharded, and have other memory each time that they are gathered.
    """

    def __init__(self, model: nn.Module, with_address: bool = False):
        self.model, self.with_address = weakref.ref(model), with_address
        # Not those that wait on the CPU or the disk for their turn, which is another tensor each time, and not those
        # that count no versions.
        tracked = [x for x in model.parameters() if x.device.type != "meta" and not x.is_inference()]
        self.parameters = [weakref.ref(x) for x in tracked]
        self.parents = [weakref.ref(x) for x in model.modules() if x._modules]
        self.state = self._state()

    def have_changed(self, model: nn.Module | None = None) -> bool:
        """Whether they are others now, or those of another model than `model`."""
        return self.state != self._state() or (model is not None and self.model() is not model)

    def _state(self):
        try:
            return (
                [x()._version for x in self.parameters],
                [id(child) for x in self.parents for child in x()._modules.values()],
                self.parameters[0]().data_ptr() if self.with_address and self.parameters else None,
            )
        except AttributeError:  # of None, where one is gone
            return None


class _Pages:
    """What the layers of a cache share: the pages of each device, and where every sequence starts."""

    def __init__(self, config, log_pruning_tolerance, page_size, max_cache_bytes, logit_bound):
        self.num_layers = config.num_hidden_layers
        self.log_pruning_tolerance, self.page_size = log_pruning_tolerance, page_size
        self.max_cache_bytes, self.logit_bound = max_cache_bytes, logit_bound
        self.drop_all()

    def drop_all(self):
        self.stores = {}
        self.key_start: torch.Tensor | None = None
        self.has_begun = True  # every sequence has a token that is not padding
        self.is_between = False  # a token is in the shift of a layer and not yet in its pages

    def store(self, query: torch.Tensor, key: torch.Tensor):
        """The pages on the device of `query (B, H, T, D)` and `key (B, H_kv, T, D)`, made if there are none yet."""
        if query.device not in self.stores:
            self.stores[query.device] = self._new_store(query, key)
        return self.stores[query.device]

    def _new_store(self, query, key):
        if self.stores and self.max_cache_bytes is not None:
            raise ValueError(
                "`max_cache_bytes` must be None where layers are on several devices; got "
                f"{self.max_cache_bytes}. Put the model on one device."
            )
        (batch, num_heads, _, head_dim), num_kv_heads = query.shape, key.shape[1]
        options = {"page_size": self.page_size, "log_tolerance": self.log_pruning_tolerance}
        options |= {"dtype": key.dtype, "device": key.device}
        with torch.inference_mode(False):
            store = operators()[0].PagedKeys(self.num_layers, batch, num_heads, num_kv_heads, head_dim, **options)
        if self.max_cache_bytes is not None:
            # Every head keeps the page that it writes to, and 16 new tokens may begin another.
            least = 2 * self.num_layers * batch * num_kv_heads
            store.max_pages = self.max_cache_bytes // store.page_bytes()
            if store.max_pages < least:
                raise ValueError(
                    f"`max_cache_bytes` must be at least {least * store.page_bytes()}, two pages of "
                    f"{self.page_size} tokens for each of {self.num_layers} layers, {batch} sequences and "
                    f"{num_kv_heads} key heads; got {self.max_cache_bytes}. Take smaller pages or fewer sequences."
                )
        if self.key_start is not None:
            store.key_start = self.key_start.to(key.device)
        return store

    def num_tokens(self) -> int:
        return max((max(store.num_keys) for store in self.stores.values()), default=0)

    def set_key_start(self, key_start: torch.Tensor) -> None:
        """Hide what is before `key_start`, `(B,)` int32, of each sequence."""
        self.key_start = key_start
        for device, store in self.stores.items():
            store.key_start = key_start.to(device)
            store.changes += 1


class FoxEvictingLayer(FoxDynamicLayer):
    """One layer of a `FoxEvictingCache`, which attends to its pages itself: see `attend`."""

    _layer_type = None  # a subclass that keeps the name would become every FoX model's layer once it is imported

    def __init__(self, pages: _Pages, layer_idx: int):
        self.pages, self.layer_idx = pages, layer_idx
        super().__init__()

    def _drop_own_states(self):
        super()._drop_own_states()
        self.longest_key: torch.Tensor | None = None

    def _store(self):
        return next((x for x in self.pages.stores.values() if x.num_keys[self.layer_idx]), None)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Nothing yet: `attend` stores them. Returns them as they are."""
        return key_states, value_states

    def update_gate(self, log_fgate: torch.Tensor) -> torch.Tensor:
        """Nothing yet, as `update`."""
        return log_fgate

    @outside_of_compilation
    def attend(self, module, query, key, value, attention_mask, scaling, log_fgate, **kwargs):
        """In place of a backend: store T new tokens and attend from them to all that is live, whatever the backend.

        Args:
            module: The attention layer, for the bound on its scores.
            query: `(B, H, T, D)`; key, value: `(B, H_kv, T, D)`; log_fgate: `(B, H, T)` fp32 nats. New tokens only.
            attention_mask: Not looked at: the cache knows what is hidden.

        Returns:
            `(B, T, H, D)` and None.

        Raises:
            ValueError: If a score is beyond the given bound, or the pages do not fit the tensors.
        """
        own = self._store()
        if own is not None and own.device != query.device:
            raise ValueError(
                f"`past_key_values` must be on the device of its layer, {query.device}; got pages on {own.device}. "
                "Build a new cache after the model was moved."
            )
        store = self.pages.store(query, key)
        if self.pages.logit_bound is not None:
            self._check_scores(query, key, scaling)
        if not store.is_bounded[self.layer_idx]:
            bound = self.pages.logit_bound
            if bound is None:
                bound = module.logit_bound(query.shape[1], query.dtype)
            else:
                bound = torch.full((query.shape[1],), float(bound))
            store.set_logit_bound(self.layer_idx, bound)
        out = operators()[1].paged_attention(
            query, key, value, log_fgate, store, self.layer_idx, scale=scaling, may_evict=not self.record_past
        )
        self.pages.is_between = False
        return out.transpose(1, 2), None

    def _check_scores(self, query, key, scaling):
        """Compare the bound that was given with the longest query and the longest key so far; waits for the device."""
        longest = key.detach().float().norm(dim=-1).amax(dim=(0, 2))
        if self.longest_key is not None:
            longest = torch.maximum(longest, self.longest_key)
        queries = query.detach().float().norm(dim=-1).amax(dim=(0, 2))
        largest = float((queries * longest.repeat_interleave(len(queries) // len(longest))).amax()) * abs(scaling)
        # 2^-12: the norms are summed in fp32. NaN is refused as well.
        if not largest * (1 + 2**-12) <= self.pages.logit_bound:
            raise ValueError(
                f"`logit_bound` must be at least every |scaling * q . k|; got {self.pages.logit_bound}, and a query "
                f"of layer {self.layer_idx} may reach {largest:.2f}. What was dropped could matter to it: give a "
                "larger bound to a new cache, or use DynamicCache(config=model.config)."
            )
        self.longest_key = longest

    @outside_of_compilation
    def get_seq_length(self) -> int:
        """Tokens so far, dropped ones included."""
        store = self._store()
        return 0 if store is None else store.num_keys[self.layer_idx]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of a mask, and its offset."""
        return self.get_seq_length() + query_length, 0

    @outside_of_compilation
    def past_shift(self, name: str) -> torch.Tensor | None:
        """As in `FoxDynamicLayer`; a copy, as `update_shift` writes to the same memory."""
        past = super().past_shift(name)
        return None if past is None else past.clone()

    @outside_of_compilation
    def update_shift(self, name: str, projection: torch.Tensor) -> None:
        """As in `FoxDynamicLayer`, in place, so that a CUDA graph finds it again."""
        past = getattr(self, f"shift_{name}")
        newest, self.pages.is_between = projection[:, -1:].detach(), True
        if self.record_past:
            with torch.inference_mode(False), torch.no_grad():
                super().update_shift(name, projection.detach())
        elif past is None or past.shape != newest.shape or past.is_inference():
            with torch.inference_mode(False):
                setattr(self, f"shift_{name}", newest.clone(memory_format=torch.contiguous_format))
        else:
            past.copy_(newest)

    def activate_past_recording(self):
        """As in `FoxDynamicLayer`; from now on nothing is dropped on account of tokens that may be taken back.

        Raises:
            ValueError: With `max_cache_bytes`, which may have to drop something at any time.
        """
        if self.pages.max_cache_bytes is not None:
            raise ValueError(
                f"`max_cache_bytes` must be None for assisted decoding, which goes back; got "
                f"{self.pages.max_cache_bytes}. The proof alone bounds the memory."
            )
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; see `FoxDynamicLayer`.

        Raises:
            ValueError: If something was dropped for good since the token that would become the last.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` must be 0 or negative; got {tokens_to_remove}. Pass -n to remove n tokens."
            )
        tokens_to_remove = int(tokens_to_remove)  # Transformers 5.17 gives a tensor
        num_left = max(self.get_seq_length() + tokens_to_remove, 0)
        shifts = (None, None)
        if num_left:
            shifts = [self._cropped_shift(state, tokens_to_remove) for state in (self.shift_keys, self.shift_values)]
        store = self._store()
        if store is not None:
            store.crop(self.layer_idx, num_left)
        self.shift_keys, self.shift_values = shifts

    def reset(self) -> None:
        """Drop every token, of all layers."""
        self._drop_own_states()
        self.pages.drop_all()

    def offload(self):
        """Refused: pages stay where the attention is."""
        raise ValueError("an evicting cache cannot be offloaded: what is live is small. Pass `offloading=False`.")

    # The cache moves the pages of all layers at once.
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Only the states before the shift; see `FoxEvictingCache.reorder_cache`."""
        self._map_own_states(lambda state: state.index_select(0, beam_idx.to(state.device)))


class FoxEvictingCache(Cache):
    """Cache whose memory follows what the model still remembers, not what it has read; for any model of FoX layers.

    `model.generate(..., cache_implementation="fox")` builds one, with `cache_config` as its options, or pass one as
    `past_key_values`. Every head of every layer and sequence keeps its own range of tokens, in pages that go back to a
    pool. `get_seq_length` counts all tokens that were read. Beams share pages; padding must be on the left. Attention
    is computed by fox_kernels, whatever `attn_implementation` says, without gradients. With a `compile_config`
    `generate` feeds each token after the prompt by a `FusedStep`, on a CUDA device by a `GraphedStep`.

    Args:
        config: That of the model.
        log_pruning_tolerance: Natural log of the attention mass that a row may lose to all dropped tokens together,
            negative; -10.0 allows 4.5e-5.
        page_size: Tokens of a page, a power of 2, at least 16. A head drops whole pages only.
        max_cache_bytes: What keys, values and decays may take at most; tables of page numbers, a few percent, come on
            top. Where it is not enough, the most decayed pages of all heads go first, and `report` tells what that may
            have cost in place of the proof. Default: None, no limit.
        logit_bound: U for a model without QK-norm, nats. Every step compares it with the longest query and key, which
            waits for the device, and refuses to go on beyond it. Default: None, from the weights of QK-norm.

    Raises:
        ValueError: If an option is not one of the above, or there is no bound.
        ImportError: Without fox_kernels.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        log_pruning_tolerance: float = -10.0,
        page_size: int = 64,
        max_cache_bytes: int | None = None,
        logit_bound: float | None = None,
    ):
        if not hasattr(config, "use_qk_norm"):
            raise ValueError(
                f"`config` must be that of a FoX model; got a {type(config).__name__}. Pass `model.config`; other "
                "models have no gates that would say what can be dropped."
            )
        if logit_bound is None and not config.use_qk_norm:
            raise ValueError(
                "`use_qk_norm` must be True for safe eviction; got False. Without it a later query could be long "
                "enough to see what was dropped: pass `logit_bound`, which is then checked at every step."
            )
        if logit_bound is not None and not 0.0 < logit_bound < math.inf:
            raise ValueError(f"`logit_bound` must be a positive number of nats; got {logit_bound}. Try 20.")
        if log_pruning_tolerance is None or not log_pruning_tolerance < 0.0:
            raise ValueError(
                "`log_pruning_tolerance` is the log of a probability and must be negative; got "
                f"{log_pruning_tolerance}. For 4.5e-5 pass -10.0."
            )
        if not isinstance(page_size, int) or page_size < 16 or page_size & (page_size - 1):
            raise ValueError(f"`page_size` must be a power of 2 and at least 16; got {page_size!r}. Take 64.")
        if max_cache_bytes is not None and not (isinstance(max_cache_bytes, int) and max_cache_bytes > 0):
            raise ValueError(
                f"`max_cache_bytes` must be a positive whole number; got {max_cache_bytes!r}. A gigabyte is 10**9; "
                "None is no limit."
            )
        operators()
        self.pages = _Pages(config, log_pruning_tolerance, page_size, max_cache_bytes, logit_bound)
        self.weights: Weights | None = None
        super().__init__(layers=[FoxEvictingLayer(self.pages, i) for i in range(config.num_hidden_layers)])

    @outside_of_compilation
    def hide_padding(self, attention_mask: torch.Tensor | None, batch: int, num_new: int) -> torch.Tensor | None:
        """Take note of where sequences start, and make room for single tokens; the model calls it before its layers.

        Args:
            attention_mask: `(B, S)`, 0 at padding, new tokens included; None if there is none.
            batch: B.
            num_new: T.

        Returns:
            The last T columns, or None if they hold no padding.

        Raises:
            ValueError: If padding is anywhere but before the first token, the mask has other dimensions, or the cache
                holds another number of sequences.
        """
        held = next((store.batch for store in self.pages.stores.values()), batch)
        if held != batch:
            raise ValueError(
                f"`past_key_values` must hold as many sequences as there are new ones, {batch}; got {held}. Build a "
                "new cache, or take some of them by `batch_select_indices`."
            )
        if num_new <= operators()[0].MAX_STEP:
            # Here, where nothing has changed yet: where there is no room the token can be fed again.
            self.make_room(num_new)
        if attention_mask is None:
            return None
        width = self.get_seq_length() + num_new
        if attention_mask.dim() != 2 or attention_mask.shape[1] != width:
            raise ValueError(
                f"`attention_mask` must be (batch, {width}) with an evicting cache, tokens so far and new ones; got "
                f"{tuple(attention_mask.shape)}. Use DynamicCache(config=model.config) for other masks."
            )
        real = attention_mask != 0
        new = real[:, width - num_new :]
        if new.all():
            new = None
            if self.pages.has_begun and num_new < width:
                return None
        first = torch.where(real.any(dim=1), real.int().argmax(dim=1), width)
        position = torch.arange(width, device=real.device)
        if not torch.equal(real, position >= first[:, None]):
            raise ValueError(
                "`attention_mask` must be 0 before the first token of a sequence only, with an evicting cache; got "
                "padding after it. Pad on the left, or use DynamicCache(config=model.config)."
            )
        self.pages.has_begun = bool((first < width).all())
        if first.any():
            first = first.int()
            if self.pages.key_start is not None:  # an episode may have begun since
                first = torch.maximum(first, self.pages.key_start.to(first))
            self.pages.set_key_start(first)
        return new

    @property
    def allows_steps(self) -> bool:
        """Whether fused steps may go on from it: no score is checked, and no token may be taken back."""
        return self.pages.logit_bound is None and not self.layers[0].record_past

    @outside_of_compilation
    def check_weights(self, model: nn.Module | None = None) -> None:
        """Refuse to go on after a weight update. A FoxModel calls it before every token.

        Args:
            model: That will read the cache; remembered with the first token. Default: None, not looked at.

        Raises:
            ValueError: If the weights are not those with which the cached tokens were computed; see `Weights`.
        """
        if model is not None and len(self.layers) != model.config.num_hidden_layers:
            raise ValueError(
                f"`past_key_values` must be built with the config of its model, of {model.config.num_hidden_layers} "
                f"layers; got {len(self.layers)}. Pass `FoxEvictingCache(model.config)`."
            )
        if model is not None:
            self._check_layers(model)
        if self.pages.num_tokens() == 0:
            self.weights = None if model is None else Weights(model)
        elif self.weights is not None and self.weights.have_changed(model):
            raise ValueError(STALE)

    def _check_layers(self, model):
        """Every layer that `model` has here (of a pipeline a part) must have read the same tokens."""
        held = [n for store in self.pages.stores.values() for n in store.num_keys if n]
        own = sum(hasattr(x, "self_attn") for x in model.layers)
        if self.pages.is_between or (held and (len(set(held)) > 1 or len(held) != own)):
            raise ValueError(
                f"`past_key_values` must hold the same tokens in all of {own} layers; got {sorted(set(held))} in "
                f"{len(held)} of them: a call was interrupted, for want of memory or by a signal. Build a new cache."
            )

    def start_over(self, which: torch.Tensor) -> None:
        """The next token of the sequences `which`, `(B,)` bool, is the first of a new episode: it sees none before."""
        if not self.pages.stores:
            return
        for store in self.pages.stores.values():
            store.start_over(which)
        self.pages.key_start = store.key_start
        for layer in self.layers:
            for name in ("shift_keys", "shift_values"):
                state = getattr(layer, name)
                if state is not None:
                    setattr(layer, name, state.masked_fill(which.to(state.device)[:, None, None, None], 0.0))

    def evict(self) -> int:
        """Look now for what can be dropped; returns the number of pages. It happens by itself once a page."""
        return sum(store.evict() for store in self.pages.stores.values())

    def make_room(self, num_new: int) -> None:
        """What a step of up to 16 tokens needs done by Python: look for what can be dropped, and allocate pages.

        Raises:
            ValueError: If `max_cache_bytes` is not enough for what may not be dropped.
            torch.OutOfMemoryError: If the device has no room for more pages; the cache is as it was then.
        """
        for store in self.pages.stores.values():
            for layer, length in enumerate(store.num_keys):
                # Looked at here, too: it is all that most steps come to, and they wait for it.
                if length and length + num_new > store.pages_end[layer] * store.page_size:
                    store.make_room(layer, num_new)

    def lost_mass_bound(self) -> float:
        """Largest share of a row of attention that dropped tokens can have had so far, in [0, 1].

        What single steps skip besides is not in it: with what was dropped it stays within the tolerance.
        """
        bounds = [
            float((store.worst + 2.0 * store.logit_bound[:, None])[store.worst > -torch.inf].max())
            for store in self.pages.stores.values()
            if (store.worst > -torch.inf).any()
        ]
        return min(1.0, math.exp(min(max(bounds, default=-math.inf), 0.0)))

    def report(self) -> CacheReport:
        """What is live, what it takes and what it may have cost; waits for the device."""
        stores = self.pages.stores.values()
        live = sum((store.live_keys().cpu() for store in stores), torch.zeros((), dtype=torch.int32))
        length, bound = self.pages.num_tokens(), self.lost_mass_bound()
        is_proven = bound <= math.exp(self.pages.log_pruning_tolerance)
        return CacheReport(length, live, live.numel() * length, self.memory_bytes(), bound, is_proven)

    def memory_bytes(self) -> int:
        """Bytes held: the pools, used or not, tables of pages, and what the shifts look back to."""
        shifts = [x for layer in self.layers for x in (layer.shift_keys, layer.shift_values) if x is not None]
        total = sum(x.numel() * x.element_size() for x in shifts)
        return total + sum(store.memory_bytes() for store in self.pages.stores.values())

    def _take_sequences(self, index: torch.Tensor) -> None:
        for store in self.pages.stores.values():
            store.take_sequences(index)
            self.pages.key_start = store.key_start
        for layer in self.layers:
            layer.reorder_cache(index)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace sequence b by sequence `beam_idx[b]`; full pages are shared, not copied."""
        self._take_sequences(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, copies side by side."""
        batch = next(iter(self.pages.stores.values())).batch if self.pages.stores else 0
        self._take_sequences(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences `indices`."""
        batch = next(iter(self.pages.stores.values())).batch if self.pages.stores else 0
        self._take_sequences(torch.arange(batch)[indices.cpu()])


def make_evicting_cache(config: PreTrainedConfig, generation_config: GenerationConfig) -> FoxEvictingCache:
    """For `generate`: `generation_config.cache_config` may hold the options of `FoxEvictingCache`."""
    options = generation_config.cache_config or {}
    if not isinstance(options, dict):
        raise ValueError(
            f"`cache_config` must be a dict of options of FoxEvictingCache; got a {type(options).__name__}. For one "
            "gigabyte pass {'max_cache_bytes': 10**9}."
        )
    known = list(inspect.signature(FoxEvictingCache).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"`cache_config` may hold {known} with cache_implementation='fox'; got {unknown}. Leave them out."
        )
    cache = FoxEvictingCache(config, **options)
    if generation_config.is_assistant:
        cache.activate_past_recording()
    return cache


# What `GenerationConfig` lets through as `cache_implementation`.
if "fox" not in configuration_utils.ALL_CACHE_IMPLEMENTATIONS:
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS += ("fox",)

__all__ = ["CacheReport", "FoxEvictingCache", "FoxEvictingLayer", "make_evicting_cache"]
