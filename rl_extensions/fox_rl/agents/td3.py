"""TD3 (arXiv:1802.09477), alone, with LEAST (arXiv:2506.13672), or with the random resets that LEAST has to beat.

    python -m fox_rl.agents.td3 --env-id Pendulum-v1 --total-steps 20000
    python -m fox_rl.agents.td3 --env-id HalfCheetah-v5 --stop least
    python -m fox_rl.agents.td3 --env-id HalfCheetah-v5 --stop random --mean-length 400

The mean length of the control is that of a LEAST run, which the log has as `episode_length`. Writes metrics.jsonl,
tensorboard/, checkpoint_0.pt and at the end actor.pt under --output-dir; with the same folder it goes on.
One process: with a replay buffer a second one would only repeat the first.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from fox_rl.learn_to_stop import EarlyStopVectorEnv, LearnToStop, RandomResetControl, StopNoise, hazard_for
from fox_rl.networks import MultiSkipMLP
from fox_rl.returns import td_target
from fox_training.optimizers import build_optimizer
from fox_training.sparsity import MaskedPruner, SparsityConfig

from . import common
from .common import option


@dataclass
class Options:
    """Options of the command line."""

    env_id: str = option("HalfCheetah-v5", "Gymnasium id with vector observations and bounded actions")
    total_steps: int = option(300_000, "environment steps")
    num_envs: int = option(1, "environments; one update for each of their steps")
    start_steps: int = option(5_000, "steps with random actions before the first update")
    batch_size: int = option(256, "transitions of an update")
    buffer_size: int = option(1_000_000, "transitions kept")
    learning_rate: float = option(3e-4, "of Adam without decay; kron takes a third")
    optimizer: str = option("adamw", "adamw, radam or kron")
    discount: float = option(0.99, "gamma")
    target_rate: float = option(0.005, "tau of the target networks")
    exploration: float = option(0.1, "deviation of the noise on actions in [-1, 1]")
    target_noise: float = option(0.2, "the same for the target, cut off at 0.5")
    policy_delay: int = option(2, "critic updates for one of the actor")
    width: int = option(256, "of the hidden layers")
    blocks: int = option(0, "residual blocks of actor and critics; 0 = the two hidden layers of the paper")
    stop: str = option("none", "none, least or random")
    stop_start: float = option(0.1, "share of the steps before the first stop")
    omega_scale: float = option(0.45, "least: leniency, 0.3 to 0.6 published")
    noise_max: float = option(0.3, "least: largest deviation of the noise when many episodes are stopped early")
    mean_length: float = option(400.0, "random: mean episode length to match")
    final_sparsity: float = option(0.0, "share of the weights of actor and critics pruned during training")
    seed: int = option(0, "of everything")
    output_dir: str = option("", "folder of the run; empty writes nothing")
    log_every: int = option(1_000, "environment steps between log lines")
    checkpoint_every: int = option(50_000, "environment steps between checkpoints")


class Critics(nn.Module):
    """Two action values, `(2, B)`."""

    def __init__(self, observation_size: int, action_size: int, width: int, blocks: int):
        super().__init__()
        self.nets = nn.ModuleList(network(observation_size + action_size, 1, width, blocks) for _ in range(2))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([observation, action], dim=-1)
        return torch.stack([net(x).squeeze(-1) for net in self.nets])


def network(in_dim: int, out_dim: int, width: int, blocks: int) -> nn.Module:
    """Two hidden layers, or a multi-skip MLP."""
    if blocks > 0:
        return nn.Sequential(MultiSkipMLP(in_dim, width, width, blocks), nn.ReLU(), nn.Linear(width, out_dim))
    return nn.Sequential(
        nn.Linear(in_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out_dim)
    )


class Replay:
    """The last transitions as tensors; `terminated`, not `ended`: truncated ones bootstrap."""

    def __init__(self, capacity: int, observation_size: int, action_size: int):
        self.capacity, self.size, self.next = capacity, 0, 0
        self.data = {
            "observation": torch.zeros(capacity, observation_size), "action": torch.zeros(capacity, action_size),
            "reward": torch.zeros(capacity), "following": torch.zeros(capacity, observation_size),
            "terminated": torch.zeros(capacity, dtype=torch.bool),
        }  # fmt: skip

    def add(self, **rows: np.ndarray) -> None:
        """Append one transition of every environment."""
        count = len(rows["reward"])
        places = (self.next + np.arange(count)) % self.capacity
        for name, values in rows.items():
            self.data[name][places] = torch.as_tensor(np.asarray(values)).to(self.data[name].dtype)
        self.next = int(places[-1] + 1) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def sample(self, count: int) -> dict[str, Tensor]:
        """Transitions drawn uniformly."""
        chosen = torch.randint(self.size, (count,))
        return {name: values[chosen] for name, values in self.data.items()}

    def state(self) -> dict:
        """What is filled of the buffer."""
        filled = {name: values[: self.size].clone() for name, values in self.data.items()}
        return {"data": filled, "size": self.size, "next": self.next}

    def load(self, state: dict) -> None:
        """Inverse of `state`."""
        self.size, self.next = state["size"], state["next"]
        for name, values in state["data"].items():
            self.data[name][: self.size] = values


class Agent:
    """Environments, networks, replay and stopper."""

    def __init__(self, options: Options):
        common.check_positive(options, "num_envs", "batch_size", "policy_delay", "log_every", "checkpoint_every")
        if options.stop not in ("none", "least", "random"):
            raise ValueError(f"stop must be none, least or random; got {options.stop!r}.")
        common.check_optimizer(options)
        self.options = options
        common.seed_everything(options.seed)
        plain = common.make_environments(options.env_id, options.num_envs, AutoresetMode.DISABLED)
        space = plain.single_action_space
        if not isinstance(space, gym.spaces.Box) or not np.isfinite(space.high).all():
            raise ValueError(f"env_id must have bounded continuous actions; got {space}. For discrete ones see pqn.")
        self.middle, self.half = (space.high + space.low) / 2, (space.high - space.low) / 2
        sizes = plain.single_observation_space.shape[0], space.shape[0]
        self.horizon = plain.spec.max_episode_steps or 1000
        self.actor = network(*sizes, options.width, options.blocks)
        self.critics = Critics(*sizes, options.width, options.blocks)
        self.target_actor, self.target_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.actor_optimizer, self.critic_optimizer = (
            build_optimizer(options.optimizer, module.parameters(), options.learning_rate)
            for module in (self.actor, self.critics)
        )
        self.replay = Replay(min(options.buffer_size, options.total_steps), *sizes)
        self.stopper = build_stopper(options, self.horizon)
        self.noise = StopNoise(options.exploration, max(options.exploration, options.noise_max), self.horizon // 4)
        self.envs = EarlyStopVectorEnv(plain, self.stopper, self.value_and_loss)
        self.meter = common.EpisodeMeter(options.num_envs)
        self.step = self.num_updates = 0
        self.pruners = build_pruners(self)
        self.observation = self.envs.reset(seed=options.seed)[0]

    def value_and_loss(self, observation, action, reward, following, terminated):
        """For the stopper: value of what was done, and the squared error of the critic on it."""
        if isinstance(self.stopper, RandomResetControl):
            return np.zeros(len(reward)), np.zeros(len(reward))
        tensors = [torch.as_tensor(np.asarray(x), dtype=torch.float32) for x in (observation, reward, following)]
        scaled = torch.as_tensor((np.asarray(action) - self.middle) / self.half, dtype=torch.float32)
        with torch.no_grad():
            value = self.critics(tensors[0], scaled).amin(dim=0)
            target = self.target_critics(tensors[2], self.target_actor(tensors[2]).tanh()).amin(dim=0)
            target = td_target(tensors[1], target, torch.as_tensor(terminated), self.options.discount)
        return value.numpy(), (target - value).square().numpy()

    def act(self) -> np.ndarray:
        """Actions in [-1, 1], with exploration."""
        options = self.options
        if self.step < options.start_steps:
            return np.random.uniform(-1, 1, (options.num_envs, len(self.half)))
        with torch.no_grad():
            action = self.actor(torch.as_tensor(self.observation, dtype=torch.float32)).tanh().numpy()
        sigma = self.noise.sigma(self.stopper.stopped_at) if options.stop == "least" else options.exploration
        return np.clip(action + np.random.normal(0, sigma, action.shape), -1, 1)

    def state(self) -> dict:
        """Everything besides the environments that a resumed run needs."""
        modules = {name: getattr(self, name).state_dict() for name in _MODULES}
        return {
            "modules": modules, "replay": self.replay.state(), "stopper": self.stopper.state_dict(),
            "pruners": {name: pruner.state_dict() for name, pruner in self.pruners.items()}, "meter": self.meter,
            "step": self.step, "num_updates": self.num_updates, "observation": self.observation,
            "step_index": self.envs._step_index, "options": asdict(self.options),
        }  # fmt: skip

    def load(self, state: dict) -> None:
        """Inverse of `state`."""
        for name in _MODULES:
            getattr(self, name).load_state_dict(state["modules"][name])
        for name, pruner in self.pruners.items():
            pruner.load_state_dict(state["pruners"][name])
        self.replay.load(state["replay"])
        self.stopper.load_state_dict(state["stopper"])
        self.meter, self.step, self.num_updates = state["meter"], state["step"], state["num_updates"]
        if state["envs"] is not None:
            self.envs.env, self.observation = state["envs"], state["observation"]
            self.envs._observation, self.envs._step_index = state["observation"], state["step_index"]
        common.restore_random(state["random"])


_MODULES = ("actor", "critics", "target_actor", "target_critics", "actor_optimizer", "critic_optimizer")


def build_stopper(options: Options, horizon: int) -> LearnToStop | RandomResetControl:
    """LEAST, random resets, or random resets that never come."""
    start = round(options.stop_start * options.total_steps)
    if options.stop == "least":
        return LearnToStop(
            options.num_envs, horizon, start_step=start, omega_scale=options.omega_scale, seed=options.seed
        )
    hazard = hazard_for(options.mean_length, horizon) if options.stop == "random" else 0.0
    return RandomResetControl(options.num_envs, hazard, start_step=start, seed=options.seed)


def build_pruners(agent: Agent) -> dict[str, MaskedPruner]:
    """One pruner for each optimizer; {} for dense networks."""
    options = agent.options
    if options.final_sparsity == 0:
        return {}
    config = SparsityConfig(final_sparsity=options.final_sparsity)
    steps = max(1, options.total_steps - options.start_steps)
    return {
        "actor": MaskedPruner(agent.actor, config, max(1, steps // options.policy_delay)),
        "critics": MaskedPruner(agent.critics, config, steps),
    }


def learn(agent: Agent) -> float:
    """One update of the critics, and every `policy_delay` of them one of the actor and the targets."""
    options, batch = agent.options, agent.replay.sample(agent.options.batch_size)
    with torch.no_grad():
        noise = (torch.randn_like(batch["action"]) * options.target_noise).clamp(-0.5, 0.5)
        action = (agent.target_actor(batch["following"]).tanh() + noise).clamp(-1, 1)
        value = agent.target_critics(batch["following"], action).amin(dim=0)
        target = td_target(batch["reward"], value, batch["terminated"], options.discount)
    loss = (agent.critics(batch["observation"], batch["action"]) - target).square().mean(dim=1).sum()
    agent.critic_optimizer.zero_grad()
    loss.backward()
    agent.critic_optimizer.step()
    agent.num_updates += 1
    if agent.num_updates % options.policy_delay == 0:
        observation = batch["observation"]
        policy_loss = -agent.critics(observation, agent.actor(observation).tanh())[0].mean()
        agent.actor_optimizer.zero_grad()
        policy_loss.backward()
        agent.actor_optimizer.step()
        with torch.no_grad():
            for slow, fast in ((agent.target_actor, agent.actor), (agent.target_critics, agent.critics)):
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), options.target_rate)
        for name, pruner in agent.pruners.items():
            pruner.apply_to(agent.target_actor if name == "actor" else agent.target_critics)
    return loss.item()


def train(options: Options, quiet: bool = False) -> Agent:
    """Train, or go on from the checkpoint in `options.output_dir`; returns the agent."""
    agent = Agent(options)
    folder = Path(options.output_dir) if options.output_dir else None
    checkpoint = None if folder is None else folder / "checkpoint_0.pt"
    state = None if checkpoint is None else common.load_checkpoint(checkpoint)
    if state is not None:
        agent.load(state)
    for name, pruner in agent.pruners.items():
        pruner.attach(agent.actor_optimizer if name == "actor" else agent.critic_optimizer)
    loss = 0.0
    with common.Log(folder, options.total_steps, agent.step, quiet) as log:
        while agent.step < options.total_steps:
            loss = advance(agent, loss)
            if agent.step % options.log_every < options.num_envs:
                lengths = agent.meter.finished_lengths
                log.write(
                    agent.step, episode_return=agent.meter.mean, loss=loss, num_stopped=agent.stopper.num_stopped,
                    episode_length=float(np.mean(lengths)) if lengths else 0.0,
                )  # fmt: skip
            is_due = agent.step % options.checkpoint_every < options.num_envs or agent.step >= options.total_steps
            if checkpoint is not None and is_due:
                common.save_checkpoint(checkpoint, agent.envs.env, **agent.state())
    if folder is not None:
        torch.save(agent.actor.state_dict(), folder / "actor.pt")
    agent.envs.close()
    return agent


def advance(agent: Agent, loss: float) -> float:
    """One step of all environments and as many updates; returns the last loss."""
    options, action = agent.options, agent.act()
    following, reward, terminated, truncated, info = agent.envs.step(agent.middle + agent.half * action)
    ended = terminated | truncated
    states = common.true_following(following, info, ended)
    agent.replay.add(
        observation=agent.observation, action=action, reward=reward, following=states, terminated=terminated
    )
    agent.meter.update(reward, ended)
    agent.observation = following
    agent.step += options.num_envs
    if agent.step >= options.start_steps:
        for _ in range(options.num_envs):
            loss = learn(agent)
    return loss


def evaluate(agent: Agent, episodes: int, seed: int = 1) -> list[float]:
    """Returns of episodes without noise and without stops."""
    env, returns = gym.make(agent.options.env_id), []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        total, ended = 0.0, False
        while not ended:
            with torch.no_grad():
                action = agent.actor(torch.as_tensor(observation, dtype=torch.float32)).tanh().numpy()
            observation, reward, terminated, truncated, _ = env.step(agent.middle + agent.half * action)
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    return returns


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    agent = train(common.options_from_command_line(Options, __doc__, argv))
    returns = evaluate(agent, 10)
    sys.stdout.write(f"10 episodes without noise: {np.mean(returns):.1f}; {agent.stopper.num_stopped} were stopped\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
