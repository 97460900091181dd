"""What a run says about itself: metrics.jsonl, the progress bar, trackers, tokens per second."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .recipe import TrackingRecipe, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with `step`.

    Args:
        path: The file.
        after_step: Drop lines of later steps and a half-written last line: a resumed run writes them again.
    """

    def __init__(self, path: Path, after_step: int):
        self.path = path
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= after_step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def write(self, values: dict[str, Any]) -> None:
        """Append one line, at once visible to readers."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Push the lines to the disk; called before a checkpoint becomes visible, which then misses none."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _complete_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line)
        except ValueError:
            break  # the process died while writing it
        lines.append(line)
    return lines


class Stopwatch:
    """Seconds of training, without evaluation and checkpoints.

    Args:
        seconds: What a run that is resumed has already used.
        clock: Seconds from any start; replaced in tests.
    """

    def __init__(self, seconds: float = 0.0, clock: Callable[[], float] = time.perf_counter):
        self.seconds = seconds
        self._clock = clock
        self._lap = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Count from now."""
        self._since = self._clock()

    def stop(self) -> None:
        """Count until now."""
        if self._since is not None:
            spent = self._clock() - self._since
            self.seconds += spent
            self._lap += spent
            self._since = None

    def lap(self) -> float:
        """Seconds counted since the last lap; goes on counting if it was."""
        running = self._since is not None
        self.stop()
        spent, self._lap = self._lap, 0.0
        if running:
            self.start()
        return spent


class Progress:
    """One bar where stderr is a terminal, else one line per logged step; silent on all but the main process."""

    def __init__(self, total: int, first: int, enabled: bool):
        self.enabled = enabled
        self.total = total
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True)

    def step(self) -> None:
        """One optimizer step is done."""
        if self.bar is not None:
            self.bar.update()

    def log(self, values: dict[str, Any]) -> None:
        """Show the figures of a logged step."""
        if not self.enabled:
            return
        text = log_line(values)
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            print(f"step {values['step']:>6}/{self.total} | {text}", flush=True)

    def say(self, text: str) -> None:
        """A line of its own that does not tear the bar."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


def log_line(values: dict[str, Any]) -> str:
    """The figures of a logged step in one line."""
    parts = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}", f"gnorm {values['grad_norm']:.2f}"]
    parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
    if "mfu" in values:
        parts.append(f"mfu {100 * values['mfu']:.1f}%")
    # A share that no longer vanishes in the rounding: the device waits for the data.
    if values.get("data_wait", 0) >= 0.01:
        parts.append(f"data wait {100 * values['data_wait']:.0f}%")
    if "pruned_fraction" in values:
        parts.append(f"pruned {100 * values['pruned_fraction']:.1f}%")
    return " | ".join(parts)


_PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def check_trackers(recipe: TrackingRecipe) -> None:
    """Refuse trackers that are unknown or not installed, before anything else is done.

    Raises:
        UserError: Naming the tracker and the package to install.
    """
    from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available

    available = {
        "tensorboard": is_tensorboard_available,
        "trackio": is_trackio_available,
        "wandb": is_wandb_available,
    }
    for name in recipe.trackers:
        if name not in available:
            raise UserError(f"tracking.trackers must be of {', '.join(available)}; got {name}.")
        if not available[name]():
            raise UserError(f"tracking.trackers {name} needs a package: pip install {_PACKAGES[name]}")


def start_trackers(accelerator: Accelerator, recipe: TrackingRecipe, config: dict[str, Any], first_step: int) -> None:
    """Start the trackers of the recipe; TensorBoard forgets steps that a resumed run writes again."""
    if not recipe.trackers:
        return
    flat = {key: value for key, value in config.items() if isinstance(value, (int, float, str, bool))}
    options = {"tensorboard": {"purge_step": first_step or None}}
    accelerator.init_trackers(
        recipe.project, config=flat, init_kwargs={k: v for k, v in options.items() if k in recipe.trackers}
    )
