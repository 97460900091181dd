"""PQN: its targets by their definition, mixed precision, pixels, and games played side by side."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

pytest.importorskip("gymnasium")

import gymnasium as gym

from fox_rl.agents import common, pqn
from fox_rl.q_network import QNetwork


class Pixels(gym.Env):
    """Frames of one shade; the reward is 1 for the action that the shade asks for. Cut off after 7 steps."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._draw(), {}

    def _draw(self):
        self.wanted = int(self.np_random.integers(3))
        return np.full((4, 84, 84), 100 * self.wanted, np.uint8)

    def step(self, action):
        reward, over = float(action == self.wanted), bool(self.np_random.random() < 0.1)
        return self._draw(), reward, over, False, {}


@pytest.fixture(autouse=True)
def environments():
    gym.register("test/Pixels-v0", entry_point=Pixels, max_episode_steps=7)
    cartpole = "gymnasium.envs.classic_control.cartpole:CartPoleEnv"
    gym.register("test/ShortCartPole-v0", entry_point=cartpole, max_episode_steps=12)
    yield
    del gym.registry["test/Pixels-v0"], gym.registry["test/ShortCartPole-v0"]


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one precision for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def made(**changes):
    sizes = dict(
        env_id="test/Pixels-v0", num_envs=4, window=16, total_steps=4 * 16 * 8, minibatches=2, width=16,
        encoder="nature", readout="flatten", eval_episodes=0,
    )  # fmt: skip
    return pqn.Agent(pqn.Options(**{**sizes, **changes}))


def watched(agent):
    """What the environments say from now on: rows (before, action, reward, terminated, truncated, led to)."""
    rows, step = [], agent.envs.step

    def record(action):
        before = agent.observation
        following, reward, terminated, truncated, info = step(action)
        led_to = common.true_following(following, info, terminated | truncated)
        rows.append([np.array(x) for x in (before, action, reward, terminated, truncated, led_to)])
        return following, reward, terminated, truncated, info

    agent.envs.step = record
    return rows


@torch.no_grad()
def defined_targets(agent, rows):
    """G_t = r + gamma (1 - terminated) (lambda G_{t+1} + (1 - lambda) max_a Q(s_{t+1}, a)), in fp64, one row each."""
    options, wanted = agent.options, None
    targets = []
    for _, _, reward, terminated, truncated, led_to in reversed(rows):
        value = np.array([agent.network(torch.as_tensor(x[None])).max().item() for x in led_to])
        following = value if wanted is None else options.decay * wanted + (1 - options.decay) * value
        following = np.where(terminated | truncated, value, following)
        wanted = reward + options.discount * np.where(terminated, 0.0, following)
        targets.insert(0, wanted)
    return np.array(targets)


@pytest.mark.parametrize("env_id", ["test/ShortCartPole-v0", "test/Pixels-v0"])
def test_targets_are_those_of_the_states_that_the_actions_led_to(env_id):
    agent = made(env_id=env_id, num_envs=3, device="cpu")
    agent.network.head.advantage.bias.data += torch.arange(agent.network.num_actions)  # values that matter
    rows = watched(agent)
    observation, action, target = pqn.collect(agent)
    before, actions, _, terminated, truncated, _ = (np.array(x) for x in zip(*rows, strict=True))
    assert terminated.any() and (truncated & ~terminated).any() and not (terminated | truncated)[-1].all()
    np.testing.assert_array_equal(observation.numpy(), before.reshape(-1, *before.shape[2:]))
    np.testing.assert_array_equal(action.numpy(), actions.ravel())
    np.testing.assert_allclose(target.numpy(), defined_targets(agent, rows).ravel(), rtol=1e-4, atol=1e-5)


def test_an_episode_cut_off_in_the_last_step_of_a_window_counts_its_last_state():
    agent = made(num_envs=4, window=7, device="cpu")  # all of them are cut off there, or were terminated before
    agent.network.head.advantage.bias.data += 1.0
    for _ in range(3):
        rows = watched(agent)
        target = pqn.collect(agent)[2]
        if (rows[-1][4] & ~rows[-1][3]).any():
            break
    np.testing.assert_allclose(target.numpy(), defined_targets(agent, rows).ravel(), rtol=1e-4, atol=1e-5)
    assert (rows[-1][4] & ~rows[-1][3]).any()


@pytest.mark.parametrize("asked", ["option", "accelerate launch"])
def test_mixed_precision_is_half_the_bits_and_not_for_values(asked, fresh_accelerate, monkeypatch, tmp_path):
    sizes = {"device": "cpu", "final_sparsity": 0.9, "window": 4, "total_steps": 32}
    if asked == "option":
        agent = made(mixed_precision="bf16", **sizes)
    else:  # what `accelerate launch --mixed_precision bf16` sets
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        agent = made(**sizes)
    (pruner, optimizer), seen = agent._pruners["network"], []
    pruner.attach(optimizer)
    for part in (agent.network.encoder, agent.network.head):
        part.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    observation = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    values = agent.model(observation)
    assert seen == [(torch.uint8, torch.bfloat16), (torch.float32, torch.float32)]
    assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())
    while agent.step < agent.total_steps:
        assert np.isfinite(agent.advance()["loss"])
    assert {p.dtype for p in agent.network.parameters()} == {torch.float32}
    assert pruner.sparsity() == pytest.approx(0.9, abs=1e-3)
    assert all(torch.all(agent.network.get_parameter(name)[~keep] == 0) for name, keep in pruner.masks.items())
    agent.network.save_pretrained(tmp_path)
    loaded = QNetwork.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(observation), agent.network(observation), rtol=0, atol=0.02)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="mixed_precision must be auto, no or bf16; got 'fp16'"):
        made(mixed_precision="fp16")
    with pytest.raises(ValueError, match="episodes must be a multiple of at_once, both at least 1; got 5 and 2"):
        common.play(lambda x, _: x, "CartPole-v1", 5, at_once=2)


def test_episodes_played_at_once_are_those_played_alone():
    def act(observation, is_first):
        assert is_first.shape == (len(observation),)
        return (observation[:, 2] > 0.02).astype(int)

    def alone(seed):
        return common.play(act, "CartPole-v1", 2, seed=seed)

    expected = [x for seed in (3, 4, 5) for x in alone(seed)]
    assert common.play(act, "CartPole-v1", 6, seed=3, at_once=3) == expected
    assert len({*expected}) > 2


def test_an_agent_evaluates_all_episodes_at_once(monkeypatch):
    agent, sizes = made(device="cpu"), []
    choose = agent.choose
    monkeypatch.setattr(agent, "choose", lambda x, first: sizes.append(len(x)) or choose(x, first))
    returns = agent.evaluate(5)
    assert len(returns) == 5 and {*sizes} == {5} and agent.evaluate(5) == returns


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_lost_on_the_way_and_masks_hold(fresh_accelerate):
    """Frames arrive as they were seen, in bfloat16 the loss is that of fp32, and what is pruned stays 0."""
    agent = made(
        mixed_precision="bf16", encoder="impala", encoder_width=3, final_sparsity=0.9, sparsity_method="static_random"
    )
    assert agent.network.encoder.stacks[0].first.weight.is_contiguous(memory_format=torch.channels_last)
    (pruner, optimizer) = agent._pruners["network"]
    pruner.attach(optimizer)
    for _ in range(3):
        rows = watched(agent)
        observation, action, target = pqn.collect(agent)
        before = np.array([row[0] for row in rows])
        np.testing.assert_array_equal(observation.cpu().numpy(), before.reshape(-1, *before.shape[2:]))
        plain = QNetwork.for_spaces(
            agent.envs.single_observation_space, agent.envs.single_action_space, width=16, encoder="impala",
            encoder_width=3, readout="flatten",
        )  # fmt: skip
        plain.load_state_dict(agent.network.state_dict())
        value = plain(observation.cpu()).gather(1, action.cpu()[:, None]).squeeze(1)
        in_half = agent.network(observation).gather(1, action[:, None]).squeeze(1)
        torch.testing.assert_close(in_half.cpu(), value, rtol=0.05, atol=0.02)
        agent.step += agent.stride
        pqn.learn(agent, observation, action, target)
        assert all(torch.all(agent.network.get_parameter(name)[~keep] == 0) for name, keep in pruner.masks.items())
    assert pruner.sparsity() == pytest.approx(0.9, abs=1e-3)
