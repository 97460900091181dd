"""What the agents share besides their components: options, environments, log, files; `training` has the loop."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import random
import shlex
import sys
import typing
from collections.abc import Callable
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
from ..q_network import QNetwork


def option(default: Any, text: str) -> Any:
    """A field of an agent's options with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class RunOptions:
    """Options of every agent; an agent adds its own and changes defaults by naming a field again."""

    env_id: str = option("CartPole-v1", "Gymnasium id")
    num_envs: int = option(1, "environments of each process")
    total_steps: int = option(100_000, "environment steps over all processes")
    learning_rate: float = option(1e-3, "of Adam; kron takes a third, see fox_training.optimizers")
    optimizer: str = option("adamw", "adamw, radam or kron")
    final_sparsity: float = option(0.0, "share of the weights pruned during training, see fox_training.sparsity")
    sparsity_method: str = option("magnitude", "magnitude, saliency, random, static_random or rigl")
    seed: int = option(0, "of everything")
    device: str = option("auto", "auto: a GPU if there is one; cpu")
    output_dir: str = option("", "folder of the run; empty writes nothing")
    tracker: str = option("tensorboard", "beside metrics.jsonl: tensorboard, trackio or none")
    log_every: int = option(1, "environment steps between log lines, at least one update")
    checkpoint_every: int = option(50_000, "environment steps between checkpoints and diagnostics")
    eval_episodes: int = option(10, "episodes without exploration at the end, for the model card; 0 for none")
    video_dir: str = option("", "folder for a video of the first evaluated episode; needs moviepy")
    push_to_hub: str = option("", "repository (user/name) to which model/ is uploaded at the end")


@dataclasses.dataclass
class ValueOptions(RunOptions):
    """Options of agents with a `QNetwork`."""

    env_id: str = option("CartPole-v1", "Gymnasium id; vector or 84 x 84 pixel observations, discrete actions")
    encoder: str = option("impala", "of pixels: impala or nature")
    encoder_width: int = option(1, "factor on the channels of the encoder")
    readout: str = option("gap", "of pixels: flatten, gap, per_conv_sum, per_conv_mean or soft_moe")
    width: int = option(128, "of the trunk")
    blocks: int = option(1, "residual blocks of the trunk, two layers each")
    skip: str = option("multi", "multi, residual or none")


def build_q_network(envs: VectorEnv, options: ValueOptions, **head: Any) -> QNetwork:
    """The network that fits the spaces and the options; `head` is for `QNetwork`."""
    return QNetwork.for_spaces(
        envs.single_observation_space, envs.single_action_space, width=options.width, blocks=options.blocks,
        skip=options.skip, encoder=options.encoder, encoder_width=options.encoder_width, readout=options.readout,
        **head,
    )  # fmt: skip


def options_from_command_line(cls: type, description: str, argv: list[str] | None = None) -> Any:
    """Build the options dataclass from `--field-name value` arguments; `--help` lists them with their defaults."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            **how,
            default=field.default,
            help=f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%"),
        )
    return cls(**vars(parser.parse_args(argv)))


def check_positive(options: Any, *names: str) -> None:
    """Raise a ValueError for the first of these options that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(options, name)}.")


def check_run_options(options: RunOptions) -> None:
    """Raise a ValueError that names the first option that no agent can have."""
    check_positive(options, "num_envs", "total_steps", "log_every", "checkpoint_every")
    allowed = {
        "optimizer": sorted(set(OPTIMIZERS) - {"muon"}),
        "tracker": ["none", "tensorboard", "trackio"],
        "device": ["auto", "cpu"],
    }
    for name, values in allowed.items():
        if getattr(options, name) not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(options, name)!r}.")


# What a run may change when it goes on.
FREE_OPTIONS = (
    "total_steps", "device", "output_dir", "env_threads", "tracker", "log_every", "checkpoint_every", "eval_episodes",
    "video_dir", "push_to_hub",
)  # fmt: skip


def claim_folder(options: RunOptions, is_main: bool = True) -> None:
    """Write options.json into `output_dir`, or raise a ValueError if the run that is there has other options."""
    if not options.output_dir:
        return
    path, own = Path(options.output_dir) / "options.json", dataclasses.asdict(options)
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else own
    for name, value in own.items():
        if name not in FREE_OPTIONS and there.get(name, value) != value:
            raise ValueError(
                f"{name} must be {there[name]!r} to go on with the run in {options.output_dir}; got {value!r}. "
                "Give a new run an output_dir of its own."
            )
    if is_main:
        _write_at_once(path, (json.dumps(own, indent=1) + "\n").encode())


def make_environments(
    env_id: str, num_envs: int, mode: AutoresetMode = AutoresetMode.SAME_STEP, *, evaluation: bool = False, **options
) -> VectorEnv:
    """Copies of a Gymnasium environment in one process; episodes restart in the step in which they end.

    Args:
        env_id: Registered id, also those of `fox_rl.envs`. `ALE/...-v5` needs `pip install ale-py` and is the C++ one:
            84 x 84 grey pixels, four frames stacked, four skipped, rewards clipped and a lost life an end in training.
        num_envs: Copies.
        mode: DISABLED for `EarlyStopVectorEnv`.
        evaluation: Atari only: whole games with their own rewards, of five minutes (18,000 frames) at most: a policy
            that never serves the ball would play for half an hour.
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
        spec = gym.spec(env_id)
        rules = {"episodic_life": not evaluation, "reward_clipping": not evaluation}
        rules |= {"max_num_frames_per_episode": 18_000} if evaluation else {}
        return ale_py.AtariVectorEnv(spec.kwargs["game"], num_envs, autoreset_mode=mode, **rules, **options)
    try:
        return gym.make_vec(env_id, num_envs, "sync", vector_kwargs={"autoreset_mode": mode}, **options)
    except gym.error.DependencyNotInstalled as error:
        raise ImportError(
            f"env_id {env_id} needs a package that is not here: pip install 'fox-transformers[rl-benchmarks]' has "
            f"those of MuJoCo and Box2D. Gymnasium says: {error}"
        ) from error


def play(
    act: Callable[[np.ndarray, np.ndarray], np.ndarray], env_id: str, episodes: int, *, seed: int = 1,
    video_dir: str = "", at_once: int = 1,
) -> list[float]:  # fmt: skip
    """Returns of episodes.

    Args:
        act: `(observation (n, ...), is_first (n,) bool)` to the actions `(n, ...)`, n environments at once.
        env_id: See `make_environments`.
        episodes: How many.
        seed: Of the first environment, the next has the next one.
        video_dir: Folder for a film of the first episode; of Atari, whose C++ environments do not render, what the
            policy sees.
        at_once: n. Each environment plays the same number of episodes, else short ones would count more often.
    """
    if min(at_once, episodes) < 1 or episodes % at_once:
        raise ValueError(f"episodes must be a multiple of at_once, both at least 1; got {episodes} and {at_once}.")
    options: dict[str, Any] = {"evaluation": True}
    films_pixels = bool(video_dir) and env_id.startswith("ALE/")
    frames: list[np.ndarray] = []
    if video_dir and not films_pixels:
        options |= {
            "render_mode": "rgb_array",
            "wrappers": [lambda env: gym.wrappers.RecordVideo(env, video_dir, episode_trigger=lambda i: i == 0)],
        }
    envs = make_environments(env_id, at_once, **options)
    returns: list[list[float]] = [[] for _ in range(at_once)]
    observation, is_first = envs.reset(seed=seed)[0], np.ones(at_once, dtype=bool)
    totals = np.zeros(at_once)
    while any(len(own) < episodes // at_once for own in returns):
        if films_pixels and not returns[0]:
            frames.append(observation[0, -1].copy())
        observation, reward, terminated, truncated, _ = envs.step(act(observation, is_first))
        totals += reward
        is_first = np.asarray(terminated | truncated)
        for env in np.flatnonzero(is_first):
            returns[env].append(float(totals[env]))
        totals[is_first] = 0.0
    envs.close()
    if frames:
        film(frames, Path(video_dir))
    return [x for own in returns for x in own[: episodes // at_once]]


def film(frames: list[np.ndarray], folder: Path, scale: int = 4) -> None:
    """Write grey frames `(H, W)` uint8 of every fourth sixtieth of a second to rl-video-episode-0.mp4, enlarged."""
    from gymnasium.utils.save_video import save_video

    pictures = [np.repeat(x.repeat(scale, 0).repeat(scale, 1)[..., None], 3, axis=-1) for x in frames]
    save_video(pictures, str(folder), episode_trigger=lambda _: True, fps=15)


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
    """Progress bar, metrics.jsonl, and a tracker.

    Args:
        folder: Where the files go; None shows the bar only.
        total: Environment steps of the whole run.
        start: Steps that are done.
        quiet: No bar, for tests and processes that are not the first.
        tracker: tensorboard (if it is installed), trackio or none.
        config: What a tracker shows as the settings of the run.
    """

    def __init__(
        self, folder: Path | None, total: int, start: int = 0, quiet: bool = False, *, tracker: str = "none",
        config: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.bar = tqdm(total=total, initial=start, unit="step", disable=quiet, file=sys.stderr)
        self.file = self.board = self.trackio = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        if tracker == "trackio":
            import trackio

            # The same name again is the same run: what follows the checkpoint is logged once more.
            self.trackio = trackio.init(project="fox_rl", name=folder.name, config=config, resume="allow", embed=False)
        elif tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            self.bar.write("tensorboard is not installed: metrics go to metrics.jsonl only.", file=sys.stderr)
        elif tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

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
        if self.trackio is not None:
            self.trackio.log(values, step=step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        """Flush and close everything."""
        self.bar.close()
        for open_one in (self.file, self.board):
            if open_one is not None:
                open_one.close()
        if self.trackio is not None:
            self.trackio.finish()


def _write_at_once(path: Path, data: bytes) -> None:
    """A file that is there whole, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_checkpoint(path: Path, envs: VectorEnv | None, **states: Any) -> None:
    """Write a resumable state in one visible step, with the random state and, if they can be pickled, environments."""
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    random_state = (random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpu)
    try:
        pickled = None if envs is None else cloudpickle.dumps(envs)
    except Exception as error:  # simulators in C raise whatever they like
        sys.stderr.write(f"environments cannot be saved ({error}): a resumed run will start them anew.\n")
        pickled = None
    buffer = io.BytesIO()
    torch.save({**states, "random": random_state, "envs": pickled}, buffer)
    _write_at_once(path, buffer.getvalue())


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
    if len(state[3]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state[3])


def command_of(options: RunOptions) -> str:
    """The command that repeats a run, without where it writes."""
    module = options.__class__.__module__
    if module == "__main__":
        module = sys.modules["__main__"].__spec__.name
    words = ["python", "-m", module]
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), field.name.replace("_", "-")
        if value == field.default or field.name in ("output_dir", "push_to_hub"):
            continue
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return shlex.join(words)


def write_card(
    folder: Path, title: str, options: RunOptions, returns: list[float], library: str, snippet: str, steps: int
) -> None:
    """README.md beside the saved model: the evaluation as a table, how to load it, and the command to repeat it.

    Args:
        folder: With config.json and model.safetensors.
        title: Name of the agent.
        options: Of the run.
        returns: Of evaluated episodes; none leaves the table out.
        library: `library_name` of the Hub.
        snippet: Python that loads the model from "USER/NAME" or this folder.
        steps: Environment steps of the training.
    """
    env_id = options.env_id
    metadata, table = "", "Not evaluated.\n"
    if returns:
        mean, deviation = float(np.mean(returns)), float(np.std(returns))
        table = f"""| environment | episodes | mean return | standard deviation |
| --- | --- | --- | --- |
| {env_id} | {len(returns)} | {mean:.2f} | {deviation:.2f} |
"""
        metadata = f"""model-index:
  - name: {title}
    results:
      - task: {{type: reinforcement-learning}}
        dataset: {{name: {env_id}, type: {env_id}}}
        metrics: [{{type: mean_reward, value: "{mean:.2f} +/- {deviation:.2f}"}}]
"""
    text = f"""---
library_name: {library}
pipeline_tag: reinforcement-learning
tags: [reinforcement-learning, {env_id.replace("/", "-")}, fox-transformers]
{metadata}---
# {title} on {env_id}

{table}
One seed, {steps:,} environment steps; evaluated without exploration. Trained with
`{command_of(options)}`.

```python
{snippet.format(where=options.push_to_hub or folder)}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
