"""TD3 with and without stops: what is stored, exact resume, and learning."""

import os

import numpy as np
import pytest
import torch

gym = pytest.importorskip("gymnasium")

from fox_rl.agents import td3  # noqa: E402

learning = pytest.mark.skipif(not os.environ.get("FOX_LEARNING"), reason="minutes long: FOX_LEARNING=1")


def options(folder="", **changes):
    sizes = dict(env_id="Pendulum-v1", total_steps=300, start_steps=60, batch_size=16, width=16)
    return td3.Options(**{**sizes, "stop_start": 0.3, "output_dir": str(folder), **changes})


@pytest.mark.parametrize("stop", ["least", "random"])
def test_stopped_episodes_are_stored_as_not_terminated_and_reset(stop):
    agent = td3.train(options(stop=stop, mean_length=50.0), quiet=True)
    if stop == "random":
        assert agent.stopper.num_stopped > 0
        assert min(agent.meter.finished_lengths) < 150
    assert agent.replay.size == 300 and not agent.replay.data["terminated"].any()
    # A transition leads to the next observation, or the episode ended there; no row leads into a new episode.
    data = agent.replay.data
    follows = torch.isclose(data["following"][:-1], data["observation"][1:], atol=1e-6).all(dim=1)
    ends = sum(np.array(agent.meter.finished_lengths) > 0)
    assert int((~follows).sum()) in (ends, ends - 1)
    speed = data["following"][:, 2] - data["observation"][:, 2]
    assert speed.abs().max() <= 3 * 9.81 / 2 * 0.05 * 1.05 + 3 * 2 * 0.05 + 1e-3  # physics, not a jump to a new start


def test_the_target_of_a_stopped_transition_bootstraps():
    """With a reward of 1 and values of 10 everywhere the target is 1 + 0.99 * 10, as an episode was only stopped."""
    agent = td3.Agent(options(stop="least"))
    for module in (agent.critics, agent.target_critics):
        for net in module.nets:
            for parameter in net.parameters():
                parameter.data.zero_()
            net[-1].bias.data.fill_(10.0)
    rows = dict(observation=np.zeros((1, 3)), action=np.zeros((1, 1)), reward=np.ones(1), following=np.zeros((1, 3)))
    agent.replay.add(**rows, terminated=np.array([False]))
    loss = td3.learn(agent)
    assert loss == pytest.approx(2 * (10 - 10.9) ** 2, rel=1e-3)
    value, potential = agent.value_and_loss(*rows.values(), np.array([True]))
    assert potential[0] == pytest.approx((value[0] - 1.0) ** 2, rel=1e-3)


@pytest.mark.parametrize("changes", [dict(stop="least"), dict(stop="random", final_sparsity=0.8, mean_length=60.0)])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, changes):
    whole = td3.train(options(tmp_path / "whole", **changes), quiet=True)
    settings = options(tmp_path / "parts", checkpoint_every=150, **changes)
    saved, advance = [], td3.advance

    def crash(agent, loss):
        if agent.step == 220 and not saved:
            saved.append(True)
            raise KeyboardInterrupt
        return advance(agent, loss)

    td3.advance = crash
    try:
        with pytest.raises(KeyboardInterrupt):
            td3.train(settings, quiet=True)
        parts = td3.train(settings, quiet=True)
    finally:
        td3.advance = advance
    for name in ("actor", "critics", "target_critics"):
        pairs = zip(getattr(whole, name).parameters(), getattr(parts, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert whole.meter.returns == parts.meter.returns and whole.stopper.num_stopped == parts.stopper.num_stopped
    for name, pruner in parts.pruners.items():
        target = parts.target_actor if name == "actor" else parts.target_critics
        assert pruner.sparsity() == pytest.approx(0.8, abs=0.02)
        assert all(torch.all(target.get_parameter(n)[~keep] == 0) for n, keep in pruner.masks.items())


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="stop must be none, least or random; got 'early'"):
        td3.train(options(stop="early"), quiet=True)
    with pytest.raises(ValueError, match="env_id must have bounded continuous actions"):
        td3.train(options(env_id="CartPole-v1"), quiet=True)


@learning
@pytest.mark.parametrize("stop", ["none", "least", "random"])
def test_it_learns_to_swing_up(stop):
    agent = td3.train(
        td3.Options(env_id="Pendulum-v1", total_steps=8_000, start_steps=1_000, width=64, batch_size=128,
                    learning_rate=1e-3, stop=stop, mean_length=60.0), quiet=True,
    )  # fmt: skip
    assert np.mean(td3.evaluate(agent, 10)) > -400  # a random policy has about -1200
