"""What is pruned, how far, when and by which rule."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from .allocation import ALLOCATIONS
from .rules import RULES
from .schedules import SparsitySchedule

# Searched in the names of parameters. Forget gates and shifts are thin, and the gates decide what pruning of attention
# may skip; heads and embeddings are what a model says and reads.
DEFAULT_EXCLUDE = (
    r"embed",
    r"norm",
    r"(^|\.)fgate",
    r"shift_proj",
    r"(^|\.)(lm_head|score|classifier|qa_outputs|policy_head|value_head)(\.|$)",
)

METHODS = (*RULES, "static_random", "rigl")


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Settings of a `MaskedPruner`; plain values, so that `to_dict` can stand in a config.json.

    The defaults are those of "In value-based deep RL, a pruned network is a good network" (arXiv:2402.12479): cubic
    schedule from 20 % to 80 % of training, |w| in each layer, densities by ERK.

    Raises:
        ValueError: If a field is not one of the values that its text allows.
    """

    final_sparsity: float
    """Share of the prunable weights that is zero at the end, in [0, 1)."""
    method: str = "magnitude"
    """magnitude, saliency or random: gradual, by that rule, and what is pruned stays pruned. static_random: a random
    mask from the first step on. rigl: constant sparsity; the smallest weights make room for those with the largest
    gradient (arXiv:1911.11134)."""
    start_fraction: float = 0.2
    """Gradual methods: share of the training steps before the first weight is pruned."""
    end_fraction: float = 0.8
    """Share of the training steps after which masks are final (rigl: the paper's own value is 0.75)."""
    every_steps: int | None = None
    """Optimizer steps between refreshes. None = a hundredth of the steps between start and end, at most 1000, the
    published value."""
    power: float = 3.0
    """Gradual methods: exponent of the schedule."""
    allocation: str = "erk"
    """erk, uniform, or global: one threshold over all layers (gradual methods only)."""
    include: tuple[str, ...] = ()
    """Regular expressions; if there are any, only parameters whose name matches one are pruned."""
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    """Regular expressions; parameters whose name matches one stay dense. Replaces the default list."""
    layer_sparsities: dict[str, float] = dataclasses.field(default_factory=dict)
    """Regular expression to final sparsity, for layers that `allocation` should not decide; not with global."""
    rigl_drop_fraction: float = 0.3
    """rigl: share of a layer's weights exchanged at the first refresh; falls to 0 as half a cosine."""
    seed: int = 0
    """random, static_random and the first masks of rigl."""

    def __post_init__(self):
        for name in ("include", "exclude"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        SparsitySchedule(final_sparsity=self.final_sparsity, start_step=0, end_step=0, power=self.power)
        _check_choice("method", self.method, METHODS)
        _check_choice("allocation", self.allocation, (*ALLOCATIONS, "global"))
        if not 0 <= self.start_fraction <= self.end_fraction <= 1:
            raise ValueError(
                "start_fraction and end_fraction must be 0 <= start <= end <= 1; "
                f"got {self.start_fraction} and {self.end_fraction}. They are shares of training."
            )
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"every_steps must be at least 1; got {self.every_steps}. None chooses it.")
        if self.allocation == "global" and (not self.is_gradual or self.layer_sparsities):
            raise ValueError(
                f"allocation global must go with a gradual method and no layer_sparsities; got {self.method} and "
                f"{self.layer_sparsities}. Use erk or uniform."
            )
        if not 0 < self.rigl_drop_fraction <= 1:
            raise ValueError(f"rigl_drop_fraction must be in (0, 1]; got {self.rigl_drop_fraction}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0; got {self.seed}.")
        for pattern, sparsity in self.layer_sparsities.items():
            if not 0 <= sparsity < 1:
                raise ValueError(f"layer_sparsities[{pattern!r}] must be in [0, 1); got {sparsity}. It is a fraction.")

    @property
    def is_gradual(self) -> bool:
        """Whether sparsity grows during training and pruned weights never come back."""
        return self.method in RULES

    def schedule(self, total_steps: int) -> SparsitySchedule:
        """The schedule for a training of `total_steps` optimizer steps."""
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1; got {total_steps}. Count optimizer steps.")
        start = round(self.start_fraction * total_steps) if self.is_gradual else 0
        end = round(self.end_fraction * total_steps)
        every = self.every_steps or min(1000, max(1, (end - start) // 100))
        return SparsitySchedule(
            final_sparsity=self.final_sparsity, start_step=start, end_step=end, every_steps=every, power=self.power
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `SparsityConfig(**d)` gives the same config back."""
        values = dataclasses.asdict(self)
        return values | {"include": list(self.include), "exclude": list(self.exclude)}


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(allowed)}; got {value!r}.")


def prunable_parameters(model: nn.Module, config: SparsityConfig) -> tuple[dict[str, tuple[nn.Module, str]], dict]:
    """Which parameters get a mask.

    Args:
        model: Any module; names are without the prefixes that DDP and torch.compile put before them.
        config: Its `include` and `exclude` are read.

    Returns:
        `{name: (module, attribute)}` of those that are pruned, and `{name: reason}` of those that stay dense. A tied
        parameter appears once, under its first name.
    """
    chosen: dict[str, tuple[nn.Module, str]] = {}
    dense: dict[str, str] = {}
    modules = dict(model.named_modules())
    # Any name of a tied parameter may exclude it: an output layer tied to the embedding is the embedding.
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        reasons = (_reason(clean_name(n), parameter, modules, n, config) for n in names[id(parameter)])
        reason = next((r for r in reasons if r), None)
        if reason:
            dense[clean_name(name)] = reason
        else:
            chosen[clean_name(name)] = (modules[path], attribute)
    return chosen, dense


def _reason(name: str, parameter: nn.Parameter, modules: dict, raw_name: str, config: SparsityConfig) -> str | None:
    owner = modules[raw_name.rpartition(".")[0]]
    if parameter.ndim < 2:
        return "fewer than two dimensions"
    if not (parameter.requires_grad and parameter.is_floating_point()):
        return "frozen or not floating point"
    if isinstance(owner, nn.Embedding) or "Norm" in type(owner).__name__:
        return f"belongs to {type(owner).__name__}"
    if config.include and not any(re.search(p, name) for p in config.include):
        return "matches nothing in include"
    return next((f"matches {p} in exclude" for p in config.exclude if re.search(p, name)), None)


def clean_name(name: str) -> str:
    """The name of a parameter without what DDP (`module.`) and torch.compile (`_orig_mod.`) add."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod").removeprefix("module.")


def check_wrapping(model: nn.Module) -> None:
    """Refuse the wrappers under which a weight is no longer a tensor of its own.

    Raises:
        ValueError: For FSDP1 and DeepSpeed ZeRO-3.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or type(parameter).__name__ == "FlatParameter":
            raise ValueError(
                f"model must have whole or DTensor parameters; got {type(parameter).__name__} {name}, which FSDP1 or "
                "ZeRO-3 has cut up. Use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP."
            )
