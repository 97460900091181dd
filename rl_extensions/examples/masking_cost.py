"""What masks cost: time of a training step with and without a pruner, interleaved, at 10M parameters.

    python rl_extensions/examples/masking_cost.py

An MLP with batch 256 under AdamW. The pruner refreshes every 1000 steps as published; its share of a refresh is added
to the masking of every step. Prints the medians and the overhead.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import nn

from fox_training.sparsity import MaskedPruner, SparsityConfig


def measure(rounds: int = 15, width: int = 1826, batch: int = 256) -> float:
    """Print the medians; returns the overhead as a share of a step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    pruner = MaskedPruner(model, SparsityConfig(final_sparsity=0.95), total_steps=100_000)
    pruner.start()
    pruner.step_count = 50_000
    pruner.refresh()
    x = torch.randn(batch, width)
    steps, holds, refreshes = [], [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        middle = time.perf_counter()
        pruner.hold()
        steps.append(middle - begin)
        holds.append(time.perf_counter() - middle)
    for _ in range(3):
        begin = time.perf_counter()
        pruner.refresh()
        refreshes.append(time.perf_counter() - begin)
    step, hold, refresh = (1e3 * statistics.median(x) for x in (steps, holds, refreshes))
    total = sum(p.numel() for p in model.parameters())
    print(
        f"{total:,} parameters: step {step:.1f} ms, masking {hold:.1f} ms, refresh {refresh:.0f} ms every 1000 steps"
    )
    overhead = (hold + refresh / 1000) / step
    print(f"overhead {100 * overhead:.1f} %")
    return overhead


def main() -> int:
    """Ends with an error at 5 % or more."""
    return 0 if measure() < 0.05 else 1


if __name__ == "__main__":
    sys.exit(main())
