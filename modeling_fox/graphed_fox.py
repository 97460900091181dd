# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding steps over an evicting cache for a loop of one's own: fewer kernels, replayed as a CUDA graph.

A step of one token waits for launches and for small kernels, not for arithmetic. `FusedStep` computes what the model
does with one product where several weights meet the same input, and leaves what lies between products and attention
to `torch.compile`. `GraphedStep` replays it as a CUDA graph.

Letters:  B batch, H query heads, H_kv key heads, D head dim, E hidden size, V vocabulary.
"""

import itertools
import types
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .eviction_fox import FoxEvictingCache, Weights, operators

# What a CUDA graph of a step has the addresses of.
READ_BY_A_STEP = (
    "keys", "values", "within", "starts", "totals", "table", "first_key", "lengths", "key_start", "evicted",
    "evicted_at",
)  # fmt: skip
# Rows of a product start at multiples of 16 bytes.
ALIGNED = 64

HOW = ("compiled", "plain")
CHANGED = "`model` must keep its weights under a step that was made of it; they changed. Make a new one."
_steps: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op("modeling_fox::attend_to_pages", mutates_args=())
def attend_to_pages(parts: torch.Tensor, heads: int, dim: int, number: int, layer: int) -> torch.Tensor:
    """`FusedStep.attend_to_pages` of step `number`, `(B, heads, dim)`.

    The pages and the tokens before the shift, which it writes to, are no arguments: they are those of the cache that
    the step is called with. So a compiled step knows nothing of their sizes and keeps no copy.
    """
    return _steps[number].attend_to_pages(layer, parts)


@attend_to_pages.register_fake
def _(parts, heads, dim, number, layer):
    return parts.new_empty(len(parts), heads, dim)


def is_plain(weight: torch.Tensor) -> bool:
    """Whether it is a tensor as such, not a quantized or sharded one that looks like it."""
    return type(weight) in (nn.Parameter, torch.Tensor)


class LayerWeights(NamedTuple):
    """Weights of one layer; what meets the same input is one matrix.

    Attributes:
        inputs: `(N, E)`: queries, keys, values, logits of the key shift, of the value shift and of the forget gates,
            output gate, those that there are; then rows of zeros.
        columns: Where each of the first six starts, None for what there is not.
        ogate: Where the output gate is, or None.
        fgate_bias: `(H,)` fp32, or None without forget gates.
        mlp: `(2 F, E)`: gate and up.
    """

    inputs: torch.Tensor
    columns: tuple[int | None, ...]
    ogate: slice | None
    outputs: torch.Tensor
    fgate_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output_norm: torch.Tensor | None
    before: torch.Tensor
    after: torch.Tensor
    mlp: torch.Tensor
    down: torch.Tensor
    skip_scale: torch.Tensor | None

    @classmethod
    def of(cls, layer: nn.Module):
        """Those of a FoxDecoderLayer. Matrices that are put together are copied, the others are the model's own."""
        attention, mlp = layer.self_attn, layer.mlp
        names = ("q_proj", "k_proj", "v_proj", "k_shift_proj", "v_shift_proj", "fgate_proj", "ogate_proj")
        parts = [getattr(attention, name) for name in names]
        for part in (*parts, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            # By name: the forget gate, a class of its own, may be of code from the Hub.
            if part is None or (type(part).__name__ in ("Linear", "FoxForgetGate") and is_plain(part.weight)):
                continue
            weight = type(getattr(part, "weight", None)).__name__
            raise ValueError(
                f"`model` must have plain linear layers for a fused step; got a {type(part).__name__} with a {weight} "
                "for a weight. Merge adapters first, and leave quantized and sharded models to `model` itself."
            )
        dtypes = {part.weight.dtype for part in parts if part is not None}
        if len(dtypes) > 1:
            raise ValueError(
                f"`model` must be of one dtype for a fused step; got {sorted(map(str, dtypes))}. FoX keeps its gates "
                "in float32 beside float16: load it in bfloat16."
            )
        # Wide ones first, so that they start at multiples of 16 bytes.
        order = sorted(range(len(parts)), key=lambda i: i in (3, 4, 5))
        columns, weights, begin = [None] * len(parts), [], 0
        for i in order:
            if parts[i] is not None:
                weights.append(parts[i].weight)
                columns[i], begin = begin, begin + len(parts[i].weight)
        padding = weights[0].new_zeros(-begin % ALIGNED, weights[0].shape[1])
        ogate = columns.pop()
        bias = attention.fgate_bias if attention.fgate_proj is None else attention.fgate_proj.bias
        norms = [getattr(attention, name) for name in ("q_norm", "k_norm", "output_norm")]
        return cls(
            torch.cat([*weights, padding]).detach(),
            tuple(columns),
            None if ogate is None else slice(ogate, ogate + len(attention.ogate_proj.weight)),
            attention.o_proj.weight.detach(),
            None if bias is None else bias.detach().float(),
            *(None if norm is None else norm.weight.detach() for norm in norms),
            layer.input_layernorm.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach(),
            mlp.down_proj.weight.detach(),
            None if layer.skip_scale is None else layer.skip_scale.detach(),
        )


def one_store(cache: FoxEvictingCache):
    """The pages of a cache that a fused or graphed step can go on from.

    Raises:
        ValueError: If it is another.
    """
    pages = cache.pages
    if len(pages.stores) != 1 or not cache.allows_steps:
        raise ValueError(
            "`cache` must hold a prompt on one device, have no `logit_bound` and not be for assisted decoding; got "
            f"{cache.get_seq_length()} tokens on {len(pages.stores)} devices, logit_bound={pages.logit_bound}, "
            f"recording={cache.layers[0].record_past}. Feed the prompt to the model, or call the model itself."
        )
    (store,) = pages.stores.values()
    return store


def check_tokens(input_ids: torch.Tensor, store) -> None:
    """Refuse what is not one token for each sequence of `store`."""
    if input_ids.shape != (store.batch, 1):
        raise ValueError(
            f"`input_ids` must be ({store.batch}, 1), one token for each sequence of the cache; got "
            f"{tuple(input_ids.shape)}. Feed more tokens to the model itself, and other sequences to a cache of "
            "their own."
        )


class FusedStep:
    """Feeds one token a sequence to a FoX model over an evicting cache: the model's logits, in fewer operations.

    Weights that meet the same input are copied into one matrix, so that they take one product. One object serves any
    number of caches, one call at a time. Dropout is never applied.

    Args:
        model: A `FoxForCausalLM` on one device, without RoPE, with plain linear layers.
        how: `"compiled"`, by `torch.compile`, which takes some seconds for each number of sequences, or `"plain"`, one
            operation after the other.

    Raises:
        ValueError: If the model is not as above, or `how` neither of these.
    """

    def __init__(self, model: nn.Module, how: str = "compiled"):
        base = getattr(model, "model", None)
        if not (hasattr(base, "layers") and hasattr(model, "lm_head")):
            raise ValueError(
                f"`model` must be a FoxForCausalLM; got a {type(model).__name__}. Take the language model itself, and "
                "merge adapters into it first."
            )
        self.model, self.config, self.device = model, model.config, model.device
        devices = sorted({str(x.device) for x in model.parameters()})
        if self.config.use_rope or len(devices) != 1 or devices == ["meta"]:
            raise ValueError(
                "`model` must be on one device, without RoPE, for a fused step; got "
                f"{devices}, use_rope={self.config.use_rope}. Call the model itself."
            )
        if how not in HOW:
            raise ValueError(f"`how` must be one of {HOW}; got {how!r}. Take the first.")
        self.how, self.number, self.cache = how, next(_numbers), None
        _steps[self.number] = self
        self.layers = [LayerWeights.of(layer) for layer in base.layers]
        self.scaling = base.layers[0].self_attn.scaling
        self.act_fn = base.layers[0].mlp.act_fn
        self.ogate_act = getattr(base.layers[0].self_attn, "ogate_act", None)
        self.embeddings = base.embed_tokens.weight.detach()
        self.norm, self.head = base.norm.weight.detach(), model.lm_head.weight.detach()
        self.weights, self.sums = Weights(model, with_address=True), self._sums_of_weights()
        self._compiled, self._seen = {}, weakref.WeakSet()

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, cache: FoxEvictingCache) -> torch.Tensor:
        """Feed `input_ids (B, 1)`, none of them padding; returns the logits `(B, 1, V)`.

        Raises:
            ValueError: If weights changed, `input_ids` has another shape, or `cache` does not hold a prompt, has a
                `logit_bound`, or records tokens that may be taken back.
        """
        store = one_store(cache)
        check_tokens(input_ids, store)
        is_new = store not in self._seen
        if not self.is_current() if is_new else self.weights.have_changed():
            raise ValueError(CHANGED)
        cache.check_weights(self.model.model)
        self._seen.add(store)
        self.cache = cache
        try:
            return self._function(len(input_ids))(self, input_ids)
        finally:
            self.cache = None

    def is_current(self) -> bool:
        """Whether the model still has the weights that this was made of."""
        return not self.weights.have_changed() and torch.equal(self._sums_of_weights(), self.sums)

    def __reduce__(self):
        """None: copies of a model, and models that are read from a file, make a step of their own."""
        return type(None), ()

    @torch.no_grad()
    def _sums_of_weights(self):
        """Looked at once for each prompt: merged adapters are written where no version of a tensor shows it."""
        return torch.stack([x.sum(dtype=torch.float64) for x in self.model.parameters()])

    def _function(self, batch):
        if self.how == "plain":
            return _logits
        if batch not in self._compiled:
            # Code of its own: Dynamo counts how often a function was compiled, of all models and batch sizes.
            own = types.FunctionType(_logits.__code__.replace(), _logits.__globals__, _logits.__name__)
            self._compiled[batch] = torch.compile(own, fullgraph=True, dynamic=False)
        return self._compiled[batch]

    def attend_to_pages(self, layer: int, parts: torch.Tensor) -> torch.Tensor:
        """Attention of one token, `(B, H, D)`, from the products of its layer, `(B, N)`; see `LayerWeights`."""
        weights, kept = self.layers[layer], self.cache.layers[layer]
        (store,) = self.cache.pages.stores.values()
        return operators()[2].paged_step(
            parts, store, layer, weights.columns, past_key=kept.shift_keys, past_value=kept.shift_values,
            q_norm=weights.q_norm, k_norm=weights.k_norm, gate_bias=weights.fgate_bias,
            eps=self.config.qk_norm_eps, scale=self.scaling,
        )  # fmt: skip

    def attend(self, idx: int, weights: LayerWeights, states: torch.Tensor) -> torch.Tensor:
        """Attention of layer `idx`, `(B, E)` to `(B, E)`."""
        config = self.config
        parts = F.linear(states, weights.inputs)
        out = attend_to_pages(parts, config.num_attention_heads, config.head_dim, self.number, idx)
        if weights.output_norm is not None:
            out = torch.rms_norm(out, out.shape[-1:], None, config.rms_norm_eps) * weights.output_norm
        out = out.flatten(1)
        if weights.ogate is not None:
            out = out * self.ogate_act(parts[:, weights.ogate])
        return F.linear(out, weights.outputs)


def _logits(self: FusedStep, input_ids):
    """`(B, 1, V)`; a function of its own for the sake of `FusedStep._function`."""
    eps = self.config.rms_norm_eps
    hidden = embeddings = F.embedding(input_ids[:, 0], self.embeddings)
    for idx, weights in enumerate(self.layers):
        states = torch.rms_norm(hidden, hidden.shape[-1:], weights.before, eps)
        hidden = hidden + self.attend(idx, weights, states)
        states = torch.rms_norm(hidden, hidden.shape[-1:], weights.after, eps)
        gate, up = F.linear(states, weights.mlp).chunk(2, dim=-1)
        hidden = hidden + F.linear(self.act_fn(gate) * up, weights.down)
        if weights.skip_scale is not None:
            hidden = hidden + weights.skip_scale * embeddings
    return F.linear(torch.rms_norm(hidden, hidden.shape[-1:], self.norm, eps), self.head)[:, None]


class GraphedStep:
    """A decoding step of `model` over an evicting cache, replayed as a CUDA graph; for a loop of one's own.

    Recorded anew, after a step without a graph, when the pool or a table has grown, which becomes rare, and when
    sequences were exchanged or the cache was filled anew. The prompt goes through the model itself.

    Args:
        model: A `FusedStep`, or a FoX model itself on one CUDA device, without RoPE, which is slower. A graph computes
            what the model did when it was recorded: adapters that are switched on or off afterwards do not show.
        cache: Evicting cache that holds a prompt of at least one token.

    Raises:
        ValueError: If the model or the cache is not one of the above.

    ```python
    >>> cache, fused = FoxEvictingCache(model.config), FusedStep(model)
    >>> with torch.no_grad():
    ...     logits = model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    >>> step = GraphedStep(fused, cache)
    >>> for _ in range(1000):
    ...     logits = step(logits[:, -1:].argmax(dim=-1))
    ```
    """

    def __init__(self, model: nn.Module | FusedStep, cache: FoxEvictingCache):
        if model.config.use_rope or model.device.type != "cuda":
            raise ValueError(
                "`model` must be on one CUDA device, without RoPE, for a CUDA graph; got "
                f"{model.device}, use_rope={model.config.use_rope}. Call the model itself."
            )
        one_store(cache)
        self.model, self.cache = model, cache
        self.weights = model.weights if isinstance(model, FusedStep) else Weights(model, True)
        # A graph reads them where they were when it was recorded.
        self.kept = [] if isinstance(model, FusedStep) else [x.detach() for x in model.parameters()]
        self.graph = self.input_ids = self.logits = self._addresses = self._seen = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Feed one token a sequence, `(B, 1)`; returns the logits `(B, 1, V)`, overwritten by the next call.

        Raises:
            ValueError: If weights changed, `input_ids` has another shape, or the cache is none to go on from.
        """
        store = one_store(self.cache)
        check_tokens(input_ids, store)
        if self.weights.have_changed():
            raise ValueError(CHANGED)
        self.cache.make_room(1)
        if self.input_ids is None or self.input_ids.shape != input_ids.shape:
            self.input_ids, self._addresses = input_ids.to(store.device, copy=True), None
        self.input_ids.copy_(input_ids)
        # What follows a graph waits for Python: nothing is looked at that cannot have changed.
        seen = (weakref.ref(store), store.changes)
        if seen != self._seen:
            addresses = self._addresses_of(store)
            if addresses != self._addresses:
                # Without a graph, once: kernels are compiled and memory is set up.
                self.graph, self._addresses = None, addresses
                return self._step()
            self._seen = seen
        if self.graph is None:
            self._record(store)
        self.graph.replay()
        store.num_keys = [x + (x > 0) for x in store.num_keys]
        return self.logits

    def _addresses_of(self, store):
        """What a graph is of: the pages, where and how large all is, and whether steps look for what they can skip."""
        tensors = [self.input_ids, *(getattr(store, name) for name in READ_BY_A_STEP)]
        tensors += [x for layer in self.cache.layers for x in (layer.shift_keys, layer.shift_values)]
        skips = [operators()[1].skips_in_steps(store, layer) for layer in range(store.num_layers)]
        return weakref.ref(store), [None if x is None else (x.data_ptr(), x.shape) for x in tensors], skips

    def _record(self, store):
        lengths = list(store.num_keys)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step()
        # Recording moved what Python knows, and nothing on the device.
        store.num_keys = lengths

    def _step(self):
        if isinstance(self.model, FusedStep):
            return self.model(self.input_ids, self.cache)
        return self.model(self.input_ids, past_key_values=self.cache, use_cache=True).logits


__all__ = ["FusedStep", "GraphedStep"]
