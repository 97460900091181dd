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
"""Configuration of the Forgetting Transformer (FoX)."""

import math

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .conversion_fox import fox_config_dict
from .parallel_fox import HEAD_NORM_STYLE

LAYER_TYPE = "forgetting_attention"
"""The one entry of `layer_types`; cache layers and masks are registered with Transformers under this name."""

FGATE_TYPES = ("full", "bias_only", "fixed", "none")
OUTPUT_GATE_ACTS = ("sigmoid", "silu")
PRUNING_RULES = ("tight", "paper")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
MLP_WIDTH_MULTIPLE = 256
REPLICATED_STYLE = "replicated_with_grad_allreduce"


# auto_docstring would put a generic text around this complete one.  trf-ignore: TRF057
@strict
class FoxConfig(PreTrainedConfig):
    r"""
    Configuration of a [`FoxModel`]. The defaults give FoX (Pro), [`FoxConfig.llama`] gives FoX (LLaMA).

    Sources: Forgetting Transformer, arXiv:2503.02130; adaptive computation pruning, arXiv:2504.06949.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000):
            Number of token ids; rows of the embedding and of the output layer.
        hidden_size (`int`, *optional*, defaults to 768):
            Channels of the residual stream.
        intermediate_size (`int`, *optional*):
            Channels inside the MLP. `None` derives `256 * ceil(floor(hidden_size * hidden_ratio * 2 / 3) / 256)`.
        hidden_ratio (`float`, *optional*, defaults to 3.5):
            Width of the MLP relative to `hidden_size`, counted as if it had two matrices instead of three. Only read
            when `intermediate_size` is `None`. The published models use 4.0 (LLaMA) and 3.5 (Pro, which pays for the
            output gate with it).
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of blocks, each attention plus MLP.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of query heads. Each has a forget gate of its own.
        num_key_value_heads (`int`, *optional*):
            Number of key and value heads; must divide `num_attention_heads`. `None` means `num_attention_heads`.
        head_dim (`int`, *optional*):
            Channels of a head. `None` means `hidden_size / num_attention_heads`.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the gate branch of the MLP, a name in `transformers.activations.ACT2FN`.
        hidden_dropout (`float`, *optional*, defaults to 0.0):
            Probability, in [0, 1), with which a channel is set to 0 in training: of the embeddings, and of what
            attention and MLP add to the residual stream. Attention weights are never dropped. The published models
            use none.
        max_position_embeddings (`int`, *optional*, defaults to 16384):
            Context length in tokens that the model is meant for. FoX has no position table, so no output depends on
            it: tools read it as the length to evaluate or to truncate at.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal distribution from which matrices are initialized.
        rms_norm_eps (`float`, *optional*, defaults to 1e-06):
            Added to the mean square in every RMSNorm except the QK-norm.
        qk_norm_eps (`float`, *optional*, defaults to 1e-05):
            The same for the RMSNorm of queries and keys.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether a forward call returns a cache unless it is told otherwise.
        pad_token_id (`int`, *optional*):
            Id of the padding token; its embedding is initialized with zeros and gets no gradient.
        bos_token_id (`int`, *optional*):
            Id of the token that begins a text.
        eos_token_id (`int` or `list[int]`, *optional*):
            Id(s) of the token that ends a text, at which generation stops.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the output layer is the transposed embedding.
        use_qk_norm (`bool`, *optional*, defaults to `True`):
            RMSNorm over the channels of each query and key head. It also bounds the attention scores by the norm
            weights, from which pruning takes its threshold without looking at the data.
        qk_norm_shared (`bool`, *optional*, defaults to `False`):
            One QK-norm weight `(head_dim,)` for all heads instead of `(num_heads, head_dim)`. The published Pro
            checkpoints share it.
        use_output_gate (`bool`, *optional*, defaults to `True`):
            Multiply the attention output by a gate computed from the layer input.
        output_gate_act (`str`, *optional*, defaults to `"sigmoid"`):
            Activation of that gate, `"sigmoid"` or `"silu"`.
        use_output_norm (`bool`, *optional*, defaults to `True`):
            RMSNorm over the channels of each head of the attention output, before the gate.
        use_k_shift (`bool`, *optional*, defaults to `True`):
            Mix each key with the key of the previous token, by a weight in (0, 1) per token and head.
        use_v_shift (`bool`, *optional*, defaults to `True`):
            The same for values.
        use_rope (`bool`, *optional*, defaults to `False`):
            Rotary position embedding on queries and keys. The decay tells distances apart, so FoX needs none.
        rope_theta (`float`, *optional*, defaults to 500000.0):
            Base of the rotary frequencies. Only read with `use_rope`.
        use_multi_skip (`bool`, *optional*, defaults to `False`):
            After every block, add the embeddings of the tokens times a number that the block learns and that starts
            at 0, so that an untrained model is the same with and without. The multi-skip residual of
            arXiv:2506.15544, which has 1 in place of that number, keeps gradients alive in deep networks of agents.
        fgate_type (`str`, *optional*, defaults to `"full"`):
            Forget gate of head h at token t: `"full"` sigmoid(w_h x_t + b_h); `"bias_only"` sigmoid(b_h), learned;
            `"fixed"` the same, not learned; `"none"` 1, ordinary softmax attention.
        fgate_decay_time_min (`float`, *optional*):
            Decay time of head 0 at initialization, in tokens: its gate starts at `exp(-1 / time)`, so that this many
            tokens forget all but 1/e. Set together with `fgate_decay_time_max`. `None` starts every bias at 0, a gate
            of one half.
        fgate_decay_time_max (`float`, *optional*):
            Decay time of the last head, in tokens; the heads between are spaced geometrically.
        log_pruning_tolerance (`float`, *optional*):
            Natural log of the attention mass that a query may lose to skipped key blocks, negative; -10.0 allows
            4.5e-5. `None` computes every block. Only `attn_implementation="fox_acp"` prunes.
        pruning_rule (`str`, *optional*, defaults to `"tight"`):
            How the blocks to skip are found. `"paper"` is the published threshold on the gates; `"tight"` adds up
            what the blocks weigh, skips more and costs more to decide.

    Raises:
        ValueError: If a value is out of range or two values contradict each other.

    ```python
    >>> from modeling_fox import FoxConfig, FoxForCausalLM

    >>> model = FoxForCausalLM(FoxConfig(num_hidden_layers=2, log_pruning_tolerance=-10.0))
    ```
    """

    model_type = "fox"
    keys_to_ignore_at_inference = ["past_key_values"]

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.k_shift_proj": "colwise",
        "layers.*.self_attn.v_shift_proj": "colwise",
        "layers.*.self_attn.fgate_proj": "colwise",
        "layers.*.self_attn.ogate_proj": "colwise",
        "layers.*.self_attn.q_norm": HEAD_NORM_STYLE,
        "layers.*.self_attn.k_norm": HEAD_NORM_STYLE,
        "layers.*.self_attn.output_norm": HEAD_NORM_STYLE,
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | None = None
    hidden_ratio: float | int = 3.5
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    hidden_dropout: float | int = 0.0
    max_position_embeddings: int = 16384
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    qk_norm_eps: float | int = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    use_qk_norm: bool = True
    qk_norm_shared: bool = False
    use_output_gate: bool = True
    output_gate_act: str = "sigmoid"
    use_output_norm: bool = True
    use_k_shift: bool = True
    use_v_shift: bool = True
    use_rope: bool = False
    rope_theta: float | int = 500000.0
    use_multi_skip: bool = False
    fgate_type: str = "full"
    fgate_decay_time_min: float | int | None = None
    fgate_decay_time_max: float | int | None = None
    log_pruning_tolerance: float | int | None = None
    pruning_rule: str = "tight"

    def __post_init__(self, **kwargs):
        # The checks run here too, not only in the `@strict` validators: those wrap every ValueError in an error of
        # their own class, and the derived values below must not be computed from nonsense.
        self._check_sizes()
        for name in ("rope_parameters", "rope_scaling"):
            if kwargs.get(name):
                raise ValueError(
                    f"`{name}` must be left out; got {kwargs[name]}, which nothing reads. Set `use_rope` and "
                    "`rope_theta`: FoX has no scaled RoPE, as its decay tells distances apart."
                )
        if self.intermediate_size is None:
            width = math.floor(self.hidden_size * self.hidden_ratio * 2 / 3)
            self.intermediate_size = MLP_WIDTH_MULTIPLE * math.ceil(width / MLP_WIDTH_MULTIPLE)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.qk_norm_shared:
            # The whole weight on every rank, whose heads each add to its gradient.
            shared = dict.fromkeys(("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"), REPLICATED_STYLE)
            self.base_model_tp_plan = self.base_model_tp_plan | shared
        self.validate_architecture()
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """One entry a layer, from which Transformers builds the cache and the masks."""
        return [LAYER_TYPE] * self.num_hidden_layers

    @classmethod
    def pro(cls, **kwargs) -> "FoxConfig":
        """FoX (Pro), the defaults: QK-norm, key and value shift, output norm and gate."""
        return cls(**kwargs)

    @classmethod
    def llama(cls, **kwargs) -> "FoxConfig":
        """FoX (LLaMA): forget gates on a LLaMA block without RoPE, none of the Pro components."""
        plain = {
            "use_qk_norm": False,
            "use_output_gate": False,
            "use_output_norm": False,
            "use_k_shift": False,
            "use_v_shift": False,
            "hidden_ratio": 4.0,
        }
        return cls(**(plain | kwargs))

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in the parent; the config.json of another implementation comes back translated, see `conversion_fox`.

        Raises:
            ValueError: If it is that of a model of Transformers, which would get gates at random.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if (found := config_dict.get("model_type")) in CONFIG_MAPPING_NAMES:
            raise ValueError(
                f"`model_type` must be 'fox'; got {found!r} in {pretrained_model_name_or_path}. To make a FoX of a "
                "Llama, Mistral or Qwen3 use `python -m modeling_fox.convert SRC DST --add-gates`."
            )
        return fox_config_dict(config_dict), kwargs

    def initial_forget_gate_bias(self) -> list[float]:
        """Bias of each head's forget gate at initialization, in logits: 0, or where the gate is `exp(-1 / time)`."""
        num_heads, shortest = self.num_attention_heads, self.fgate_decay_time_min
        if shortest is None:
            return [0.0] * num_heads
        step = (self.fgate_decay_time_max / shortest) ** (1 / max(num_heads - 1, 1))
        # sigmoid(b) = exp(-x) for b = -log(exp(x) - 1); the second form does not overflow for times under 1/700 token.
        rates = [1 / (shortest * step**head) for head in range(num_heads)]
        return [-rate - math.log(-math.expm1(-rate)) for rate in rates]

    def validate_layer_type(self):
        """Accept our own layer type: the parent checks against the closed list of Transformers' own."""

    def validate_architecture(self):
        """Raise a `ValueError` that names the field, its value and the next step if the values cannot be built."""
        self._check_sizes()
        self._check_heads()
        self._check_forget_gate()
        self._check_pruning()
        choices = {"output_gate_act": OUTPUT_GATE_ACTS, "fgate_type": FGATE_TYPES, "hidden_act": tuple(ACT2FN)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}; got {getattr(self, name)!r}.")

    def _check_sizes(self):
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        for name in ("intermediate_size", "num_key_value_heads", "head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be at least 1; got {getattr(self, name)}. Leave it None to derive it."
                )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads` ({self.num_attention_heads}); "
                f"got {self.hidden_size}. Set `head_dim` to choose the width of a head freely."
            )
        for name in ("hidden_ratio", "rms_norm_eps", "qk_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a positive number; got {getattr(self, name)}.")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(
                f"`hidden_dropout` must be in [0, 1); got {self.hidden_dropout}: a fraction, no percentage."
            )
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"`initializer_range` must be 0 or more; got {self.initializer_range}.")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be below `vocab_size` ({self.vocab_size}); got {self.pad_token_id}. "
                "Raise `vocab_size` to the length of the tokenizer."
            )

    def _check_heads(self):
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads` ({heads}); got {kv_heads}. "
                "Leave it None to give every query head keys of its own."
            )
        if self.use_rope and self.head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even with `use_rope`; got {self.head_dim}. RoPE rotates pairs of channels."
            )

    def _check_forget_gate(self):
        times = (self.fgate_decay_time_min, self.fgate_decay_time_max)
        if (times[0] is None) != (times[1] is None):
            raise ValueError(
                f"`fgate_decay_time_min` and `fgate_decay_time_max` must be set together; got {times[0]} and "
                f"{times[1]}."
            )
        if times[0] is None:
            if self.fgate_type == "fixed":
                raise ValueError(
                    "`fgate_type='fixed'` needs `fgate_decay_time_min` and `fgate_decay_time_max`; got None. "
                    "They are all that defines a gate that is not learned."
                )
        elif self.fgate_type == "none":
            raise ValueError(
                f"`fgate_decay_time_min` must be None with `fgate_type='none'`; got {times[0]}. Without gates there "
                "is nothing to initialize."
            )
        elif not 0 < times[0] <= times[1] < math.inf:
            raise ValueError(
                "`fgate_decay_time_min` and `fgate_decay_time_max` are numbers of tokens and must be positive and in "
                f"this order; got {times[0]} and {times[1]}."
            )

    def _check_pruning(self):
        if self.pruning_rule not in PRUNING_RULES:
            raise ValueError(f"`pruning_rule` must be one of {PRUNING_RULES}; got {self.pruning_rule!r}.")
        tolerance = self.log_pruning_tolerance
        if tolerance is not None and not -math.inf < tolerance < 0:
            raise ValueError(
                "`log_pruning_tolerance` is the log of a probability and must be negative and finite; got "
                f"{tolerance}. For a tolerance of 4.5e-5 pass -10.0; to switch pruning off pass None."
            )


__all__ = ["FoxConfig"]
