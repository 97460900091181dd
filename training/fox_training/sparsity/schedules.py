"""How much is pruned at which step, as a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SparsitySchedule:
    """Sparsity that grows fast, then levels off.

        s(t) = final (1 - (1 - p)^power),   p = (t - start) / (end - start), held to [0, 1]

    With power 3 this is the schedule of Zhu & Gupta (arXiv:1710.01878, eq. 1, starting at 0).

    Raises:
        ValueError: If a field is out of its range.
    """

    final_sparsity: float
    """Share of the weights that is zero at the end, in [0, 1). 0.95 keeps one weight in twenty."""
    start_step: int
    """Optimizer steps that are done before the first weight is pruned."""
    end_step: int
    """Optimizer steps after which the final sparsity is reached; equal to `start_step` it is reached at once."""
    every_steps: int = 1000
    """Steps between two refreshes of the masks. The step `end_step` is always one."""
    power: float = 3.0
    """1 prunes at a constant rate, larger ones prune earlier."""

    def __post_init__(self):
        if not 0 <= self.final_sparsity < 1:
            raise ValueError(
                f"final_sparsity must be in [0, 1); got {self.final_sparsity}. It is a fraction: 0.95 for 95 %."
            )
        if self.start_step < 0 or self.end_step < self.start_step:
            raise ValueError(
                "start_step and end_step must be 0 <= start_step <= end_step; "
                f"got {self.start_step} and {self.end_step}. Count optimizer steps."
            )
        if self.every_steps < 1:
            raise ValueError(f"every_steps must be at least 1; got {self.every_steps}.")
        if self.power <= 0:
            raise ValueError(f"power must be above 0; got {self.power}. The published schedule has 3.")

    def progress(self, step: int) -> float:
        """Share of the way from `start_step` to `end_step`, in [0, 1]."""
        if step >= self.end_step:
            return 1.0
        return max(0, step - self.start_step) / max(1, self.end_step - self.start_step)

    def fraction(self, step: int) -> float:
        """Sparsity after `step` optimizer steps as a share of the final one, in [0, 1]."""
        return 1.0 - (1.0 - self.progress(step)) ** self.power

    def sparsity(self, step: int) -> float:
        """Sparsity after `step` optimizer steps, in [0, 1)."""
        return self.final_sparsity * self.fraction(step)

    def is_refresh(self, step: int) -> bool:
        """Whether the masks are made anew after optimizer step `step` (counted from 1)."""
        if step == self.end_step:
            return True
        return self.start_step < step < self.end_step and (step - self.start_step) % self.every_steps == 0
