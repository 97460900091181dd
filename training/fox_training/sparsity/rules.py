"""How weights are ranked: the lowest score goes first. A new rule is one function and one entry in `RULES`."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[..., Tensor]


def magnitude(weight: Tensor, grad: Tensor | None = None, *, name: str = "", seed: int = 0) -> Tensor:
    """`|w|`, fp32, shape of `weight`."""
    return weight.detach().float().abs()


def saliency(weight: Tensor, grad: Tensor | None = None, *, name: str = "", seed: int = 0) -> Tensor:
    """`|w dL/dw|`, fp32: first-order estimate of how the loss changes when the weight becomes zero.

    Raises:
        ValueError: If `grad` is None: call after `backward()` and before `zero_grad()`.
    """
    return (weight.detach().float() * needed_gradient(grad, name).float()).abs()


def random(weight: Tensor, grad: Tensor | None = None, *, name: str = "", seed: int = 0) -> Tensor:
    """Uniform in (0, 1), fp32, the same for every call, process and device: a function of `name` and `seed`."""
    # Hashed together: the generator of the CPU reads only 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    # Above 0, which is the score of a weight that is zero by chance; 2^-24 is the spacing of torch.rand.
    return (torch.rand(weight.shape, generator=generator) + 2.0**-25).to(weight.device)


RULES: dict[str, Rule] = {"magnitude": magnitude, "saliency": saliency, "random": random}


def needed_gradient(grad: Tensor | None, name: str) -> Tensor:
    """`grad`, or the reason why there must be one.

    Raises:
        ValueError: If it is None.
    """
    if grad is None:
        raise ValueError(
            f"the gradient of {name or 'a weight'} must be there when masks are made; got None. "
            "Call after backward() and before zero_grad(), or exclude the weight."
        )
    return grad.detach()


def highest(score: Tensor, count: int) -> Tensor:
    """Mask of the `count` highest scores, bool; among equal ones the first in memory order. Cost O(n), no sort."""
    flat = score.reshape(-1)
    if count >= flat.numel():
        return torch.ones_like(score, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(score.shape)
