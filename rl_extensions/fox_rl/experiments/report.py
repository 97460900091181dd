"""Tables and learning curves from results.csv."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path

import numpy as np

from fox_rl.evaluation import beats_control, bootstrap_interval, compare, interquartile_mean
from fox_rl.experiments.jobs import EXPERIMENTS

Rows = list[dict[str, str]]


def last_scores(rows: Rows, metric: str, tail: float = 0.0) -> dict[str, np.ndarray]:
    """`{arm: (runs, 1)}`: the metric of every run at its end, runs in the order of their seeds.

    Args:
        rows: Of one experiment.
        metric: Name.
        tail: Share of the run's steps, at its end, whose values are averaged; 0 takes the last one.
    """
    points: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["metric"] == metric:
            points[row["arm"]][int(row["seed"])].append((float(row["step"]), float(row["value"])))

    def end(run: list[tuple[float, float]]) -> float:
        last = max(step for step, _ in run)
        return float(np.mean([value for step, value in run if step >= last * (1 - tail)]))

    return {arm: np.array([[end(runs[seed])] for seed in sorted(runs)]) for arm, runs in points.items()}


def steps_to_reach(rows: Rows, metric: str, threshold: float) -> dict[str, list[float]]:
    """`{arm: first step at which each run has the metric at or above the threshold}`, infinity if it never has."""
    curves: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["metric"] == metric:
            curves[(row["arm"], int(row["seed"]))].append((float(row["step"]), float(row["value"])))
    reached: dict[str, list[float]] = defaultdict(list)
    for (arm, _), points in sorted(curves.items()):
        reached[arm].append(min((step for step, value in points if value >= threshold), default=float("inf")))
    return dict(reached)


def best_rates(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of arms `NAME lr=RATE` the rate with the highest interquartile mean, under the whole name."""
    groups: dict[str, list[str]] = defaultdict(list)
    for arm in scores:
        groups[arm.split(" lr=")[0]].append(arm)
    best = (max(arms, key=lambda arm: interquartile_mean(scores[arm])) for arms in groups.values())
    return {arm: scores[arm] for arm in best}


def write_report(rows: Rows, names: list[str], folder: Path) -> str:
    """Markdown of all named experiments that have results; writes folder/NAME.png where matplotlib is installed."""
    parts = []
    for name in names:
        own = [row for row in rows if row["experiment"] == name]
        metric = EXPERIMENTS[name].score
        scores, drawn = last_scores(own, metric, EXPERIMENTS[name].tail), own
        if not scores:
            parts.append(f"{name}: no {metric} measured yet.\n")
            continue
        few = [arm for arm, values in scores.items() if len(values) < 2]
        parts.append(f"## {name}: {EXPERIMENTS[name].text}\n")
        if few:
            parts.append(f"{metric}, one run each: " + ", ".join(f"{arm} {scores[arm][0, 0]:.3f}" for arm in few))
        scores = {arm: values for arm, values in scores.items() if arm not in few}
        if scores and EXPERIMENTS[name].swept:
            means = ", ".join(f"{arm}: {interquartile_mean(values):.1f}" for arm, values in scores.items())
            parts.append(f"Interquartile mean of {metric} at every learning rate: {means}.\n")
            scores = best_rates(scores)
            drawn = [row for row in own if row["arm"] in scores]
        if scores:
            parts.append(compare(scores))
        if name.startswith("early-stop") and "none" in scores:
            parts += early_stop_lines(own, scores)
        if importlib.util.find_spec("matplotlib") is not None:
            plot_curves(drawn, folder / f"{name}.png")
    return "\n".join(parts)


def early_stop_lines(rows: Rows, scores: dict[str, np.ndarray]) -> list[str]:
    """Steps to the return without stops, what the stops saved, and whether LEAST beats the control.

    Args:
        rows: Of one experiment with the arms none, least and random.
        scores: `last_scores` of eval_return.
    """
    goal = interquartile_mean(scores["none"])
    lines = [f"\nSteps to the final return of `none`, {goal:.0f}, interquartile mean, 95 % interval and every run:"]
    last = max(float(row["step"]) for row in rows if row["metric"] == "eval_return")
    for arm, steps in steps_to_reach(rows, "eval_return", goal).items():
        counted, never = np.minimum(steps, last)[:, None], int(np.isinf(steps).sum())
        low, high = bootstrap_interval(interquartile_mean, counted)
        each = ", ".join("never" if np.isinf(x) else f"{x:.0f}" for x in steps)
        late = f"; never counts as {last:.0f}, so the mean is a lower bound" if never else ""
        lines.append(f"- {arm}: {interquartile_mean(counted):.0f} ({low:.0f} to {high:.0f}): {each}{late}")
    lines += ["", "| arm | mean episode length | episodes stopped | steps saved |", "| --- | --- | --- | --- |"]
    lengths, stopped, saved = (last_scores(rows, x) for x in ("episode_length", "num_stopped", "saved_steps"))
    for arm in scores:
        cells = [f"{x[arm].mean():.0f}" for x in (lengths, stopped, saved) if arm in x]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    if {"least", "random"} <= scores.keys() & lengths.keys():
        lines += ["", beats_control(scores["least"], scores["random"], lengths["least"], lengths["random"])[1]]
    return lines


def plot_curves(rows: Rows, path: Path, metrics: tuple[str, ...] = ("eval_return", "episode_return")) -> None:
    """Mean over the seeds with the range of them, by environment steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def points(metric: str) -> dict[str, dict[float, list[float]]]:
        curves: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row["metric"] == metric and np.isfinite(float(row["value"])):
                curves[row["arm"]][float(row["step"])].append(float(row["value"]))
        return curves

    # Whichever has more points is the curve.
    metric = max(metrics, key=lambda m: max((len(x) for x in points(m).values()), default=0))
    curves = points(metric)
    if not curves:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm, values in curves.items():
        steps = sorted(values)
        (line,) = axes.plot(steps, [np.mean(values[s]) for s in steps], label=arm)
        low, high = ([f(values[s]) for s in steps] for f in (min, max))
        axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="environment steps", ylabel=f"{metric}, mean and range of the seeds")
    axes.legend(fontsize="small")
    figure.savefig(path)
