"""Environments in processes of their own that share memory: a step of all of them costs what the slowest one costs.

Gymnasium's `AsyncVectorEnv` sends every action through a pipe, which takes longer than a step of HalfCheetah, and
cannot restart one environment between two steps. Imports no PyTorch, so that a worker starts in a second.

Letters: N environments, O observation size, A action size.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

STEP, RESET, CLOSE = 1, 2, 3


class Shared:
    """Arrays that all processes see. A worker reads and writes the rows of its environments only."""

    def __init__(self, context: Any, count: int, observation_size: int, action_size: int):
        self.shapes = {
            "command": ((count,), np.int64), "seed": ((count,), np.int64), "reward": ((count,), np.float64),
            "observation": ((count, observation_size), np.float64), "action": ((count, action_size), np.float64),
            "terminated": ((count,), np.bool_), "truncated": ((count,), np.bool_),
        }  # fmt: skip
        self.memory = {
            name: context.RawArray("b", max(1, int(np.prod(shape)) * np.dtype(kind).itemsize))
            for name, (shape, kind) in self.shapes.items()
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Views of the memory in this process."""
        return {
            name: np.frombuffer(self.memory[name], dtype=kind, count=int(np.prod(shape))).reshape(shape)
            for name, (shape, kind) in self.shapes.items()
        }


def wait(semaphore: Any, spins: int, timeout: float) -> bool:
    """Acquire, asking again and again before sleeping: to be woken up costs more than a step."""
    return any(semaphore.acquire(False) for _ in range(spins)) or semaphore.acquire(True, timeout)


def work(env_id: str, own: list[int], shared: Shared, go: Any, done: Any, spins: int) -> None:
    """Body of a worker: does what `command` says for its environments, until it is closed or its parent is gone."""
    envs = {i: gym.make(env_id, disable_env_checker=True) for i in own}
    x = shared.arrays()
    while True:
        if not wait(go, spins, timeout=1.0):
            if not multiprocessing.parent_process().is_alive():
                return
            continue
        for i, env in envs.items():
            if x["command"][i] == STEP:
                action = x["action"][i].astype(env.action_space.dtype)
                x["observation"][i], x["reward"][i], x["terminated"][i], x["truncated"][i], _ = env.step(
                    action[0] if isinstance(env.action_space, gym.spaces.Discrete) else action
                )
            elif x["command"][i] == RESET:
                seed = int(x["seed"][i])
                x["observation"][i] = env.reset(seed=None if seed < 0 else seed)[0]
            elif x["command"][i] == CLOSE:
                return
            x["command"][i] = 0
        done.release()


class EnvironmentPool:
    """N environments of one kind, stepped and restarted by number.

    Args:
        env_id: Gymnasium id with vector observations, and vectors or one number as actions.
        count: N. Environment i belongs to worker i modulo `workers`.
        workers: Processes.
        spins: Times that a waiting process asks before it sleeps. None: 10,000 (about 2 ms) where every process has a
            core of its own, else 0.

    Attributes:
        observation_space, action_space: Of one environment.
        horizon: Longest episode, in steps.
    """

    def __init__(self, env_id: str, count: int, workers: int, spins: int | None = None):
        if not 1 <= workers <= count:
            raise ValueError(f"workers must be in [1, count {count}]; got {workers}.")
        probe = gym.make(env_id, disable_env_checker=True)
        self.observation_space, self.action_space = probe.observation_space, probe.action_space
        self.horizon = (probe.spec and probe.spec.max_episode_steps) or 1000
        probe.close()
        if spins is None:
            spins = 10_000 if (os.cpu_count() or 1) > workers else 0
        context = multiprocessing.get_context("spawn")
        shared = Shared(context, count, self.observation_space.shape[0], sum(self.action_space.shape) or 1)
        self.x, self.spins, self.owner = shared.arrays(), spins, np.arange(count) % workers
        self.go = [context.Semaphore(0) for _ in range(workers)]
        self.done = [context.Semaphore(0) for _ in range(workers)]
        self.processes = []
        for worker in range(workers):
            own = np.flatnonzero(self.owner == worker).tolist()
            arguments = (env_id, own, shared, self.go[worker], self.done[worker], spins)
            self.processes.append(context.Process(target=work, args=arguments, daemon=True))
            self.processes[-1].start()

    def command(self, numbers: np.ndarray, command: int) -> None:
        """Let these environments do something and wait for it."""
        self.x["command"][numbers] = command
        workers = np.unique(self.owner[numbers]).tolist()
        for worker in workers:
            self.go[worker].release()
        for worker in workers:
            while not wait(self.done[worker], self.spins, timeout=1.0):
                if not self.processes[worker].is_alive():
                    code = self.processes[worker].exitcode
                    raise RuntimeError(f"worker {worker} died with exit code {code}; what it said stands above.")

    def reset(self, numbers: np.ndarray, seeds: np.ndarray | None = None) -> np.ndarray:
        """Begin episodes; returns their first observations `(len(numbers), O)`."""
        self.x["seed"][numbers] = -1 if seeds is None else seeds
        self.command(numbers, RESET)
        return self.x["observation"][numbers]

    def step(self, numbers: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, ...]:
        """Observation, reward, terminated and truncated after actions `(len(numbers), A)`. No episode is restarted."""
        self.x["action"][numbers] = action
        self.command(numbers, STEP)
        return tuple(self.x[name][numbers] for name in ("observation", "reward", "terminated", "truncated"))

    def play(
        self, numbers: np.ndarray, seeds: np.ndarray, act: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:  # fmt: skip
        """Returns of one whole episode in each of these environments, `(n,)`.

        Args:
            numbers: `(n,)`.
            seeds: Of each, `(n,)`.
            act: All observations `(n, O)` to actions `(n, A)`; what it says for an episode that is over is not read.
        """
        observation = self.reset(numbers, seeds)
        totals, alive = np.zeros(len(numbers)), np.ones(len(numbers), dtype=bool)
        while alive.any():
            action = act(observation)
            observation[alive], reward, terminated, truncated = self.step(numbers[alive], action[alive])
            totals[alive] += reward
            alive[alive] = ~(terminated | truncated)
        return totals

    def close(self) -> None:
        """End the processes."""
        self.x["command"][:] = CLOSE
        for process, go in zip(self.processes, self.go, strict=True):
            go.release()
            process.join(timeout=10.0)
            if process.is_alive():
                process.terminate()

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(self, *_) -> None:
        self.close()
