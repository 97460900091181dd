"""Kron in every agent, on environments of one step whose best action is known."""

import numpy as np
import pytest
import torch

gym = pytest.importorskip("gymnasium")
pytest.importorskip("pytorch_optimizer")

from fox_rl.agents import dqn, ppo_fox, pqn, sac, td3  # noqa: E402


class Match(gym.Env):
    """The observation is 1 or -1 and so is the best action: discrete 1 or 0, continuous 0.5 or -0.5. One step."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, continuous=False):
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32) if continuous else gym.spaces.Discrete(2)
        self.continuous = continuous

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sign = 1.0 if self.np_random.random() < 0.5 else -1.0
        return np.full(1, self.sign, np.float32), {}

    def step(self, action):
        if self.continuous:
            reward = 1.0 - 4.0 * (float(action[0]) - 0.5 * self.sign) ** 2
        else:
            reward = 1.0 if (int(action) == 1) == (self.sign > 0) else -1.0
        return np.full(1, self.sign, np.float32), reward, True, False, {}


for name, continuous in (("test/Match-v0", False), ("test/MatchContinuous-v0", True)):
    gym.register(name, entry_point=Match, kwargs={"continuous": continuous}, max_episode_steps=1)

OFF_POLICY = dict(width=8, batch_size=16, start_steps=32)


def train(module, **changes):
    """Train with Kron; returns the agent and its actions for the observations 1 and -1."""
    agent = module.train(module.Options(optimizer="kron", eval_episodes=0, tracker="none", **changes), quiet=True)
    with torch.no_grad():
        first = np.array([[1.0], [-1.0]], dtype=np.float32)
        if module is ppo_fox:
            agent.play_cache = agent.network.new_cache()
        return agent, agent.choose(first, np.ones(2, dtype=bool))


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        (dqn, OFF_POLICY | dict(total_steps=150, train_every=3, target_every=50, learning_rate=0.03)),
        (pqn, dict(total_steps=384, num_envs=16, window=8, width=8, minibatches=4, learning_rate=0.03)),
        (ppo_fox, dict(
            total_steps=384, num_envs=16, window=8, hidden_size=8, num_heads=1, num_layers=1, minibatches=2,
            learning_rate=0.1,
        )),
    ],
    ids=["dqn", "pqn", "ppo_fox"],
)  # fmt: skip
def test_discrete_agents_learn_with_kron(module, changes):
    """At a learning rate of 1e-9 all three choose 0 and 1."""
    agent, actions = train(module, env_id="test/Match-v0", **changes)
    assert actions.tolist() == [1, 0]
    assert all(torch.isfinite(p).all() for p in agent.network.parameters())


@pytest.mark.parametrize("module", [td3, sac], ids=["td3", "sac"])
def test_continuous_agents_learn_with_kron(module):
    changes = {} if module is td3 else dict(temperature=0.05)
    agent, actions = train(
        module, env_id="test/MatchContinuous-v0", total_steps=100, learning_rate=0.1, **OFF_POLICY, **changes
    )
    reward = 1.0 - 4.0 * (actions[:, 0] - np.array([0.5, -0.5])) ** 2
    assert reward.min() > 0.2  # an action of 0 has 0 twice
    assert type(agent.actor_optimizer).__name__ == type(agent.critic_optimizer).__name__ == "Kron"
