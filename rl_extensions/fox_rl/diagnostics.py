"""What goes wrong in a network that learns from a moving target: per layer, without changing the network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Euclidean norm of the gradient of every weight with two or more dimensions, in the order of the model.

    Call after `backward`. Weights without a gradient count as 0.
    """
    return {
        name: 0.0 if p.grad is None else float(p.grad.float().norm())
        for name, p in model.named_parameters()
        if p.ndim > 1
    }


@torch.no_grad()
def dormant_fraction(activations: Tensor, threshold: float = 0.025) -> float:
    """Share of units that are tau-dormant (arXiv:2302.12902).

    The score of a unit is the mean of `|activation|` over the batch (and over the positions of a convolution), divided
    by the mean score of its layer; dormant is a score of at most `threshold`. A layer of zeros is all dormant.

    Args:
        activations: `(B, units)` or `(B, units, h, w)`, after the activation function.
        threshold: tau; 0.025 in the paper, 0.1 in some later work.
    """
    if activations.ndim not in (2, 4):
        raise ValueError(f"activations must be (B, units) or (B, units, h, w); got {tuple(activations.shape)}.")
    score = activations.float().abs().mean(dim=[d for d in range(activations.ndim) if d != 1])
    return float((score <= threshold * score.mean()).float().mean())


@torch.no_grad()
def feature_rank(features: Tensor, share: float = 0.99) -> int:
    """Effective rank (srank, arXiv:2010.14498): fewest singular values whose sum is `share` of the sum of all.

    Args:
        features: `(B, D)`.
        share: In (0, 1]; the paper's 1 - delta with delta = 0.01.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be (B, D); got {tuple(features.shape)}.")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1]; got {share}.")
    values = torch.linalg.svdvals(features.double())
    if float(values.sum()) == 0.0:
        return 0
    return int((values.cumsum(0) < share * values.sum() * (1 - 1e-12)).sum()) + 1


class Recorder:
    """Collects the outputs of chosen modules during forward passes, as a context manager.

    Args:
        model: Any module.
        choose: Which modules; by default every ReLU, whose outputs are what `dormant_fraction` takes.

    Attributes:
        outputs: `{name: last output, detached}`. A module that is used several times appears as `name`, `name#2`, ...
    """

    def __init__(self, model: nn.Module, choose: Callable[[nn.Module], bool] = lambda m: isinstance(m, nn.ReLU)):
        self.model, self.choose = model, choose
        self.outputs: dict[str, Tensor] = {}
        self._hooks: list = []

    def __enter__(self) -> Recorder:
        self.outputs.clear()
        for name, module in self.model.named_modules():
            if self.choose(module):
                self._hooks.append(module.register_forward_hook(self._keep(name)))
        if not self._hooks:
            raise ValueError("choose must pick a module; got none. The model has no ReLU module? Pass another choice.")
        return self

    def _keep(self, name: str):
        def hook(module, inputs, output):
            key, number = name, 1
            while key in self.outputs:
                number += 1
                key = f"{name}#{number}"
            self.outputs[key] = output.detach()

        return hook

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def dormant(self, threshold: float = 0.025) -> dict[str, float]:
        """`dormant_fraction` of everything recorded."""
        return {name: dormant_fraction(output, threshold) for name, output in self.outputs.items()}
