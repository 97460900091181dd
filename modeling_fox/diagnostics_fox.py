# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""What the gates and the pruning do inside a model, collected while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class PruningStats:
    """Pruning of every head, over the forward calls made inside `pruning_stats`."""

    def __init__(self, num_layers: int):
        self._fractions: list[torch.Tensor | None] = [None] * num_layers
        self._bounds: list[torch.Tensor | None] = [None] * num_layers
        self._calls = [0] * num_layers

    def _add(self, layer: int, pruned_fraction: torch.Tensor, lost_mass_bound: torch.Tensor) -> None:
        self._calls[layer] += 1
        if self._calls[layer] == 1:
            self._fractions[layer], self._bounds[layer] = pruned_fraction, lost_mass_bound
        else:
            self._fractions[layer] = self._fractions[layer] + pruned_fraction
            self._bounds[layer] = torch.maximum(self._bounds[layer], lost_mass_bound)

    def _stacked(self, rows: list[torch.Tensor | None]) -> torch.Tensor:
        if 0 in self._calls:
            raise ValueError(
                "`pruning_stats` must see a forward call of the model; got none. Call it inside the block, without a "
                "FoxEvictingCache: that attends by itself, and `report()` tells what it dropped."
            )
        return torch.stack([row.float().cpu() for row in rows])

    @property
    def pruned_fraction(self) -> torch.Tensor:
        """Share of the visible (query, key) pairs that was skipped, `(num_layers, num_heads)`, mean over the calls."""
        return self._stacked(self._fractions) / torch.tensor(self._calls)[:, None]

    @property
    def lost_mass_bound(self) -> torch.Tensor:
        """No query lost more attention mass than this, `(num_layers, num_heads)`, maximum over the calls."""
        return self._stacked(self._bounds)


def _attention_layers(model: nn.Module, sink: str) -> list[nn.Module]:
    layers = [module for module in model.modules() if hasattr(module, sink)]
    if not layers:
        raise ValueError(f"`model` must be a FoX model; got a {type(model).__name__} without forgetting attention.")
    return layers


@contextmanager
def pruning_stats(model: nn.Module) -> Iterator[PruningStats]:
    """Collect what adaptive computation pruning skips in the forward calls made inside the block.

    The numbers stay on the device until they are read, so collecting does not wait for it.

    Args:
        model: A FoX model, wrapped (DDP, PEFT) or not, with `attn_implementation="fox_acp"`.

    Raises:
        ValueError: If the model runs another backend; those do not prune.

    ```python
    >>> with pruning_stats(model) as stats:
    ...     model(input_ids)
    >>> stats.pruned_fraction.mean()
    ```
    """
    layers = _attention_layers(model, "pruning_sink")
    backend = layers[0].config._attn_implementation
    if backend != "fox_acp":
        raise ValueError(
            f"`attn_implementation` must be 'fox_acp' to prune; got {backend!r}. "
            "Call `model.set_attn_implementation('fox_acp')` first."
        )
    stats = PruningStats(len(layers))

    def sink_of(index: int):
        return lambda pruned_fraction, lost_mass_bound: stats._add(index, pruned_fraction, lost_mass_bound)

    for index, layer in enumerate(layers):
        layer.pruning_sink = sink_of(index)
    try:
        yield stats
    finally:
        for layer in layers:
            layer.pruning_sink = None


@contextmanager
def forget_gates(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the log forget gates of the forward call made inside the block.

    Yields:
        A list, filled by the call: one `(B, H, T)` fp32 tensor of nats per layer, detached, 0 at padding. After
        several calls it holds those of the last one.

    ```python
    >>> with forget_gates(model) as gates:
    ...     model(input_ids)
    >>> half_life_tokens = -math.log(2) / gates[0].mean(dim=(0, 2))
    ```
    """
    layers = _attention_layers(model, "gate_sink")
    gates: list[torch.Tensor] = []
    latest: dict[int, torch.Tensor] = {}

    def sink_of(index: int):
        def sink(log_fgate: torch.Tensor) -> None:
            latest[index] = log_fgate
            if len(latest) == len(layers):
                gates[:] = [latest[i] for i in range(len(layers))]

        return sink

    for index, layer in enumerate(layers):
        layer.gate_sink = sink_of(index)
    try:
        yield gates
    finally:
        for layer in layers:
            layer.gate_sink = None


__all__ = ["PruningStats", "forget_gates", "pruning_stats"]
