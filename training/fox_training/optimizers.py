"""Which weight is moved by which optimizer, and the running mean of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .recipe import OptimizerRecipe, RecipeError, ScheduleRecipe
from .schedule import learning_rate_factor


def decays(name: str, parameter: nn.Parameter, *, decay_embeddings: bool = True) -> bool:
    """Whether weight decay applies: to weights with two or more dimensions that are no norm.

    As in the paper's runs (arXiv:2503.02130): linear weights, forget-gate and shift projections included, and the
    embedding decay; biases, gate biases and norm weights do not, also where a norm keeps one row per head.
    """
    if parameter.ndim < 2 or "norm" in name:
        return False
    return decay_embeddings or "embed" not in name


def is_hidden_matrix(name: str, parameter: nn.Parameter, num_heads: int) -> bool:
    """Whether Muon may orthogonalise the weight: a matrix between feature spaces inside a block.

    Not the embedding and the output layer, and not the projections to one number per head (forget gate, shift), whose
    rows are separate directions rather than a map.
    """
    return parameter.ndim == 2 and ".layers." in f".{name}" and "norm" not in name and min(parameter.shape) > num_heads


def build_optimizers(model: nn.Module, recipe: OptimizerRecipe) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the hidden matrices and AdamW over the rest.

    Every group carries `peak_lr`, from which `set_learning_rate` computes `lr`.

    Raises:
        RecipeError: If Muon is asked for and this PyTorch has none.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizers = []
    if recipe.name == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise RecipeError(
                f"optimizer.name muon needs PyTorch 2.9 or newer; this is {torch.__version__}. Use adamw."
            )
        num_heads = getattr(model.config, "num_attention_heads", 1)
        hidden = [(n, p) for n, p in named if is_hidden_matrix(n, p, num_heads)]
        taken = {id(p) for _, p in hidden}
        named = [(n, p) for n, p in named if id(p) not in taken]
        if hidden:
            optimizers.append(
                torch.optim.Muon(
                    [p for _, p in hidden],
                    lr=recipe.muon_learning_rate,
                    momentum=recipe.muon_momentum,
                    weight_decay=recipe.weight_decay,
                )
            )
    optimizers.append(_adamw(named, recipe))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _adamw(named: list[tuple[str, nn.Parameter]], recipe: OptimizerRecipe) -> torch.optim.AdamW:
    keep = recipe.decay_embeddings
    groups = [
        {
            "params": [p for n, p in named if decays(n, p, decay_embeddings=keep)],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for n, p in named if not decays(n, p, decay_embeddings=keep)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        # One kernel for all weights; exists for CPU and CUDA.
        fused=all(p.device.type in ("cpu", "cuda") for _, p in named),
    )


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, schedule: ScheduleRecipe) -> float:
    """Set `lr` of every group for optimizer step `step` (from 0); returns the share of the peak."""
    factor = learning_rate_factor(
        step,
        steps=schedule.steps,
        warmup_steps=schedule.warmup_steps,
        kind=schedule.kind,
        final_fraction=schedule.final_fraction,
        decay_fraction=schedule.decay_fraction,
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return factor


class WeightAverage:
    """Exponential running mean of the weights: `mean <- d mean + (1 - d) weight` after each step.

    `d = min(decay, (1 + step) / (10 + step))`, so that the first steps do not hold on to the random start.

    Args:
        model: The model whose parameters are averaged; on the same device, in fp32.
        decay: In (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._names = [name for name, _ in model.named_parameters()]
        self._weights = [p for _, p in model.named_parameters()]
        self._means = [p.detach().clone() for p in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._means, [w.detach() for w in self._weights], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the mean weights inside the block and its own again behind it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, mean in zip(self._weights, self._means, strict=True):
            held = weight.clone()
            weight.copy_(mean)
            mean.copy_(held)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The means by parameter name."""
        return dict(zip(self._names, self._means, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name, mean in zip(self._names, self._means, strict=True):
            mean.copy_(state[name])
