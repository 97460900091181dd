"""TD3 and SAC with and without stops: what is stored, exact resume, sharing, and learning."""

import os

import numpy as np
import pytest
import torch

gym = pytest.importorskip("gymnasium")

from interrupted import assert_pruned, whole_and_resumed  # noqa: E402

from fox_rl.agents import off_policy, sac, td3  # noqa: E402
from fox_rl.continuous import ActorCritic  # noqa: E402

learning = pytest.mark.skipif(not os.environ.get("FOX_LEARNING"), reason="minutes long: FOX_LEARNING=1")


def options(folder="", module=td3, **changes):
    sizes = dict(env_id="Pendulum-v1", total_steps=300, start_steps=60, batch_size=16, width=16, eval_episodes=0)
    return module.Options(**{**sizes, "stop_start": 0.3, "output_dir": str(folder), **changes})


@pytest.mark.parametrize("stop", ["least", "random"])
def test_stopped_episodes_are_stored_as_not_terminated_and_reset(stop):
    agent = td3.train(options(stop=stop, mean_length=50.0), quiet=True)
    if stop == "random":
        assert agent.stopper.num_stopped > 0
        assert min(agent.meter.finished_lengths) < 150
        assert agent.envs.saved_steps == sum(200 - length for length in agent.meter.finished_lengths)
    assert agent.replay.size == 300 and not agent.replay.data["terminated"].any()
    # A transition leads to the next observation, or the episode ended there; no row leads into a new episode.
    data = agent.replay.data
    follows = torch.isclose(data["following"][:-1], data["observation"][1:], atol=1e-6).all(dim=1)
    ends = sum(np.array(agent.meter.finished_lengths) > 0)
    assert int((~follows).sum()) in (ends, ends - 1)
    speed = data["following"][:, 2] - data["observation"][:, 2]
    assert speed.abs().max() <= 3 * 9.81 / 2 * 0.05 * 1.05 + 3 * 2 * 0.05 + 1e-3  # physics, not a jump to a new start


def constant_critics(agent, value):
    for module in (agent.critics, agent.target_critics):
        for net in module.nets:
            for parameter in net.parameters():
                parameter.data.zero_()
            net[-1].bias.data.fill_(value)


def test_the_target_of_a_stopped_transition_bootstraps():
    """With a reward of 1 and values of 10 everywhere the target is 1 + 0.99 * 10, as an episode was only stopped."""
    agent = td3.Agent(options(stop="least"))
    constant_critics(agent, 10.0)
    rows = dict(observation=np.zeros((1, 3)), action=np.zeros((1, 1)), reward=np.ones(1), following=np.zeros((1, 3)))
    agent.replay.add(**rows, terminated=np.array([False]))
    loss = agent.learn()["loss"]
    assert loss == pytest.approx(2 * (10 - 10.9) ** 2, rel=1e-3)
    value, potential = agent.value_and_loss(*rows.values(), np.array([True]))
    assert potential[0] == pytest.approx((value[0] - 1.0) ** 2, rel=1e-3)


def test_the_actor_step_leaves_the_critics_with_the_gradients_of_their_own_loss():
    agent = td3.Agent(options(policy_delay=1))
    rng = np.random.default_rng(0)
    agent.replay.add(
        observation=rng.normal(size=(32, 3)), action=rng.uniform(-1, 1, (32, 1)), reward=rng.normal(size=32),
        following=rng.normal(size=(32, 3)), terminated=np.zeros(32, dtype=bool),
    )  # fmt: skip
    before = [p.detach().clone() for p in agent.actor.parameters()]
    kept, step = {}, agent.critic_optimizer.step

    def remember():
        kept["gradients"] = [p.grad.clone() for p in agent.critics.parameters()]
        return step()

    agent.critic_optimizer.step = remember
    agent.learn()
    assert all(torch.equal(a, p.grad) for a, p in zip(kept["gradients"], agent.critics.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, agent.actor.parameters(), strict=True))
    assert agent.diagnose().keys() == {"grad_first", "grad_last", "dormant", "feature_rank"}


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        (td3, dict(stop="least")),
        (td3, dict(stop="random", final_sparsity=0.8, mean_length=60.0)),
        (sac, dict(stop="least", final_sparsity=0.8, blocks=1)),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, module, changes):
    changes = dict(total_steps=100, start_steps=40, checkpoint_every=60, **changes)
    whole, parts = whole_and_resumed(
        module, lambda folder: options(folder, module, **changes), tmp_path, 80, ("network", "target_critics")
    )
    assert whole.stopper.num_stopped == parts.stopper.num_stopped
    assert whole.envs.saved_steps == parts.envs.saved_steps
    if module is sac:
        assert whole.log_temperature_value == parts.log_temperature_value != 0.0
    for name, pruner in parts.pruners.items():
        assert_pruned(getattr(parts, name), pruner, 0.8)
        if hasattr(parts, f"target_{name}"):
            assert_pruned(getattr(parts, f"target_{name}"), pruner, 0.8)


@pytest.mark.parametrize("module", [td3, sac])
def test_what_is_saved_loads_acts_the_same_and_has_its_card(tmp_path, module):
    agent = module.train(options(tmp_path, module, total_steps=80, eval_episodes=2), quiet=True)
    loaded = ActorCritic.from_pretrained(tmp_path / "model")
    observation = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_array_equal(loaded.act(observation), agent.network.act(observation))
    assert np.abs(loaded.act(observation)).max() <= 2.0
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| Pendulum-v1 | 2 | {np.mean(agent.evaluate(2)):.2f} |" in card
    assert f"fox_rl.agents.{module.__name__.split('.')[-1]}" in card and "ActorCritic.from_pretrained" in card


def test_the_density_of_a_squashed_normal_is_that_of_pytorchs_transformed_distribution():
    torch.manual_seed(0)
    network = ActorCritic(3, [-1.0, -1.0], [1.0, 1.0], stochastic=True, width=8).double()
    observation = torch.randn(64, 3, dtype=torch.double)
    action, log_prob = network.sample(observation)
    mean, log_std = network.actor(observation).chunk(2, dim=-1)
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=0))
    torch.testing.assert_close(log_prob, squashed.log_prob(action).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(network.mode(observation), mean.tanh())


def test_an_update_of_sac_is_that_of_stable_baselines3():
    """Same weights, same transitions, same random numbers: critics, actor and temperature move alike."""
    sb3 = pytest.importorskip("stable_baselines3")
    agent = sac.Agent(options(module=sac, batch_size=64, learning_rate=1e-3))
    theirs = sb3.SAC(
        "MlpPolicy", "Pendulum-v1", learning_rate=1e-3, batch_size=64, device="cpu", seed=0, tau=0.005,
        policy_kwargs={"net_arch": [16, 16]}, ent_coef="auto_1.0",
    )  # fmt: skip
    with torch.no_grad():
        linear = [x for x in agent.actor if isinstance(x, torch.nn.Linear)]
        for ours, other in zip(linear[:2], [x for x in theirs.actor.latent_pi if hasattr(x, "weight")], strict=True):
            other.weight.copy_(ours.weight), other.bias.copy_(ours.bias)
        for part, other in enumerate((theirs.actor.mu, theirs.actor.log_std)):
            other.weight.copy_(linear[2].weight[part : part + 1]), other.bias.copy_(linear[2].bias[part : part + 1])
        for critic in (theirs.critic, theirs.critic_target):
            for net, other in zip(agent.critics.nets, critic.q_networks, strict=True):
                other.load_state_dict(net.state_dict())
    rng = np.random.default_rng(0)
    rows = dict(
        observation=rng.normal(size=(64, 3)).astype(np.float32), action=rng.uniform(-1, 1, (64, 1)).astype(np.float32),
        reward=rng.normal(size=64).astype(np.float32), following=rng.normal(size=(64, 3)).astype(np.float32),
        terminated=rng.random(64) < 0.3,
    )  # fmt: skip
    batch = {name: torch.as_tensor(x) for name, x in rows.items()}
    agent.batch = lambda: batch
    samples = type("Samples", (), dict(
        observations=batch["observation"], actions=batch["action"], next_observations=batch["following"],
        rewards=batch["reward"][:, None], dones=batch["terminated"].float()[:, None], discounts=None,
    ))  # fmt: skip
    theirs.replay_buffer.sample = lambda *_, **__: samples
    theirs._logger = sb3.common.logger.Logger(None, [])
    # The order in which they draw: the action of the actor's loss first, that of the target second.
    noises = torch.randn(2, 64, 1)
    with pytest.MonkeyPatch.context() as patched:
        draws = iter(noises)
        patched.setattr(torch, "randn_like", lambda x: next(draws))
        patched.setattr(
            torch.distributions.Normal, "rsample", lambda self, shape=(): self.loc + self.scale * next(draws)
        )
        theirs.train(1, 64)
        draws = iter(noises.flip(0))
        agent.learn()
    for net, other in zip(agent.critics.nets, theirs.critic.q_networks, strict=True):
        for ours, their in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, their, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear[0].weight, theirs.actor.latent_pi[0].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear[2].weight[:1], theirs.actor.mu.weight, rtol=1e-4, atol=1e-5)
    assert agent.log_temperature_value == pytest.approx(theirs.log_ent_coef.item(), abs=1e-6)


def test_two_updates_of_td3_are_those_of_stable_baselines3():
    """The second one moves the actor and the targets as well; no noise on the target's action."""
    sb3 = pytest.importorskip("stable_baselines3")
    agent = td3.Agent(options(batch_size=64, learning_rate=1e-3, target_noise=0.0))
    theirs = sb3.TD3(
        "MlpPolicy", "Pendulum-v1", learning_rate=1e-3, batch_size=64, device="cpu", seed=0, target_policy_noise=0.0,
        target_noise_clip=0.0, policy_kwargs={"net_arch": [16, 16]},
    )  # fmt: skip
    for actor in (theirs.actor, theirs.actor_target):
        actor.mu.load_state_dict(agent.actor.state_dict())
    for critic in (theirs.critic, theirs.critic_target):
        for net, other in zip(agent.critics.nets, critic.q_networks, strict=True):
            other.load_state_dict(net.state_dict())
    rng = np.random.default_rng(0)
    theirs._logger = sb3.common.logger.Logger(None, [])
    for _ in range(2):
        rows = [rng.normal(size=(64, 3)), rng.uniform(-1, 1, (64, 1)), rng.normal(size=64), rng.normal(size=(64, 3))]
        names = ("observation", "action", "reward", "following")
        batch = {name: torch.tensor(x, dtype=torch.float32) for name, x in zip(names, rows, strict=True)}
        batch["terminated"] = torch.as_tensor(rng.random(64) < 0.3)
        agent.batch = lambda batch=batch: batch
        samples = type("Samples", (), dict(
            observations=batch["observation"], actions=batch["action"], next_observations=batch["following"],
            rewards=batch["reward"][:, None], dones=batch["terminated"].float()[:, None], discounts=None,
        ))  # fmt: skip
        theirs.replay_buffer.sample = lambda *_, samples=samples, **__: samples
        theirs.train(1, 64)
        agent.learn()
    pairs = [(agent.actor, theirs.actor.mu), (agent.target_actor, theirs.actor_target.mu)]
    pairs += list(zip(agent.critics.nets, theirs.critic.q_networks, strict=True))
    pairs += list(zip(agent.target_critics.nets, theirs.critic_target.q_networks, strict=True))
    for ours, other in pairs:
        for mine, their in zip(ours.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.detach(), their.detach(), rtol=1e-4, atol=1e-5)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="stop must be none, least or random; got 'early'"):
        td3.train(options(stop="early"), quiet=True)
    with pytest.raises(ValueError, match="env_id must have bounded continuous actions"):
        td3.train(options(env_id="CartPole-v1"), quiet=True)
    with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
        sac.Agent(options(module=sac, temperature=0.0))


@learning
@pytest.mark.parametrize(("module", "stop"), [(td3, "none"), (td3, "least"), (td3, "random"), (sac, "none")])
def test_it_learns_to_swing_up(module, stop):
    agent = module.train(
        options(module=module, total_steps=8_000, start_steps=1_000, width=64, batch_size=128, learning_rate=1e-3,
                stop=stop, mean_length=60.0, stop_start=0.1), quiet=True,
    )  # fmt: skip
    assert np.mean(agent.evaluate(10)) > -400  # a random policy has about -1200


def test_targets_are_moved_by_no_optimizer():
    agent = td3.Agent(options())
    assert not any(p.requires_grad for p in agent.target_critics.parameters())
    assert all(p.requires_grad for p in off_policy.frozen_copy(agent.actor).requires_grad_(True).parameters())
