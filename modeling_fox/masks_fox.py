# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""What the layers need to know of padding and of packed documents, from what the model was given.

Letters:  B batch, T new tokens, S cached and new tokens.
"""

import torch
import torch.nn.functional as F
from torch import distributed
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    create_causal_mask,
    packed_sequence_mask_function,
)
from transformers.utils.import_utils import is_tracing


def find_document_starts(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, batch_size: int
) -> torch.Tensor | None:
    """First tokens of packed documents, `(B, T)` bool, where `position_ids` do not go on by one; `None` if nowhere.

    Where padding begins or ends they may jump without a document starting.
    """
    if position_ids is None or position_ids.shape[-1] == 1:
        return None
    starts = F.pad(position_ids[:, 1:] - position_ids[:, :-1] != 1, (1, 0)).expand(batch_size, -1)
    if attention_mask is not None:
        real = attention_mask[:, -starts.shape[1] :].bool()
        starts = starts & real & F.pad(real[:, :-1], (1, 0))
    if not is_tracing(starts) and not starts.any():
        return None
    return starts


def refuse_parts_of_rows(position_ids: torch.Tensor) -> None:
    """Raise a `ValueError` if this process was handed the later part of rows that another one has the start of.

    Accelerate's `sp_size` (DeepSpeed) hands them out so and then exchanges keys and values by attention functions of
    its own, which FoX does not call: every process would train on its part alone, without a word.
    """
    if is_tracing(position_ids) or not (distributed.is_available() and distributed.is_initialized()):
        return
    # Behind padding Transformers counts from 1.
    if distributed.get_world_size() > 1 and (position_ids[:, 0] > 1).all():
        raise ValueError(
            f"`position_ids` must start at 0 where there is no cache; got {int(position_ids[0, 0])} in training on "
            f"{distributed.get_world_size()} processes. If each has a part of every row, call "
            "`enable_context_parallel(model)`, or set `cp_size` or `sp_size` for fox_training.train, which does; "
            "Accelerate's and DeepSpeed's own forms would lose the forget gates of the other parts."
        )


def positions_of_documents(cu_seq_lens: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Position of each token in its document, `(1, T)` int64.

    Args:
        cu_seq_lens: `(documents + 1,)`, where each document starts in the one row of tokens, and where the last ends.

    Raises:
        ValueError: If there are several rows, or numbers that do not rise from 0 to at most T.
    """
    batch, num_tokens = inputs_embeds.shape[:2]
    if batch != 1 or cu_seq_lens.dim() != 1:
        raise ValueError(
            "`cu_seq_lens_q` must be one list of boundaries for one row of tokens; got the shape "
            f"{tuple(cu_seq_lens.shape)} for {batch} rows. Put all documents into one row, or pass `position_ids`."
        )
    position = torch.arange(num_tokens, device=inputs_embeds.device)
    boundaries = cu_seq_lens.to(position)
    if not is_tracing(boundaries):
        # From 0 up to 0: what lies between must not fall.
        ends = F.pad(boundaries, (0, 1), value=num_tokens)
        if boundaries[0] != 0 or (ends.diff() < 0).any():
            raise ValueError(
                f"`cu_seq_lens_q` must rise from 0 to at most {num_tokens} tokens; got {boundaries.tolist()}. Of "
                "lengths take the running sum, with a 0 before it."
            )
    document = torch.searchsorted(boundaries, position, right=True) - 1
    return (position - boundaries[document])[None]


def padding_of_new_tokens(
    config, inputs_embeds, attention_mask, past_key_values=None, layer_idx=0, **kwargs
) -> torch.Tensor | None:
    """The T columns of the new tokens in a mask, or `None` if no new token is padding or that is not known.

    They are the last of `(B, S)`; that of a static cache may be as wide as the cache.

    Transformers' own `create_recurrent_attention_mask` takes a single token for real, which is wrong for a sequence
    that still is in its padding when a prompt is fed in pieces. Compiled code takes it for real too.
    """
    num_tokens = inputs_embeds.shape[1]
    if attention_mask is None or attention_mask.dim() != 2 or (num_tokens == 1 and is_tracing(attention_mask)):
        return None
    num_seen = None if past_key_values is None else past_key_values.get_seq_length(layer_idx)
    if isinstance(num_seen, torch.Tensor):
        position = torch.arange(num_tokens, device=attention_mask.device) + num_seen
        padding_mask = attention_mask[:, position]
    else:
        padding_mask = attention_mask[:, -num_tokens:]
    if not is_tracing(padding_mask) and padding_mask.all():
        return None
    return padding_mask.contiguous()


def find_last_real_token(padding_mask: torch.Tensor) -> torch.Tensor:
    """For each of `(B, T)` tokens, how many of them reach up to the last real one, itself included: `(B, T)` int64.

    0 where all up to here is padding. As an index it counts the token before the T new ones as number 0.
    """
    position = torch.arange(1, padding_mask.shape[1] + 1, device=padding_mask.device)
    return (position * (padding_mask != 0)).cummax(dim=1).values


def check_mask(attention_mask: torch.Tensor, backend: str, num_keys: int | None) -> None:
    """Raise a `ValueError` for a mask that backends would fail on, or read in different ways.

    Args:
        backend: Name of the attention implementation.
        num_keys: S, or `None` where it is not known.
    """
    shape, dim = tuple(attention_mask.shape), attention_mask.dim()
    if dim not in (2, 4):
        raise ValueError(f"`attention_mask` must be (B, S) or (B, 1, T, S); got {shape}.")
    if dim == 4 and backend == "flex_attention":
        raise ValueError(
            f"`attention_mask` must be `None` or (B, S) with 'flex_attention'; got {shape}. Use 'sdpa' for it."
        )
    if dim == 4 and not (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
        raise ValueError(
            f"`attention_mask` of 4 dimensions must be bool or floating point; got {attention_mask.dtype}. Pass "
            "`mask.bool()`, True where a token may look, or what is to be added to the scores."
        )
    if dim == 2 and num_keys is not None and shape[1] < num_keys:
        raise ValueError(
            f"`attention_mask` must cover all {num_keys} tokens, cached and new; got {shape}. Put that of the cached "
            "tokens before it."
        )


def make_masks(config, inputs_embeds, attention_mask, position_ids, past_key_values, layer_idx=0):
    """Make what the layers need from what the model was given.

    Args:
        attention_mask: `(B, S)`, 0 at padding, cut where it is wider; a 4D mask, passed on as it is, of which the
            token shift knows nothing; or the dict that `generate` makes itself for a cache of fixed shape.
        position_ids: `(B, T)`; see `find_document_starts`.
        layer_idx: Layer whose cache tells how many tokens came before.

    Returns:
        Arguments of every layer: "attention_mask", what the backend takes; "padding_mask", `(B, T)`, 0 at padding;
        "last_real_token", see `find_last_real_token`; "document_starts", `(B, T)` bool, first tokens of packed
        documents. Each of them may be `None`.

    Raises:
        ValueError: If documents are packed and there is a cache or padding: not every backend tells them apart then;
            or if the mask is one that `check_mask` refuses.
    """
    if isinstance(attention_mask, dict):
        return _layer_masks(attention_mask["full_attention"], attention_mask["linear_attention"], None)
    forgets = hasattr(past_key_values, "hide_padding")
    document_starts = None
    is_step = inputs_embeds.shape[1] == 1 and attention_mask is not None and attention_mask.dim() == 2
    if is_step and not is_tracing(attention_mask) and attention_mask.all():
        # One look at the device a step: what follows would take two more.
        attention_mask = None
    if attention_mask is not None and not forgets:
        num_seen = 0 if past_key_values is None else past_key_values.get_seq_length(layer_idx)
        is_known = not (isinstance(num_seen, torch.Tensor) or is_tracing(attention_mask))
        num_keys = num_seen + inputs_embeds.shape[1] if is_known else None
        check_mask(attention_mask, config._attn_implementation, num_keys)
        if attention_mask.dim() == 2:
            attention_mask = attention_mask[:, :num_keys]
    if attention_mask is None or attention_mask.dim() == 2:
        document_starts = find_document_starts(position_ids, attention_mask, inputs_embeds.shape[0])
    same_document = None
    if document_starts is not None and past_key_values is not None and is_tracing(document_starts):
        # Nothing is known of the values, but that this call is allowed: so it is one document.
        document_starts = None
    elif document_starts is not None and attention_mask is not None and is_tracing(document_starts):
        # Padding or documents, nobody knows: the mask tells both apart.
        same_document = packed_sequence_mask_function(document_starts.cumsum(dim=-1))
    elif document_starts is not None:
        if past_key_values is not None or (attention_mask is not None and not attention_mask.all()):
            raise ValueError(
                "`position_ids` must go on by one within a sequence when there is a cache or padding; got packed "
                "documents. Pass `use_cache=False` and no `attention_mask`, or one document a row."
            )
        # Transformers looks for documents only if it gets no mask.
        attention_mask = None
    if forgets:
        # It hides by itself what is not to be seen, over more keys than a mask would fit in memory for.
        return _layer_masks(None, past_key_values.hide_padding(attention_mask, *inputs_embeds.shape[:2]), None)
    mask_kwargs = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
        "layer_idx": layer_idx,
    }
    causal = create_causal_mask(**mask_kwargs, and_mask_function=same_document)
    padding = padding_of_new_tokens(**mask_kwargs)
    return _layer_masks(causal, padding, document_starts)


def _layer_masks(attention_mask, padding_mask, document_starts) -> dict:
    return {
        "attention_mask": attention_mask,
        "padding_mask": padding_mask,
        "last_real_token": None if padding_mask is None else find_last_real_token(padding_mask),
        "document_starts": document_starts,
    }


# For `generate`, which makes the masks itself when the cache is compileable: the same two that FoxModel makes.
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["forgetting_attention"] = {
    "full_attention": create_causal_mask,
    "linear_attention": padding_of_new_tokens,
}

__all__ = ["make_masks", "positions_of_documents", "refuse_parts_of_rows"]
