"""The figures of an evaluation. Each function draws one figure to one PNG and keeps no state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150


def position_curve(
    path: Path, context: Sequence[float], nats: Sequence[float], standard_error: Sequence[float], title: str
):
    """Loss against the number of tokens that could be seen, with a band of two standard errors.

    Args:
        path: PNG to write.
        context: Centre of each bin, in tokens.
        nats: Mean loss of each bin, in nats per token.
        standard_error: Of that mean, same unit.
        title: Of the figure.
    """
    figure, axes = _figure(6.4, 4.0)
    mean, error = np.asarray(nats), np.asarray(standard_error)
    axes.fill_between(context, mean - 2 * error, mean + 2 * error, alpha=0.2, linewidth=0, label="two standard errors")
    axes.plot(context, mean, marker="o", markersize=3, label="mean of the bin")
    axes.set_xscale("log")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def head_map(path: Path, values: np.ndarray, *, label: str, title: str, percent: bool = False, log: bool = False):
    """One number per layer and head as a heat map, the numbers written into the cells.

    Args:
        path: PNG to write.
        values: `(num_layers, num_heads)`.
        label: What the colour means, with its unit.
        title: Of the figure.
        percent: The values are shares: show them from 0 to 100 %.
        log: Colour on a logarithmic scale; the values must be positive.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    layers, heads = values.shape
    figure, axes = _figure(max(4.0, 1.8 + 0.55 * heads), max(2.4, 1.4 + 0.45 * layers))
    shown = 100 * values if percent else values
    scale = {"vmin": 0, "vmax": 100} if percent else {}
    if log:
        scale = {"norm": LogNorm(vmin=shown.min(), vmax=max(shown.max(), 1.01 * shown.min()))}
    image = axes.imshow(shown, aspect="auto", cmap="viridis", **scale)
    figure.colorbar(image, ax=axes, label=label)
    if values.size <= 400:
        _write_cells(axes, image, shown)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    _save(figure, path)


def training_curve(
    path: Path,
    tokens: Sequence[float],
    bits: Sequence[float],
    validation_tokens: Sequence[float],
    validation_bits: Sequence[float],
    levels: dict[str, float] | None = None,
):
    """Bits per byte, or nats per token, against training tokens, with horizontal lines for other models.

    Args:
        path: PNG to write.
        tokens: Training tokens seen at each logged step.
        bits: Training loss there, in nats per token.
        validation_tokens: Training tokens seen at each evaluation.
        validation_bits: Validation loss there, in nats per token.
        levels: Name and loss (nats per token) of what the model is compared with.
    """
    figure, axes = _figure(6.4, 4.0)
    axes.plot(tokens, bits, linewidth=1, alpha=0.7, label="training")
    if len(validation_tokens):
        axes.plot(validation_tokens, validation_bits, marker="o", markersize=4, label="validation")
    for name, level in (levels or {}).items():
        axes.axhline(level, color="grey", linestyle="--", linewidth=1)
        axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def _write_cells(axes: Axes, image, shown: np.ndarray):
    for layer, head in np.ndindex(*shown.shape):
        value = shown[layer, head]
        # Dark text on the bright end of the colour map and light text on the dark end.
        bright = image.norm(value) > 0.6
        axes.text(
            head, layer, _short(value), ha="center", va="center", fontsize=7, color="black" if bright else "white"
        )


def _short(value: float) -> str:
    if value >= 10000:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Figure instead of pyplot: no global state, no display, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path):
    figure.savefig(path)
