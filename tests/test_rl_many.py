"""Many runs of TD3 in one: the agent's own update, environments in other processes, and who is stopped when."""

import contextlib
import os
import signal

import numpy as np
import pytest
import torch

gym = pytest.importorskip("gymnasium")

from fox_rl.agents import td3  # noqa: E402
from fox_rl.experiments import many_td3, workers  # noqa: E402
from fox_rl.experiments.many_td3 import ManyTD3, Runs  # noqa: E402
from fox_rl.learn_to_stop import hazard_for  # noqa: E402


def options(**changes):
    sizes = dict(env_id="Pendulum-v1", total_steps=300, start_steps=60, batch_size=16, width=16)
    return td3.Options(**{**sizes, "stop_start": 0.3, **changes})


@pytest.fixture(scope="module")
def pool():
    with workers.EnvironmentPool("Pendulum-v1", 4, 2) as pool:
        yield pool


def test_many_runs_in_one_are_the_single_runs():
    """Stacked networks, same rows, same noise: one update with actor and one without, against the agents' own."""
    settings = options(batch_size=8, target_noise=0.2, policy_delay=2)
    agents = []
    for seed in (0, 1):
        settings.seed = seed
        agents.append(td3.Agent(settings))
    many = ManyTD3([agent.network for agent in agents], 100, settings, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2):
        rows = torch.randn(2, 8, 2 * 3 + 1 + 2, generator=generator)
        rows[..., -1] = (rows[..., -1] > 0).float()
        noise = torch.randn(2, 8, 1, generator=generator)
        for run, agent in enumerate(agents):
            batch = many.split(rows[run])
            agent.batch = lambda batch=batch: batch
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(torch, "randn_like", lambda x, drawn=noise[run]: drawn)
                agent.learn()
        many.learn(rows, noise, with_actor=number == 2)
    for run, agent in enumerate(agents):
        for stacked, net in ((many.actor, agent.actor), (many.target_actor, agent.target_actor)):
            torch.testing.assert_close(stacked.weights[0][run].T, net[0].weight, rtol=1e-5, atol=1e-6)
        for twin in (0, 1):
            net = agent.target_critics.nets[twin]
            torch.testing.assert_close(many.target_critics.weights[1][2 * twin + run].T, net[2].weight)
            torch.testing.assert_close(
                many.critics.biases[2][2 * twin + run, 0], agent.critics.nets[twin][4].bias, rtol=1e-5, atol=1e-6
            )


def test_environments_in_other_processes_are_those_of_this_one(pool):
    envs = [gym.make("Pendulum-v1") for _ in range(4)]
    first = pool.reset(np.arange(4), np.array([7, 8, 9, 10]))
    expected = np.stack([env.reset(seed=7 + i)[0] for i, env in enumerate(envs)])
    np.testing.assert_array_equal(first, expected)
    generator = np.random.default_rng(0)
    for step in range(200):
        numbers = np.arange(4) if step % 3 else np.array([2, 0])  # some wait meanwhile
        action = generator.uniform(-2, 2, (len(numbers), 1)).astype(np.float32)
        got = pool.step(numbers, action)
        rows = [envs[i].step(a)[:4] for i, a in zip(numbers, action, strict=True)]
        for values, theirs in zip(got, zip(*rows, strict=True), strict=True):
            np.testing.assert_array_equal(values, np.stack(theirs))
    assert got[3].tolist() == [True, False, True, False]  # 200 steps, and 133
    before = pool.x["observation"].copy()
    again = pool.reset(np.array([1]), np.array([8]))
    np.testing.assert_array_equal(again[0], expected[1])
    np.testing.assert_array_equal(pool.x["observation"][[0, 2, 3]], before[[0, 2, 3]])


def test_the_control_has_the_mean_length_that_least_has_had_last(pool):
    world = Runs(pool, [("least", 3), ("random", 3), ("random", 4)], options())
    first = world.observation.copy()
    world.lengths[0], world.lengths[1] = [100] * 19, [50] * 20
    world.step_index[:] = 39
    truncated = np.array([True, False, False])
    world.finish(first.copy(), np.zeros(3, dtype=bool), truncated, np.zeros(3), np.zeros(3))
    assert world.lengths[0][-1] == 40 and world.step_index[:, 0].tolist() == [0, 40, 40]
    assert [stopper.hazard for stopper in world.stoppers[1:]] == [hazard_for(97.0, 200), 0.0]
    assert (world.observation[0] != first[0]).any() and (world.observation[1:] == first[1:]).all()
    assert world.num_stopped.sum() == world.saved_steps.sum() == 0


@pytest.mark.parametrize("natural", [0.0, 0.01])
def test_the_control_keeps_up_with_least_whatever_ends_its_episodes(pool, monkeypatch, natural):
    """Lengths of LEAST that scatter and change; `natural`: how often the control's episodes end by themselves."""
    world = Runs(pool, [("least", 0), ("random", 0)], options(stop_start=0.0))
    generator = np.random.default_rng(0)
    monkeypatch.setattr(world.pool, "reset", lambda numbers, seeds=None: world.observation[numbers])
    monkeypatch.setattr(world.stoppers[0], "update", lambda *_: generator.random(1) < 1 / usual)
    monkeypatch.setattr(world.stoppers[0], "episode_end", lambda *_: None)
    for step in range(12_000):
        usual = 120 if step > 6000 else 20
        terminated = np.array([False, generator.random() < natural])
        truncated = ~terminated & (world.step_index[:, 0] >= 199)
        world.finish(world.observation, terminated, truncated, np.zeros(2), np.zeros(2))
    least, control = (np.mean(x) for x in world.lengths)
    assert 30 < least < 70 and abs(control - least) < 0.1 * least
    assert world.num_stopped[1] > 50 and (sum(world.terminated[1]) > 50) == (natural > 0)


def test_a_stop_is_counted_with_the_steps_that_it_saves(pool):
    world = Runs(pool, [("none", 0), ("random", 0)], options(stop_start=0.0))
    world.stoppers[1].hazard = 1.0
    world.step_index[:] = 49
    no = np.zeros(2, dtype=bool)
    world.finish(world.observation, no, no, np.zeros(2), np.zeros(2))
    assert world.num_stopped.tolist() == [0, 1] and world.saved_steps.tolist() == [0, 150]
    world.step_index[1] = 199  # its own end: nothing is saved
    world.finish(world.observation, no, np.array([False, True]), np.zeros(2), np.zeros(2))
    assert world.num_stopped.tolist() == [0, 1] and world.lengths[1] == [50, 200]


def test_a_step_is_stored_and_learned_from_as_the_agent_does():
    """Through replay and graph functions: the rows that are kept, the value and the error that LEAST is given."""
    settings = options(batch_size=4)
    agent = td3.Agent(settings)
    agent.stopper = None  # value_and_loss leaves the work out for the control
    many = ManyTD3([agent.network], 3, settings, torch.device("cpu"))
    generator = np.random.default_rng(0)
    stored = []
    for number in range(5):
        columns = [generator.normal(size=(1, n)) for n in (3, 1, 3, 1)] + [np.array([[number % 2 == 0]])]
        value, potential = many.add(*columns)
        observation, action, following, reward, terminated = columns
        expected = agent.value_and_loss(
            observation, agent.network.scale(action), reward[:, 0], following, terminated[:, 0]
        )
        np.testing.assert_allclose([value, potential], expected, rtol=1e-4, atol=1e-6)
        stored.append(np.concatenate(columns, axis=1)[0])
        assert int(many.size) == min(number + 1, 3)
    np.testing.assert_allclose(many.rows[0], np.stack([stored[3], stored[4], stored[2]]), rtol=1e-6)
    before = [p.clone() for p in many.critics.parameters()]
    many.update_critics()
    assert all((a != b).any() for a, b in zip(before, many.critics.parameters(), strict=True))


def test_an_evaluated_run_is_its_own_actor_in_one_environment(pool):
    agents = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        agents.append(td3.Agent(options(seed=seed)))
    with torch.no_grad():
        for agent in agents:
            agent.actor[-1].weight.mul_(20.0)  # so that it acts
    many = ManyTD3([agent.network for agent in agents], 3, options(), torch.device("cpu"))
    world = Runs(pool, [("none", 0), ("none", 1)], options())
    expected = []
    for agent in agents:
        env, total, truncated = gym.make("Pendulum-v1"), 0.0, False
        observation, _ = env.reset(seed=1000)
        while not truncated:
            observation, reward, _, truncated, _ = env.step(agent.network.act(observation[None])[0])
            total += reward
        expected.append(total)
    np.testing.assert_allclose(many_td3.evaluate(many, world, 1), expected, rtol=1e-3)
    assert abs(expected[0] - expected[1]) > 1


def test_training_reports_every_run():
    rows = []
    runs = [("none", 0), ("least", 0), ("random", 0)]
    settings = options(total_steps=230, start_steps=210, stop_start=0.5)
    many_td3.train(
        "Pendulum-v1", runs, settings, lambda *row: rows.append(row), device="cpu", workers=1, eval_episodes=1
    )
    for arm, seed in runs:
        own = {name: value for a, s, step, name, value in rows if (a, s, step) == (arm, seed, 230)}
        assert own.keys() == {"eval_return", "episode_length", "num_stopped", "saved_steps"}
        assert -2000 < own["eval_return"] < 0 < own["episode_length"] <= 200
        assert arm == "random" or own["num_stopped"] == 0  # one episode tells LEAST nothing


def test_a_graph_that_cannot_be_recorded_is_replaced_by_its_function(monkeypatch, capsys):
    """Recording does not execute, and fails at its end: the call that failed is made again, the ones after it too."""

    @contextlib.contextmanager
    def failing(graph):
        yield
        calls.append("recorded")
        raise RuntimeError("operation not permitted when stream is capturing")

    calls = []
    for name, value in {"synchronize": lambda: None, "CUDAGraph": object, "graph": failing}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    graphed = many_td3.Graphed(lambda: calls.append("called"), True, lambda: calls.append("failed"))
    graphed.calls = 3
    graphed(), graphed()
    assert calls == ["called", "recorded", "failed", "called", "called"]
    assert capsys.readouterr().err.count("NO CUDA GRAPH") == 1


@pytest.mark.gpu
def test_graphs_do_what_the_functions_do():
    """Same seed with graphs and without: rows, actions, values and all weights after 12 updates."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    settings, device = options(batch_size=64), torch.device("cuda")
    torch.manual_seed(0)
    agents = [td3.Agent(options(seed=seed, device="cpu")) for seed in (0, 1, 2)]
    both = []
    for graphs in (False, True):
        many = ManyTD3([agent.network for agent in agents], 32, settings, device, graphs)
        generator, seen = np.random.default_rng(0), []
        torch.manual_seed(1)
        for number in range(50):
            columns = [generator.normal(size=(3, n)).astype(np.float32) for n in (3, 1, 3, 1)]
            seen += many.add(*columns, np.zeros((3, 1), np.float32))
            seen.append(many.choose(columns[0]).ravel())
            if number >= 38:
                (many.update_all if number % 2 else many.update_critics)()
        assert many.num_graphs == 4 * graphs
        both.append((seen, [*many.actor.parameters(), *many.target_critics.parameters(), many.rows]))
    (plain, weights), (graphed, theirs) = both
    for a, b in zip(plain, graphed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(weights, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_says_what_is_wrong(pool):
    with pytest.raises(ValueError, match=r"workers must be in \[1, count 2\]; got 3"):
        workers.EnvironmentPool("Pendulum-v1", 2, 3)
    with pytest.raises(ValueError, match="runs must have an arm of none, least, random; got .'early'."):
        many_td3.train("Pendulum-v1", [("early", 0)], options(), print)
    os.kill(pool.processes[0].pid, signal.SIGKILL)  # the last test of this pool
    with pytest.raises(RuntimeError, match="worker 0 died with exit code -9"):
        pool.step(np.arange(4), np.zeros((4, 1)))
