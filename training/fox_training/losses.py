"""The loss of long rows without their logits: `(tokens, vocabulary)` numbers are never held at once.

full      the model's own loss; the logits of all tokens in fp32, and their gradient
chunked   plain PyTorch: the logits of 4,096 tokens at a time, and once more in the backward pass
liger     Liger's fused linear cross entropy for GPUs (pip install liger-kernel), arXiv:2410.10989
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .recipe import RecipeError

CHUNK_TOKENS = 4096
IGNORE = -100
# Models whose logits are the hidden states times the output layer, and nothing else.
PLAIN_HEADS = ("fox", "llama", "mistral", "qwen2", "qwen3", "gpt2")


def use_loss(model: PreTrainedModel, kind: str) -> None:
    """Let `model(..., labels=...)` compute its loss in the given way, in place; it then returns no logits.

    Calls without labels are those of before.

    Args:
        model: A causal language model, before it is wrapped or compiled.
        kind: full, chunked or liger.

    Raises:
        RecipeError: If the model's logits are more than a product, or the package is missing.
    """
    if kind == "full":
        return
    if model.config.model_type not in PLAIN_HEADS:
        raise RecipeError(
            f"run.loss must be full for model.type {model.config.model_type}; got {kind}. The others are known to be "
            f"the same for {', '.join(PLAIN_HEADS)}."
        )
    summed = _liger() if kind == "liger" else chunked_cross_entropy
    plain_forward = type(model).forward

    def forward(self, *args: Any, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs: Any):
        if labels is None and shift_labels is None:
            return plain_forward(self, *args, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        if shift_labels is None:
            # The model predicts a token from those before it; the last one predicts nothing.
            shift_labels = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
        targets = shift_labels.flatten()
        loss = summed(hidden.flatten(0, 1), self.get_output_embeddings().weight, targets)
        count = (targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=loss / count)

    model.forward = types.MethodType(forward, model)


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int = CHUNK_TOKENS
) -> torch.Tensor:
    """Cross entropy of `hidden @ weight.T` summed over the targets, in nats, in fp32 or wider.

    Memory O(chunk * V) in both passes: each chunk's logits are computed again for its gradient.

    Args:
        hidden: `(N, D)`.
        weight: `(V, D)`.
        targets: `(N,)` int64, -100 where nothing is predicted.
        chunk: Tokens at a time.
    """
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for begin in range(0, len(targets), chunk):
        part = slice(begin, begin + chunk)
        total = total + checkpoint(_cross_entropy, hidden[part], weight, targets[part], use_reentrant=False)
    return total


def _cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)


def _liger():
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise RecipeError(
            "run.loss liger needs a package: pip install liger-kernel. Without it use chunked."
        ) from error

    def summed(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        # The weight's gradient is a sum over chunks, which bf16 would round each time.
        return liger_fused_linear_cross_entropy(
            hidden, weight, targets, ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32
        )

    return summed
