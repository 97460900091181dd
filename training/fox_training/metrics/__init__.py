"""`evaluate` metrics that come with the package and need no network.

Each folder is an ordinary `evaluate` module, so `evaluate.load(metrics.path("bits_per_byte"))` works too; `load` gives
the same object without copying the module into the cache of `evaluate`.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

CLASSES = {
    "bits_per_byte": "BitsPerByte",
    "next_token_accuracy": "NextTokenAccuracy",
    "perplexity": "Perplexity",
}


def path(name: str) -> str:
    """Folder of the metric, to be given to `evaluate.load`.

    Raises:
        ValueError: If there is no metric of that name.
    """
    if name not in CLASSES:
        near = get_close_matches(name, CLASSES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Metrics of the Hub are loaded with `evaluate.load`."
        raise ValueError(f"`name` must be one of {sorted(CLASSES)}, got {name!r}. {hint}")
    return str(Path(__file__).parent / name)


def load(name: str) -> evaluate.Metric:
    """The metric `name`, with `add_batch` and `compute`; it keeps its inputs in memory and touches no disk.

    Raises:
        ValueError: If there is no metric of that name.
    """
    path(name)
    module = import_module(f"{__name__}.{name}.{name}")
    return getattr(module, CLASSES[name])(keep_in_memory=True)
