"""How a sparsity is shared out over the layers.

uniform: every layer the same. erk: Erdos-Renyi-Kernel (arXiv:1911.11134, section 3). A third way, global, needs the
scores of all layers and is made in `masks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]


def kept_weights(num_weights: int, sparsity: float) -> int:
    """Weights that stay of `num_weights`: `round(num_weights (1 - sparsity))`, at least one."""
    return max(1, round(num_weights * (1.0 - sparsity)))


def uniform_sparsities(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The same sparsity for every layer."""
    return dict.fromkeys(shapes, sparsity)


def erk_sparsities(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Sparsity of each layer by the Erdos-Renyi-Kernel rule.

    The density of a layer is proportional to `sum(shape) / prod(shape)`, so that small layers stay denser; one whose
    density would exceed 1 is dense, the most extreme first, and the others make up for it. The weights left over all
    layers are `(1 - sparsity)` of them.

    Args:
        shapes: Shape of each weight, at least two dimensions; the order of the dimensions does not matter.
        sparsity: Over all layers, in [0, 1).
    """
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = (1.0 - sparsity) * sum(size.values())
    dense: set[str] = set()
    while True:
        sparse = [name for name in shapes if name not in dense]
        if not sparse:
            return dict.fromkeys(shapes, 0.0)
        scale = (budget - sum(size[name] for name in dense)) / sum(raw[name] * size[name] for name in sparse)
        largest = max(raw[name] for name in sparse)
        if scale * largest <= 1.0:
            break
        dense |= {name for name in sparse if raw[name] == largest}
    return {name: 0.0 if name in dense else 1.0 - scale * raw[name] for name in shapes}


ALLOCATIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {
    "uniform": uniform_sparsities,
    "erk": erk_sparsities,
}
