"""What TD3 and SAC share: options, replay, early stopping, and one update for each environment step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from fox_rl.continuous import ActorCritic
from fox_rl.diagnostics import gradient_norms
from fox_rl.learn_to_stop import EarlyStopVectorEnv, LearnToStop, RandomResetControl, StopNoise, hazard_for
from fox_rl.replay import Replay
from fox_rl.returns import td_target
from fox_training.optimizers import build_optimizer

from . import common, training
from .common import option


@dataclass
class ContinuousOptions(common.RunOptions):
    """Options of TD3 and SAC."""

    env_id: str = option("HalfCheetah-v5", "Gymnasium id with vector observations and bounded actions")
    num_envs: int = option(1, "environments; one update for each of their steps")
    total_steps: int = option(300_000, "environment steps")
    learning_rate: float = option(3e-4, "of Adam without decay; kron takes a third")
    device: str = option("cpu", "auto: a GPU if there is one; cpu, which is faster for networks of this size")
    log_every: int = option(1_000, "environment steps between log lines")
    start_steps: int = option(5_000, "steps with random actions before the first update")
    batch_size: int = option(256, "transitions of an update")
    buffer_size: int = option(1_000_000, "transitions kept")
    discount: float = option(0.99, "gamma")
    target_rate: float = option(0.005, "tau of the target networks")
    width: int = option(256, "of the hidden layers")
    blocks: int = option(0, "residual blocks of actor and critics; 0 = the two hidden layers of the papers")
    skip: str = option("multi", "multi, residual or none, with blocks above 0")
    stop: str = option("none", "none, least or random")
    stop_start: float = option(0.1, "share of the steps before the first stop")
    omega_scale: float = option(0.45, "least: leniency, 0.3 to 0.6 published")
    noise_max: float = option(0.3, "least: largest deviation of the noise when many episodes are stopped early")
    mean_length: float = option(400.0, "random: mean episode length to match, where none ends by itself")


class ContinuousAgent(training.Agent):
    """Environments, networks, replay and stopper; TD3 and SAC add how they act and learn."""

    library = "pytorch"
    snippet = (
        "from fox_rl.continuous import ActorCritic\n\n"
        'networks = ActorCritic.from_pretrained("{where}")\naction = networks.act(observation)'
    )
    modules = ("network", "target_critics", "actor_optimizer", "critic_optimizer", "replay", "stopper")
    values = ("meter", "step", "observation", "num_updates")
    stochastic = False

    def __init__(self, options: ContinuousOptions, accelerator: Accelerator | None = None):
        super().__init__(options, accelerator)
        self.refuse_processes()
        common.check_positive(options, "batch_size")
        if options.stop not in ("none", "least", "random"):
            raise ValueError(f"stop must be none, least or random; got {options.stop!r}.")
        plain = common.make_environments(options.env_id, options.num_envs, AutoresetMode.DISABLED)
        self.network = ActorCritic.for_spaces(
            plain.single_observation_space, plain.single_action_space, stochastic=self.stochastic, width=options.width,
            blocks=options.blocks, skip=options.skip,
        ).to(self.device)  # fmt: skip
        self.actor, self.critics = self.network.actor, self.network.critics
        self.target_critics = frozen_copy(self.critics)
        self.actor_optimizer, self.critic_optimizer = (
            build_optimizer(options.optimizer, module.parameters(), options.learning_rate)
            for module in (self.actor, self.critics)
        )
        self.horizon = (plain.spec and plain.spec.max_episode_steps) or 1000
        self.replay = Replay(min(options.buffer_size, options.total_steps))
        self.stopper = build_stopper(options, self.horizon)
        low = getattr(options, "exploration", 0.0)
        self.noise = StopNoise(low, max(low, options.noise_max), max(1, self.horizon // 4))
        self.envs = EarlyStopVectorEnv(plain, self.stopper, self.value_and_loss)
        self.num_updates = 0
        self.observation = self.envs.reset(seed=self.seed_process())[0]

    def explore(self) -> np.ndarray:
        """Actions in [-1, 1] with exploration, `(n, A)`."""
        raise NotImplementedError

    def learn(self) -> dict[str, float]:
        """One update from the replay buffer."""
        raise NotImplementedError

    def following_value(self, observation: Tensor) -> Tensor:
        """Value that the target takes for these states, `(B,)`."""
        raise NotImplementedError

    def tensor(self, values: Any) -> Tensor:
        """float32 on the device."""
        return torch.as_tensor(np.asarray(values), dtype=torch.float32, device=self.device)

    def value_and_loss(self, observation, action, reward, following, terminated):
        """For LEAST: value of what was done, and the squared error of the critic on it."""
        if isinstance(self.stopper, RandomResetControl):
            return np.zeros(len(reward)), np.zeros(len(reward))
        with torch.no_grad():
            value = self.critics(self.tensor(observation), self.tensor(self.network.unscale(action))).amin(dim=0)
            target = td_target(
                self.tensor(reward), self.following_value(self.tensor(following)),
                torch.as_tensor(terminated, device=self.device), self.options.discount,
            )  # fmt: skip
        return value.cpu().numpy(), (target - value).square().cpu().numpy()

    def noise_deviation(self) -> float:
        """Of the noise on actions: more where LEAST stops many episodes early."""
        return self.noise.sigma(self.stopper.stopped_at) if self.options.stop == "least" else self.noise.low

    def advance(self) -> dict[str, float]:
        """One step of all environments and as many updates."""
        options = self.options
        if self.step < options.start_steps:
            action = np.random.uniform(-1, 1, (options.num_envs, len(self.network.low)))
        else:
            action = self.explore()
        following, reward, terminated, truncated, info = self.envs.step(self.network.scale(action))
        ended = terminated | truncated
        states = common.true_following(following, info, ended)
        self.replay.add(
            observation=self.observation, action=action, reward=reward, following=states, terminated=terminated
        )
        self.meter.update(reward, ended)
        self.observation = following
        self.step += options.num_envs
        values = {"num_stopped": self.stopper.num_stopped, "saved_steps": self.envs.saved_steps}
        if self.meter.finished_lengths:
            values["episode_length"] = float(np.mean(self.meter.finished_lengths))
        if self.step >= options.start_steps:
            for _ in range(options.num_envs):
                losses = self.learn()
            values |= losses
        return values

    def batch(self) -> dict[str, Tensor]:
        """Transitions of an update, on the device."""
        return {name: x.to(self.device) for name, x in self.replay.sample(self.options.batch_size).items()}

    def polyak(self, *pairs: tuple[nn.Module, nn.Module, str]) -> None:
        """Move targets towards `(target, online, name of the pruner)`; what is pruned stays zero."""
        with torch.no_grad():
            for slow, fast, name in pairs:
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), self.options.target_rate)
                if name in self.pruners:
                    self.pruners[name].apply_to(slow)

    def choose(self, observation: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Actions without exploration."""
        return self.network.act(observation)

    def diagnose(self) -> dict[str, float]:
        """Gradients of the last update of the critics, their dormant units, and the rank of their features."""
        if self.num_updates == 0:
            return {}
        first, *_, last = gradient_norms(self.critics.nets[0]).values()
        data = {
            name: x.to(self.device) for name, x in self.replay.rows(torch.arange(min(256, self.replay.size))).items()
        }
        inputs = torch.cat([data["observation"], data["action"]], dim=-1)
        net = self.critics.nets[0]
        return {"grad_first": first, "grad_last": last} | training.trunk_diagnostics(net, lambda: net[:-1](inputs))

    def plain_environments(self) -> Any:
        """Without the stopper, which is saved by itself."""
        return self.envs.env, self.envs._step_index, self.envs.saved_steps

    def restore_environments(self, envs: Any | None) -> None:
        """As in `Agent`."""
        if envs is None:
            self.observation = self.envs.reset()[0]
            return
        self.envs.env, self.envs._step_index, self.envs.saved_steps = envs
        self.envs._observation = self.observation


def frozen_copy(module: nn.Module) -> nn.Module:
    """A target network: a copy that no optimizer moves."""
    return copy.deepcopy(module).requires_grad_(False)


def actor_step(agent: ContinuousAgent, loss: Tensor) -> None:
    """One step of the actor; the critics keep the gradients of their own loss."""
    gradients = torch.autograd.grad(loss, list(agent.actor.parameters()))
    for parameter, gradient in zip(agent.actor.parameters(), gradients, strict=True):
        parameter.grad = gradient
    agent.actor_optimizer.step()


def build_stopper(options: ContinuousOptions, horizon: int) -> LearnToStop | RandomResetControl:
    """LEAST, random resets, or random resets that never come."""
    start = round(options.stop_start * options.total_steps)
    if options.stop == "least":
        return LearnToStop(
            options.num_envs, horizon, start_step=start, omega_scale=options.omega_scale, seed=options.seed
        )
    hazard = hazard_for(options.mean_length, horizon) if options.stop == "random" else 0.0
    return RandomResetControl(options.num_envs, hazard, start_step=start, seed=options.seed)
