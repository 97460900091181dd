# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the two other implementations of FoX: their configurations and their weights, into ours and back.

| theirs     | `model_type`                         | what differs                                         |
| ---------- | ------------------------------------ | ---------------------------------------------------- |
| `OFFICIAL` | `forgetting_transformer-project_fox` | one matrix for gate and up projection of the MLP     |
| `FLA`      | `forgetting_transformer`             | `f_proj` is the forget gate, `g_proj` the output one |
| old `FLA`  | the same, before April 2025          | `g_proj` is the forget gate                          |

`from_pretrained` of our models reads all three: the configuration by its `model_type`, the weights by their names, by
the weight conversion of Transformers. `python -m modeling_fox.convert` writes them. Their config.json holds only what
differs from defaults of their own, which therefore stand here.

Letters:  E hidden size, I width of the MLP, H query heads, H_kv key heads, D head dim.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_utils import load_state_dict

OFFICIAL = "forgetting_transformer-project_fox"
FLA = "forgetting_transformer"

# Their field -> ours, where the value stays as it is.
SAME_VALUE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "initializer_range": "initializer_range",
    "norm_eps": "rms_norm_eps",
    "use_cache": "use_cache",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_output_gate": "use_output_gate",
    "qk_norm": "use_qk_norm",
}
OFFICIAL_SAME_VALUE = SAME_VALUE | {
    "rope_base": "rope_theta",
    "use_rope": "use_rope",
    "ogate_act": "output_gate_act",
    "fgate_type": "fgate_type",
    "use_output_norm": "use_output_norm",
    "qk_norm_share_param_across_head": "qk_norm_shared",
    "use_k_shift": "use_k_shift",
    "use_v_shift": "use_v_shift",
    "log_pruning_tolerance": "log_pruning_tolerance",
}
# The values of a field that their config.json leaves out.
DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 2048, "hidden_ratio": 4, "intermediate_size": None, "num_hidden_layers": 24,
    "num_heads": 32, "num_kv_heads": None, "hidden_act": "swish", "initializer_range": 0.02, "norm_eps": 1e-6,
    "use_cache": True, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "use_output_gate": False, "qk_norm": False,
}  # fmt: skip
OFFICIAL_DEFAULTS = DEFAULTS | {
    "max_position_embeddings": 2048, "rope_base": 500000.0, "use_rope": False, "ogate_act": "sigmoid",
    "fgate_type": "full", "fgate_bias_init": False, "decay_time_min": None, "decay_time_max": None,
    "use_output_norm": False, "qk_norm_share_param_across_head": False, "use_k_shift": False, "use_v_shift": False,
    "log_pruning_tolerance": None,
}  # fmt: skip
# What we have and flash-linear-attention has not: a checkpoint of theirs always means this value.
FLA_ALWAYS = {
    "output_gate_act": "sigmoid", "use_output_norm": False, "use_k_shift": False, "use_v_shift": False,
    "use_rope": False, "fgate_type": "full", "qk_norm_shared": False,
}  # fmt: skip
# How fast a step or a loss is computed, or read nowhere: no output depends on it.
NO_EFFECT = {
    OFFICIAL: {"window_size", "elementwise_affine", "attention_bias", "fuse_norm", "fuse_cross_entropy"},
    FLA: {
        "max_position_embeddings",
        "elementwise_affine",
        "fuse_norm",
        "fuse_swiglu",
        "fuse_cross_entropy",
        "fuse_linear_cross_entropy",
        "use_l2warp",
    },
}
# Says which code to run, which is ours from here on.
OF_THEIR_CODE = {"model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"}
QK_NORM_EPS = 1e-5
"""Theirs in both implementations, whatever `norm_eps` is."""

HIDDEN_ACTS = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}


def fox_config_dict(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Translate the contents of a config.json of theirs into arguments of `FoxConfig`; any other comes back as it is.

    Raises:
        ValueError: If it switches something on that FoxConfig cannot say, or holds a field that nobody knows.
    """
    source = config_dict.get("model_type")
    if source not in (OFFICIAL, FLA):
        return config_dict
    defaults = OFFICIAL_DEFAULTS if source == OFFICIAL else DEFAULTS
    theirs = defaults | config_dict
    # The name of v4 for the same field.
    theirs.setdefault("dtype", theirs.pop("torch_dtype", None))
    same_value = OFFICIAL_SAME_VALUE if source == OFFICIAL else SAME_VALUE
    ours = {"model_type": "fox"} | {name: theirs[field] for field, name in same_value.items()}
    ours |= {"hidden_ratio": theirs["hidden_ratio"] or 4, "qk_norm_eps": QK_NORM_EPS}
    ours["hidden_act"] = _choose("hidden_act", theirs["hidden_act"], HIDDEN_ACTS)
    # One that is None, as in their training configurations, was only ever used for tables that we do not have.
    if theirs.get("max_position_embeddings") is not None:
        ours["max_position_embeddings"] = theirs["max_position_embeddings"]
    if source == OFFICIAL:
        ours |= _official_only(theirs)
    else:
        ours |= FLA_ALWAYS | {"num_key_value_heads": theirs["num_kv_heads"]}
    for field in theirs.keys() - defaults.keys() - NO_EFFECT[source] - OF_THEIR_CODE:
        if hasattr(PreTrainedConfig, field):
            ours[field] = theirs[field]
        elif theirs[field]:
            raise ValueError(
                f"`{field}` must not be set in a {source!r}; got {theirs[field]!r}, which FoX has no place for. If it "
                "changes no output of the model, remove it from config.json."
            )
    return ours


def _choose(field: str, value, allowed: dict):
    if value not in allowed:
        raise ValueError(f"`{field}` must be one of {tuple(allowed)}; got {value!r}. FoX has no other.")
    return allowed[value]


def _official_only(theirs: dict[str, Any]) -> dict[str, Any]:
    if theirs["num_kv_heads"] is not None:
        raise ValueError(
            f"`num_kv_heads` must be None; got {theirs['num_kv_heads']}. The official implementation refuses it too, "
            "so no such weights exist."
        )
    if theirs["use_output_gate"] and theirs["use_output_norm"] and theirs["ogate_act"] != "sigmoid":
        raise ValueError(
            f"`ogate_act` must be 'sigmoid' with `use_output_norm`; got {theirs['ogate_act']!r}, which the official "
            "implementation ignores there. Write 'sigmoid' into config.json for what it computes."
        )
    times = {"fgate_decay_time_min": theirs["decay_time_min"], "fgate_decay_time_max": theirs["decay_time_max"]}
    return times if theirs["fgate_bias_init"] else {}


def foreign_config_dict(config: PreTrainedConfig, target: str) -> dict[str, Any]:
    """The config.json of the implementation `target`, `OFFICIAL` or `FLA`, for the model of a `FoxConfig`.

    Left out is what changes no output of trained weights: see `left_out`.

    Raises:
        ValueError: If that implementation cannot compute this model.
    """
    _refuse_what_they_lack(config, target)
    same_value = OFFICIAL_SAME_VALUE if target == OFFICIAL else SAME_VALUE
    theirs = {"model_type": target, "architectures": ["ForgettingTransformerForCausalLM"]}
    theirs |= {field: getattr(config, name) for field, name in same_value.items()}
    theirs |= {"hidden_ratio": config.hidden_ratio, "hidden_act": "swish", "num_kv_heads": None}
    if config.dtype is not None:
        theirs["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    if target == FLA:
        return theirs | {"num_kv_heads": config.num_key_value_heads}
    if config.hidden_act == "sigmoid":
        theirs["hidden_act"] = "sigmoid"
    theirs["max_position_embeddings"] = config.max_position_embeddings
    if config.fgate_type in ("bias_only", "fixed") and config.fgate_decay_time_min is not None:
        theirs |= {
            "fgate_bias_init": True,
            "decay_time_min": config.fgate_decay_time_min,
            "decay_time_max": config.fgate_decay_time_max,
        }
    return theirs


def _refuse_what_they_lack(config: PreTrainedConfig, target: str) -> None:
    allowed = {"hidden_act": ("silu", "sigmoid") if target == OFFICIAL else ("silu",), "use_multi_skip": (False,)}
    allowed["head_dim"] = (config.hidden_size / config.num_attention_heads,)
    if config.use_qk_norm:
        allowed["qk_norm_eps"] = (QK_NORM_EPS,)
    if target == OFFICIAL:
        allowed["num_key_value_heads"] = (config.num_attention_heads,)
        if config.use_output_gate and config.use_output_norm:
            allowed["output_gate_act"] = ("sigmoid",)
    else:
        allowed |= {name: (value,) for name, value in FLA_ALWAYS.items()}
        if not config.use_output_gate:
            del allowed["output_gate_act"]
        if not config.use_qk_norm:
            del allowed["qk_norm_shared"]
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"`{name}` must be {' or '.join(map(repr, values))} in a {target!r}; got {getattr(config, name)!r}. "
                "That implementation has no place for it, so this model cannot be written in its format."
            )


def left_out(config: PreTrainedConfig, target: str) -> list[str]:
    """Names of the fields whose value `foreign_config_dict` does not carry over: they act in training or prune."""
    names = []
    if config.hidden_dropout:
        names.append("hidden_dropout")
    if config.fgate_type == "full" and config.fgate_decay_time_min is not None:
        names += ["fgate_decay_time_min", "fgate_decay_time_max"]
    if target == FLA and config.log_pruning_tolerance is not None:
        names.append("log_pruning_tolerance")
    return names


class SplitHeads(ConversionOps):
    """Norm weight `(heads * D,)` to `(heads, D)`; one `(D,)` shared by the heads is repeated if ours is not shared."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs):
        (weight,) = next(iter(input_dict.values()))
        shape = model.get_parameter(full_layer_name).shape
        if weight.numel() == shape.numel():
            weight = weight.reshape(shape)
        elif weight.shape == shape[-1:]:
            weight = weight.expand(shape).clone()
        # Any other shape goes on as it is, for Transformers to report both.
        return {target_patterns[0]: weight}

    @property
    def reverse_op(self) -> ConversionOps:
        return MergeHeads()


class MergeHeads(ConversionOps):
    """Norm weight `(heads, D)` to `(heads * D,)`; `(D,)` stays as it is."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (weight,) = next(iter(input_dict.values()))
        return {target_patterns[0]: weight.flatten()}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitHeads()


def _attention_names(source: str, k_shift: bool, v_shift: bool, old_gate: bool) -> dict[str, str]:
    """Names of the weights below `layers.N.attn` -> below `layers.N.self_attn`."""
    names = {"q_proj.weight": "q_proj.weight", "o_proj.weight": "o_proj.weight"}
    for name, shifted in (("k", k_shift), ("v", v_shift)):
        if shifted:
            names |= {
                f"{name}_proj.linear.weight": f"{name}_proj.weight",
                f"{name}_proj.shift_proj.weight": f"{name}_shift_proj.weight",
            }
        else:
            names[f"{name}_proj.weight"] = f"{name}_proj.weight"
    if source == OFFICIAL:
        gates = {"fgate_proj": "fgate_proj", "ogate_proj": "ogate_proj"}
        names["fgate_bias"] = "fgate_bias"
    else:
        gates = {"g_proj": "fgate_proj"} if old_gate else {"f_proj": "fgate_proj", "g_proj": "ogate_proj"}
    for theirs, ours in gates.items():
        names[f"{theirs}.weight"] = f"{ours}.weight"
        if ours == "fgate_proj":
            names[f"{theirs}.bias"] = f"{ours}.bias"
    return names


def weight_transforms(
    source: str, *, k_shift: bool = False, v_shift: bool = False, old_gate: bool = False
) -> list[WeightRenaming | WeightConverter]:
    """What Transformers has to do with weights of `OFFICIAL` or `FLA` to make them ours; it can do it in reverse.

    Args:
        k_shift, v_shift: Whether keys, values are shifted; the official names differ.
        old_gate: Whether `g_proj` is the forget gate.
    """

    def rename(theirs: str, ours: str) -> WeightRenaming:
        return WeightRenaming(re.escape(theirs), ours)

    transforms = [rename("embeddings.weight", "embed_tokens.weight")]
    transforms.append(rename(".attn_norm.", ".input_layernorm."))
    transforms.append(rename(".mlp_norm.", ".post_attention_layernorm."))
    names = _attention_names(source, k_shift, v_shift, old_gate)
    transforms += [rename(f".attn.{theirs}", f".self_attn.{ours}") for theirs, ours in names.items()]
    for norm in ("q_norm", "k_norm", "output_norm"):
        theirs, ours = re.escape(f".attn.{norm}.weight"), f".self_attn.{norm}.weight"
        transforms.append(WeightConverter(theirs, ours, operations=[SplitHeads()]))
    if source == OFFICIAL:
        gate, up = ".mlp.gate_proj.weight", ".mlp.up_proj.weight"
        # (2 I, E), the rows of the gate first.
        transforms.append(WeightConverter(re.escape(gate), [gate, up], operations=[Chunk(dim=0)]))
    return transforms


def transforms_to(target: str, config: PreTrainedConfig) -> list[WeightRenaming | WeightConverter]:
    """The transforms whose reverse writes a model of this `FoxConfig` in the format `target`."""
    return weight_transforms(target, k_shift=config.use_k_shift, v_shift=config.use_v_shift)


def transforms_for(names: Iterable[str]) -> list[WeightRenaming | WeightConverter]:
    """The transforms that a checkpoint with weights of these names needs; none if it is ours."""
    names = set(names)

    def has(name: str) -> bool:
        return any(re.search(rf"(^|\.)layers\.\d+\.{re.escape(name)}$", x) for x in names)

    if not has("attn.q_proj.weight"):
        return []
    source = FLA if has("mlp.up_proj.weight") else OFFICIAL
    shifts = {f"{name}_shift": has(f"attn.{name}_proj.linear.weight") for name in ("k", "v")}
    # Only a forget gate has a bias.
    return weight_transforms(source, old_gate=has("attn.g_proj.bias"), **shifts)


def checkpoint_names(state_dict: dict | None, checkpoint_files: list[str] | None) -> set[str]:
    """Names of the weights in a checkpoint, from the headers of its files."""
    if state_dict is not None:
        return set(state_dict)
    names = set()
    for file in checkpoint_files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as weights:
                names.update(weights.keys())
        else:
            names.update(load_state_dict(file, map_location="meta"))
    return names


def check_layers_are_covered(names: Iterable[str], transforms: list, model) -> None:
    """Raise if a layer has a weight that the checkpoint lacks, or the checkpoint one that the layer lacks.

    Transformers would only warn, and leave the first at random and the second out.
    """
    covered = set()
    for name in names:
        targets = [name]
        for transform in transforms:
            renamed, matched = transform.rename_source_key(name)
            if matched is not None:
                targets = [renamed.replace(transform.target_patterns[0], x) for x in transform.target_patterns]
                break
        covered.update(targets)
    ours, theirs = (
        {x[x.find("layers.") :] for x in group if "layers." in x} for group in (model.state_dict(), covered)
    )
    for group, what in ((theirs - ours, "has weights that the model of its config.json"), (ours - theirs, "lacks")):
        if group:
            some = ", ".join(sorted(group)[:4])
            tail = " has no place for" if what.startswith("has") else " of the model of its config.json"
            raise ValueError(
                f"`pretrained_model_name_or_path` {what}{tail}: {len(group)} in all, among them {some}. Correct "
                "config.json; what FoX does not have (biases of q, k and v, residuals by attention) it cannot load."
            )


class LoadsOtherCheckpoints:
    """Mixin of FoX models: `from_pretrained` finds weights of the other implementations and converts them."""

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        names = checkpoint_names(state_dict, checkpoint_files)
        transforms = transforms_for(names)
        if transforms:
            if load_config.device_mesh is not None:
                raise ValueError(
                    "`distributed_config` and `tp_plan` must be None for a checkpoint of another implementation: its "
                    "matrices are not cut where ours are. Convert it first: `python -m modeling_fox.convert SRC DST`."
                )
            check_layers_are_covered(names, transforms, model)
            load_config = replace(load_config, weight_mapping=transforms + (load_config.weight_mapping or []))
        loaded = super(LoadsOtherCheckpoints, type(model))._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if transforms:
            # Else `save_pretrained` would undo the conversion and write their names beside our configuration.
            model._weight_conversions = None
        return loaded


__all__ = ["FLA", "OFFICIAL", "LoadsOtherCheckpoints", "foreign_config_dict", "fox_config_dict", "transforms_to"]
