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
    from matplotlib.ticker import FuncFormatter

    figure, axes = _figure(6.4, 4.0)
    mean, error = np.asarray(nats), np.asarray(standard_error)
    axes.fill_between(context, mean - 2 * error, mean + 2 * error, alpha=0.2, linewidth=0, label="two standard errors")
    axes.plot(context, mean, marker="o", markersize=3, label="mean of the bin")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
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
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    layers, heads = values.shape
    figure, axes = _figure(np.clip(1.8 + 0.55 * heads, 4, 10), np.clip(1.4 + 0.45 * layers, 2.4, 7.5))
    shown = 100 * values if percent else values
    scale = {"vmin": 0, "vmax": 100} if percent else {}
    if log:
        # Whole decades: at least one, with a labelled tick at both ends.
        low, high = np.floor(np.log10(shown.min())), np.ceil(np.log10(shown.max()))
        scale = {"norm": LogNorm(vmin=10**low, vmax=10 ** max(high, low + 1))}
    image = axes.imshow(shown, aspect="auto", cmap="viridis", **scale)
    figure.colorbar(image, ax=axes, label=label, format=FuncFormatter(_short))
    if heads <= 16 and layers <= 16:
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
    nats: Sequence[float],
    validation_tokens: Sequence[float],
    validation_nats: Sequence[float],
    levels: dict[str, float] | None = None,
):
    """Loss against training tokens, with horizontal lines for other models.

    Args:
        path: PNG to write.
        tokens: Training tokens seen at each logged step.
        nats: Training loss there, in nats per token.
        validation_tokens: Training tokens seen at each evaluation.
        validation_nats: Validation loss there, in nats per token.
        levels: Name and loss (nats per token) of what the model is compared with.
    """
    from matplotlib.ticker import FuncFormatter

    figure, axes = _figure(6.4, 4.0)
    axes.plot(tokens, nats, linewidth=1, alpha=0.7, label="training")
    if len(validation_tokens):
        axes.plot(validation_tokens, validation_nats, marker="o", markersize=4, label="validation")
    for name, level in (levels or {}).items():
        axes.axhline(level, color="grey", linestyle="--", linewidth=1)
        axes.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def curves(
    path: Path,
    lines: dict[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    title: str = "",
    groups: dict[str, str] | None = None,
    levels: dict[str, float] | None = None,
    log: bool = False,
):
    """Several lines in one figure.

    Args:
        path: PNG to write.
        lines: Name to x and y values.
        x: What the x axis is, with its unit.
        y: The same of the y axis.
        title: Of the figure.
        groups: Name of a line to its group; lines of one group share a colour and stand in the legend once.
        levels: Name and y value of horizontal lines.
        log: Logarithmic y axis.
    """
    from matplotlib.ticker import FuncFormatter

    figure, axes = _figure(6.4, 4.0)
    colours: dict[str, str] = {}
    for name, (at, values) in lines.items():
        group = (groups or {}).get(name, name)
        label = None if group in colours else group
        colour = colours.setdefault(group, f"C{len(colours) % 10}")
        axes.plot(at, values, linewidth=1.2, alpha=0.8, color=colour, label=label, marker="o", markersize=2)
    for name, level in (levels or {}).items():
        axes.axhline(level, color="grey", linestyle="--", linewidth=1)
        axes.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if colours:
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


def _short(value: float, _position: int | None = None) -> str:
    """A number in at most five characters, as tick label or in a cell: 8.4, 350, 12k, 1.5M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Figure instead of pyplot: no global state, no display, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path):
    figure.savefig(path)
