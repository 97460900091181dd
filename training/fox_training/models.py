"""The model that a recipe describes, and writing the finished one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

import modeling_fox

from .checkpoint import save_tokenizer_and_model, write_folder
from .recipe import ModelRecipe, RecipeError, nearest
from .tokenizers import document_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_model(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Model with fp32 weights; random unless `recipe.pretrained` is set.

    Raises:
        RecipeError: If a config field does not exist, values contradict each other, or the weights cannot be loaded.
    """
    try:
        if recipe.pretrained is not None:
            model = _load(recipe, tokenizer)
        else:
            config = _config(recipe, tokenizer)
            options = {} if recipe.attn_implementation is None else {"attn_implementation": recipe.attn_implementation}
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    except RecipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError, KeyError, StrictDataclassError) as error:
        raise RecipeError(f"the model section cannot be built: {_first_lines(error)}") from error
    _generate_as_trained(model, tokenizer)
    return model


def _config(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase):
    values = dict(recipe.config)
    if recipe.type == "fox":
        known = modeling_fox.FoxConfig
        make = {"pro": known.pro, "llama": known.llama}[recipe.variant]
    elif recipe.type in CONFIG_MAPPING:
        known = make = CONFIG_MAPPING[recipe.type]
    else:
        raise RecipeError(
            f"model.type {recipe.type} is no model of Transformers{nearest(recipe.type, ['fox', 'llama'])}"
        )
    fields = {item.name for item in dataclasses.fields(known)}
    for key in values:
        if key not in fields:
            raise RecipeError(f"unknown recipe key model.config.{key}{nearest(key, fields)}")
    vocab_size = values.setdefault("vocab_size", len(tokenizer))
    if vocab_size < len(tokenizer):
        raise RecipeError(
            f"model.config.vocab_size must be at least {len(tokenizer)}, the tokens of the tokenizer; "
            f"got {vocab_size}. "
            "Leave it out to take that number."
        )
    for name, token in _special_tokens(tokenizer).items():
        values.setdefault(name, token)
    return make(**values)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Those for a config. A token that begins or ends texts is not for padding, whose embedding never learns."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None if pad in (bos, eos) else pad}


def _load(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    options: dict[str, Any] = dict(recipe.config)
    if recipe.attn_implementation is not None:
        options["attn_implementation"] = recipe.attn_implementation
    model = AutoModelForCausalLM.from_pretrained(recipe.pretrained, dtype=torch.float32, **options)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise RecipeError(
            f"model.pretrained {recipe.pretrained} has {rows} tokens and the tokenizer {len(tokenizer)}. "
            "Set data.tokenizer.kind hub and data.tokenizer.path to the tokenizer of that model."
        )
    for name, token in _special_tokens(tokenizer).items():
        if token is not None and token not in _listed(getattr(model.config, name, None)):
            setattr(model.config, name, token)
    return model


def _generate_as_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation begin, end and pad by the tokens that the model is trained with.

    A text ends where the next one begins: with the token that stands before every document.
    """
    options = model.generation_config
    begins = document_token_id(tokenizer)
    ends = [t for t in (tokenizer.eos_token_id, begins) if t is not None and t not in _listed(options.eos_token_id)]
    # Of several that end a text all stay, if that of the tokenizer is one of them.
    known = [] if tokenizer.eos_token_id in ends else _listed(options.eos_token_id)
    ends = list(dict.fromkeys([*known, *ends]))
    options.eos_token_id = ends[0] if len(ends) == 1 else ends
    options.bos_token_id = begins
    if tokenizer.pad_token_id is not None:
        options.pad_token_id = tokenizer.pad_token_id


def _listed(tokens: int | list[int] | None) -> list[int]:
    return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]


def num_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """All weights, and those without the input embedding."""
    total = sum(p.numel() for p in model.parameters())
    return total, total - model.get_input_embeddings().weight.numel()


def prunes(model: PreTrainedModel) -> bool:
    """Whether the forward pass skips blocks of attention."""
    config = model.config
    return (
        config.model_type == "fox"
        and config._attn_implementation == "fox_acp"
        and config.log_pruning_tolerance is not None
    )


@torch.no_grad()
def pruned_share(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """Share of the visible (query, key) pairs that pruning skips on one batch, mean over layers and heads.

    A forward pass of its own, without gradients and uncompiled: collecting inside the training step would make
    torch.compile build a second graph.
    """
    with modeling_fox.pruning_stats(model) as stats:
        # Of the logits only the last: the whole model is called, for FSDP2 gathers its weights then.
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, logits_to_keep=1)
    return stats.pruned_fraction.mean().item()


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """`save_pretrained` of model and tokenizer into `folder`, which is replaced in one step.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where they go.
        weights: Its whole weights, where it holds only parts of them.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one bar for one shard says nothing and tears the bar of the training
    try:
        write_folder(folder, lambda work: save_tokenizer_and_model(model, tokenizer, work, weights), manifest=False)
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_lines(error: Exception) -> str:
    """The message without the class names that `@strict` configs wrap around it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:3]) if lines else type(error).__name__
