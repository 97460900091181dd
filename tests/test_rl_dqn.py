"""DQN and the parts of Rainbow: each against a definition written another way, and the agent against itself."""

import os

import numpy as np
import pytest
import torch

gym = pytest.importorskip("gymnasium")

from interrupted import assert_pruned, whole_and_resumed  # noqa: E402

from fox_rl.agents import dqn  # noqa: E402
from fox_rl.networks import NoisyLinear, QHead  # noqa: E402
from fox_rl.q_network import QNetwork  # noqa: E402
from fox_rl.replay import MultiStep, PrioritizedReplay, Replay, SumTree  # noqa: E402
from fox_rl.returns import categorical_target  # noqa: E402

learning = pytest.mark.skipif(not os.environ.get("FOX_LEARNING"), reason="minutes long: FOX_LEARNING=1")


def options(folder="", **changes):
    sizes = dict(
        total_steps=300, start_steps=50, width=16, batch_size=8, log_every=50, target_every=50, eval_episodes=0,
        v_min=0.0, v_max=50.0,
    )  # fmt: skip
    return dqn.Options(**{**sizes, "output_dir": str(folder), **changes})


def test_the_projection_is_that_of_hat_functions():
    """Independent form: each atom gets sum_j p_j max(0, 1 - |cut(z_j) - atom| / step), as in rlax."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.linspace(-3, 5, 17, dtype=torch.double)
    probabilities = torch.rand(50, 17, generator=generator, dtype=torch.double).softmax(-1)
    reward = 4 * torch.randn(50, generator=generator, dtype=torch.double)
    factor = torch.rand(50, generator=generator, dtype=torch.double)
    factor[:10] = 0.0
    reward[:3] = torch.tensor([-3.0, 5.0, 0.5])  # on an atom, also on the last one
    got = categorical_target(probabilities, reward, factor, atoms)
    cut = (reward[:, None] + factor[:, None] * atoms).clamp(-3, 5)
    hat = (1 - (cut[:, None, :] - atoms[None, :, None]).abs() / 0.5).clamp(min=0)
    torch.testing.assert_close(got, (hat * probabilities[:, None]).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.sum(-1), torch.ones(50, dtype=torch.double))


def test_the_projection_keeps_the_mean_where_nothing_is_cut_off():
    atoms = torch.linspace(-10, 10, 51, dtype=torch.double)
    probabilities = torch.rand(20, 51, dtype=torch.double).softmax(-1)
    reward, factor = torch.linspace(-1, 1, 20, dtype=torch.double), torch.full((20,), 0.9, dtype=torch.double)
    got = categorical_target(probabilities, reward, factor, atoms)
    torch.testing.assert_close(got @ atoms, reward + 0.9 * (probabilities @ atoms))


@pytest.mark.parametrize("capacity", [1, 5, 64, 100])
def test_the_sum_tree_finds_what_a_running_sum_finds(capacity):
    generator = np.random.default_rng(capacity)
    tree, values = SumTree(capacity), np.zeros(capacity)
    for _ in range(5):
        places = generator.integers(0, capacity, size=min(7, capacity))
        places = np.unique(places)
        values[places] = generator.random(len(places)) * 3
        tree.update(places, values[places])
        assert tree.total == pytest.approx(values.sum())
        mass = generator.random(200) * values.sum() * (1 - 1e-9)
        np.testing.assert_array_equal(tree.find(mass), np.searchsorted(np.cumsum(values), mass, side="right"))


def test_priorities_decide_how_often_and_with_which_weight():
    """Frequencies and weights against the equations of arXiv:1511.05952, computed without the tree."""
    replay = PrioritizedReplay(10, alpha=0.6, epsilon=0.0)
    replay.add(x=np.arange(8))
    priorities = np.array([1.0, 0.5, 0.1, 4.0, 2.0, 0.01, 1.0, 3.0])
    replay.update(torch.arange(8), torch.tensor(priorities))
    chance = priorities**0.6 / (priorities**0.6).sum()
    np.random.seed(0)
    batch = replay.sample(20_000, beta=0.4)
    counts = np.bincount(batch["x"].numpy(), minlength=8)
    assert np.abs(counts / 20_000 - chance).max() < 1e-3  # stratified: nearly exact
    weight = (8 * chance) ** -0.4
    np.testing.assert_allclose(batch["weight"].numpy(), (weight / weight.max())[batch["x"].numpy()], rtol=1e-5)
    replay.add(x=np.array([8]))
    assert replay.tree.values(np.array([8]))[0] == pytest.approx(4.0**0.6)  # new ones come with the largest so far
    loaded = PrioritizedReplay(10, alpha=0.6)
    loaded.load_state_dict(replay.state_dict())
    np.testing.assert_allclose(loaded.tree.nodes, replay.tree.nodes)
    assert loaded.largest == replay.largest and torch.equal(loaded.data["x"], replay.data["x"])


def test_a_full_buffer_forgets_its_oldest_transitions():
    replay = Replay(4)
    for i in range(3):
        replay.add(x=np.array([2 * i, 2 * i + 1]))
    assert replay.size == 4 and sorted(replay.data["x"].tolist()) == [2, 3, 4, 5]
    assert set(replay.sample(200)["x"].tolist()) == {2, 3, 4, 5}


@pytest.mark.parametrize("steps", [1, 3])
def test_several_steps_are_the_sums_over_each_episode(steps):
    """Two environments, episodes of random lengths, against sums over the recorded episodes."""
    generator = np.random.default_rng(0)
    multi, got, episodes, running = MultiStep(2, steps, 0.9), [], [], [[], []]
    state = np.array([0.0, 1000.0])
    for _ in range(60):
        reward, ended = generator.normal(size=2), generator.random(2) < 0.15
        terminated = ended & (generator.random(2) < 0.5)
        following = state + 1
        rows = multi.add(state[:, None], np.array([0, 1]), reward, following[:, None], terminated, ended)
        if rows is not None:
            got += list(zip(*(rows[name] for name in rows), strict=True))
        for env in range(2):
            running[env].append((state[env], reward[env], following[env], terminated[env]))
            if ended[env]:
                episodes.append(running[env])
                running[env] = []
        state = following + 10 * ended
    found = {float(observation[0]): rest for observation, _, *rest in got}
    assert len(found) == len(got)  # nothing twice
    for episode in episodes:
        for t in range(len(episode)):
            part = episode[t : t + steps]
            total, following, terminated, factor = found[episode[t][0]]
            assert total == pytest.approx(sum(0.9**k * row[1] for k, row in enumerate(part)))
            assert following[0] == part[-1][2] and terminated == part[-1][3]
            assert factor == pytest.approx(0.9 ** len(part))


def test_noise_is_factorised_learned_and_only_there_in_training():
    torch.manual_seed(0)
    layer, x = NoisyLinear(4, 3), torch.randn(2, 4)
    assert torch.equal(layer.eval()(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer.weight_sigma, torch.full((3, 4), 0.25))  # 0.5 / sqrt(4)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.weight.zero_(), layer.bias.zero_(), layer.bias_sigma.zero_(), layer.weight_sigma.fill_(1.0)
        noises = torch.stack([layer(torch.eye(4)) for _ in range(4000)])  # (n, in, out): the noise itself
    assert torch.linalg.matrix_rank(noises[0]) == 1
    # f of a normal has mean 0 and second moment E|x| = sqrt(2 / pi); the product of two has 2 / pi.
    assert noises.mean().abs() < 0.02 and noises.square().mean() == pytest.approx(2 / np.pi, rel=0.05)
    layer(x).sum().backward()
    assert layer.weight_sigma.grad.abs().sum() > 0


def test_a_dueling_head_is_value_plus_centred_advantage():
    torch.manual_seed(0)
    head, features = QHead(8, 5, 3, dueling=True), torch.randn(4, 8)
    out = head(features)
    assert out.shape == (4, 5, 3)
    torch.testing.assert_close(out.mean(dim=1), head.value(features))
    network = QNetwork(4, 2, num_atoms=51, v_min=-1.0, v_max=3.0, width=8)
    logits = network(torch.randn(6, 4))
    with torch.no_grad():
        network.head.advantage.weight.zero_()
    values = network.values(torch.randn(6, 4))
    assert logits.shape == (6, 2, 51)
    torch.testing.assert_close(values, torch.ones(6, 2))  # uniform over [-1, 3]


def filled(agent, count=32):
    generator = np.random.default_rng(0)
    agent.replay.add(
        observation=generator.normal(size=(count, 4)).astype(np.float32), action=generator.integers(0, 2, count),
        reward=generator.normal(size=count), following=generator.normal(size=(count, 4)).astype(np.float32),
        terminated=generator.random(count) < 0.3, factor=np.full(count, 0.9),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in agent.target.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return agent.replay.rows(torch.arange(count))


@pytest.mark.parametrize("double", [False, True])
def test_the_loss_is_the_one_written_out_row_by_row(double):
    torch.manual_seed(0)
    agent = dqn.Agent(options(double=double))
    batch = filled(agent)
    loss, priority, _ = dqn.value_error(agent, batch)
    for i in range(32):
        state, following = batch["observation"][i : i + 1], batch["following"][i : i + 1]
        of_target = agent.target(following)[0]
        best = agent.network(following)[0].argmax() if double else of_target.argmax()
        end = 0.0 if batch["terminated"][i] else 0.9 * float(of_target[best].detach())
        error = float(agent.network(state)[0, batch["action"][i]].detach()) - float(batch["reward"][i]) - end
        assert float(priority[i].detach()) == pytest.approx(abs(error), abs=1e-5)
        huber = 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5
        assert float(loss[i].detach()) == pytest.approx(huber, abs=1e-5)


def test_the_loss_of_distributions_bootstraps_only_where_nothing_was_terminated():
    torch.manual_seed(0)
    agent = dqn.Agent(options(num_atoms=11, v_min=-5.0, v_max=5.0))
    batch = filled(agent)
    error, _, _ = dqn.distribution_error(agent, batch)
    logits = agent.network(batch["observation"])[torch.arange(32), batch["action"]].log_softmax(-1)
    for i in torch.flatten(batch["terminated"].nonzero()).tolist():
        place = (float(batch["reward"][i]) + 5.0) / 1.0
        low = int(place)
        expected = -((1 - place + low) * logits[i, low] + (place - low) * logits[i, low + 1])
        assert float(error[i].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


@pytest.mark.parametrize(
    "changes", [dict(final_sparsity=0.8, num_envs=2), dict(rainbow=True, blocks=0)], ids=["pruned", "rainbow"]
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, changes):
    _, parts = whole_and_resumed(
        dqn, lambda folder: options(folder, checkpoint_every=120, **changes), tmp_path, 170, ("network", "target")
    )
    if "final_sparsity" in changes:
        assert_pruned(parts.target, parts.pruners["network"], 0.8)
    else:
        assert isinstance(parts.replay, PrioritizedReplay) and parts.network.num_atoms == 51
        assert float(parts.replay.data["factor"][0]) == pytest.approx(0.99**3)


def test_what_is_saved_loads_and_its_card_says_how_good_it_is(tmp_path):
    agent = dqn.train(options(tmp_path, rainbow=True, eval_episodes=2, total_steps=100), quiet=True)
    loaded = QNetwork.from_pretrained(tmp_path / "model").eval()
    observation = torch.randn(5, 4)
    assert torch.equal(loaded.values(observation), agent.network.eval().values(observation))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "# Rainbow on CartPole-v1" in card and f"| CartPole-v1 | 2 | {np.mean(agent.evaluate(2)):.2f} |" in card


@learning
@pytest.mark.parametrize("changes", [{}, dict(rainbow=True, v_max=100.0)], ids=["dqn", "rainbow"])
def test_it_learns_to_balance(changes):
    agent = dqn.train(dqn.Options(total_steps=40_000, eval_episodes=0, v_min=0.0, **changes), quiet=True)
    assert np.mean(agent.evaluate(10)) > 150  # a random policy lasts 22 steps


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dqn.Agent(options(env_id="Pendulum-v1")), "env_id must have discrete actions"),
        (lambda: dqn.Agent(options(num_atoms=51, v_min=3.0, v_max=3.0)), "v_min below v_max; got 51, 3.0 and 3.0"),
        (lambda: dqn.Agent(options(multi_steps=0)), "multi_steps must be at least 1; got 0"),
        (lambda: PrioritizedReplay(3, alpha=2.0), r"alpha must be in \[0, 1\]; got 2.0"),
        (lambda: Replay(0), "capacity must be at least 1; got 0"),
    ],
)
def test_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
