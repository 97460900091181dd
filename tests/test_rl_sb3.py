"""Pruning inside Stable-Baselines3: the target is hit in the number of updates that the library really makes."""

import numpy as np
import pytest
import torch

sb3 = pytest.importorskip("stable_baselines3")
gym = pytest.importorskip("gymnasium")

from fox_rl.adapters.sb3 import PixelExtractor, PruningCallback, count_updates, trained_networks  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

AGENTS = {
    "DQN": lambda: sb3.DQN("MlpPolicy", "CartPole-v1", learning_starts=50, target_update_interval=100, seed=0),
    "PPO": lambda: sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=48, n_epochs=3, seed=0),
    "TD3": lambda: sb3.TD3("MlpPolicy", "Pendulum-v1", learning_starts=50, policy_kwargs={"net_arch": [32]}, seed=0),
    "SAC": lambda: sb3.SAC("MlpPolicy", "Pendulum-v1", learning_starts=50, policy_kwargs={"net_arch": [32]}, seed=0),
}


@pytest.mark.parametrize("name", AGENTS)
def test_every_network_reaches_the_target_and_stays_there(name):
    agent, callback, steps = AGENTS[name](), PruningCallback(final_sparsity=0.8), 160
    agent.learn(steps, callback=callback)
    networks = trained_networks(agent)
    assert set(networks) == set(callback.pruners)
    for key, (network, _, target, _) in networks.items():
        pruner = callback.pruners[key]
        assert pruner.sparsity() == pytest.approx(0.8, abs=0.01), key
        assert abs(pruner.step_count - pruner.total_steps) <= 1  # the updates were counted right
        for owner in [network] + ([] if target is None else [target]):
            parameters = dict(owner.named_parameters())
            assert all(torch.all(parameters[n][~keep] == 0) for n, keep in pruner.masks.items())


def test_masks_go_on_in_another_session(tmp_path):
    agent, callback = AGENTS["DQN"](), PruningCallback(final_sparsity=0.8, total_updates=100, end_fraction=0.4)
    agent.learn(260, callback=callback)
    agent.save(tmp_path / "agent")
    loaded = sb3.DQN.load(tmp_path / "agent", env=agent.get_env())
    again = PruningCallback(final_sparsity=0.8, total_updates=100, end_fraction=0.4)
    again.load_state_dict(callback.state_dict())
    loaded.learn(120, callback=again)
    before, after = callback.pruners["policy"].masks, again.pruners["policy"].masks
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.pruners["policy"].step_count > callback.pruners["policy"].step_count


def test_updates_are_counted_for_several_environments_and_gradient_steps():
    envs = sb3.common.env_util.make_vec_env("CartPole-v1", 4)
    agent = sb3.DQN("MlpPolicy", envs, learning_starts=40, train_freq=2, gradient_steps=-1)
    assert count_updates(agent, 1000) == 960
    assert count_updates(AGENTS["PPO"](), 260) == 5 * 3 * 2  # 5 rollouts of 64 steps, 3 epochs, 48 + 16


def test_our_encoders_feed_its_policies():
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    for encoder, readout, size in (("nature", "gap", 256), ("impala", "soft_moe", 32 * 121)):
        extractor = PixelExtractor(space, encoder, readout=readout, features_dim=256)
        assert extractor.features_dim == size
        assert extractor(torch.rand(2, 4, 84, 84)).shape == (2, size)
    with pytest.raises(ValueError, match="encoder must be impala or nature; got 'resnet'"):
        PixelExtractor(space, "resnet")
