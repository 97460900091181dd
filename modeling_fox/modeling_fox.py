# Copyright 2026 The FoX project authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The Forgetting Transformer (FoX, arXiv:2503.02130) for Transformers v5.

Letters:  B batch, T new tokens, S cached and new tokens, H query heads, H_kv key heads, D head dim, E hidden size.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .attention_fox import (
    check_attn_implementation,
    default_attn_implementation,
    eager_attention_forward,
    flex_attention_forward,
    sdpa_attention_forward,
)
from .cache_fox import prepare_cache
from .configuration_fox import FoxConfig
from .conversion_fox import LoadsOtherCheckpoints
from .generation_fox import DecodesFox
from .hub_fox import SavesCode
from .masks_fox import make_masks, positions_of_documents, refuse_parts_of_rows

# An instance of its own, so that "sdpa" and "flex_attention" mean ours in this file and Transformers' elsewhere.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward
ALL_ATTENTION_FUNCTIONS["flex_attention"] = flex_attention_forward

# Rounding of normalized queries and keys may lift their norm above what the norm weights say. Each element is rounded
# at most four times a side (norm, weight, product, rotation), by half a unit in the last place: 2^-9, 2^-11, 2^-24.
ROUNDING_MARGIN = {torch.bfloat16: 1 + 2**-5, torch.float16: 1 + 2**-7}
ROUNDING_MARGIN_FP32 = 1 + 2**-14


@use_kernel_forward_from_hub("RMSNorm")
class FoxRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        return torch.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class FoxHeadRMSNorm(nn.Module):
    """RMSNorm over the channels of each head of `(B, T, heads, D)`, with a weight per head or one for all."""

    def __init__(self, num_heads: int, head_dim: int, eps: float, shared: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim) if shared else torch.ones(num_heads, head_dim))
        self.variance_epsilon = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        # In the dtype of the states: under autocast an fp32 weight would make queries and keys fp32, but not values.
        dtype, weight = states.dtype, self.weight
        normalized = torch.rms_norm(states, states.shape[-1:], None, self.variance_epsilon)
        if normalized.dtype == weight.dtype == dtype:
            return normalized * weight
        return normalized.to(dtype) * weight.to(dtype)

    extra_repr = FoxRMSNorm.extra_repr


class FoxRotaryEmbedding(nn.Module):
    """Cosines and sines `(B, T, D)` of the rotary embedding, fp32."""

    def __init__(self, config: FoxConfig):
        super().__init__()
        self.rope_theta = config.rope_theta
        self.head_dim = config.head_dim

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Computed anew, not kept in a buffer: a buffer would follow the model to bf16, where positions beyond 256
        # are no longer told apart.
        exponent = torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=torch.float32) / self.head_dim
        angles = position_ids[..., None].float() * self.rope_theta**-exponent
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel i with channel i + D/2 of `(B, T, heads, D)`, in fp32; the norm of a head stays as it is."""
    first, second = states.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (states * cos[:, :, None] + turned * sin[:, :, None]).to(states.dtype)


class FoxForgetGate(nn.Linear):
    """Logits of the forget gates, `(B, T, E)` to `(B, T, H)`. A class of its own for its initialization."""


class FoxMLP(nn.Module):
    """SwiGLU: `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: FoxConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class FoxAttention(nn.Module):
    """Forgetting attention with the components that the config switches on.

    Attributes:
        gate_sink: Called with the log gates of each forward, `(B, H, T)` fp32; see `forget_gates`.
        pruning_sink: Called with pruned fraction and lost mass bound, `(H,)` each; see `pruning_stats`.
        context_parallel: Set by `enable_context_parallel`, when the T new tokens are a part of longer rows.
    """

    def __init__(self, config: FoxConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.gate_sink: Callable | None = None
        self.pruning_sink: Callable | None = None
        self.context_parallel = None

        hidden_size, num_heads = config.hidden_size, config.num_attention_heads
        num_kv_heads = config.num_key_value_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)

        self.k_shift_proj = self.v_shift_proj = None
        self.q_norm = self.k_norm = self.output_norm = self.ogate_proj = None
        self.fgate_proj = fgate_bias = None
        if config.use_k_shift:  # CODEPATH: FoX (Pro), not FoX (LLaMA)
            self.k_shift_proj = nn.Linear(hidden_size, num_kv_heads, bias=False)
        if config.use_v_shift:  # CODEPATH: FoX (Pro), not FoX (LLaMA)
            self.v_shift_proj = nn.Linear(hidden_size, num_kv_heads, bias=False)
        if config.use_qk_norm:  # CODEPATH: FoX (Pro), not FoX (LLaMA); the published Pro weights are shared by heads
            self.q_norm = FoxHeadRMSNorm(num_heads, self.head_dim, config.qk_norm_eps, config.qk_norm_shared)
            self.k_norm = FoxHeadRMSNorm(num_kv_heads, self.head_dim, config.qk_norm_eps, config.qk_norm_shared)
        if config.use_output_norm:  # CODEPATH: FoX (Pro), not FoX (LLaMA)
            self.output_norm = FoxHeadRMSNorm(num_heads, self.head_dim, config.rms_norm_eps)
        if config.use_output_gate:  # CODEPATH: FoX (Pro), not FoX (LLaMA)
            self.ogate_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
            self.ogate_act = ACT2FN[config.output_gate_act]
        if config.fgate_type == "full":  # CODEPATH: every FoX; the other types are the paper's ablations
            self.fgate_proj = FoxForgetGate(hidden_size, num_heads, bias=True)
        elif config.fgate_type == "bias_only":  # CODEPATH: ablation
            fgate_bias = nn.Parameter(torch.zeros(num_heads))
        elif config.fgate_type == "fixed":  # CODEPATH: ablation
            fgate_bias = nn.Buffer(torch.zeros(num_heads))
        self.fgate_bias = fgate_bias

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        last_real_token: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from T new tokens to all S.

        Args:
            hidden_states: `(B, T, E)`.
            attention_mask: Whatever the mask function of the backend made.
            padding_mask: `(B, T)`, 0 at padding among the new tokens; `None` if there is none.
            last_real_token: `(B, T)`, see `find_last_real_token`; `None` if there is no padding.
            document_starts: `(B, T)` bool, first tokens of packed documents; `None` if nothing is packed.
            position_embeddings: Cosines and sines of the rotary embedding, or `None` without it.
            past_key_values: Cache to read and extend.

        Returns:
            Output `(B, T, E)` and attention weights `(B, H, T, S)`, or `None` for every backend but `eager`.
        """
        input_shape = hidden_states.shape[:-1]
        cache_layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        query = self.q_proj(hidden_states).view(*input_shape, -1, self.head_dim)
        key = self.k_proj(hidden_states).view(*input_shape, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(*input_shape, -1, self.head_dim)
        log_fgate = self.log_forget_gate(hidden_states, num_heads=query.shape[2])
        context = (cache_layer, last_real_token, document_starts)
        if (k_shift_proj := self.k_shift_proj) is not None:
            key = self.shift("keys", key, k_shift_proj(hidden_states), *context)
        if (v_shift_proj := self.v_shift_proj) is not None:
            value = self.shift("values", value, v_shift_proj(hidden_states), *context)
        if padding_mask is not None:
            # Filled, not multiplied: what padding computes may be NaN. Nothing is forgotten over padding.
            is_padding = padding_mask == 0
            key = key.masked_fill(is_padding[:, :, None, None], 0.0)
            value = value.masked_fill(is_padding[:, :, None, None], 0.0)
            log_fgate = log_fgate.masked_fill(is_padding[:, None, :], 0.0)
        if self.gate_sink is not None:
            self.gate_sink(log_fgate.detach())
        if (q_norm := self.q_norm) is not None:
            query, key = q_norm(query), self.k_norm(key)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)

        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache_layer is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            log_fgate = cache_layer.update_gate(log_fgate)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # A cache that gives keys back attends to what it kept.
        attention_interface = getattr(cache_layer, "attend", attention_interface)
        if self.context_parallel is not None:
            attention_interface = partial(self.context_parallel.attend, attention_interface)
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            log_fgate=log_fgate,
            document_starts=document_starts,
            cache_layer=cache_layer,
            **kwargs,
        )
        if (output_norm := self.output_norm) is not None:
            output = output_norm(output)
        output = output.reshape(*input_shape, -1)
        if (ogate_proj := self.ogate_proj) is not None:
            output = output * self.ogate_act(ogate_proj(hidden_states))
        return self.o_proj(output), weights

    def shift(
        self,
        name: str,
        projection: torch.Tensor,
        logits: torch.Tensor,
        cache_layer,
        last_real_token: torch.Tensor | None,
        document_starts: torch.Tensor | None,
    ) -> torch.Tensor:
        """Mix each token's keys or values with those of the token before: `w * previous + (1 - w) * own`.

        Args:
            name: `"keys"` or `"values"`.
            projection: `(B, T, H_kv, D)`.
            logits: `(B, T, H_kv)`; `w = sigmoid(logits)`, in fp32.
            cache_layer: Knows the token before the first new one; `None` if there is none, which stands for zeros.
        """
        before = None if cache_layer is None else cache_layer.past_shift(name)
        if before is None and self.context_parallel is not None:
            before = self.context_parallel.previous_token(projection)
        elif before is None:
            before = torch.zeros_like(projection[:, :1])
        latest, previous = projection, before
        if projection.shape[1] > 1 or last_real_token is not None:
            extended = torch.cat([before, projection], dim=1)
            if last_real_token is not None:
                # Padding takes the place of the last real token, so that the next one looks past the padding.
                index = F.pad(last_real_token, (1, 0))[:, :, None, None].expand_as(extended)
                extended = extended.gather(1, index)
            latest, previous = extended[:, 1:], extended[:, :-1]
        if cache_layer is not None:
            cache_layer.update_shift(name, latest)
        if document_starts is not None:
            previous = previous.masked_fill(document_starts[:, :, None, None], 0.0)
        weight = logits.float().sigmoid().unsqueeze(-1)
        return torch.lerp(projection.float(), previous.float(), weight).to(projection.dtype)

    def log_forget_gate(self, hidden_states: torch.Tensor, num_heads: int) -> torch.Tensor:
        """Natural log of the forget gates of `hidden_states`, `(B, H, T)` fp32 nats, at most 0.

        The logits may be bf16, but not what follows: a score sums up to S of these.
        """
        batch, num_tokens = hidden_states.shape[:2]
        if (fgate_proj := self.fgate_proj) is not None:
            # Its weight can be fp32 beside fp16 ones, see `_keep_in_fp32_modules`.
            logits = fgate_proj(hidden_states.to(fgate_proj.weight.dtype))
            return F.logsigmoid(logits.float()).transpose(1, 2)
        if self.fgate_bias is not None:
            return F.logsigmoid(self.fgate_bias.float())[None, :, None].expand(batch, -1, num_tokens)
        return torch.zeros(batch, num_heads, num_tokens, device=hidden_states.device)

    @torch.no_grad()
    def logit_bound(self, num_heads: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Bound on `|scaling * q . k|` per query head, `(H,)` fp32; `None` without QK-norm.

        A normalized head times its weight is at most `max|weight| * sqrt(D)` long, before and after rotation, so a
        score is at most `max|w_q| * max|w_k| * sqrt(D)`, plus a margin for rounding to `dtype`, that of the queries.

        Raises:
            ValueError: If the weights are offloaded.
        """
        if self.q_norm is None:
            return None
        weights = (self.q_norm.weight, self.k_norm.weight)
        if any(w.device.type == "meta" for w in weights):
            raise ValueError(
                f"`device_map` must keep layer {self.layer_idx} where it computes, to bound its scores for pruning or "
                "an evicting cache; got norms that wait on the CPU or the disk. Set `log_pruning_tolerance` to None, "
                "or take another cache."
            )
        # Tensor parallelism: the local part holds the heads of this rank.
        weights = (w.to_local() if hasattr(w, "to_local") else w for w in weights)
        largest_q, largest_k = (w.detach().float().abs().amax(dim=-1) for w in weights)
        if largest_q.dim():
            largest_k = largest_k.repeat_interleave(largest_q.shape[0] // largest_k.shape[0])
        margin = ROUNDING_MARGIN.get(dtype, ROUNDING_MARGIN_FP32)
        # A weight shared by the heads bounds all of them alike.
        return (largest_q * largest_k * (self.head_dim**0.5 * margin)).expand(num_heads)


class FoxDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention, then MLP, each added to the residual stream; with multi-skip the embeddings too."""

    def __init__(self, config: FoxConfig, layer_idx: int):
        super().__init__()
        self.self_attn = FoxAttention(config, layer_idx)
        self.mlp = FoxMLP(config)
        self.input_layernorm = FoxRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = FoxRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.skip_scale = None
        if config.use_multi_skip:  # CODEPATH: no published FoX; deep networks whose data keep changing
            self.skip_scale = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        embeddings: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + (self.dropout(attended) if self.training else attended)
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        hidden_states = hidden_states + (self.dropout(out) if self.training else out)
        if self.skip_scale is not None:
            hidden_states = hidden_states + self.skip_scale * embeddings
        return hidden_states


@auto_docstring
class FoxPreTrainedModel(SavesCode, LoadsOtherCheckpoints, PreTrainedModel):
    config: FoxConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FoxDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    # False: engines that bring their own attention function (vLLM, TGI) would drop the gates.
    _supports_attention_backend = False
    _can_compile_fullgraph = True
    # Beside fp16 weights, and out of every quantization: a pattern, as some quantizers match names of weights.
    _keep_in_fp32_modules = [".*fgate_proj"]
    _can_record_outputs = {"hidden_states": FoxDecoderLayer, "attentions": FoxAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # By name: Transformers only comes here for modules with parameters of their own.
        bias = module.bias if type(module).__name__ == "FoxForgetGate" else getattr(module, "fgate_bias", None)
        if bias is not None:
            init.copy_(bias, torch.tensor(self.config.initial_forget_gate_bias(), device=bias.device))
        if getattr(module, "skip_scale", None) is not None:
            init.zeros_(module.skip_scale)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention is None:
            requested_attention = default_attn_implementation()
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, allow_all_kernels: bool = False
    ) -> str:
        # Before the parent, which would take the name of a kernel for one of FlashAttention.
        attn_implementation = check_attn_implementation(attn_implementation, allow_all_kernels)
        return super()._check_and_adjust_attn_implementation(attn_implementation, is_init_check)


@auto_docstring
class FoxModel(FoxPreTrainedModel):
    def __init__(self, config: FoxConfig):
        # Again: `from_pretrained(..., fgate_type=...)` changes fields of a config that was checked before.
        config.validate_architecture()
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [FoxDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = FoxRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.rotary_emb = None
        if config.use_rope:  # CODEPATH: no published FoX; Transformer (Pro), the paper's baseline
            self.rotary_emb = FoxRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.context_parallel = None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Only read for packed documents and with `use_rope`. Where they do not go on by one a document starts,
            which sees nothing before it. Packing needs `use_cache=False`. Without them `cu_seq_lens_q`, the
            boundaries of the documents in one row, says the same.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("`input_ids` or `inputs_embeds` must be given; got neither or both. Pass exactly one.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if past_key_values is not None:
            prepare_cache(past_key_values, self)
        elif use_cache:
            past_key_values = DynamicCache(config=self.config)

        # In a pipeline the layers of other stages are identities, whose part of the cache stays empty.
        own = next((idx for idx, layer in enumerate(self.layers) if hasattr(layer, "self_attn")), 0)
        if position_ids is None and kwargs.get("cu_seq_lens_q") is not None:
            position_ids = positions_of_documents(kwargs["cu_seq_lens_q"], inputs_embeds)
        context = (self.config, inputs_embeds, attention_mask, position_ids, past_key_values)
        if self.context_parallel is None:
            if self.training and position_ids is not None and past_key_values is None:
                refuse_parts_of_rows(position_ids)
            masks = make_masks(*context, own)
        else:
            masks, position_ids = self.context_parallel.make_masks(*context)
        num_tokens = inputs_embeds.shape[1]
        # In a static cache this is a tensor that the layers below count up.
        num_seen = 0 if past_key_values is None else past_key_values.get_seq_length(own)
        num_keys = None
        if isinstance(num_seen, torch.Tensor) and num_tokens > 1 and not is_tracing(inputs_embeds):
            # One look at the device for all layers; a step of one token needs none.
            num_keys = int(num_seen) + num_tokens
        position_embeddings = None
        if self.rotary_emb is not None:
            if position_ids is None:
                position_ids = (torch.arange(num_tokens, device=inputs_embeds.device) + num_seen)[None]
            position_embeddings = self.rotary_emb(position_ids)

        hidden_states = self.dropout(inputs_embeds)
        embeddings = None
        if self.config.use_multi_skip:  # CODEPATH: no published FoX; see FoxDecoderLayer
            if not all(hasattr(layer, "self_attn") for layer in self.layers):
                raise ValueError(
                    "`use_multi_skip` must be False in a pipeline: its later stages do not see the embeddings. Split "
                    "the model with `tp_size` in place of `pp_size`."
                )
            embeddings = hidden_states
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                embeddings,
                **masks,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                num_keys=num_keys,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


@auto_docstring
class FoxForCausalLM(DecodesFox, FoxPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: FoxConfig):
        super().__init__(config)
        self.model = FoxModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            As in [`FoxModel`]: where they do not go on by one a packed document starts. Give such a token the label
            -100, or the last token of each document is trained to predict the first of the next.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Targets, the same as `input_ids`: the model shifts them. -100 is ignored.

        ```python
        >>> from modeling_fox import FoxConfig, FoxForCausalLM

        >>> model = FoxForCausalLM(FoxConfig(num_hidden_layers=2))
        >>> loss = model(input_ids, labels=input_ids).loss
        ```"""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["FoxForCausalLM", "FoxModel", "FoxPreTrainedModel"]
