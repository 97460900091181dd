"""Several processes: what Accelerate's configuration asks for, done to a model of Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile every layer and the loss, in place.

    All layers are one piece of code, so it is compiled once: the first step of 24 layers waits as long as that of one.
    What stands between them (embedding, last norm, output layer) is single kernels that a compiler cannot make faster.
    """
    for layer in model.model.layers:
        layer.compile()
    model.loss_function = torch.compile(model.loss_function)
