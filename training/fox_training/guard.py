"""Losses that are no number or jump: found at the next logged step, with the batch that did it."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

# The newest step weighs 1 / 20 in the running mean, which counts once it has seen this many.
_DECAY = 0.95
_SETTLED = 50


class Finding(NamedTuple):
    """The first step whose loss or gradient norm is not as it should be. `expected` is None for one that is no number,
    else the running mean that the loss jumped from."""

    step: int
    loss: float
    grad_norm: float
    expected: float | None


class Guard:
    """Keeps loss, gradient norm and batch of every step since the last check; nothing waits for the device before it.

    Args:
        spike: Nats per token above the running mean of about 20 steps that count as a jump; None = none does.
    """

    def __init__(self, spike: float | None):
        self.spike = spike
        self._steps: collections.deque = collections.deque()
        self._mean, self._count = 0.0, 0
        self._batch: list[dict[str, torch.Tensor]] = []

    def add(
        self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, batch: list[dict[str, torch.Tensor]]
    ) -> None:
        """Remember a step: loss `()` in nats per token, gradient norm `()`, micro-batches, all on the device."""
        self._steps.append((step, loss, grad_norm, batch))

    def check(self, mean_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> Finding | None:
        """The first step that went wrong since the last check, the same on all processes."""
        if not self._steps:
            return None
        losses = mean_over_processes(torch.stack([loss.double() for _, loss, _, _ in self._steps])).tolist()
        norms = torch.stack([norm.double() for _, _, norm, _ in self._steps]).tolist()
        steps, self._steps = self._steps, collections.deque()
        for (step, _, _, batch), loss, norm in zip(steps, losses, norms, strict=True):
            expected = None
            if math.isfinite(loss) and math.isfinite(norm):
                if self.spike is None or self._count < _SETTLED or loss <= self._mean + self.spike:
                    self._take_in(loss)
                    continue
                expected = self._mean
            self._batch = batch
            return Finding(step, loss, norm, expected)
        return None

    def save_batch(self, path: Path) -> None:
        """Write what this process was given in the step that `check` found: `input_ids` and `position_ids`,
        `(micro-batches, rows, L)` int64."""
        names = [name for name in ("input_ids", "position_ids") if name in self._batch[0]]
        tensors = {name: torch.stack([part[name] for part in self._batch]).cpu().contiguous() for name in names}
        save_file(tensors, str(path))

    def _take_in(self, loss: float) -> None:
        self._count += 1
        # Divided by the sum of the weights, as if there had been nothing before the first step.
        weight = (1 - _DECAY) / (1 - _DECAY**self._count)
        self._mean += weight * (loss - self._mean)
