# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""Adopt a pretrained Llama, Mistral or Qwen3: the same weights, RoPE and norms, and forget gates that stand open.

At the start the model computes what the source computes. Fine-tuned, its gates learn what to forget, after which
pruning skips it. Command line: `python -m modeling_fox.convert SRC DST --add-gates`.
"""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from .configuration_fox import FoxConfig
from .modeling_fox import FoxForCausalLM

DECAY_TIME = 1e7
"""Tokens after which a gate has forgotten all but 1/e; a score then differs from the source's by 1e-7 a token.

Measured on two layers of width 64 with logits up to 4 and prompts of 60 tokens: 1e7 moves logits by 8e-6, and 1e8 by
2e-6, which is rounding. But the gradient of a gate shrinks alike, and below the eps of Adam, 1e-8, gates do not learn:
in 150 steps on a task that needs them some that started at 1e7 closed by a tenth, and none that started at 1e8.
"""

SAME_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "dtype",
)  # fmt: skip

MODEL_TYPES = ("llama", "mistral", "qwen3")


def fox_config_of(source: PreTrainedConfig, decay_time: float = DECAY_TIME) -> FoxConfig:
    """Configuration of the FoX that computes what a model with the configuration `source` computes.

    Args:
        source: Of a Llama, a Mistral without a window, or a Qwen3.
        decay_time: Decay time of every gate at the start, in tokens.

    Raises:
        ValueError: If the source has something that FoX has not.
    """
    if source.model_type not in MODEL_TYPES:
        raise ValueError(
            f"`model_type` must be one of {MODEL_TYPES} to add gates; got {source.model_type!r}. Other models have in "
            "their layers what FoX has not, such as biases of queries and keys in Qwen2. Choose one of those."
        )
    rope = source.rope_parameters
    refused = {
        "attention_bias": bool(getattr(source, "attention_bias", False)),
        "mlp_bias": bool(getattr(source, "mlp_bias", False)),
        "use_sliding_window": bool(getattr(source, "use_sliding_window", False)),
        # Of Qwen3 it is only read with the field above.
        "sliding_window": source.model_type == "mistral" and source.sliding_window,
        "rope_type": rope.get("rope_type", "default") not in ("default", None) and rope["rope_type"],
        "partial_rotary_factor": rope.get("partial_rotary_factor") not in (None, 1.0)
        and rope["partial_rotary_factor"],
    }
    for name, value in refused.items():
        if value:
            raise ValueError(f"`{name}` must be off to add gates; got {value!r}, which FoX has no place for.")
    is_qwen = source.model_type == "qwen3"
    return FoxConfig.llama(
        **{name: getattr(source, name) for name in SAME_FIELDS},
        head_dim=getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
        use_rope=True,
        rope_theta=rope["rope_theta"],
        use_qk_norm=is_qwen,
        qk_norm_shared=is_qwen,
        qk_norm_eps=source.rms_norm_eps,
        fgate_decay_time_min=decay_time,
        fgate_decay_time_max=decay_time,
    )


def add_gates(source: str, decay_time: float = DECAY_TIME) -> FoxForCausalLM:
    """Load the Llama, Mistral or Qwen3 `source`, a folder or a Hub name, as a FoX with open gates, in its dtype."""
    given = AutoModelForCausalLM.from_pretrained(source)
    config = fox_config_of(given.config, decay_time)
    with no_init_weights():
        model = FoxForCausalLM(config)
    model.to(given.dtype)
    missing, unexpected = model.load_state_dict(given.state_dict(), strict=False)
    gates = {name for name in model.state_dict() if ".fgate_proj." in name}
    if set(missing) != gates or unexpected:
        raise ValueError(
            f"`source` must have the weights of its config; {sorted({*missing, *unexpected} - gates)} differ."
        )
    bias = torch.tensor(config.initial_forget_gate_bias())
    for layer in model.model.layers:
        gate = layer.self_attn.fgate_proj
        # Every token alike: what a gate opens or closes for is left to training.
        torch.nn.init.zeros_(gate.weight)
        gate.bias.data.copy_(bias)
    model.tie_weights()
    model.generation_config = given.generation_config
    return model.eval()


__all__ = ["add_gates", "fox_config_of"]
