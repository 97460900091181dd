"""LEAST: end an episode early when it goes worse than usual (arXiv:2506.13672), and the control it has to beat.

At step i of an episode, over the last K episodes that got that far, with the critic's value Q of the executed action
and the potential G, for which the temporal-difference loss of that transition stands:

    eps_i = median Q_i,    omega_i = clip(scale median G_i / G),    stop if  Q < omega eps   where eps >= 0
                                                                             Q < eps / omega where eps < 0

A large loss makes omega small, and a small omega is lenient. A stop is a truncation: the target goes on with the value
of the next state. The authors' code is not public. What the public text leaves open is decided here and marked "ours":
scale and clip of omega, histogram and steps of the window, form of the noise, and the share of episodes that is never
stopped, without which the medians would only know episodes that were going well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper


class LearnToStop:
    """Decides for each of n parallel episodes whether to stop it, from the values seen so far.

    Args:
        num_envs: Parallel episodes.
        horizon: Longest episode, in steps.
        start_step: Environment steps over all episodes before the first stop; published: 10 to 20 % of training on
            MuJoCo, 5 to 15 % on DMC.
        window: K, episodes at first; 250 published.
        omega_scale: Factor on omega, 0.3 to 0.6 published; without it nearly every episode is stopped at once.
        omega_clip: Bounds of omega. Ours.
        keep_fraction: Share of episodes that is never stopped. Ours.
        min_valid: Episodes that must have reached a step before anything is stopped there. Ours.
        entropy_margin: The window grows by `window_step` when the entropy of the stored values is above
            `1 + entropy_margin` times its running mean, and shrinks back when it is below; None keeps it. 0 to 0.1
            published.
        entropy_every: Episodes between two looks at the entropy. Ours.
        window_step: Episodes by which the window changes. Ours.
        max_window: Largest window. Ours.
        seed: For choosing the episodes that are never stopped.

    Attributes:
        window: K now.
        num_stopped: Episodes stopped so far.
        stopped_at: Steps at which the last 100 episodes were stopped, -1 for those that were not.
    """

    def __init__(
        self, num_envs: int, horizon: int, *, start_step: int, window: int = 250, omega_scale: float = 0.45,
        omega_clip: tuple[float, float] = (0.05, 0.6), keep_fraction: float = 0.1, min_valid: int = 8,
        entropy_margin: float | None = 0.05, entropy_every: int = 1, window_step: int = 25, max_window: int = 500,
        seed: int = 0,
    ):  # fmt: skip
        _check(num_envs, horizon, window, max_window, omega_scale, omega_clip, keep_fraction, min_valid)
        self.num_envs, self.horizon, self.start_step = num_envs, horizon, start_step
        self.window = self.first_window = window
        self.omega_scale, self.omega_clip = omega_scale, omega_clip
        self.keep_fraction, self.min_valid = keep_fraction, min_valid
        self.entropy_margin, self.window_step, self.max_window = entropy_margin, window_step, max_window
        self.entropy_every = entropy_every
        self.generator = np.random.default_rng(seed)
        self.num_steps = self.num_stopped = 0
        self.entropies: list[float] = []
        self.stopped_at: list[int] = []
        shape = (max_window, horizon)
        self._q, self._potential = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        self._num_episodes = 0
        self._open_q = np.full((num_envs, horizon), np.nan, np.float32)
        self._open_potential = np.full((num_envs, horizon), np.nan, np.float32)
        self._never = self.generator.random(num_envs) < keep_fraction
        self._rows = np.arange(num_envs)
        self._medians: dict[int, list[tuple[int, float, float]]] = {}

    def update(self, step_index: np.ndarray, q: np.ndarray, potential: np.ndarray) -> np.ndarray:
        """Take in one transition of every episode and say which to stop after it.

        Args:
            step_index: Step within the episode, from 0, `(n,)` int.
            q: Critic's value of the executed action, `(n,)`.
            potential: Loss of the critic on the transition, `(n,)`, at least 0.

        Returns:
            `(n,)` bool. The caller ends these episodes, as truncated, and then calls `episode_end`.
        """
        steps = step_index.tolist()
        if max(steps) >= self.horizon:
            raise ValueError(f"step_index must be below horizon {self.horizon}; got {max(steps)}.")
        self._open_q[self._rows, step_index] = q
        self._open_potential[self._rows, step_index] = potential
        self.num_steps += self.num_envs
        stop = np.zeros(self.num_envs, dtype=bool)
        if self.num_steps >= self.start_step and self._num_episodes >= self.min_valid:
            for env, step in enumerate(steps):
                stop[env] = not self._never[env] and self._is_hopeless(step, float(q[env]), float(potential[env]))
        return stop

    def _is_hopeless(self, step: int, q: float, potential: float) -> bool:
        count, eps, usual = self._usual(step)
        if count < self.min_valid:
            return False
        low, high = self.omega_clip
        omega = min(max(self.omega_scale * usual / max(potential, 1e-12), low), high)
        return q < (omega * eps if eps >= 0 else eps / omega)

    def _usual(self, step: int) -> tuple[int, float, float]:
        """Episodes of the window that got to this step, and the medians of their values and potentials there.

        Medians of several steps are computed together and kept until an episode ends: they are most of the cost.
        """
        block, place = divmod(step, _BLOCK)
        if block not in self._medians:
            rows, columns = self._recent_rows(), slice(block * _BLOCK, (block + 1) * _BLOCK)
            q = self._q[rows, columns]
            potential = np.where(np.isnan(q), np.nan, self._potential[rows, columns])
            count = (~np.isnan(q)).sum(axis=0)
            usual = (count, _column_medians(q, count), _column_medians(potential, count))
            self._medians[block] = list(zip(*(x.tolist() for x in usual), strict=True))
        return self._medians[block][place]

    def _recent_rows(self) -> np.ndarray:
        """Rows of the last `window` episodes; their order does not matter."""
        last = self._num_episodes
        return np.arange(max(0, last - self.window), last) % self.max_window

    def episode_end(self, ended: np.ndarray, stopped: np.ndarray) -> None:
        """Move finished episodes into the tables, however they ended.

        Args:
            ended: `(n,)` bool.
            stopped: `(n,)` bool, those that ended because `update` said so.
        """
        for env in np.flatnonzero(ended):
            row = self._num_episodes % self.max_window
            last_step = int(np.flatnonzero(~np.isnan(self._open_q[env]))[-1])
            self._q[row], self._potential[row] = self._open_q[env], self._open_potential[env]
            self._open_q[env] = self._open_potential[env] = np.nan
            self._num_episodes += 1
            self.num_stopped += int(stopped[env])
            self.stopped_at = [*self.stopped_at[-99:], last_step if stopped[env] else -1]
            self._never[env] = self.generator.random() < self.keep_fraction
            if self.entropy_margin is not None and self._num_episodes % self.entropy_every == 0:
                self._adapt_window()
            self._medians.clear()

    def _adapt_window(self) -> None:
        entropy = value_entropy(self._q[self._recent_rows()])
        if self.entropies:
            usual = sum(self.entropies) / len(self.entropies)
            if entropy > (1 + self.entropy_margin) * usual:
                self.window = min(self.window + self.window_step, self.max_window)
            elif entropy < (1 - self.entropy_margin) * usual:
                self.window = max(self.window - self.window_step, self.first_window)
        self.entropies = [*self.entropies[-99:], entropy]

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next stops; arrays, numbers and lists."""
        arrays = {name: getattr(self, name).copy() for name in _ARRAYS}
        return arrays | {name: getattr(self, name) for name in _NUMBERS} | {
            "generator": self.generator.bit_generator.state
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in _ARRAYS:
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(
                    f"state must be of {self.num_envs} episodes, horizon {self.horizon} and max_window "
                    f"{self.max_window}; got {name} of shape {state[name].shape}."
                )
            setattr(self, name, state[name].copy())
        for name in _NUMBERS:
            value = state[name]
            setattr(self, name, list(value) if isinstance(value, list) else value)
        self.generator.bit_generator.state = state["generator"]
        self._medians.clear()


_BLOCK = 32  # steps
_ARRAYS = ("_q", "_potential", "_open_q", "_open_potential", "_never")
_NUMBERS = ("num_steps", "num_stopped", "window", "entropies", "stopped_at", "_num_episodes")


def _check(num_envs, horizon, window, max_window, omega_scale, omega_clip, keep_fraction, min_valid) -> None:
    if num_envs < 1 or horizon < 1 or min_valid < 1:
        raise ValueError(
            f"num_envs, horizon and min_valid must be at least 1; got {num_envs}, {horizon} and {min_valid}."
        )
    if not 1 <= window <= max_window:
        raise ValueError(f"window must be in [1, max_window {max_window}]; got {window}.")
    if not 0 < omega_clip[0] <= omega_clip[1] or omega_scale <= 0:
        raise ValueError(f"omega_scale and omega_clip must be above 0; got {omega_scale} and {omega_clip}.")
    if not 0 <= keep_fraction <= 1:
        raise ValueError(f"keep_fraction must be in [0, 1]; got {keep_fraction}. It is a fraction.")


def _column_medians(values: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Medians of the `count` numbers of each column, among NaN; 0 where there is none."""
    ordered = np.sort(values.T, axis=1)  # NaN last
    each = np.arange(len(count))
    middle = (ordered[each, np.maximum(count - 1, 0) // 2] + ordered[each, count // 2]) / 2
    return np.where(count > 0, middle, 0.0)


def value_entropy(values: np.ndarray, bins: int = 32) -> float:
    """Entropy in nats of a histogram of `bins` equal bins over the values that are no NaN. Ours."""
    values = values[~np.isnan(values)]
    if values.size == 0:
        return 0.0
    counts = np.histogram(values, bins=bins)[0]
    share = counts[counts > 0] / values.size
    return float(-(share * np.log(share)).sum())


class StopNoise:
    """Exploration noise that grows with the frequency of early stops in the last episodes.

        sigma = low + (high - low) sigmoid(steepness (frequency - 0.5))

    `frequency` is the share of the last episodes that were stopped before step `early`. Published for `high`: 0.25 to
    0.35 for TD3 and 0.15 to 0.25 for SAC; the form of the sigmoid is ours.
    """

    def __init__(self, low: float, high: float, early: int, steepness: float = 10.0):
        if not 0 <= low <= high:
            raise ValueError(f"low and high must be 0 <= low <= high; got {low} and {high}.")
        self.low, self.high, self.early, self.steepness = low, high, early, steepness

    def sigma(self, stopped_at: list[int]) -> float:
        """Standard deviation for the next actions, in the unit of `low` and `high`.

        Args:
            stopped_at: `LearnToStop.stopped_at`.
        """
        if not any(step >= 0 for step in stopped_at):
            return self.low
        frequency = sum(0 <= step < self.early for step in stopped_at) / len(stopped_at)
        return self.low + (self.high - self.low) / (1.0 + math.exp(-self.steepness * (frequency - 0.5)))


class RandomResetControl:
    """Stops episodes at random with a constant hazard: same interface as `LearnToStop`, same mean length, no learning.

    Most of what LEAST won in our trial on Pendulum came with this as well, so it belongs beside every LEAST result.

    Args:
        num_envs: Parallel episodes.
        hazard: Chance to stop after each step; see `hazard_for`.
        start_step: Environment steps over all episodes before the first stop.
        seed: Of the coin.
    """

    def __init__(self, num_envs: int, hazard: float, *, start_step: int, seed: int = 0):
        if not 0 <= hazard <= 1:
            raise ValueError(f"hazard must be in [0, 1]; got {hazard}. See hazard_for.")
        self.num_envs, self.hazard, self.start_step = num_envs, hazard, start_step
        self.generator = np.random.default_rng(seed)
        self.num_steps = self.num_stopped = 0
        self.stopped_at: list[int] = []
        self._last_step = np.zeros(num_envs, dtype=np.int64)

    def update(self, step_index: np.ndarray, q: np.ndarray, potential: np.ndarray) -> np.ndarray:
        """`(n,)` bool; the values are not looked at."""
        self.num_steps += self.num_envs
        self._last_step[:] = step_index
        stop = self.generator.random(self.num_envs) < self.hazard
        return stop & (self.num_steps >= self.start_step)

    def episode_end(self, ended: np.ndarray, stopped: np.ndarray) -> None:
        """Count the stops."""
        for env in np.flatnonzero(ended):
            self.num_stopped += int(stopped[env])
            self.stopped_at = [*self.stopped_at[-99:], int(self._last_step[env]) if stopped[env] else -1]

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next stops."""
        names = ("num_steps", "num_stopped", "stopped_at")
        return {name: getattr(self, name) for name in names} | {
            "_last_step": self._last_step.copy(), "generator": self.generator.bit_generator.state,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.num_steps, self.num_stopped = state["num_steps"], state["num_stopped"]
        self.stopped_at, self._last_step = list(state["stopped_at"]), state["_last_step"].copy()
        self.generator.bit_generator.state = state["generator"]


def hazard_for(mean_length: float, natural_length: int) -> float:
    """Hazard at which episodes of `natural_length` steps get this mean length: `(1 - (1 - p)^L) / p = mean_length`.

    Args:
        mean_length: In (0, natural_length], steps.
        natural_length: Steps of an episode that nobody stops. Where some end earlier by themselves, the mean comes out
            shorter; `fox_rl.experiments.many_td3` corrects for that.
    """
    if not 1 <= mean_length <= natural_length:
        raise ValueError(f"mean_length must be in [1, {natural_length}]; got {mean_length}.")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        length = natural_length if middle == 0 else (1 - (1 - middle) ** natural_length) / middle
        low, high = (middle, high) if length > mean_length else (low, middle)
    return (low + high) / 2


ValueFunction = Callable[[Any, Any, np.ndarray, Any, np.ndarray], tuple[np.ndarray, np.ndarray]]


class EarlyStopVectorEnv(VectorWrapper):
    """Vector environment whose episodes a stopper may end, with resets in the same step.

    A stopped episode has `truncated` True and `terminated` False. As with `AutoresetMode.SAME_STEP` the observation
    returned is the first of the next episode and `info["final_obs"]` holds the last of the old one, an array or a
    dict of arrays like the observation itself, with rows that did not end left as they are. `info["early_stop"]` says
    which episodes the stopper ended.

    Args:
        env: Made with `autoreset_mode=AutoresetMode.DISABLED`.
        stopper: `LearnToStop` or `RandomResetControl`.
        value_fn: `(observation, action, reward, next_observation, terminated)` to value and potential, `(n,)` each.

    Attributes:
        saved_steps: Steps that stopped episodes had left to the time limit of the environment; 0 if it has none.
    """

    def __init__(self, env: VectorEnv, stopper: LearnToStop | RandomResetControl, value_fn: ValueFunction):
        super().__init__(env)
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.DISABLED:
            raise ValueError(
                f"env must have autoreset_mode DISABLED; got {mode}. Make it with "
                "vector_kwargs={'autoreset_mode': AutoresetMode.DISABLED}."
            )
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.stopper, self.value_fn = stopper, value_fn
        self._observation: Any = None
        self._step_index = np.zeros(env.num_envs, dtype=np.int64)
        self._limit = (env.spec and env.spec.max_episode_steps) or 0
        self.saved_steps = 0

    def reset(self, *, seed=None, options=None):
        """Reset all environments; episodes that were open do not enter the stopper's tables."""
        self._observation, info = self.env.reset(seed=seed, options=options)
        self._step_index[:] = 0
        return self._observation, info

    def step(self, actions):
        """One step of every environment; see the class."""
        following, reward, terminated, truncated, info = self.env.step(actions)
        q, potential = self.value_fn(self._observation, actions, reward, following, terminated)
        stop = self.stopper.update(self._step_index, q, potential) & ~terminated & ~truncated
        truncated = truncated | stop
        ended = terminated | truncated
        self._step_index += 1
        info = {**info, "early_stop": stop}
        self.saved_steps += int(np.maximum(self._limit - self._step_index[stop], 0).sum())
        if ended.any():
            info["final_obs"] = _copy(following)
            self.stopper.episode_end(ended, stop)
            self._step_index[ended] = 0
            following, _ = self.env.reset(options={"reset_mask": ended})
        self._observation = following
        return following, reward, terminated, truncated, info


class EarlyStopEnv(gym.Wrapper):
    """The same for one environment, e.g. under Stable-Baselines3, whose buffers bootstrap through truncations.

    Args:
        env: Any environment.
        stopper: Made with `num_envs=1`.
        value_fn: As in `EarlyStopVectorEnv`, called with arrays of one row.
    """

    def __init__(self, env: gym.Env, stopper: LearnToStop | RandomResetControl, value_fn: ValueFunction):
        super().__init__(env)
        if stopper.num_envs != 1:
            raise ValueError(f"stopper must be made with num_envs 1; got {stopper.num_envs}.")
        self.stopper, self.value_fn = stopper, value_fn
        self._observation: Any = None
        self._step_index = 0

    def reset(self, **kwargs):
        """Start an episode."""
        self._observation, info = self.env.reset(**kwargs)
        self._step_index = 0
        return self._observation, info

    def step(self, action):
        """One step; `truncated` and `info["early_stop"]` say if it was stopped."""
        following, reward, terminated, truncated, info = self.env.step(action)
        row = (np.asarray(x)[None] for x in (self._observation, action, reward, following, terminated))
        q, potential = self.value_fn(*row)
        stop = bool(self.stopper.update(np.array([self._step_index]), q, potential)[0])
        stop = stop and not terminated and not truncated
        truncated = truncated or stop
        if terminated or truncated:
            self.stopper.episode_end(np.array([True]), np.array([stop]))
        self._observation = following
        self._step_index += 1
        return following, reward, terminated, truncated, {**info, "early_stop": stop}


def _copy(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {name: np.array(value) for name, value in observation.items()}
    return np.array(observation)
