"""Honest figures from few runs (arXiv:2108.13264): interquartile mean, stratified bootstrap, profiles.

Scores are `(runs, tasks)` arrays throughout; every run is one seed. The formulas are those of rliable 1.2.0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Scores = np.ndarray


def interquartile_mean(scores: Scores) -> float:
    """Mean of the middle half of all runs of all tasks: the lowest and highest `n // 4` of n scores are left out."""
    values = np.sort(_checked(scores).ravel())
    cut = len(values) // 4
    return float(values[cut : len(values) - cut].mean())


def optimality_gap(scores: Scores, target: float = 1.0) -> float:
    """Mean shortfall below `target`, with scores above it counted as `target`."""
    return float(target - np.minimum(_checked(scores), target).mean())


def probability_of_improvement(scores: Scores, other: Scores) -> float:
    """Chance that a run of the first beats one of the second on the same task, mean over tasks; a tie is a half.

    Args:
        scores: `(runs, tasks)`.
        other: `(other runs, tasks)`, same tasks in the same order.
    """
    scores, other = _checked(scores), _checked(other)
    if scores.shape[1] != other.shape[1]:
        raise ValueError(f"other must have the {scores.shape[1]} tasks of scores; got {other.shape[1]}.")
    difference = scores[:, None, :] - other[None, :, :]  # (runs, other runs, tasks)
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def performance_profile(scores: Scores, thresholds: np.ndarray) -> np.ndarray:
    """Share of all runs whose score is above each threshold, `(thresholds,)`: the run-score distribution."""
    return (_checked(scores)[None] > np.asarray(thresholds, dtype=float)[:, None, None]).mean(axis=(1, 2))


def bootstrap_interval(
    statistic: Callable[..., float | np.ndarray],
    *scores: Scores,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of a statistic, by resampling the runs of every task on their own (stratified).

    Args:
        statistic: Function of as many arrays as are given, e.g. `interquartile_mean`; may return an array.
        scores: `(runs, tasks)` each; several are resampled independently, for `probability_of_improvement`.
        confidence: Share of the resampled values inside the interval, in (0, 1).
        resamples: Number of resampled data sets.
        seed: Of the resampling.

    Returns:
        Lower and upper end, with the shape that the statistic has.

    Raises:
        ValueError: With a single run there is nothing to resample.
    """
    arrays = [_checked(x) for x in scores]
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1); got {confidence}. It is a fraction.")
    if min(len(x) for x in arrays) < 2:
        raise ValueError("scores must hold at least 2 runs; got 1. An interval needs more than one seed.")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        drawn = [np.take_along_axis(x, generator.integers(0, len(x), x.shape), axis=0) for x in arrays]
        values.append(statistic(*drawn))
    outside = 50.0 * (1.0 - confidence)
    low, high = np.percentile(np.asarray(values), [outside, 100.0 - outside], axis=0)
    return low, high


def normalize(scores: Scores, lowest: np.ndarray | float, highest: np.ndarray | float) -> Scores:
    """`(scores - lowest) / (highest - lowest)` per task, e.g. random and human score of a game."""
    return (_checked(scores) - np.asarray(lowest)) / (np.asarray(highest) - np.asarray(lowest))


def compare(results: dict[str, Scores], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> str:
    """Markdown table with the interquartile mean of each method, its interval, and how it does against the first.

    Args:
        results: Method name to `(runs, tasks)`; the first one is the baseline.
        confidence: See `bootstrap_interval`.
        resamples: See `bootstrap_interval`.
        seed: See `bootstrap_interval`.
    """
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    baseline = next(iter(results))
    lines = [
        f"| method | runs | interquartile mean | {confidence:.0%} interval | P(better than {baseline}) | interval |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, scores in results.items():
        low, high = bootstrap_interval(interquartile_mean, scores, **options)
        cells = [name, str(len(scores)), f"{interquartile_mean(scores):.3f}", f"{low:.3f} to {high:.3f}"]
        if name == baseline:
            cells += ["", ""]
        else:
            chance = probability_of_improvement(scores, results[baseline])
            low, high = bootstrap_interval(probability_of_improvement, scores, results[baseline], **options)
            cells += [f"{chance:.2f}", f"{low:.2f} to {high:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beats_control(
    scores: Scores, control: Scores, lengths: np.ndarray, control_lengths: np.ndarray, *, min_runs: int = 5,
    tolerance: float = 0.1, **options,
) -> tuple[bool, str]:  # fmt: skip
    """Whether a method that stops episodes may be said to be better than a control that stops them at random.

    Three conditions: enough runs of both, episodes of the same mean length, and an interval of the difference of the
    interquartile means that lies above 0. The last is left out where one of the others fails.

    Args:
        scores, control: `(runs, tasks)`.
        lengths, control_lengths: Mean episode length of each run, steps.
        min_runs: Fewest runs of each.
        tolerance: Largest relative difference of the mean lengths.
        options: Of `bootstrap_interval`.

    Returns:
        The answer, and a sentence with its reason.
    """
    fewest = min(len(_checked(scores)), len(_checked(control)))
    if fewest < min_runs:
        return False, f"No claim: {fewest} runs, and it takes {min_runs} of each."
    length, usual = float(np.mean(lengths)), float(np.mean(control_lengths))
    if abs(length - usual) > tolerance * usual:
        return False, f"No claim: mean episode lengths of {length:.0f} and {usual:.0f} steps do not match."

    def difference(first: Scores, second: Scores) -> float:
        return interquartile_mean(first) - interquartile_mean(second)

    low, high = bootstrap_interval(difference, scores, control, **options)
    text = f"difference of the interquartile means {difference(scores, control):.3f} ({low:.3f} to {high:.3f})"
    return bool(low > 0), f"{'Better than' if low > 0 else 'Not separable from or worse than'} the control: {text}."


def plot_profiles(results: dict[str, Scores], thresholds: np.ndarray, path: str, **options) -> None:
    """Performance profiles with their intervals as a figure.

    Args:
        results: Method name to `(runs, tasks)`.
        thresholds: Increasing scores for the horizontal axis.
        path: Image file; its ending chooses the format.
        options: Of `bootstrap_interval`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, scores in results.items():
        low, high = bootstrap_interval(lambda x: performance_profile(x, thresholds), scores, **options)
        (line,) = axes.plot(thresholds, performance_profile(scores, thresholds), label=name)
        axes.fill_between(thresholds, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="score", ylabel="share of runs above it", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(path)


def _checked(scores: Scores) -> Scores:
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"scores must be (runs, tasks); got shape {scores.shape}. One task: scores[:, None].")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite; got {int((~np.isfinite(scores)).sum())} that are not.")
    return scores
