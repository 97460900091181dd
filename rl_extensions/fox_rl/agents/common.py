"""What the agents share besides their components: options, environments, log, checkpoints and the model card."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import random
import sys
import typing
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from tqdm import tqdm

from fox_training.optimizers import OPTIMIZERS

from ..envs import register_environments


def option(default: Any, text: str) -> Any:
    """A field of an agent's options with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


def options_from_command_line(cls: type, description: str, argv: list[str] | None = None) -> Any:
    """Build the options dataclass from `--field-name value` arguments; `--help` lists them with their defaults."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = {int: int, float: float, str: str}[hints[field.name]]
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=kind,
            default=field.default,
            help=f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%"),
        )
    return cls(**vars(parser.parse_args(argv)))


def check_positive(options: Any, *names: str) -> None:
    """Raise a ValueError for the first of these options that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(options, name)}.")


def check_optimizer(options: Any) -> None:
    """Raise a ValueError for an optimizer that no agent has."""
    if options.optimizer not in set(OPTIMIZERS) - {"muon"}:
        raise ValueError(f"optimizer must be adamw, radam or kron; got {options.optimizer!r}.")


def make_environments(
    env_id: str, num_envs: int, mode: AutoresetMode = AutoresetMode.SAME_STEP, **options
) -> VectorEnv:
    """Copies of a Gymnasium environment in one process; episodes restart in the step in which they end.

    Args:
        env_id: Registered id, also those of `fox_rl.envs`; `ALE/...` needs `pip install ale-py`.
        num_envs: Copies.
        mode: DISABLED for `EarlyStopVectorEnv`.
        options: Of the environment.
    """
    register_environments()
    if env_id.startswith("ALE/"):
        try:
            import ale_py
        except ImportError as error:
            raise ImportError(
                f"env_id {env_id} needs ale-py (GPL-2.0): pip install 'fox-transformers[rl-atari]'."
            ) from error
        gym.register_envs(ale_py)
    return gym.make_vec(env_id, num_envs, "sync", vector_kwargs={"autoreset_mode": mode}, **options)


def true_following(following: np.ndarray, info: dict[str, Any], ended: np.ndarray) -> np.ndarray:
    """The states that the actions led to: where an episode ended its last one, not the first of the next."""
    if not ended.any():
        return following
    states = np.array(following)
    for env in np.flatnonzero(ended):
        states[env] = info["final_obs"][env]
    return states


class EpisodeMeter:
    """Returns and lengths of the last 100 finished episodes over all environments."""

    def __init__(self, num_envs: int):
        self.running = np.zeros(num_envs)
        self.lengths = np.zeros(num_envs, dtype=np.int64)
        self.returns: list[float] = []
        self.finished_lengths: list[int] = []

    def update(self, reward: np.ndarray, ended: np.ndarray) -> None:
        """Take in one step of all environments."""
        self.running += reward
        self.lengths += 1
        for env in np.flatnonzero(ended):
            self.returns = [*self.returns[-99:], float(self.running[env])]
            self.finished_lengths = [*self.finished_lengths[-99:], int(self.lengths[env])]
        self.running[ended] = 0.0
        self.lengths[ended] = 0

    @property
    def mean(self) -> float:
        """Mean return of the last 100 episodes, NaN before the first."""
        return float(np.mean(self.returns)) if self.returns else float("nan")


class Log:
    """Progress bar, metrics.jsonl, and TensorBoard where it is installed.

    Args:
        folder: Where the files go; None shows the bar only.
        total: Environment steps of the whole run.
        start: Steps that are done.
        quiet: No bar, for tests and processes that are not the first.
    """

    def __init__(self, folder: Path | None, total: int, start: int = 0, quiet: bool = False):
        self.bar = tqdm(total=total, initial=start, unit="step", disable=quiet, file=sys.stderr)
        self.file = self.board = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= start]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            self.file = path.open("a", encoding="utf-8")
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
            except ImportError:
                self.bar.write("tensorboard is not installed: metrics go to metrics.jsonl only.", file=sys.stderr)

    def write(self, step: int, **values: float) -> None:
        """One line of metrics after `step` environment steps."""
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        """Flush and close everything."""
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def save_checkpoint(path: Path, envs: VectorEnv | None, **states: Any) -> None:
    """Write a resumable state in one visible step, with the random state and, if they can be pickled, environments."""
    random_state = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    try:
        pickled = None if envs is None else cloudpickle.dumps(envs)
    except Exception as error:  # simulators in C raise whatever they like
        sys.stderr.write(f"environments cannot be saved ({error}): a resumed run will start them anew.\n")
        pickled = None
    buffer = io.BytesIO()
    torch.save({**states, "random": random_state, "envs": pickled}, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Inverse of `save_checkpoint`, None if there is no file; random states are restored by `restore_random`.

    The file holds pickles: load only what you wrote yourself.
    """
    if not path.exists():
        return None
    state = torch.load(path, weights_only=False)
    state["envs"] = None if state["envs"] is None else cloudpickle.loads(state["envs"])
    return state


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_random(state: tuple) -> None:
    """Set the random states of a checkpoint."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def write_card(folder: Path, title: str, env_id: str, options: Any, returns: list[float], library: str) -> None:
    """README.md beside the saved model, with the evaluation as a table and the command to repeat it."""
    changed = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default and field.name != "output_dir"
    }
    command = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
    text = f"""---
library_name: {library}
tags: [reinforcement-learning, {env_id.replace("/", "-")}, fox-transformers]
---
# {title} on {env_id}

| environment | episodes | mean return | standard deviation |
| --- | --- | --- | --- |
| {env_id} | {len(returns)} | {np.mean(returns):.2f} | {np.std(returns):.2f} |

One seed; the policy acts greedily. Trained with `python -m {options.__class__.__module__} {command}`.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
