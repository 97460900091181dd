"""Power of the GPUs in training, by NVML's counters of energy, where there are a GPU and nvidia-ml-py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class PowerMeter:
    """Mean power of one GPU between calls.

    Args:
        device: Of this process; anything but CUDA has no meter.
        clock: Seconds from any start; replaced in tests.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._read = _counter(device)
        self._last = (clock(), self._read()) if self._read is not None else None

    def lap(self) -> float | None:
        """Watts since the last call; None without a meter."""
        if self._last is None:
            return None
        before, now = self._last, (self._clock(), self._read())
        self._last = now
        seconds = now[0] - before[0]
        return (now[1] - before[1]) / seconds if seconds > 0 else None


def _counter(device: torch.device) -> Callable[[], float] | None:
    """A function of the joules that the GPU has taken since its driver was loaded; None if it does not say."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        # By its UUID: the numbers of NVML know nothing of CUDA_VISIBLE_DEVICES.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (ImportError, RuntimeError):
        return None
    except Exception as error:
        if type(error).__module__.startswith("pynvml"):  # an old GPU, or a container without the library
            return None
        raise
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def watt_hours(rows: list[dict[str, Any]]) -> float | None:
    """Energy of all GPUs over the training steps of a run, from the logged lines; None if it was not measured.

    Args:
        rows: Lines of metrics.jsonl with `train_seconds` and `gpu_watts`, which holds since the line before.
    """
    if not rows or any("gpu_watts" not in row for row in rows):
        return None
    seconds = [0.0, *(row["train_seconds"] for row in rows)]
    spans = [after - before for before, after in zip(seconds, seconds[1:], strict=False)]
    return sum(row["gpu_watts"] * span for row, span in zip(rows, spans, strict=True)) / 3600
