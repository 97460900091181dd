"""The loop of every agent: train, log, prune, save, go on after a crash, evaluate, share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from fox_rl.diagnostics import Recorder, feature_rank
from fox_training.sparsity import MaskedPruner, SparsityConfig

from . import common


class Agent:
    """What `run` needs of an agent. A subclass builds itself in `__init__`, and defines `advance` and `choose`.

    Class attributes:
        title: Name in the model card.
        library: `library_name` of the Hub: pytorch or transformers.
        snippet: Python that loads what was saved, with `{where}` for the place.
        modules: Attributes with a state_dict that a resumed run loads.
        values: Other attributes that it needs; they are pickled.
        plays_at_once: Whether `choose` takes any number of environments.

    Attributes:
        options: A `RunOptions`.
        accelerator: Device and processes.
        envs: Vector environments.
        network: What is saved, evaluated and shared; has `save_pretrained`.
        meter: Returns of finished episodes.
        step: Environment steps so far, over all processes.
        total_steps: At which training ends.
        stride: Steps that one `advance` makes.
    """

    title = library = snippet = ""
    modules: tuple[str, ...] = ("network", "optimizer")
    values: tuple[str, ...] = ("meter", "step", "observation")
    plays_at_once = False

    def __init__(self, options: Any, accelerator: Accelerator | None = None):
        common.check_run_options(options)
        self.options = options
        self.accelerator = accelerator or Accelerator(cpu=options.device == "cpu")
        self.step = 0
        self.total_steps = options.total_steps
        self.stride = options.num_envs
        self.meter = common.EpisodeMeter(options.num_envs)
        self._pruners: dict[str, tuple[MaskedPruner, Any]] = {}
        # The weights are the same in all processes, everything after `seed_process` is not.
        common.seed_everything(options.seed)

    def refuse_processes(self) -> None:
        """Raise a ValueError in all but a run of one process."""
        count = self.accelerator.num_processes
        if count > 1:
            raise ValueError(
                f"num_processes must be 1 with a replay buffer; got {count}. Run {self.title} with python -m; PQN and "
                "PPO learn from the environments of all processes."
            )

    def advance(self) -> dict[str, float]:
        """Make `stride` environment steps and learn from them; returns what is to be logged."""
        raise NotImplementedError

    def choose(self, observation: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Actions without exploration, for `common.play`."""
        raise NotImplementedError

    def diagnose(self) -> dict[str, float]:
        """What goes wrong in the networks, at every checkpoint."""
        return {}

    @property
    def device(self) -> torch.device:
        """Of the networks."""
        return self.accelerator.device

    def seed_process(self) -> int:
        """Seed what differs between processes; returns the seed of their environments."""
        seed = self.options.seed + 1 + self.accelerator.process_index
        common.seed_everything(seed)
        return seed

    def prune(self, name: str, module: nn.Module, optimizer: Any, updates: int) -> None:
        """Prune this module over so many steps of its optimizer, if the options say so."""
        options = self.options
        if options.final_sparsity > 0:
            config = SparsityConfig(
                final_sparsity=options.final_sparsity, method=options.sparsity_method, seed=options.seed
            )
            self._pruners[name] = (MaskedPruner(module, config, max(1, updates)), optimizer)

    @property
    def pruners(self) -> dict[str, MaskedPruner]:
        """By the name given to `prune`; {} for dense networks."""
        return {name: pruner for name, (pruner, _) in self._pruners.items()}

    def plain_environments(self) -> Any:
        """What is pickled of the environments."""
        return self.envs

    def restore_environments(self, envs: Any | None) -> None:
        """Go on with unpickled environments, or with those made anew if they could not be pickled."""
        if envs is None:
            self.observation = self.envs.reset()[0]
        else:
            self.envs = envs

    def state(self) -> dict[str, Any]:
        """Everything besides the environments that a resumed run needs."""
        return {
            "modules": {name: getattr(self, name).state_dict() for name in self.modules},
            "values": {name: getattr(self, name) for name in self.values},
            "pruners": {name: pruner.state_dict() for name, pruner in self.pruners.items()},
            "options": asdict(self.options),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        for name, value in state["modules"].items():
            getattr(self, name).load_state_dict(value)
        for name, value in state["values"].items():
            setattr(self, name, value)
        for name, pruner in self.pruners.items():
            pruner.load_state_dict(state["pruners"][name])
        self.restore_environments(state["envs"])
        common.restore_random(state["random"])

    def evaluate(self, episodes: int, *, seed: int = 1, video_dir: str = "") -> list[float]:
        """Returns of episodes without exploration, without stops and in environments of their own."""
        self.network.eval()
        # A film is of one environment; a policy with a memory has it for one.
        at_once = episodes if self.plays_at_once and not video_dir else 1
        returns = common.play(
            self.choose, self.options.env_id, episodes, seed=seed, video_dir=video_dir, at_once=at_once
        )  # fmt: skip
        self.network.train()
        return returns


class OnPolicyAgent(Agent):
    """Agent that learns from a window of all environments at a time."""

    def __init__(self, options: Any, accelerator: Accelerator | None = None):
        super().__init__(options, accelerator)
        common.check_positive(options, "window", "epochs", "minibatches")
        self.stride = options.num_envs * options.window * self.accelerator.num_processes
        self.num_updates = max(1, options.total_steps // self.stride)
        self.total_steps = self.num_updates * self.stride

    @property
    def update(self) -> int:
        """Windows so far."""
        return self.step // self.stride

    @property
    def optimizer_steps(self) -> int:
        """Of the whole training."""
        return self.num_updates * self.options.epochs * self.options.minibatches


def run(agent: Agent, quiet: bool = False, report: Callable[..., None] | None = None) -> Agent:
    """Train, or go on from the checkpoint in `options.output_dir`.

    Args:
        agent: Fresh; with the options of the run in that folder, but for `common.FREE_OPTIONS`.
        quiet: No progress bar.
        report: Called like `Log.write` with every line of the log.
    """
    common.claim_folder(agent.options, agent.accelerator.is_main_process)
    return _run_claimed(agent, quiet, report)


def _run_claimed(agent: Agent, quiet: bool = False, report: Callable[..., None] | None = None) -> Agent:
    options, accelerator = agent.options, agent.accelerator
    folder = Path(options.output_dir) if options.output_dir else None
    checkpoint = None if folder is None else folder / f"checkpoint_{accelerator.process_index}.pt"
    state = None if checkpoint is None else common.load_checkpoint(checkpoint)
    if state is not None:
        agent.load(state)
    for pruner, optimizer in agent._pruners.values():
        pruner.attach(optimizer)
    is_main = accelerator.is_main_process
    log = common.Log(
        folder if is_main else None, agent.total_steps, agent.step, quiet or not is_main, tracker=options.tracker,
        config=asdict(options),
    )  # fmt: skip
    with log:
        while agent.step < agent.total_steps:
            values = agent.advance()
            is_saved = _is_due(agent, options.checkpoint_every)
            if is_saved:
                values |= agent.diagnose()
            if is_saved or _is_due(agent, options.log_every):
                values |= {f"sparsity_{name}": pruner.sparsity() for name, pruner in agent.pruners.items()}
                for write in (log.write, report):
                    if write is not None:
                        write(agent.step, episode_return=agent.meter.mean, **values)
            if checkpoint is not None and is_saved:
                common.save_checkpoint(checkpoint, agent.plain_environments(), **agent.state())
    if is_main and folder is not None:
        save(agent, folder / "model")
    agent.envs.close()
    return agent


def _is_due(agent: Agent, every: int) -> bool:
    return agent.step >= agent.total_steps or agent.step % every < agent.stride


def save(agent: Agent, folder: Path) -> None:
    """Weights, config and card; uploads them if the options name a repository."""
    options = agent.options
    agent.network.save_pretrained(folder)
    returns = agent.evaluate(options.eval_episodes, video_dir=options.video_dir) if options.eval_episodes else []
    common.write_card(folder, agent.title, options, returns, agent.library, agent.snippet, agent.step)
    if options.push_to_hub:
        push_to_hub(folder, options.push_to_hub)


def push_to_hub(folder: Path, repo_id: str, *, private: bool | None = None) -> str:
    """Upload a saved model with its card in one commit; makes the repository if it is not there. Needs a login.

    Args:
        folder: With config.json, model.safetensors and README.md.
        repo_id: user/name.
        private: Of a new repository.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi

    missing = [name for name in ("config.json", "model.safetensors", "README.md") if not (folder / name).exists()]
    if missing:
        raise ValueError(f"folder must hold {', '.join(missing)}; got {folder}. Give the model/ folder of a run.")
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload agent"))


@torch.no_grad()
def trunk_diagnostics(module: nn.Module, features: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Share of dormant units over all ReLUs of a module, and rank of the features that a forward pass returns."""
    with Recorder(module) as recorder:
        rank = feature_rank(features())
    dormant = recorder.dormant()
    return {"dormant": sum(dormant.values()) / len(dormant), "feature_rank": rank}


def main(agent_class: type[Agent], options_class: type, description: str, argv: list[str] | None = None) -> int:
    """Command line of an agent; an option that it cannot have, or a missing package, is said in one line."""
    options = common.options_from_command_line(options_class, description, argv)
    try:
        agent = agent_class(options)
        common.claim_folder(options, agent.accelerator.is_main_process)
    except (ValueError, ImportError, gym.error.Error) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    _run_claimed(agent)
    sys.stdout.write(f"mean return of the last {len(agent.meter.returns)} episodes: {agent.meter.mean:.3f}\n")
    return 0
