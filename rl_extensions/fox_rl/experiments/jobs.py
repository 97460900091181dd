"""What the experiments run. Each is a list of jobs; a job measures one or several arms and seeds in one process.

A new experiment is one function that returns its jobs, and one entry in `EXPERIMENTS`. Only what runs imports PyTorch.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Report = Callable[..., None]  # (arm, seed, step, metric, value)


@dataclass(frozen=True)
class Job:
    """One process of an experiment.

    Attributes:
        experiment: Key of `EXPERIMENTS`.
        name: Of the job within the experiment; what is done is known by it.
        run: Module-level function `(report, **settings)`.
        settings: Arguments of `run`.
        cost: Rough seconds on one core; the longest jobs start first.
        rate: Learning rate of its runs, where rates are swept.
    """

    experiment: str
    name: str
    run: Callable[..., None]
    settings: dict[str, Any] = field(default_factory=dict)
    cost: float = 60.0
    rate: float | None = None


@dataclass(frozen=True)
class Experiment:
    """What it shows and how its results are read.

    Attributes:
        text: One line for `--help`.
        jobs: `(range of seeds, steps or None)` to the jobs. A job of several runs is `named` after its first seed.
        seeds: Runs of each arm if nothing else is said.
        score: Metric whose last value is compared between the arms.
        swept: Arms are `NAME lr=RATE`; the best rate of each is compared.
        tail: Share of the steps, at the end, over which the score is averaged; 0 is the last value alone.
    """

    text: str
    jobs: Callable[[range, int | None], list[Job]]
    seeds: int = 5
    score: str = "eval_return"
    swept: bool = False
    tail: float = 0.0


def named(name: str, seeds: range) -> str:
    """Of a job with runs of all these seeds, so that others are another job."""
    return f"{name} from seed {seeds.start}" if seeds.start else name


LOGGED = ("episode_return", "sparsity_network", "dormant", "feature_rank")


def report_logged(
    report: Report, arm: str, seed: int, step: int, values: dict[str, float], names: tuple[str, ...] = LOGGED
) -> None:  # fmt: skip
    """Report what a line of an agent's log has of `names`."""
    for name in names:
        if name in values:
            report(arm, seed, step, name, values[name])


def train_agent(report: Report, agent: str, arm: str, seed: int, episodes: int = 20, **options: Any) -> None:
    """Train an agent of `fox_rl.agents` and evaluate it."""
    import importlib

    from fox_rl.agents import training

    module = importlib.import_module(f"fox_rl.agents.{agent}")
    made = module.Agent(module.Options(seed=seed, device="cpu", **options))
    report(arm, seed, 0, "parameters", sum(p.numel() for p in made.network.parameters()))
    begin = time.perf_counter()

    def log(step: int, **values: float) -> None:
        report_logged(report, arm, seed, step, values)

    training.run(made, quiet=True, report=log)
    report(arm, seed, made.step, "seconds", time.perf_counter() - begin)
    returns = made.evaluate(episodes)
    report(arm, seed, made.step, "eval_return", float(np.mean(returns)))


PRUNING_ARMS = {
    "dense": {},
    "pruned": {"final_sparsity": 0.95},
    "static": {"final_sparsity": 0.95, "sparsity_method": "static_random"},
}


RATES = (2.5e-4, 5e-4, 1e-3)


def pruning_jobs(name: str, seeds: range, cost: float, **options: Any) -> list[Job]:
    """Dense, pruned and static sparse DQN at three learning rates, a job for each rate."""
    workers = max(1, ((os.cpu_count() or 1) - 3) // 3)
    jobs = []
    for rate in RATES:
        shared = {"learning_rate": rate, "width": 128, "multi_steps": 3, "train_every": 2, **options}
        runs = [
            (f"{arm} lr={rate:g}", {**shared, **own, "seed": seed})
            for (arm, own), seed in itertools.product(PRUNING_ARMS.items(), seeds)
        ]
        settings = {"runs": runs, "workers": workers}
        jobs.append(Job(name, named(f"lr={rate:g}", seeds), train_many_dqn, settings, cost, rate))
    return jobs


def cartpole(seeds: range, steps: int | None) -> list[Job]:
    """On CartPole-v1. With returns of one step and a target copied every 1000 it had 130 of 500 after 50,000."""
    return pruning_jobs(
        "pruning-cartpole", seeds, 1500, env_id="CartPole-v1", total_steps=steps or 50_000, target_every=200,
        epsilon_end=0.02, epsilon_fraction=0.1,
    )  # fmt: skip


def lunar_lander(seeds: range, steps: int | None) -> list[Job]:
    """On LunarLander-v3."""
    return pruning_jobs(
        "pruning-lunarlander", seeds, 6000, env_id="LunarLander-v3", total_steps=steps or 200_000, target_every=250,
        epsilon_end=0.05, epsilon_fraction=0.12,
    )  # fmt: skip


def train_atari(report: Report, arm: str, seed: int, episodes: int = 16, **options: Any) -> None:
    """PQN on a game; on a GPU in bfloat16."""
    import torch

    from fox_rl.agents import pqn, training

    begin = time.perf_counter()
    precision = "bf16" if torch.cuda.is_available() else "no"
    agent = pqn.Agent(pqn.Options(seed=seed, mixed_precision=precision, **options))
    report(arm, seed, 0, "parameters", sum(p.numel() for p in agent.network.parameters()))
    report(arm, seed, 0, "seconds", time.perf_counter() - begin)
    play, in_games = agent.envs.step, [0.0]

    def timed(action: np.ndarray) -> tuple:
        before = time.perf_counter()
        following = play(action)
        in_games[0] += time.perf_counter() - before
        return following

    agent.envs.step = timed

    def log(step: int, **values: float) -> None:
        report_logged(report, arm, seed, step, values, (*LOGGED, "loss"))
        report(arm, seed, step, "seconds", time.perf_counter() - begin)
        report(arm, seed, step, "seconds_in_games", in_games[0])

    training.run(agent, quiet=True, report=log)
    report(arm, seed, agent.step, "eval_return", float(np.mean(agent.evaluate(episodes))))
    report(arm, seed, agent.step, "seconds", time.perf_counter() - begin)


def atari(seeds: range, steps: int | None) -> list[Job]:
    """IMPALA of width 3: flatten dense, pruned and static sparse, and the mean over the image; a job for each run."""
    arms = {name: {"readout": "flatten", **options} for name, options in PRUNING_ARMS.items()}
    arms["gap"] = {"readout": "gap"}
    jobs = []
    # A run that is cut off early leaves whole seeds and, of the last one, whole rates.
    for seed, rate, (arm, options) in itertools.product(seeds, RATES, arms.items()):
        settings = {
            "arm": f"{arm} lr={rate:g}", "seed": seed, "learning_rate": rate, "env_id": "ALE/Qbert-v5",
            "total_steps": steps or 300_000, "num_envs": 32, "window": 32, "minibatches": 16, "encoder_width": 3,
            "width": 512, "epsilon_end": 0.02, "epsilon_fraction": 0.25, "log_every": 10_000,
            "checkpoint_every": 100_000, **options,
        }  # fmt: skip
        jobs.append(Job("pruning-atari", f"{arm} lr={rate:g} seed {seed}", train_atari, settings, 400, rate))
    return jobs


def memory(seeds: range, steps: int | None) -> list[Job]:
    """RepeatFirst with FoX, a GRU and windows of 16 and 64 steps, at 93,000 weights each."""
    arms = {
        "fox": {"memory": "fox"},
        "gru": {"memory": "gru", "hidden_size": 87},
        "window-16": {"memory": "window", "attention_window": 16},
        "window-64": {"memory": "window", "attention_window": 64},
    }
    jobs = []
    for (arm, options), seed in itertools.product(arms.items(), seeds):
        settings = {
            "agent": "ppo_fox", "arm": arm, "seed": seed, "episodes": 100, "total_steps": steps or 133_120,
            "log_every": 5_000, **options,
        }  # fmt: skip
        jobs.append(Job("memory", f"{arm}-{seed}", train_agent, settings, 200))
    return jobs


def followed(report: Report, arm: str, seed: int) -> tuple[Report, Callable[[int, Any], None]]:
    """`report` that adds the seconds at every evaluation of this run, and what says every 5 s what a step costs."""
    begin = time.perf_counter()
    shown = [begin, 0]

    def timed(own_arm: str, own_seed: int, step: int, metric: str, value: float) -> None:
        report(own_arm, own_seed, step, metric, value)
        if (own_arm, own_seed, metric) == (arm, seed, "eval_return"):
            report("all", 0, step, "seconds", time.perf_counter() - begin)

    def watch(step: int, many: Any) -> None:
        seconds = time.perf_counter() - shown[0]
        if seconds > 5.0:
            report("all", 0, step, "milliseconds_a_step", 1e3 * seconds / (step - shown[1]))
            report("all", 0, step, "num_graphs", many.num_graphs)
            shown[:] = time.perf_counter(), step

    return timed, watch


def fifteenth(steps: int) -> int:
    """Steps between evaluations, so that the 15th is the one at the end and not beside it."""
    return math.ceil(steps / 15)


def train_many_dqn(
    report: Report, runs: list[tuple[str, dict[str, Any]]], workers: int, graphs: bool = True
) -> None:  # fmt: skip
    """Arms and seeds of DQN in one process."""
    from fox_rl.agents.dqn import Options
    from fox_rl.experiments.many_dqn import train

    made = [(arm, Options(**options)) for arm, options in runs]
    timed, watch = followed(report, made[0][0], made[0][1].seed)
    every = fifteenth(made[0][1].total_steps)
    train(made, timed, workers=workers, eval_every=every, eval_episodes=10, graphs=graphs, watch=watch)


def train_many(
    report: Report, env_id: str, runs: list[tuple[str, int]], steps: int, workers: int, graphs: bool = True,
    eval_episodes: int = 2,
) -> None:  # fmt: skip
    """All arms and seeds of TD3 in one process."""
    from fox_rl.agents.td3 import Options
    from fox_rl.experiments.many_td3 import train

    timed, watch = followed(report, *runs[0])
    options = Options(env_id=env_id, total_steps=steps, start_steps=5_000)
    train(
        env_id, runs, options, timed, workers=workers, eval_every=fifteenth(steps), eval_episodes=eval_episodes,
        graphs=graphs, watch=watch,
    )  # fmt: skip


def early_stop(env_id: str, name: str, eval_episodes: int, most: int) -> Callable[[range, int | None], list[Job]]:
    """TD3, LEAST and random resets; a process for each environment, as far as there are cores, and `most`."""

    def jobs(seeds: range, steps: int | None) -> list[Job]:
        runs = [(arm, seed) for arm in ("none", "least", "random") for seed in seeds]
        workers = max(1, min(len(runs), (os.cpu_count() or 1) - 2, most))
        settings = {"env_id": env_id, "runs": runs, "steps": steps or 300_000, "workers": workers}
        settings["eval_episodes"] = eval_episodes
        return [Job(name, named("all", seeds), train_many, settings, 10_000)]

    return jobs


def measure_throughput(report: Report, name: str, steps: int, rounds: int) -> None:
    """Environment steps/s of an agent and of the same in Stable-Baselines3, in turn, with one thread."""
    import stable_baselines3 as sb3

    from fox_rl.agents import dqn, sac, td3

    shared = {"batch_size": 256, "learning_starts": 500, "buffer_size": 100_000, "device": "cpu", "seed": 0}
    ours = {"start_steps": 500, "buffer_size": 100_000, "device": "cpu", "total_steps": steps}
    net = {"net_arch": [256, 256]}
    if name == "dqn":
        env = "CartPole-v1"
        theirs = sb3.DQN("MlpPolicy", env, **{**shared, "batch_size": 64}, policy_kwargs=net)
        # Two hidden layers of 256 without norms do not exist here: our smallest has three layers with LayerNorm.
        agent = dqn.Agent(dqn.Options(env_id=env, width=256, blocks=0, **{**ours, "start_steps": 500}))
    else:
        env = "Pendulum-v1"
        theirs = {"td3": sb3.TD3, "sac": sb3.SAC}[name]("MlpPolicy", env, **shared, policy_kwargs=net)
        module = {"td3": td3, "sac": sac}[name]
        agent = module.Agent(module.Options(env_id=env, log_every=10_000, **ours))
    for number in range(rounds):
        begin = time.perf_counter()
        agent.total_steps = agent.step + steps
        while agent.step < agent.total_steps:
            agent.advance()
        middle = time.perf_counter()
        theirs.learn(steps, reset_num_timesteps=False)
        end = time.perf_counter()
        if number:  # the first round has the steps without updates
            report(f"{name} ours", number, steps, "steps_per_second", steps / (middle - begin))
            report(f"{name} sb3", number, steps, "steps_per_second", steps / (end - middle))


def throughput(seeds: range, steps: int | None) -> list[Job]:
    """DQN on CartPole, TD3 and SAC on Pendulum."""
    sizes, rounds = {"dqn": 6_000, "td3": 2_000, "sac": 1_500}, len(seeds) + 1
    return [
        Job("throughput", name, measure_throughput, {"name": name, "steps": steps or size, "rounds": rounds}, 100)
        for name, size in sizes.items()
    ]


EXPERIMENTS = {
    "pruning-cartpole": Experiment(
        "DQN on CartPole: dense, pruned to 95 %, static sparse", cartpole, swept=True, tail=0.2
    ),
    "pruning-lunarlander": Experiment("the same on LunarLander (box2d)", lunar_lander, swept=True, tail=0.2),
    "pruning-atari": Experiment(
        "PQN on Qbert: the same and GAP, IMPALA of width 3 (ale-py, GPU)",
        atari,
        seeds=1,
        # Of lives with clipped rewards and 2 % random actions: 16 games without any are too much a matter of chance.
        score="episode_return",
        swept=True,
        tail=0.2,
    ),
    "memory": Experiment("RepeatFirst with PPO: FoX, GRU, sliding windows", memory, seeds=3),
    "early-stop-halfcheetah": Experiment(
        "TD3, LEAST, random resets on HalfCheetah-v5 (mujoco, GPU)",
        # 15 environments: 0.37 ms a step with 5 processes, 0.45 with 8, 1.57 with 15 of 16 cores.
        early_stop("HalfCheetah-v5", "early-stop-halfcheetah", 2, most=5),
        tail=0.2,
    ),
    "early-stop-ant": Experiment("the same on Ant-v5", early_stop("Ant-v5", "early-stop-ant", 1, most=12), tail=0.2),
    "throughput": Experiment("steps/s next to Stable-Baselines3", throughput, seeds=3, score="steps_per_second"),
}
