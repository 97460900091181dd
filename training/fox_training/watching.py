"""What the attention of a model in training does: pruned share and gate half-lives by layer and head."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .scoring import HeadObserver


def has_gates(model: PreTrainedModel) -> bool:
    """Whether the model has forget gates to watch."""
    return model.config.model_type == "fox" and model.config.fgate_type != "none"


@torch.no_grad()
def observe_heads(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Pruned share and half-life of each head on one batch, as lists that JSON can hold.

    A head that forgets `d` nats a token on average has a half-life of `ln 2 / d` tokens; None where it never forgets.

    Args:
        model: FoX with forget gates.
        inputs: `input_ids` and `position_ids`, `(B, L)` int64.

    Returns:
        `half_life_tokens` and, for a model that prunes, `pruned_share`, both `[layer][head]`.
    """
    observer = HeadObserver(model)
    with observer.watch(tuple(inputs["input_ids"].shape)):
        # Of the logits only the last: the whole model is called, for FSDP2 gathers its weights then.
        tokens, positions = inputs["input_ids"], inputs["position_ids"]
        model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1)
    report = observer.report()
    found = {"half_life_tokens": _lists(report.half_life_tokens)}
    if report.pruned_share is not None and model.config.log_pruning_tolerance is not None:
        found["pruned_share"] = _lists(report.pruned_share)
    return found


def by_layer(observed: dict[str, Any]) -> dict[str, float]:
    """One figure a layer for the trackers: mean pruned share, and the median half-life of its heads in tokens."""
    figures = {}
    for layer, shares in enumerate(observed.get("pruned_share", [])):
        figures[f"pruned_share/layer_{layer:02d}"] = sum(shares) / len(shares)
    for layer, values in enumerate(observed["half_life_tokens"]):
        median = float(np.median([math.inf if value is None else value for value in values]))
        if math.isfinite(median):
            figures[f"half_life_tokens/layer_{layer:02d}"] = median
    return figures


def _lists(values: np.ndarray) -> list[list[float | None]]:
    return [[float(value) if math.isfinite(value) else None for value in row] for row in values]
