"""The runner of experiments: what it writes, that it goes on where it was cut off, and what the report says."""

import csv

import numpy as np
import pytest

pytest.importorskip("gymnasium")

from fox_rl.experiments import report as reports
from fox_rl.experiments import runner
from fox_rl.experiments.jobs import EXPERIMENTS, Job, train_atari


def measured(report, seed, fails=False):
    report("arm", seed, 10, "eval_return", 1.5 + seed)
    if fails:
        raise RuntimeError("no")


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_results_are_written_kept_and_gone_on_with(tmp_path, capfd):
    path = tmp_path / "results.csv"
    assert runner.drop_unfinished(path) == set()
    jobs = [Job("memory", "good", measured, {"seed": 0}), Job("memory", "bad", measured, {"seed": 1, "fails": True})]
    assert runner.run_all(jobs, 2, path, seconds=None) == 1
    assert {(row["job"], row["metric"]) for row in rows_of(path)} == {
        ("good", "eval_return"), ("good", "done"), ("bad", "eval_return")
    }  # fmt: skip
    err = capfd.readouterr().err
    assert "memory bad failed" in err and "RuntimeError: no" in err
    assert runner.drop_unfinished(path) == {("memory", "good")}
    assert [(row["job"], row["metric"], float(row["value"])) for row in rows_of(path)][0] == (
        "good",
        "eval_return",
        1.5,
    )
    assert len(rows_of(path)) == 2
    with path.open("a", encoding="utf-8") as file:
        file.write("memory,good,arm,0,20,eval_re")  # the machine died here
    assert len(runner.read_rows(path)) == 2
    assert runner.run_all(jobs[:1], 1, path, seconds=0.0) == 0
    assert "1 jobs were cut off, 0 not begun" in capfd.readouterr().err


def table(metric, values):
    return [
        {"experiment": "memory", "job": "x", "arm": arm, "seed": str(seed), "step": str(step), "metric": metric,
         "value": str(value)}
        for arm, runs in values.items() for seed, curve in enumerate(runs) for step, value in curve
    ]  # fmt: skip


def test_the_last_value_of_every_run_and_the_first_step_at_a_goal():
    rows = table("eval_return", {"a": [[(10, 1.0), (30, 5.0), (20, 9.0)], [(10, 2.0)]], "b": [[(10, 0.5), (20, 4.0)]]})
    scores = reports.last_scores(rows, "eval_return")
    np.testing.assert_array_equal(scores["a"], [[5.0], [2.0]])
    np.testing.assert_array_equal(scores["b"], [[4.0]])
    tails = reports.last_scores(rows, "eval_return", tail=0.5)
    np.testing.assert_array_equal(tails["a"], [[7.0], [2.0]])
    assert reports.steps_to_reach(rows, "eval_return", 4.0) == {"a": [20.0, float("inf")], "b": [20.0]}


def test_every_arm_is_compared_at_its_best_rate(tmp_path, monkeypatch):
    drawn, plot = [], reports.plot_curves

    def watched(rows, path):
        drawn.extend(row["arm"] for row in rows)
        plot(rows, path)

    monkeypatch.setattr(reports, "plot_curves", watched)
    rates = {"dense lr=0.1": 3.0, "dense lr=0.2": 4.0, "pruned lr=0.1": 9.0, "pruned lr=0.2": 1.0}
    rows = table("eval_return", {arm: [[(5, mean - 1)], [(5, mean + 1)]] for arm, mean in rates.items()})
    for row in rows:
        row["experiment"] = "pruning-cartpole"
    text = reports.write_report(rows, ["pruning-cartpole", "memory"], tmp_path)
    assert "| dense lr=0.2 | 2 | 4.000 |" in text and "| pruned lr=0.1 | 2 | 9.000 |" in text
    assert "memory: no eval_return measured yet." in text
    assert "dense lr=0.1 |" not in text and "dense lr=0.1: 3.0" in text and "1.00 |" in text
    assert (tmp_path / "pruning-cartpole.png").stat().st_size > 1000
    assert {*drawn} == {"dense lr=0.2", "pruned lr=0.1"}


def test_stops_are_reported_with_what_they_saved_and_against_their_control(tmp_path):
    seeds = range(5)
    rows = table("eval_return", {
        "none": [[(10, 1.0), (20, 5.0)] for _ in seeds],
        "least": [[(10, 6.0 + 0.1 * i), (20, 9.0 + 0.1 * i)] for i in seeds],
        "random": [[(10, 4.0), (20, (4.0 if i == 4 else 7.0) + 0.1 * i)] for i in seeds],
    })  # fmt: skip
    for metric, values in {
        "episode_length": (1000, 400, 420), "num_stopped": (0, 30, 33), "saved_steps": (0, 1234, 1100)
    }.items():  # fmt: skip
        arms = zip(("none", "least", "random"), values, strict=True)
        rows += table(metric, {arm: [[(20, value)] for _ in seeds] for arm, value in arms})
    for row in rows:
        row["experiment"] = "early-stop-ant"
    text = reports.write_report(rows, ["early-stop-ant"], tmp_path)
    assert "Steps to the final return of `none`, 5, " in text
    assert "- least: 10 (10 to 10): 10, 10, 10, 10, 10\n" in text
    assert "- random: 20 (20 to 20): 20, 20, 20, 20, never; never counts as 20, so the mean is a lower bound" in text
    assert "| least | 400 | 30 | 1234 |" in text and "| random | 420 | 33 | 1100 |" in text
    assert "Better than the control: difference of the interquartile means 2.100" in text


def test_the_plans_are_what_results_describe():
    """Numbers of runs, learning rates for every arm, and networks of equal size in the comparison of memories."""
    for name, experiment in EXPERIMENTS.items():
        jobs = experiment.jobs(range(experiment.seeds), None)
        assert {job.experiment for job in jobs} == {name} and len({job.name for job in jobs}) == len(jobs)
    cartpole = EXPERIMENTS["pruning-cartpole"].jobs(range(5), None)
    runs = [run for job in cartpole for run in job.settings["runs"]]
    assert len(cartpole) == 3 and len(runs) == 45 and len({arm for arm, _ in runs}) == 9
    from fox_rl.agents import dqn
    from fox_rl.experiments import many_dqn

    for job in cartpole + EXPERIMENTS["pruning-lunarlander"].jobs(range(5), None):
        many_dqn.check([(arm, dqn.Options(**options)) for arm, options in job.settings["runs"]])
    from fox_rl.agents import pqn

    atari = EXPERIMENTS["pruning-atari"].jobs(range(2), 5000)
    rates = {(job.settings["arm"], job.settings["learning_rate"], job.settings["seed"]) for job in atari}
    assert len(atari) == len(rates) == 24 and all(arm.endswith(f" lr={rate:g}") for arm, rate, _ in rates)
    assert [job.settings["seed"] for job in atari] == [0] * 12 + [1] * 12  # whole sweeps, one seed after the other
    for job in atari:
        pqn.Options(**{name: value for name, value in job.settings.items() if name != "arm"})
    from fox_rl.agents import common, ppo_fox

    envs, sizes = common.make_environments("fox_rl/RepeatFirst-v0", 1), {}
    for job in EXPERIMENTS["memory"].jobs(range(1), None):
        options = {name: job.settings[name] for name in ("memory", "hidden_size") if name in job.settings}
        network = ppo_fox.build_policy(envs, ppo_fox.Options(**options))
        sizes[job.name] = sum(p.numel() for p in network.parameters())
    assert len(sizes) == 4 and max(sizes.values()) < 1.02 * min(sizes.values())


def test_the_command_line_reaches_the_jobs():
    arguments = ["early-stop-ant", "--seeds", "2", "--steps", "50", "--eager", "--env-workers", "3"]
    (job,) = runner.planned(runner.build_parser().parse_args(arguments))
    assert (job.settings["graphs"], job.settings["workers"], job.settings["steps"]) == (False, 3, 50)
    assert job.settings["runs"] == [(arm, seed) for arm in ("none", "least", "random") for seed in (0, 1)]
    (job,) = runner.planned(runner.build_parser().parse_args(["early-stop-ant"]))
    assert "graphs" not in job.settings and 1 <= job.settings["workers"] <= len(job.settings["runs"]) == 15
    jobs = runner.planned(runner.build_parser().parse_args(["pruning-atari", "--env-workers", "3"]))
    assert {job.settings["env_threads"] for job in jobs} == {3}
    rates = ["--rates", "5e-4", "0.001"]
    jobs = runner.planned(runner.build_parser().parse_args(["pruning-atari", "pruning-cartpole", "memory", *rates]))
    assert [job.experiment for job in jobs] == ["pruning-atari"] * 8 + ["pruning-cartpole"] * 2
    assert {job.settings["learning_rate"] for job in jobs[:8]} == {5e-4, 1e-3}
    assert {own["learning_rate"] for job in jobs[8:] for _, own in job.settings["runs"]} == {5e-4, 1e-3}


def test_later_runs_add_seeds():
    names = ["early-stop-ant", "pruning-cartpole", "memory", "pruning-atari"]

    def planned(*arguments):
        return runner.planned(runner.build_parser().parse_args([*names, "--seeds", "2", *arguments]))

    def seeds(job):
        runs = job.settings.get("runs") or [("", job.settings["seed"])]
        return sorted({own["seed"] if isinstance(own, dict) else own for _, own in runs})

    first, later = planned(), planned("--first-seed", "5")
    assert [seeds(job) for job in later] == [[seed + 5 for seed in seeds(job)] for job in first]
    assert seeds(later[0]) == [5, 6]
    assert not {job.name for job in first} & {job.name for job in later}
    # A run of its own is the same job, whichever seeds are asked for beside it.
    assert {job.name for job in planned("--seeds", "6") if job.run is train_atari} & {job.name for job in later}


def test_says_what_is_wrong(capsys):
    for arguments, message in (
        (["memory", "--workers", "0"], "--workers and --seeds must be at least 1; got 0"),
        (["memory", "--first-seed", "-1"], "--first-seed must be at least 0"),
        (["pruning-atari", "--rates", "5e-4", "0.3"], "--rates must be rates of these experiments; got 0.3"),
        (["throughput", "--first-seed", "3"], "0 for throughput, whose runs are rounds; got 3"),
    ):
        with pytest.raises(SystemExit):
            runner.main(arguments)
        assert message in capsys.readouterr().err
