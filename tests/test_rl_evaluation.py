"""Statistics over few runs, against figures of rliable 1.2.0 and, where it is installed, against rliable itself."""

import numpy as np
import pytest

from fox_rl.evaluation import (
    beats_control,
    bootstrap_interval,
    compare,
    interquartile_mean,
    normalize,
    optimality_gap,
    performance_profile,
    plot_profiles,
    probability_of_improvement,
)


@pytest.fixture
def scores():
    first = np.round(np.random.default_rng(7).normal(1.0, 0.6, (7, 5)), 3)
    second = np.round(np.random.default_rng(8).normal(0.8, 0.5, (6, 5)), 3)
    second[0, 0] = first[0, 0]  # a tie
    return first, second


def test_the_figures_are_those_of_rliable(scores):
    """rliable 1.2.0 (pandas < 3) on the same arrays; its intervals from 20,000 and 5,000 resamples."""
    first, second = scores
    assert interquartile_mean(first) == pytest.approx(0.7744736842105262, abs=1e-12)
    assert optimality_gap(first) == pytest.approx(0.3446571428571428, abs=1e-12)
    assert probability_of_improvement(first, second) == pytest.approx(0.48809523809523814, abs=1e-12)
    thresholds = np.linspace(0, 2, 5)
    profile = [0.91428571, 0.68571429, 0.34285714, 0.05714286, 0.0]
    assert performance_profile(first, thresholds) == pytest.approx(profile, abs=1e-8)
    assert bootstrap_interval(interquartile_mean, first) == pytest.approx((0.59315658, 0.93515921), abs=0.015)
    interval = bootstrap_interval(probability_of_improvement, first, second)
    assert interval == pytest.approx((0.34285714, 0.63809524), abs=0.02)
    low, high = bootstrap_interval(lambda x: performance_profile(x, thresholds), first)
    assert low == pytest.approx([0.82857143, 0.51428571, 0.2, 0.0, 0.0], abs=0.03)
    assert high == pytest.approx([1.0, 0.82857143, 0.48642857, 0.14285714, 0.0], abs=0.03)


@pytest.mark.filterwarnings("ignore")
def test_rliable_itself_agrees(scores):
    metrics = pytest.importorskip("rliable.metrics")
    for x in (scores[0], scores[1], scores[0][:4, :1]):
        assert interquartile_mean(x) == pytest.approx(metrics.aggregate_iqm(x))
    assert probability_of_improvement(*scores) == pytest.approx(metrics.probability_of_improvement(*scores))


def test_the_interquartile_mean_leaves_out_a_quarter_at_both_ends():
    assert interquartile_mean(np.array([[1.0], [2.0], [3.0], [1000.0]])) == 2.5
    assert interquartile_mean(np.array([[1.0], [2.0], [6.0]])) == 3.0
    assert interquartile_mean(np.arange(9.0)[:, None] ** 2) == np.mean(np.arange(2.0, 7.0) ** 2)


def test_a_95_percent_interval_covers_the_truth_about_as_often():
    """Mean of 8 tasks x 8 runs of a known distribution; the percentile interval of few runs is a little too narrow."""
    generator = np.random.default_rng(0)
    offsets = np.arange(8.0)
    hits = 0
    for trial in range(100):
        scores = offsets + generator.normal(size=(8, 8))
        low, high = bootstrap_interval(lambda x: x.mean(), scores, resamples=150, seed=trial)
        hits += low <= 3.5 <= high
    assert 0.85 <= hits / 100 <= 0.99


def test_resampling_is_within_tasks():
    """If tasks were mixed, the interval of the mean would be wide although runs do not differ at all."""
    scores = np.tile(np.array([[0.0, 100.0]]), (5, 1))
    assert bootstrap_interval(lambda x: x.mean(), scores) == (50.0, 50.0)


def test_ties_count_half_and_order_matters():
    assert probability_of_improvement(np.ones((3, 2)), np.ones((2, 2))) == 0.5
    assert probability_of_improvement(np.ones((3, 2)), np.zeros((2, 2))) == 1.0
    assert normalize(np.array([[3.0]]), 1.0, 5.0) == 0.5


def test_the_table_and_the_figure_are_made(scores, tmp_path):
    table = compare({"plain": scores[1], "ours": scores[0]}, resamples=50)
    assert table.splitlines()[0].startswith(
        "| method | runs | interquartile mean | 95% interval | P(better than plain)"
    )
    assert table.splitlines()[3].startswith("| ours | 7 | 0.774 |") and "| 0.49 |" in table
    plot_profiles({"ours": scores[0]}, np.linspace(0, 2, 9), str(tmp_path / "profile.png"), resamples=20)
    assert (tmp_path / "profile.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: interquartile_mean(np.zeros(3)), r"scores must be \(runs, tasks\); got shape \(3,\)"),
        (lambda: interquartile_mean(np.full((2, 2), np.nan)), "scores must be finite; got 4 that are not"),
        (lambda: bootstrap_interval(interquartile_mean, np.zeros((1, 3))), "at least 2 runs; got 1"),
        (lambda: probability_of_improvement(np.zeros((2, 3)), np.zeros((2, 4))), "the 3 tasks of scores; got 4"),
        (lambda: bootstrap_interval(interquartile_mean, np.zeros((2, 3)), confidence=95), "in .0, 1.; got 95"),
    ],
)
def test_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_claim_over_the_control_needs_runs_equal_lengths_and_an_interval_above_it():
    generator = np.random.default_rng(0)
    control, lengths = generator.normal(100, 10, (6, 1)), np.full(6, 50.0)
    better, same = control + 40, generator.permutation(control)
    assert beats_control(better, control, lengths, lengths)[0]
    answer, text = beats_control(better, control, lengths, lengths * 1.05)
    assert answer and text.startswith("Better than the control: difference of the interquartile means 40.000 (")
    for scores in (same, control - 40):
        answer, text = beats_control(scores, control, lengths, lengths)
        assert not answer and text.startswith("Not separable from or worse than the control")
    assert beats_control(better[:4], control, lengths[:4], lengths) == (
        False, "No claim: 4 runs, and it takes 5 of each."
    )  # fmt: skip
    assert beats_control(better, control, lengths, lengths * 1.2) == (
        False, "No claim: mean episode lengths of 50 and 60 steps do not match."
    )  # fmt: skip
