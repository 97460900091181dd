"""Agents: they learn, they go on exactly where they stopped, and what they save loads."""

import dataclasses
import importlib
import json
import os
import shlex
import sys
import types

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

import gymnasium as gym
from interrupted import assert_pruned, whole_and_resumed
from transformers import AutoModel

from fox_rl.agents import common, pqn, training
from fox_rl.q_network import QNetwork

learning = pytest.mark.skipif(not os.environ.get("FOX_LEARNING"), reason="minutes long: FOX_LEARNING=1")


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def pqn_options(folder="", **changes):
    sizes = dict(
        num_envs=8, window=16, total_steps=8 * 16 * 6, minibatches=4, width=16, checkpoint_every=256, eval_episodes=0
    )  # fmt: skip
    return pqn.Options(**{**sizes, "output_dir": str(folder), **changes})


def ppo_options(folder="", **changes):
    from fox_rl.agents import ppo_fox

    sizes = dict(
        num_envs=4, window=16, total_steps=4 * 16 * 4, minibatches=2, hidden_size=16, num_layers=1, num_heads=2,
        checkpoint_every=128, epochs=2, eval_episodes=0,
    )  # fmt: skip
    return ppo_fox.Options(**{**sizes, "output_dir": str(folder), **changes})


def test_a_stopped_pqn_goes_on_bit_for_bit(tmp_path):
    _, parts = whole_and_resumed(pqn, lambda folder: pqn_options(folder, final_sparsity=0.8), tmp_path, 384)
    assert parts.update == 6
    assert_pruned(parts.network, parts.pruners["network"], 0.8)


def test_a_stopped_ppo_with_memory_goes_on_bit_for_bit(tmp_path):
    from fox_rl.agents import ppo_fox

    env = dict(env_id="CartPole-v1", context_steps=8)
    whole_and_resumed(ppo_fox, lambda folder: ppo_options(folder, **env), tmp_path, 192)


def test_what_ppo_saves_loads_and_its_card_says_how_good_it_is(tmp_path):
    from fox_rl.agents import ppo_fox

    agent = ppo_fox.train(ppo_options(tmp_path, eval_episodes=3), quiet=True)
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert same(weights(agent.network), weights(loaded))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    agent.network = loaded
    returns = agent.evaluate(3)
    assert f"| fox_rl/RepeatFirst-v0 | 3 | {np.mean(returns):.2f} |" in card
    assert "--num-envs 4" in card and "library_name: transformers" in card


def test_the_ratio_of_the_first_update_is_one_also_with_context_and_resets():
    """What was sampled step by step has the same probability when the window is read in parallel."""
    from accelerate import Accelerator

    from fox_rl.agents import ppo_fox

    agent = ppo_fox.Agent(ppo_options(env_id="CartPole-v1", context_steps=20), Accelerator())
    for _ in range(3):
        rollout = ppo_fox.collect(agent)
    assert rollout.observation.shape[:2] == (4, 36) and bool(rollout.is_init[:, 1:].any())
    with torch.no_grad():
        outputs = agent.network(rollout.observation, rollout.is_init)
        outputs.logits = outputs.logits[:, -16:]
        log_prob = outputs.distribution().log_prob(rollout.action)
    # The first steps of the window have lost what lies before the context, in acting as in learning.
    torch.testing.assert_close(log_prob, rollout.log_prob, rtol=0, atol=1e-4)


def test_ppo_bootstraps_through_a_truncation_and_not_through_a_termination():
    from accelerate import Accelerator

    from fox_rl.agents import ppo_fox

    class OneStep(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        action_space = gym.spaces.Discrete(2)

        def __init__(self, truncates=False):
            self.truncates = truncates

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.ones(1, np.float32), 2.0, not self.truncates, self.truncates, {}

    gym.register("test/OneStep-v0", entry_point=OneStep)
    targets = {}
    for truncates in (False, True):
        options = ppo_options(env_id="test/OneStep-v0", gae_decay=0.0, window=4, discount=0.5)
        original = common.make_environments
        common.make_environments = lambda *a, **k: original(*a, truncates=truncates, **k)  # noqa: B023
        try:
            agent = ppo_fox.Agent(options, Accelerator())
        finally:
            common.make_environments = original
        agent.network.value_head.bias.data.fill_(10.0)
        targets[truncates] = ppo_fox.collect(agent).target
    torch.testing.assert_close(targets[False], torch.full((4, 4), 2.0))
    assert targets[True].min() > 5.5  # 2 + 0.5 * about 10


def test_what_pqn_saves_loads(tmp_path):
    agent = pqn.train(pqn_options(tmp_path, eval_episodes=2), quiet=True)
    assert same(weights(agent.network), weights(QNetwork.from_pretrained(tmp_path / "model")))
    last = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert 0 <= last["dormant"] <= 1 and last["feature_rank"] >= 1 and last["grad_first"] > 0
    returns = agent.evaluate(2)
    assert f"| CartPole-v1 | 2 | {np.mean(returns):.2f} |" in (tmp_path / "model" / "README.md").read_text()


@learning
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_with_memory_solves_repeat_first_within_133k_steps(seed):
    from fox_rl.agents import ppo_fox

    agent = ppo_fox.train(ppo_fox.Options(seed=seed), quiet=True)
    assert np.mean(agent.evaluate(100)) >= 0.95


@learning
def test_pqn_learns_to_balance():
    agent = pqn.train(pqn.Options(total_steps=81_920), quiet=True)
    assert agent.meter.mean > 120  # a random policy lasts 22 steps


def test_pixels_and_atoms_have_their_shapes():
    pixels, action = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(6)
    for readout in ("gap", "soft_moe"):
        network = QNetwork.for_spaces(pixels, action, encoder="nature", readout=readout, num_atoms=51)
        assert network(torch.zeros(2, 4, 84, 84, dtype=torch.uint8)).shape == (2, 6, 51)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pqn.train(pqn_options(num_envs=0), quiet=True), "num_envs must be at least 1; got 0"),
        (
            lambda: pqn.train(pqn_options(optimizer="sgd"), quiet=True),
            "optimizer must be one of adamw, kron, radam; got 'sgd'",
        ),
        (lambda: pqn.train(pqn_options(env_id="Pendulum-v1"), quiet=True), "env_id must have discrete actions"),
    ],
)
def test_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


AGENTS = ("pqn", "dqn", "ppo_fox", "td3", "sac")


@pytest.mark.parametrize("name", AGENTS)
def test_help_lists_every_option(name, capsys):
    module = importlib.import_module(f"fox_rl.agents.{name}")
    with pytest.raises(SystemExit):
        training.main(module.Agent, module.Options, module.__doc__, ["--help"])
    out = capsys.readouterr().out
    assert f"-m fox_rl.agents.{name}" in out and "--push-to-hub" in out
    shared = ("optimizer", "final_sparsity", "sparsity_method", "checkpoint_every", "video_dir", "tracker")
    assert {*shared} <= {field.name for field in dataclasses.fields(module.Options)}
    assert all("--" + field.name.replace("_", "-") in out for field in dataclasses.fields(module.Options))


def test_the_command_on_a_card_is_the_run(monkeypatch):
    from fox_rl.agents import dqn

    options = dqn.Options(seed=3, rainbow=True, double=False, env_id="a b", output_dir="here", learning_rate=2.5e-4)
    python, flag, module, *arguments = shlex.split(common.command_of(options))
    assert (python, flag, module) == ("python", "-m", "fox_rl.agents.dqn")
    again = common.options_from_command_line(dqn.Options, "", arguments)
    assert again == dataclasses.replace(options, output_dir="")
    # Run as a module, its own name is __main__.
    monkeypatch.setattr(dqn.Options, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", types.SimpleNamespace(name="fox_rl.agents.dqn"))
    assert common.command_of(options).startswith("python -m fox_rl.agents.dqn --env-id 'a b' ")


def test_the_command_line_says_in_one_line_what_is_wrong(capsys, monkeypatch, tmp_path):
    def call(name, *arguments):
        module = importlib.import_module(f"fox_rl.agents.{name}")
        assert training.main(module.Agent, module.Options, module.__doc__, list(arguments)) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
        return err

    assert "num_envs must be at least 1; got 0" in call("dqn", "--num-envs", "0")
    assert "doesn't exist" in call("td3", "--env-id", "NoSuchTask-v0")

    folder = tmp_path / "run"
    common.claim_folder(pqn_options(folder, width=32, total_steps=100))
    common.claim_folder(pqn_options(folder, width=32, total_steps=200))  # a run may be made longer
    err = call("pqn", *shlex.split(common.command_of(pqn_options(width=16)))[3:], "--output-dir", str(folder))
    assert f"width must be 32 to go on with the run in {folder}; got 16." in err

    def missing(*_, **__):
        raise gym.error.DependencyNotInstalled("MuJoCo is not installed")

    monkeypatch.setattr(gym, "make_vec", missing)
    err = call("td3", "--env-id", "HalfCheetah-v5")
    assert "env_id HalfCheetah-v5 needs a package" in err and "fox-transformers[rl-benchmarks]" in err


def test_what_is_uploaded_is_the_model_its_config_and_its_card(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options["exist_ok"]))

        def upload_folder(self, folder_path, repo_id, **_):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            return "https://huggingface.co/me/agent/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    pqn.train(pqn_options(tmp_path, push_to_hub="me/agent", eval_episodes=1), quiet=True)
    assert calls == [("me/agent", True), ("me/agent", ["README.md", "config.json", "model.safetensors"])]
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert 'QNetwork.from_pretrained("me/agent")' in card and "type: mean_reward" in card
    assert huggingface_hub.ModelCard(card).data.eval_results[0].dataset_name == "CartPole-v1"
    with pytest.raises(ValueError, match="folder must hold config.json, model.safetensors, README.md"):
        training.push_to_hub(tmp_path, "me/agent")


def test_a_run_can_be_watched_in_trackio(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    seen = []

    class Run:
        def log(self, values, step):
            seen.append((step, values["loss"]))

        def finish(self):
            seen.append("end")

    monkeypatch.setattr(trackio, "init", lambda **settings: seen.append(settings["config"]["seed"]) or Run())
    pqn.train(pqn_options(tmp_path, tracker="trackio", seed=5), quiet=True)
    assert seen[0] == 5 and [x[0] for x in seen[1:-1]] == [128 * i for i in range(1, 7)] and seen[-1] == "end"


def test_the_first_evaluated_episode_is_filmed(tmp_path):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    agent = pqn.Agent(pqn_options())
    assert len(agent.evaluate(2, video_dir=str(tmp_path / "film"))) == 2
    assert [path.suffix for path in (tmp_path / "film").iterdir()] == [".mp4"]


def test_of_atari_what_the_policy_sees_is_filmed(tmp_path):
    pytest.importorskip("ale_py")
    moviepy = pytest.importorskip("moviepy")
    seen = []
    common.play(
        lambda x, _: seen.append(x[0, -1].copy()) or np.ones(1, int), "ALE/Pong-v5", 1, video_dir=str(tmp_path)
    )
    (path,) = tmp_path.iterdir()
    film = moviepy.VideoFileClip(str(path))
    assert film.size == [336, 336] and abs(film.duration * 15 - len(seen)) <= 1
    np.testing.assert_allclose(film.get_frame(50.5 / 15)[2::4, 2::4].mean(-1), seen[50], atol=24)  # compressed
    film.close()
