"""Masks over the weights of a model, held after every optimizer step.

Zeroing weights once is not enough, and neither is masking their gradient: momentum, decay and preconditioners move
them again (after 50 steps 98 % of them are no longer zero). So the weights are masked after the step, by a hook on the
optimizer. Parameters keep their names and stay plain tensors: saving, copying, compiling and sharding see nothing new.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .allocation import ALLOCATIONS, kept_weights
from .config import SparsityConfig, check_wrapping, clean_name, prunable_parameters
from .rules import RULES, highest, magnitude, needed_gradient, random
from .sharding import local_part, whole


class MaskedPruner:
    """Prunes the weights of a model while it is trained.

    Nothing happens until `attach` or the first `step`; a resumed run calls `load_state_dict` before that.
    Memory: one byte for each prunable weight, on the CPU five.

    Args:
        model: Any module; build the pruner after the model is wrapped (`accelerate.prepare`, `fully_shard`, DDP).
        config: See `SparsityConfig`.
        total_steps: Optimizer steps of the whole training.

    Attributes:
        step_count: Optimizer steps seen.
        excluded: `{name: reason}` of the parameters that stay dense.
        layer_sparsities: `{name: final sparsity}`; empty for global allocation.

    Raises:
        ValueError: If nothing is left to prune, or the weights are not whole tensors (FSDP1, ZeRO-3).
    """

    def __init__(self, model: nn.Module, config: SparsityConfig, total_steps: int):
        check_wrapping(model)
        self.config, self.total_steps = config, total_steps
        self.schedule = config.schedule(total_steps)
        self._places, self.excluded = prunable_parameters(model, config)
        if not self._places:
            raise ValueError(
                f"model must have a prunable parameter; got {len(self.excluded)} that stay dense: "
                f"{dict(list(self.excluded.items())[:5])}. Change include or exclude of the config."
            )
        self.layer_sparsities = self._allocate()
        self.step_count = 0
        self._keep: dict[str, Tensor] = {}  # bool, the part of this process
        self._bits: dict[str, Tensor] = {}  # the same on a CPU as integers, see `_hold`
        self._dense: set[str] = set()  # nothing of it is pruned, so there is nothing to hold
        self._hooks: list[Any] = []

    def _allocate(self) -> dict[str, float]:
        if self.config.allocation == "global":
            return {}
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters()}
        fixed = {}
        for pattern, sparsity in self.config.layer_sparsities.items():
            matching = [name for name in shapes if re.search(pattern, name)]
            if not matching:
                raise ValueError(f"layer_sparsities[{pattern!r}] must match a prunable parameter; got {list(shapes)}.")
            fixed |= dict.fromkeys(matching, sparsity)
        rest = {name: shape for name, shape in shapes.items() if name not in fixed}
        return ALLOCATIONS[self.config.allocation](rest, self.config.final_sparsity) | fixed if rest else fixed

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        # Looked up each time: `fully_shard` and `.to()` may have put another parameter in the same place.
        return [(name, getattr(module, attribute)) for name, (module, attribute) in self._places.items()]

    def attach(self, *optimizers: torch.optim.Optimizer) -> MaskedPruner:
        """Hold the masks after each step of these optimizers; a step of the last one counts as a training step.

        Takes any `torch.optim.Optimizer`, also one prepared by Accelerate. saliency and rigl read gradients when the
        last one steps: call `zero_grad` after that. Without the hook, call `step`.

        Returns:
            The pruner itself.

        Raises:
            ValueError: If something is no PyTorch optimizer.
        """
        inner = [_unwrap(optimizer) for optimizer in optimizers]
        if not inner:
            raise ValueError("attach needs an optimizer; got none. Without one call step() after each training step.")
        self.start()
        for optimizer in inner[:-1]:
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.hold()))
        self._hooks.append(inner[-1].register_step_post_hook(lambda optimizer, *_: self.step(optimizer)))
        return self

    def detach(self) -> None:
        """Remove the hooks; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def start(self) -> None:
        """Make the first masks if there are none: random ones for static_random and rigl, else all ones."""
        if self._keep:
            return
        for name, parameter in self._parameters():
            if self.config.is_gradual:
                keep = torch.ones(parameter.shape, dtype=torch.bool)
            else:
                score = random(torch.empty(()).expand(parameter.shape), name=name, seed=self.config.seed)
                keep = highest(score, kept_weights(score.numel(), self.layer_sparsities[name]))
            self._set_mask(name, parameter, keep)
        self.hold()

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count a training step, refresh the masks if it is time, and hold them. The hook calls this.

        Args:
            optimizer: rigl: its state is set to zero where a weight comes back.
        """
        self.start()
        self.step_count += 1
        if self.schedule.is_refresh(self.step_count) and self.config.method != "static_random":
            self.refresh(optimizer)
        self.hold()

    @torch.no_grad()
    def refresh(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make the masks of `step_count` now."""
        if self.config.method == "rigl":
            for name, parameter in self._parameters():
                self._refresh_rigl(name, parameter, optimizer)
            return
        if self.config.allocation == "global":
            self._refresh_globally()
            return
        fraction = self.schedule.fraction(self.step_count)
        for name, parameter in self._parameters():
            score, active = self._score(name, parameter)
            count = kept_weights(score.numel(), self.layer_sparsities[name] * fraction)
            # A schedule that was stretched by a resumed run may ask for more than there is.
            self._set_mask(name, parameter, highest(score, min(count, active)))

    def _score(self, name: str, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """Score of the whole weight, with -1 for what is pruned already, and how many are not."""
        grad = None if parameter.grad is None else whole(parameter.grad)
        score = RULES[self.config.method](whole(parameter), grad, name=name, seed=self.config.seed)
        keep = self._whole_mask(name, parameter)
        return score.masked_fill(~keep, -1.0), int(keep.sum())

    def _refresh_globally(self) -> None:
        parameters = self._parameters()
        scored = [self._score(name, parameter) for name, parameter in parameters]
        total = sum(score.numel() for score, _ in scored)
        count = min(kept_weights(total, self.schedule.sparsity(self.step_count)), sum(n for _, n in scored))
        device = scored[0][0].device
        for score, _ in scored:
            # A layer without any weight would cut the network in two.
            score.view(-1)[score.argmax()] = math.inf
        mask = highest(torch.cat([score.reshape(-1).to(device) for score, _ in scored]), count)
        for (name, parameter), part in zip(parameters, mask.split([s.numel() for s, _ in scored]), strict=True):
            self._set_mask(name, parameter, part.view(parameter.shape).to(parameter.device))

    def _refresh_rigl(self, name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> None:
        keep = self._whole_mask(name, parameter)
        active = int(keep.sum())
        share = (
            self.config.rigl_drop_fraction * 0.5 * (1 + math.cos(math.pi * self.schedule.progress(self.step_count)))
        )
        moved = min(int(share * active), keep.numel() - active)
        if moved == 0:
            return
        # The step has just moved what was masked: a weight that grows now must start from zero.
        self._hold(name, local_tensor(parameter.data))
        grad = whole(needed_gradient(parameter.grad, name)).float().abs()
        stay = highest(magnitude(whole(parameter)).masked_fill(~keep, -1.0), active - moved)
        new = stay | highest(grad.masked_fill(stay, -1.0), moved)
        self._set_mask(name, parameter, new)
        grown = local_part(new & ~keep, parameter)
        for value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                local_tensor(value).masked_fill_(grown, 0)

    def _set_mask(self, name: str, parameter: nn.Parameter, keep: Tensor) -> None:
        self._keep[name] = local_part(keep.to(parameter.device), parameter)
        self._bits.pop(name, None)
        (self._dense.add if bool(keep.all()) else self._dense.discard)(name)

    def _whole_mask(self, name: str, parameter: nn.Parameter) -> Tensor:
        return whole(self._keep[name].to(parameter.device), like=parameter)

    @torch.no_grad()
    def hold(self) -> None:
        """Set every pruned weight to exactly 0."""
        for name, parameter in self._parameters():
            if name not in self._dense:
                self._hold(name, local_tensor(parameter.data))

    def _hold(self, name: str, weight: Tensor) -> None:
        keep = self._keep[name]
        if keep.device != weight.device:
            self._keep[name] = keep = keep.to(weight.device)
        if weight.device.type != "cpu" or weight.dtype not in _INTEGERS or not weight.is_contiguous():
            weight.masked_fill_(~keep, 0)
            return
        # On a CPU PyTorch mixes dtypes slowly: 7 ms for 10M weights on one core, where a bool mask takes 15 to 50 ms.
        integers = _INTEGERS[weight.dtype]
        bits = self._bits.get(name)
        if bits is None or bits.dtype != integers:
            self._bits[name] = bits = keep.to(integers).neg_()
        weight.view(integers).bitwise_and_(bits)

    @torch.no_grad()
    def apply_to(self, other: nn.Module | Mapping[str, Tensor]) -> None:
        """Mask the tensors of the same names in a target network, an average of the weights, a state dict.

        Args:
            other: Module or `{name: tensor}`; what it has besides is left alone.

        Raises:
            ValueError: If a masked weight is missing in it or has another shape.
        """
        self.start()
        found = dict(other.named_parameters(remove_duplicate=False)) if isinstance(other, nn.Module) else other
        found = {clean_name(name): tensor for name, tensor in found.items()}
        for name, parameter in self._parameters():
            target = found.get(name)
            if target is None or target.shape != parameter.shape:
                got = "nothing of that name" if target is None else tuple(target.shape)
                raise ValueError(f"other must have {name} of shape {tuple(parameter.shape)}; got {got}.")
            keep = local_part(self._whole_mask(name, parameter), target)
            local_tensor(target.data).masked_fill_(~keep.to(target.device), 0)

    @property
    def masks(self) -> dict[str, Tensor]:
        """`{name: bool}`, True where a weight stays; of sharded weights the part of this process."""
        self.start()
        return dict(self._keep)

    def counts(self) -> dict[str, tuple[int, int]]:
        """`{name: (weights that are masked, weights)}` over whole layers. All processes call this together."""
        self.start()
        counts = {}
        for name, parameter in self._parameters():
            keep = self._whole_mask(name, parameter)
            counts[name] = (keep.numel() - int(keep.sum()), keep.numel())
        return counts

    def sparsity(self) -> float:
        """Share of the prunable weights that is masked now."""
        counts = self.counts().values()
        return sum(pruned for pruned, _ in counts) / sum(total for _, total in counts)

    @property
    def is_final(self) -> bool:
        """Whether the last refresh is over: from here on the masks stay."""
        return self.step_count >= self.schedule.end_step

    def describe(self) -> str:
        """A table: what is pruned, how far now and at the end, and what stays dense and why."""
        lines = [f"{'parameter':<48} {'weights':>12} {'now':>7} {'final':>7}"]
        for name, (pruned, total) in self.counts().items():
            final = self.layer_sparsities.get(name)
            shown = "global" if final is None else f"{final:.4f}"
            lines.append(f"{name:<48} {total:>12,} {pruned / total:>7.4f} {shown:>7}")
        lines += [f"{name:<48} dense: {reason}" for name, reason in self.excluded.items()]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Tensor]:
        """Step and masks, eight weights to a byte, on the CPU; tensors only, so that safetensors takes them."""
        self.start()
        state = {"step_count": torch.tensor(self.step_count)}
        for name, parameter in self._parameters():
            state[f"mask.{name}"] = _pack(self._whole_mask(name, parameter).cpu())
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, and mask the weights.

        Raises:
            ValueError: If the masks are of other parameters.
        """
        parameters = self._parameters()
        expected = {f"mask.{name}": (parameter.numel() + 7) // 8 for name, parameter in parameters}
        got = {key: value.numel() for key, value in state.items() if key.startswith("mask.")}
        if expected != got:
            wrong = sorted(set(expected.items()) ^ set(got.items()))
            raise ValueError(f"state must hold masks of the same parameters; these differ: {wrong[:4]}.")
        self.step_count = int(state["step_count"])
        for name, parameter in parameters:
            self._set_mask(name, parameter, _unpack(state[f"mask.{name}"], parameter.shape))
        self.hold()


def sparsify(
    model: nn.Module, *optimizers: torch.optim.Optimizer, total_steps: int, final_sparsity: float, **config: Any
) -> MaskedPruner:
    """Prune `model` while `optimizers` train it: the one line for a loop of one's own.

    Args:
        model: See `MaskedPruner`.
        optimizers: Those that move its weights; the last one counts the steps.
        total_steps: Optimizer steps of the whole training.
        final_sparsity: In [0, 1).
        config: More fields of `SparsityConfig`.
    """
    return MaskedPruner(model, SparsityConfig(final_sparsity=final_sparsity, **config), total_steps).attach(
        *optimizers
    )


# Integers of the same width, for masking by bits: exact, and never NaN as inf * 0 is.
_INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, in the same memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper, whose own hooks never run."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}. "
            "Call step() of the pruner after each training step instead."
        )
    return optimizer


def _pack(mask: Tensor) -> Tensor:
    flat = torch.nn.functional.pad(mask.reshape(-1), (0, -mask.numel() % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (flat.view(-1, 8).to(torch.uint8) * weights).sum(dim=1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    bits = (packed.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.bool().view(-1)[: math.prod(shape)].view(shape)
