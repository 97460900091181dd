# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""Cache layers of FoX: keys, values, the log forget gates and the token that the shift looks back to.

Defining them enters them in the tables from which `DynamicCache(config=...)`, `StaticCache(config=...)` and `generate`
build their layers. The gates are stored per token: dropping, reordering or continuing a sequence then needs no
correction. Beside them `fox_acp` keeps their running sums, which grow with every token and can be made anew.

Shapes: B batch, H query heads, H_kv key heads, S cached tokens, D head dim.
"""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_torchdynamo_compiling

try:
    from fox_kernels.decode import GrowingSums, append_gates, empty_sums
    from fox_kernels.gates import GateSums
except ImportError:
    append_gates = None

# Gates below this many nats are stored in the sums as this: exp(-9000) is 0 in every format, and the sums would take
# -1e4 for the mark of a closed gate.
LOWEST_GATE = -9000.0


def is_exporting() -> bool:
    """Whether this runs for `torch.export`. Dynamo of PyTorch 2.11 takes `torch.compiler.is_exporting()` for True."""
    return torch.compiler._is_exporting_flag


def use_operator(decode, gates) -> None:
    """Take the running sums from these modules: those of a kernel of the Hub, in place of fox_kernels."""
    global GateSums, GrowingSums, append_gates, empty_sums
    GrowingSums, append_gates, empty_sums = decode.GrowingSums, decode.append_gates, decode.empty_sums
    GateSums = gates.GateSums


def append_to_sums(
    within: torch.Tensor,
    starts: torch.Tensor,
    totals: torch.Tensor,
    log_fgate: torch.Tensor,
    num_keys: torch.Tensor,
) -> None:
    """`fox_kernels.decode.append_gates`, with tensors only."""
    append_gates(GrowingSums(GateSums(within, starts), totals), log_fgate, num_keys)


append_to_sums_op = torch.library.custom_op(
    "modeling_fox::append_to_sums", append_to_sums, mutates_args=("within", "starts", "totals")
)


def spare_length(length: int) -> int:
    """How much longer than what it holds memory is allocated: an eighth, 64 to 4096 tokens."""
    return min(max(length // 8, 64), 4096)


def may_write_in_place() -> bool:
    """Whether a cache may write to memory that it has handed out: autograd keeps it, and Dynamo would have to know."""
    return not (torch.is_grad_enabled() or is_torchdynamo_compiling())


class GrowingMemory:
    """Memory of a tensor that grows along one dimension, with room for what comes next.

    `torch.cat` copies the whole cache for every token: 2.4 ms a layer for 4096 tokens of 12 heads with 64 channels on
    one CPU core, where attention itself takes 4 ms.
    """

    def __init__(self, dim: int):
        self.dim = dim
        self.drop()

    def drop(self) -> None:
        """Give the memory back."""
        self.memory: torch.Tensor | None = None
        self.newest: torch.Tensor | None = None
        self.is_inference = False
        self.used = 0

    def append(self, old: torch.Tensor | None, new: torch.Tensor, in_place: bool = True) -> torch.Tensor:
        """`torch.cat([old, new])`; a view of this memory, into which only `new` is copied if `old` was one too.

        Args:
            in_place: What `may_write_in_place` says; False for `torch.cat` itself.
        """
        if old is None or (old is not self.newest and old.numel() == 0):
            return new
        if not in_place:
            self.drop()
            return torch.cat([old, new], dim=self.dim)
        self.make_room(old, new.shape[self.dim]).copy_(new)
        return self.newest

    def make_room(self, old: torch.Tensor, num_new: int) -> torch.Tensor:
        """The places for `num_new` entries after `old`, to be written to; `newest` is then `old` with them."""
        dim, memory, length = self.dim, self.memory, old.shape[self.dim]
        end = length + num_new
        if self.is_inference and not torch.is_inference_mode_enabled():
            memory = None
        if memory is None or end > memory.shape[dim] or not (old is self.newest or self._ends_with(old)):
            shape = list(old.shape)
            shape[dim] = end + spare_length(end)
            self.memory = memory = old.new_empty(shape)
            self.is_inference = memory.is_inference()
            memory.narrow(dim, 0, length).copy_(old)
        self.used = end
        self.newest = memory.narrow(dim, 0, end)
        return memory.narrow(dim, length, num_new)

    def _ends_with(self, old: torch.Tensor) -> bool:
        """Whether `old` is all that is in this memory."""
        return (
            # A copy of the layer may have gone on from the same tokens: then they are not the last any more.
            self.used == old.shape[self.dim]
            and self.memory.data_ptr() == old.data_ptr()
            and self.memory.stride() == old.stride()
            and self.memory.shape[0] == old.shape[0]
        )

    def shorten(self, length: int) -> None:
        """Only the first `length` entries are in use any more."""
        self.used, self.newest = min(self.used, length), None


class Offloads:
    """Mixin of cache layers whose keys and values wait on the CPU for their turn, and return on a stream of their own.

    Transformers lets that stream wait for nothing, and its memory be used again while it is still read.
    """

    _is_back: torch.Event | None = None

    def offload(self):
        """Move keys and values to the CPU."""
        super().offload()
        if self.is_initialized and self.device.type != "cpu":
            self._is_on_cpu = torch.Event(self.device)
            self._is_on_cpu.record()

    def prefetch(self):
        """Move keys and values back, on the stream that is current; the default one is to wait for it."""
        if not self.is_initialized or self.keys.device == self.device:
            return
        self._is_on_cpu.wait()
        super().prefetch()
        for states in (self.keys, self.values):
            states.record_stream(torch.cuda.default_stream(self.device))
        self._is_back = torch.Event(self.device)
        self._is_back.record()

    def wait_for_keys(self):
        """Before keys and values are touched outside of `update`, for which Transformers waits itself."""
        if self._is_back is not None:
            self._is_back.wait()


class FoxDynamicLayer(Offloads, DynamicLayer):
    """Cache of one layer that grows with the sequence.

    Attributes:
        keys, values: `(B, H_kv, S, D)`, after shift, norm and rotation.
        log_fgate: `(B, H, S)` fp32 nats, `None` before the first token.
        shift_keys, shift_values: Projections of the last token before the shift, `(B, 1, H_kv, D)`; between
            `activate_past_recording` and the crops that follow, those of every token since, `(B, n, H_kv, D)`.
    """

    _layer_type = "forgetting_attention"

    def __init__(self, **kwargs):
        super().__init__()
        self.record_past = False
        self._drop_own_states()

    def _drop_own_states(self):
        self.log_fgate: torch.Tensor | None = None
        self.shift_keys: torch.Tensor | None = None
        self.shift_values: torch.Tensor | None = None
        dims = {"keys": -2, "values": -2, "log_fgate": -1, "decay": -1}
        self._memory = {name: GrowingMemory(dim) for name, dim in dims.items()}
        self._in_place = False
        self._drop_sums()

    def _drop_sums(self):
        self._decay = self._last_decay = None
        self._sums = None
        self._num_summed = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append keys and values of new tokens, `(B, H_kv, T, D)`, and return all of them.

        What was returned before keeps its contents until tokens that it holds are cropped and others take their place.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        memory, self._in_place = self._memory, may_write_in_place()
        self.keys = memory["keys"].append(self.keys, key_states, self._in_place)
        self.values = memory["values"].append(self.values, value_states, self._in_place)
        return self.keys, self.values

    def update_gate(self, log_fgate: torch.Tensor) -> torch.Tensor:
        """Append the gates of new tokens, `(B, H, T)` fp32 nats, and return all of them, `(B, H, S)`.

        Must follow the `update` with the same tokens.
        """
        self.log_fgate = self._memory["log_fgate"].append(self.log_fgate, log_fgate, self._in_place)
        return self.log_fgate

    def decay_to_last(self, dtype: torch.dtype) -> torch.Tensor | None:
        """How much each cached token has decayed at the last one, `(B, H, S)` nats: the sum of the gates after it.

        A difference of running sums in fp64, to which every call adds the gates that came since the one before. In
        memory whose rows start at multiples of 16 bytes, as kernels for GPUs want it. `None` where gradients or a
        compiler need to see how it comes about, and on devices without fp64.
        """
        gates, decay = self.log_fgate, self._decay
        if not self._in_place or gates.is_mps:
            return None
        num_keys, num_summed = gates.shape[-1], 0 if decay is None else decay.shape[-1]
        if num_summed == 0:
            decay = gates.double().cumsum(dim=-1)
            last = decay[..., -1:]
        elif num_summed < num_keys:
            is_step = num_keys - num_summed == 1
            new = gates[..., num_summed:]
            last = self._last_decay if self._last_decay is not None else decay[..., -1:]
            room = self._memory["decay"].make_room(decay, num_keys - num_summed)
            torch.add(last, new if is_step else new.double().cumsum(dim=-1), out=room)
            decay, last = self._memory["decay"].newest, room if is_step else room[..., -1:]
        else:
            last = decay[..., -1:]
        self._decay, self._last_decay = decay, last
        out = decay.new_empty((*decay.shape[:2], -(-num_keys // 8) * 8), dtype=dtype)[..., :num_keys]
        return torch.sub(last, decay, out=out)

    def gate_sums(self):
        """Running sums of all cached gates, for `fox_kernels.decode.forgetting_attention_decode`.

        The work is that of the gates that came since the last call. Where the memory is too short, or sequences were
        exchanged, they are summed anew: 64 times fewer numbers than the keys that had to be copied then.
        """
        num_keys = self.log_fgate.shape[-1]
        sums = self._sums
        if (
            sums is None
            or sums.totals.shape[-1] * 128 < num_keys
            or (sums.totals.is_inference() and not torch.is_inference_mode_enabled())
        ):
            length = num_keys + spare_length(num_keys)
            self._sums = sums = empty_sums(*self.log_fgate.shape[:2], -(-length // 128) * 128, self.log_fgate.device)
            self._num_summed = 0
        new = self.log_fgate[..., self._num_summed :].clamp(min=LOWEST_GATE)
        append_gates(sums, new, self._num_summed)
        self._num_summed = num_keys
        return sums.sums

    def offload(self):
        """Move keys and values to the CPU, and give back their memory here."""
        for name in ("keys", "values"):
            self._memory[name].drop()
        super().offload()

    def past_shift(self, name: str) -> torch.Tensor | None:
        """Projection of the last token before the shift, `(B, 1, H_kv, D)`, or `None` at the start of a sequence.

        Args:
            name: `"keys"` or `"values"`.
        """
        state = getattr(self, f"shift_{name}")
        return state if state is None or state.shape[1] == 1 else state[:, -1:]

    def update_shift(self, name: str, projection: torch.Tensor) -> None:
        """Remember the projections of the new tokens before the shift, `(B, T, H_kv, D)`, if needed."""
        kept = projection
        if self.record_past:
            past = getattr(self, f"shift_{name}")
            kept = projection if past is None else torch.cat([past, projection], dim=1)
        elif projection.shape[1] > 1:
            # A copy: a slice would keep the projections of the whole prompt alive.
            kept = projection[:, -1:].clone()
        setattr(self, f"shift_{name}", kept)

    def activate_past_recording(self):
        """From now on keep what the shift needs to go back, until the next `crop`. Assisted decoding calls this."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, and the recording. 0 only trims the recording.

        Raises:
            RuntimeError: If the token that would become the last was not recorded. Cropping to nothing always works.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` must be 0 or negative; got {tokens_to_remove}. Pass -n to remove n tokens."
            )
        num_left = self.get_seq_length() + tokens_to_remove
        if num_left <= 0:
            self.reset()
            return
        # Both shifts are looked at before anything changes, so that an error leaves the cache as it was.
        shifts = [self._cropped_shift(state, tokens_to_remove) for state in (self.shift_keys, self.shift_values)]
        super().crop(tokens_to_remove)
        self.log_fgate = self.log_fgate[..., :num_left]
        self._decay, self._last_decay = None if self._decay is None else self._decay[..., :num_left], None
        for memory in self._memory.values():
            memory.shorten(num_left)
        # From the start of a block the sums go on with the same bits.
        self._num_summed = min(self._num_summed, num_left // 128 * 128)
        self.shift_keys, self.shift_values = shifts

    def _cropped_shift(self, state: torch.Tensor | None, tokens_to_remove: int) -> torch.Tensor | None:
        if state is None:
            return None
        num_left = state.shape[1] + tokens_to_remove
        if num_left < 1:
            raise RuntimeError(
                f"`tokens_to_remove` must reach back at most {state.shape[1] - 1} tokens; got {tokens_to_remove}. "
                "Call `activate_past_recording()` on the cache before the tokens that may be removed: the token "
                "shift cannot be undone without their projections."
            )
        return state[:, num_left - 1 : num_left].clone()

    def reset(self) -> None:
        """Drop every token."""
        # Own code, as 5.17 zeroes what 5.23 drops, and `update` appends to zeroed keys.
        self.keys = self.values = None
        self.is_initialized = False
        self._drop_own_states()

    def _map_own_states(self, change) -> None:
        for name in ("log_fgate", "shift_keys", "shift_values"):
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, change(state))
        self._drop_sums()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace sequence b by sequence `beam_idx[b]`."""
        self.wait_for_keys()
        super().reorder_cache(beam_idx)
        self._map_own_states(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, copies side by side."""
        self.wait_for_keys()
        super().batch_repeat_interleave(repeats)
        self._map_own_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences `indices`."""
        self.wait_for_keys()
        super().batch_select_indices(indices)
        self._map_own_states(lambda state: state[indices, ...])


class FoxStaticLayer(Offloads, StaticLayer):
    """Cache of one layer in tensors of fixed shape and address, for `torch.compile`.

    Attributes as in `FoxDynamicLayer`, with `S = max_cache_len` throughout: places not yet filled hold zeros and are
    masked. A zero shift state is what the first token of a sequence sees, so none has to be told apart.
    """

    _layer_type = "forgetting_attention"

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(max_cache_len=max_cache_len)
        self.log_fgate: torch.Tensor | None = None
        self.shift_keys: torch.Tensor | None = None
        self.shift_values: torch.Tensor | None = None
        self._sums = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate everything from the shapes and dtypes of the first keys and values, `(B, H_kv, T, D)`."""
        super().lazy_initialization(key_states, value_states)
        self.shift_keys = key_states.new_zeros((self.batch_size, 1, self.num_heads, self.k_head_dim))
        self.shift_values = value_states.new_zeros((self.batch_size, 1, self.num_heads, self.v_head_dim))
        self._allocate_gate(self.num_heads)
        if not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(self.shift_keys)
            torch._dynamo.mark_static_address(self.shift_values)

    def _allocate_gate(self, num_heads: int) -> None:
        self.log_fgate = torch.zeros(
            (self.batch_size, num_heads, self.max_cache_len), dtype=torch.float32, device=self.device
        )
        self._sums = None
        if not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(self.log_fgate)

    def update_gate(self, log_fgate: torch.Tensor) -> torch.Tensor:
        """Write the gates of new tokens, `(B, H, T)` fp32 nats, and return the whole buffer `(B, H, max_cache_len)`.

        Must follow the `update` with the same tokens, which allocates and moves the write position on.
        """
        if self.log_fgate.shape[1] != log_fgate.shape[1]:
            # Keys and values do not tell how many query heads share them, so grouped queries are only seen here.
            self._allocate_gate(log_fgate.shape[1])
        num_new = log_fgate.shape[-1]
        position = torch.arange(num_new, device=self.device) + (self.cumulative_length - num_new)
        self.log_fgate.index_copy_(2, position, log_fgate)
        if self._sums is not None:
            self._append_to_sums(log_fgate, self.cumulative_length - num_new)
        return self.log_fgate

    def _append_to_sums(self, log_fgate: torch.Tensor, num_keys: torch.Tensor) -> None:
        # The op only where a compiler needs it: a look at the tensor would break its graph.
        append = append_to_sums_op if is_torchdynamo_compiling() else append_to_sums
        (within, starts), totals = self._sums
        append(within, starts, totals, log_fgate.detach().clamp(min=LOWEST_GATE), num_keys)

    def gate_sums(self):
        """As in `FoxDynamicLayer`, for all `max_cache_len` places; `cumulative_length` says how many are in use.

        Made at the first call, which must not be in compiled code, and from then on kept up by `update_gate`.
        """
        if self._sums is None:
            batch, num_heads, num_keys = self.log_fgate.shape
            self._sums = empty_sums(batch, num_heads, -(-num_keys // 128) * 128, self.device)
            # All places: those not filled hold zeros and add nothing.
            self._append_to_sums(self.log_fgate, torch.zeros_like(self.cumulative_length))
            if not is_torchdynamo_compiling():
                for state in self._sum_states():
                    torch._dynamo.mark_static_address(state)
        return self._sums.sums

    def _sum_states(self) -> tuple[torch.Tensor, ...]:
        return () if self._sums is None else (*self._sums.sums, self._sums.totals)

    def past_shift(self, name: str) -> torch.Tensor | None:
        """As in `FoxDynamicLayer`; zeros at the start of a sequence once the memory is there."""
        # A copy: `update_shift` writes to the buffer before the copy is used.
        return getattr(self, f"shift_{name}").clone() if self.is_initialized else None

    def update_shift(self, name: str, projection: torch.Tensor) -> None:
        """Remember the projection of the last of the new tokens before the shift, `(B, T, H_kv, D)`."""
        if not self.is_initialized:
            heads_first = projection.transpose(1, 2)
            self.lazy_initialization(heads_first, heads_first)
        getattr(self, f"shift_{name}").copy_(projection[:, -1:])

    def reset(self) -> None:
        """Forget every token, keep the memory."""
        super().reset()
        if self.is_initialized:
            for state in (self.log_fgate, self.shift_keys, self.shift_values, *self._sum_states()):
                state.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace sequence b by sequence `beam_idx[b]`, in place."""
        self.wait_for_keys()
        if self.is_initialized:
            for state in (self.keys, self.values, self.log_fgate, self.shift_keys, self.shift_values):
                state.copy_(state.index_select(0, beam_idx.to(state.device)))
            for state in self._sum_states():
                batch_dim = state.dim() - 3
                state.copy_(state.index_select(batch_dim, beam_idx.to(state.device)))


def prepare_cache(cache: Cache, model: PreTrainedModel) -> None:
    """Make sure that `cache` can hold the gates; an empty `DynamicCache()` built without a config is filled in place.

    Raises:
        ValueError: If the cache already holds keys but no gates, or is of a kind that cannot hold them; if it is
            static and the model is being exported; or if it drops tokens and is of other weights.
    """
    if cache.is_compileable and is_exporting():
        raise ValueError(
            "`past_key_values` must not be a static cache when the model is exported: what Transformers writes for "
            "ExecuTorch keeps keys and values from step to step, but no gates. Export with `use_cache=False`."
        )
    # Not by isinstance: code loaded from the Hub has a second set of classes with the same methods.
    kinds = {type(layer) for layer in cache.layers}
    if kinds and all(hasattr(kind, "update_gate") for kind in kinds):
        if hasattr(cache, "check_weights"):
            cache.check_weights(model)
        return
    is_empty = all(type(layer) is DynamicLayer and layer.get_seq_length() == 0 for layer in cache.layers)
    if type(cache) is DynamicCache and is_empty:
        cache.layers = DynamicCache(config=model.config).layers
        cache.layer_class_to_replicate = None
        return
    raise ValueError(
        f"`past_key_values` must hold forget gates beside keys and values; got a {type(cache).__name__} without them. "
        "Build it with `DynamicCache(config=model.config)` or `StaticCache(config=model.config, max_cache_len=...)`, "
        "or pass None. Quantized caches and prefix tuning have no place for the gates."
    )


__all__ = ["FoxDynamicLayer", "FoxStaticLayer", "prepare_cache"]
