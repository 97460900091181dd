"""Many runs of DQN in one: the agent's own update and masks, its exploration, and what is reported."""

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

from fox_rl.agents import dqn
from fox_rl.experiments import many_dqn
from fox_rl.experiments.many_dqn import ManyDQN
from fox_training.sparsity import MaskedPruner, SparsityConfig


def options(**changes):
    return dqn.Options(
        **{**dict(env_id="CartPole-v1", total_steps=40, start_steps=10, batch_size=8, width=16), **changes}
    )


def batches(runs, count, generator):
    """Rows `(runs, count, 2 x 4 + 4)` as they are stored, and the same as batches of the agent."""
    rows = torch.randn(runs, count, 12, generator=generator)
    rows[..., 8] = (rows[..., 8] > 0).float()  # action
    rows[..., 10] = (rows[..., 10] > 0.5).float()  # terminated
    split = [
        {"observation": x[:, :4], "following": x[:, 4:8], "action": x[:, 8].long(), "reward": x[:, 9],
         "terminated": x[:, 10] > 0.5, "factor": x[:, 11]}
        for x in rows
    ]  # fmt: skip
    return rows, split


@pytest.mark.parametrize("changes", [{}, {"dueling": True, "double": False, "blocks": 0}])
def test_many_runs_in_one_are_the_single_runs(changes):
    """Same rows: six updates with a norm that clips some, dense, pruned and static, against the agents' own."""
    arms = [{}, {"final_sparsity": 0.6}, {"final_sparsity": 0.6, "sparsity_method": "static_random"}]
    settings = [options(seed=seed, max_grad_norm=0.5, device="cpu", **arm, **changes) for seed, arm in enumerate(arms)]
    agents = [dqn.Agent(own) for own in settings]
    many = ManyDQN([agent.network for agent in agents], 20, settings[0], torch.device("cpu"))
    pruners = {}
    for run in (1, 2):
        config = SparsityConfig(final_sparsity=0.6, method=settings[run].sparsity_method, every_steps=2)
        pruners[run] = MaskedPruner(many.network(run), config, 6)
        many.drop(run, pruners[run].masks)
        MaskedPruner(agents[run].network, config, 6).attach(agents[run].optimizer)
    generator = torch.Generator().manual_seed(0)
    for update in range(1, 7):
        rows, split = batches(3, 8, generator)
        for agent, batch in zip(agents, split, strict=True):
            agent.replay.sample = lambda count, batch=batch: batch
            dqn.learn(agent)
        many.learn(rows)
        many_dqn.refresh(many, pruners, update)
        if update == 3:
            many.copy_to_target()
            for agent in agents:
                agent.target.load_state_dict(agent.network.state_dict())
    for run, agent in enumerate(agents):
        for name, parameter in agent.network.named_parameters():
            torch.testing.assert_close(many.weights[name].data[run], parameter.data, rtol=1e-4, atol=1e-6)
            assert torch.equal(many.weights[name].data[run] == 0, parameter == 0) or parameter.ndim < 2
    assert [round(pruners[run].sparsity(), 2) for run in (1, 2)] == [0.6, 0.6]
    observation = torch.randn(3, 4, generator=generator)
    expected = [int(agent.network(x[None]).argmax()) for agent, x in zip(agents, observation, strict=True)]
    assert many.choose(observation.numpy()).tolist() == expected


def test_each_run_keeps_its_own_last_transitions():
    settings = options(multi_steps=3)
    many = ManyDQN([dqn.Agent(settings).network for _ in range(2)], 3, settings, torch.device("cpu"))
    many.add(np.zeros(0, dtype=np.int64), None)
    for number in range(4):
        runs = np.array([0, 1, 1][: 1 if number < 3 else 3])
        value = number + np.array([0.0, 0.0, 1.0])[: len(runs)]
        rows = {x: np.repeat(value[:, None], 4, axis=1) for x in ("observation", "following")}
        many.add(runs, rows | dict.fromkeys(("action", "reward", "terminated", "factor"), value))
    assert many.size[:, 0].tolist() == [3, 2]
    assert many.rows[:-1, 0].tolist() == [3, 1, 2, 3, 4, 0] and many.rows[4].tolist() == [4.0] * 12


def test_it_explores_like_the_agent():
    settings = options(total_steps=100, epsilon_fraction=0.5, epsilon_end=0.1)
    agent = dqn.Agent(settings)
    for agent.step in (0, 9, 10, 30, 50, 99):
        assert many_dqn.epsilon(settings, agent.step) == pytest.approx(agent.epsilon)
    many = ManyDQN([agent.network] * 400, 3, settings, torch.device("cpu"))
    generators = [np.random.default_rng(seed) for seed in range(400)]
    observation = np.ones((400, 4), np.float32)
    best = many.choose(observation)
    assert best.min() == best.max()
    other = (many_dqn.explore(many, observation, generators, 0.4) != best).mean()
    assert 0.14 < other < 0.26  # half of the random ones
    assert 0.4 < many_dqn.explore(many, observation, generators, 1.0).mean() < 0.6


def test_training_reports_every_run():
    rows = []
    runs = [("dense", options(seed=1, multi_steps=3)), ("pruned", options(seed=2, multi_steps=3, final_sparsity=0.9))]
    many_dqn.train(runs, lambda *row: rows.append(row), device="cpu", eval_every=20, eval_episodes=2)
    returns = {(arm, seed, step): value for arm, seed, step, name, value in rows if name == "eval_return"}
    assert returns.keys() == {(*run, step) for run in (("dense", 1), ("pruned", 2)) for step in (20, 40)}
    assert all(8 <= value <= 500 for value in returns.values())
    (final,) = [value for arm, _, step, name, value in rows if (step, name) == (40, "sparsity_network")]
    assert final == pytest.approx(0.9, abs=5e-3)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="runs must differ in seed, final_sparsity, sparsity_method alone; got .*wid"):
        many_dqn.train([("a", options()), ("b", options(width=8))], print)
    with pytest.raises(ValueError, match="sparsity_method must be one of magnitude, random, static_random; got rigl"):
        many_dqn.train([("a", options(final_sparsity=0.5, sparsity_method="rigl"))], print)
    with pytest.raises(ValueError, match="noisy must be False to train many runs at once; got True"):
        many_dqn.train([("a", options(noisy=True))], print)


@pytest.mark.gpu
def test_graphs_do_what_the_functions_do():
    """Same seed with graphs and without: choices and all weights after 8 updates."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    networks = [dqn.Agent(options(seed=seed, device="cpu")).network for seed in range(3)]
    both = []
    for graphs in (False, True):
        many = ManyDQN(networks, 64, options(batch_size=32), torch.device("cuda"), graphs)
        torch.manual_seed(1)
        stored = batches(3, 64, torch.Generator().manual_seed(0))[0].numpy()
        for number in range(64):
            row = stored[:, number]
            columns = {"observation": row[:, :4], "following": row[:, 4:8]}
            columns |= {x: row[:, 8 + i] for i, x in enumerate(("action", "reward", "terminated", "factor"))}
            many.add(np.arange(3), columns)
        many.drop(1, {"trunk.out.0.weight": torch.rand(16, 16, device="cuda") > 0.5})
        chosen = []
        for number in range(8):
            many.update()
            chosen.append(many.choose(np.random.default_rng(number).normal(size=(3, 4)).astype(np.float32)))
        assert many.num_graphs == 3 * graphs
        np.testing.assert_array_equal(many.rows[:-1].cpu().numpy(), stored.reshape(3 * 64, 12))
        both.append((np.concatenate(chosen), many.weights))
    np.testing.assert_array_equal(both[0][0], both[1][0])
    for name, weight in both[0][1].items():
        torch.testing.assert_close(weight, both[1][1][name], rtol=1e-3, atol=1e-4)
