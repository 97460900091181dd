"""LEAST: the rule by hand, a loop over single episodes, what is stored, and targets that go on through a stop."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

import gymnasium as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fox_rl.learn_to_stop import (
    EarlyStopEnv,
    EarlyStopVectorEnv,
    LearnToStop,
    RandomResetControl,
    StopNoise,
    hazard_for,
    value_entropy,
)
from fox_rl.returns import gae, lambda_returns, td_target

OPTIONS = dict(start_step=0, keep_fraction=0.0, min_valid=1, entropy_margin=None)


def stopper_after(q, potential, **options):
    """A stopper that has seen one-step episodes with these values and potentials."""
    stopper = LearnToStop(1, 5, **{**OPTIONS, **options})
    for value, loss in zip(q, potential, strict=True):
        stopper._never[:] = True
        stopper.update(np.array([0]), np.array([value]), np.array([loss]))
        stopper.episode_end(np.array([True]), np.array([False]))
    stopper._never[:] = options.get("keep_fraction", 0) == 1
    return stopper


@pytest.mark.parametrize(
    ("usual", "q", "potential", "stops"),
    [
        # omega = clip(0.5 * 1 / potential, 0.1, 0.8); eps = median of what was seen
        (10.0, 4.9, 1.0, True), (10.0, 5.1, 1.0, False),  # omega 0.5: below 5
        (10.0, 1.1, 4.0, True), (10.0, 1.4, 4.0, False),  # omega 0.125: a large loss is lenient
        (10.0, 1.1, 100.0, False),  # omega held at 0.1: below 1
        (10.0, 7.9, 0.1, True), (10.0, 8.1, 0.1, False),  # omega held at 0.8
        (-10.0, -19.0, 1.0, False), (-10.0, -21.0, 1.0, True),  # eps < 0: below -10 / 0.5
        (-10.0, -79.0, 4.0, False), (-10.0, -81.0, 4.0, True),
        (0.0, -0.1, 1.0, True), (0.0, 0.1, 1.0, False),
    ],
)  # fmt: skip
def test_the_rule_is_the_published_one(usual, q, potential, stops):
    stopper = stopper_after([usual - 1, usual, usual + 100], [0.2, 1.0, 9.0], omega_scale=0.5, omega_clip=(0.1, 0.8))
    assert stopper.update(np.array([0]), np.array([q]), np.array([potential])).tolist() == [stops]


def hopeless(stopper):
    return bool(stopper.update(np.array([0]), np.array([-1e6]), np.array([1.0]))[0])


def test_nothing_is_stopped_before_the_start_without_data_or_in_the_quota():
    seen = dict(q=[1.0] * 5, potential=[1.0] * 5)
    assert hopeless(stopper_after(**seen))
    assert not hopeless(stopper_after(**seen, start_step=7)) and hopeless(stopper_after(**seen, start_step=6))
    assert not hopeless(stopper_after(**seen, min_valid=6)) and hopeless(stopper_after(**seen, min_valid=5))
    assert not hopeless(stopper_after(**seen, keep_fraction=1.0))


def test_the_quota_is_the_share_of_episodes_that_cannot_be_stopped():
    stopper = LearnToStop(1, 3, start_step=0, keep_fraction=0.1, min_valid=1, seed=3)
    kept = 0
    for _ in range(2000):
        kept += int(stopper._never[0])
        stopper.update(np.array([0]), np.array([0.0]), np.array([1.0]))
        stopper.episode_end(np.array([True]), np.array([False]))
    assert 0.07 < kept / 2000 < 0.13


def test_many_episodes_at_once_are_the_same_as_a_loop_over_lists():
    """The reference keeps lists of episodes and takes medians of what reached a step."""
    generator = np.random.default_rng(0)
    n, horizon, window = 4, 40, 9  # longer than the steps whose medians are computed together
    stopper = LearnToStop(n, horizon, window=window, max_window=20, start_step=40, **{
        k: v for k, v in OPTIONS.items() if k != "start_step"} | {"min_valid": 3})  # fmt: skip
    episodes, open_ones = [], [[] for _ in range(n)]
    step = np.zeros(n, dtype=int)
    total = stops = longest = 0
    for _ in range(900):
        q, potential = generator.normal(4, 2, n).astype(np.float32), generator.random(n).astype(np.float32) + 0.01
        got = stopper.update(step, q, potential)
        total += n
        expected = np.zeros(n, dtype=bool)
        for env in range(n):
            open_ones[env].append((q[env], potential[env]))
            reached = [e for e in episodes[-window:] if len(e) > step[env]]
            if total >= 40 and len(reached) >= 3:
                eps = np.median([e[step[env]][0] for e in reached])
                omega = 0.45 * np.median([e[step[env]][1] for e in reached]) / potential[env]
                omega = min(max(omega, 0.05), 0.6)
                expected[env] = q[env] < (omega * eps if eps >= 0 else eps / omega)
        assert got.tolist() == expected.tolist()
        stops += int(got.sum())
        longest = max(longest, int(step[got].max(initial=0)))
        ended = got | (step == horizon - 1) | (generator.random(n) < 0.02)
        stopper.episode_end(ended, got)
        for env in np.flatnonzero(ended):
            episodes.append(open_ones[env])
            open_ones[env] = []
        step = np.where(ended, 0, step + 1)
    assert stops == stopper.num_stopped > 50 and longest > 32


def test_the_window_grows_when_values_scatter_and_shrinks_back():
    stopper = LearnToStop(1, 4, start_step=10**9, window=10, window_step=5, max_window=40, entropy_margin=0.05)
    generator = np.random.default_rng(0)

    def play(episodes, spread):
        for _ in range(episodes):
            for step in range(4):
                value = np.array([round(spread * generator.random(), 2)])
                stopper.update(np.array([step]), value, np.array([1.0]))
            stopper.episode_end(np.array([True]), np.array([False]))

    play(30, 0.0)
    assert stopper.window == 10
    play(12, 10.0)
    assert stopper.window > 10
    grown = stopper.window
    play(150, 0.0)
    assert stopper.window == 10 < grown <= 40


def test_the_entropy_is_that_of_the_histogram():
    assert value_entropy(np.array([[0.0, 1.0], [np.nan, np.nan]]), bins=2) == pytest.approx(math.log(2))
    assert value_entropy(np.full((3, 3), 2.0)) == 0.0
    assert value_entropy(np.arange(64.0)) == pytest.approx(math.log(32))


def test_the_noise_grows_with_the_share_of_early_stops():
    noise = StopNoise(0.1, 0.3, early=50)
    assert noise.sigma([]) == noise.sigma([-1, -1]) == 0.1
    assert noise.sigma([10, 60]) == pytest.approx(0.2)  # half of them: the middle of the sigmoid
    assert noise.sigma([10, 20]) == pytest.approx(0.1 + 0.2 / (1 + math.exp(-5)))
    assert noise.sigma([10, -1, -1, -1]) < noise.sigma([10, 10, -1, -1]) < noise.sigma([10, 10, 10, -1])


def test_random_resets_have_the_mean_length_they_are_asked_for():
    hazard = hazard_for(60.0, 200)
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.geometric(hazard, 200_000), 200)
    assert lengths.mean() == pytest.approx(60.0, rel=0.01)
    assert hazard_for(200, 200) == pytest.approx(0.0, abs=1e-9) and hazard_for(1, 200) == pytest.approx(1.0)
    control = RandomResetControl(1, hazard, start_step=0, seed=1)
    got = []
    for _ in range(2000):
        for step in range(200):
            stop = control.update(np.array([step]), np.zeros(1), np.zeros(1))
            if stop[0] or step == 199:
                got.append(step + 1)
                control.episode_end(np.array([True]), stop)
                break
    assert np.mean(got) == pytest.approx(60.0, rel=0.06)


@pytest.mark.parametrize("kind", ["learned", "random"])
def test_a_saved_stopper_goes_on_with_the_same_decisions(kind):
    def make():
        if kind == "random":
            return RandomResetControl(3, 0.2, start_step=5, seed=1)
        return LearnToStop(3, 8, window=5, max_window=10, start_step=5, min_valid=2)

    def play(stopper, steps, generator, step):
        record = []
        for _ in range(steps):
            stop = stopper.update(step, generator.normal(size=3), generator.random(3))
            ended = stop | (step == 7)
            stopper.episode_end(ended, stop)
            step = np.where(ended, 0, step + 1)
            record.append(stop.tolist())
        return record, step

    one, generator = make(), np.random.default_rng(0)
    _, step = play(one, 50, generator, np.zeros(3, dtype=int))
    two = make()
    two.load_state_dict(one.state_dict())
    again = np.random.default_rng(9)
    expected, _ = play(one, 60, np.random.default_rng(9), step)
    assert play(two, 60, again, step)[0] == expected and any(map(any, expected))
    assert one.num_stopped == two.num_stopped


class Counting(gym.Env):
    """Observation: how many steps the episode is old; terminates after 30."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.age += 1
        return np.full(1, self.age, np.float32), 1.0, self.age >= 30, False, {}


class StopAt:
    """A stopper that ends episode `env` after step `at[env]`."""

    def __init__(self, *at):
        self.at, self.num_envs, self.ended = np.array(at), len(at), []

    def update(self, step_index, q, potential):
        self.seen = (q.tolist(), potential.tolist())
        return step_index == self.at

    def episode_end(self, ended, stopped):
        self.ended.append((ended.tolist(), stopped.tolist()))


def value_fn(observation, action, reward, following, terminated):
    return observation[:, 0], following[:, 0]


def test_a_stopped_episode_is_truncated_reset_and_its_target_bootstraps():
    env = SyncVectorEnv([Counting] * 2, autoreset_mode=AutoresetMode.DISABLED)
    stopper = StopAt(2, 99)
    env = EarlyStopVectorEnv(env, stopper, value_fn)
    observation, _ = env.reset(seed=0)
    for _ in range(3):
        observation, reward, terminated, truncated, info = env.step(np.zeros(2, dtype=int))
    assert terminated.tolist() == [False, False] and truncated.tolist() == [True, False]
    assert info["early_stop"].tolist() == [True, False]
    assert info["final_obs"][0] == 3 and observation[0] == 0 and observation[1] == 3
    assert stopper.seen == ([2.0, 2.0], [3.0, 3.0]) and stopper.ended == [([True, False], [True, False])]
    target = td_target(torch.tensor([1.0]), torch.tensor([10.0]), torch.tensor([bool(terminated[0])]), 0.9)
    assert target.item() == pytest.approx(10.0)  # 1 + 0.9 * 10, and not 1
    for _ in range(27):  # the second environment reaches its own end; the first is stopped again and again
        observation, reward, terminated, truncated, info = env.step(np.zeros(2, dtype=int))
    assert terminated.tolist() == [False, True] and not truncated[1] and not info["early_stop"][1]
    assert observation[1] == 0
    observation, _, _, _, info = env.step(np.zeros(2, dtype=int))
    assert observation[1] == 1 and "final_obs" not in info


def test_saved_steps_are_those_to_the_time_limit():
    gym.register("test/Counting-v0", entry_point=Counting, max_episode_steps=20)
    env = gym.make_vec("test/Counting-v0", 2, "sync", vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED})
    env = EarlyStopVectorEnv(env, StopAt(4, 99), value_fn)
    env.reset()
    for _ in range(12):  # the first is stopped twice after 5 of 20 steps
        env.step(np.zeros(2, dtype=int))
    assert env.saved_steps == 2 * 15


def test_a_natural_end_is_never_counted_as_a_stop():
    stopper = StopAt(29, 29)
    env = EarlyStopVectorEnv(SyncVectorEnv([Counting] * 2, autoreset_mode=AutoresetMode.DISABLED), stopper, value_fn)
    env.reset()
    for _ in range(30):
        _, _, terminated, truncated, info = env.step(np.zeros(2, dtype=int))
    assert terminated.all() and not truncated.any() and not info["early_stop"].any()
    assert stopper.ended == [([True, True], [False, False])]


def test_the_wrapper_of_one_environment_does_the_same():
    stopper = StopAt(4)
    env = EarlyStopEnv(Counting(), stopper, value_fn)
    env.reset()
    ends = [env.step(0)[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(False, True)]
    assert stopper.ended == [([True], [True])]


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="autoreset_mode DISABLED; got AutoresetMode.NEXT_STEP"):
        EarlyStopVectorEnv(SyncVectorEnv([Counting]), StopAt(1), value_fn)
    with pytest.raises(ValueError, match="stopper must be made with num_envs 1; got 2"):
        EarlyStopEnv(Counting(), StopAt(1, 1), value_fn)
    with pytest.raises(ValueError, match=r"window must be in \[1, max_window 500\]; got 600"):
        LearnToStop(1, 5, start_step=0, window=600)
    with pytest.raises(ValueError, match="step_index must be below horizon 5; got 5"):
        LearnToStop(1, 5, start_step=0).update(np.array([5]), np.zeros(1), np.zeros(1))
    with pytest.raises(ValueError, match="state must be of 2 episodes"):
        LearnToStop(2, 5, start_step=0).load_state_dict(LearnToStop(1, 5, start_step=0).state_dict())
    with pytest.raises(ValueError, match="omega_scale and omega_clip must be above 0; got 0"):
        LearnToStop(1, 5, start_step=0, omega_scale=0)
    with pytest.raises(ValueError, match=r"hazard must be in \[0, 1\]; got 2"):
        RandomResetControl(1, 2, start_step=0)


def test_advantages_and_returns_are_their_sums():
    """The definition: sums of discounted one-step errors up to the end of the episode, and no further."""
    generator = torch.Generator().manual_seed(0)
    steps, n, discount, decay = 9, 3, 0.9, 0.7
    reward, value, following = torch.randn(3, steps, n, generator=generator)
    terminated = torch.rand(steps, n, generator=generator) < 0.2
    ended = terminated | (torch.rand(steps, n, generator=generator) < 0.2)
    got = gae(reward, value, following, terminated, ended, discount=discount, decay=decay)
    returns = lambda_returns(reward, following, terminated, ended, discount=discount, decay=decay)
    for env in range(n):
        for t in range(steps):
            end = next((k for k in range(t, steps) if ended[k, env]), steps - 1)
            target = [reward[k, env] + discount * following[k, env] * (not terminated[k, env]) for k in range(steps)]
            advantage = sum((discount * decay) ** (k - t) * (target[k] - value[k, env]) for k in range(t, end + 1))
            assert got[t, env].item() == pytest.approx(float(advantage), abs=1e-5)
            # G = target + sum of corrections (discount decay)^j (target_j - v_j), with v_j the value after step j - 1
            expected = target[t] + sum(
                (discount * decay) ** (k - t) * (target[k] - following[k - 1, env]) for k in range(t + 1, end + 1)
            )
            assert returns[t, env].item() == pytest.approx(float(expected), abs=1e-5)
