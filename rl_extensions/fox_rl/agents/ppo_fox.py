"""PPO (arXiv:1707.06347) with a memory of forgetting attention.

One process:        python -m fox_rl.agents.ppo_fox --env-id fox_rl/RepeatFirst-v0
Several processes:  accelerate launch -m fox_rl.agents.ppo_fox --env-id fox_rl/RepeatFirst-v0

The policy acts with a cache of bounded size and learns from whole windows, in which episodes are kept apart by closed
gates. What an episode did before the window is given to it again as `--context-steps` observations without loss.
Writes metrics.jsonl, tensorboard/, checkpoint.pt and at the end model/ under --output-dir; started again with the same
folder it goes on from the checkpoint.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fox_rl.policy import FoxPolicyConfig, FoxPolicyModel
from fox_rl.returns import gae
from fox_training.optimizers import build_optimizer
from fox_training.sparsity import MaskedPruner, SparsityConfig

from . import common
from .common import option


@dataclass
class Options:
    """Options of the command line."""

    env_id: str = option("fox_rl/RepeatFirst-v0", "Gymnasium id; discrete, vector or 84 x 84 pixel observations")
    num_envs: int = option(32, "environments of each process")
    total_steps: int = option(133_120, "environment steps over all processes")
    window: int = option(52, "steps of each environment between two updates")
    context_steps: int = option(0, "steps before the window that the policy reads again, without loss")
    learning_rate: float = option(1e-3, "of AdamW, falls to 0 in a line; kron takes a third, see fox_training")
    optimizer: str = option("adamw", "adamw, radam or kron")
    discount: float = option(0.99, "gamma")
    gae_decay: float = option(0.95, "lambda")
    epochs: int = option(4, "passes over a window")
    minibatches: int = option(4, "updates of a pass, over whole environments")
    clip: float = option(0.2, "largest change of a probability ratio")
    entropy_bonus: float = option(0.01, "weight of the entropy")
    value_weight: float = option(0.5, "weight of the value loss")
    max_grad_norm: float = option(0.5, "gradient norm is clipped here")
    hidden_size: int = option(64, "width of the policy")
    num_layers: int = option(2, "layers of the policy")
    num_heads: int = option(4, "attention heads")
    longest_memory: float = option(128.0, "decay time of the slowest head at the start, in steps")
    final_sparsity: float = option(0.0, "share of the weights pruned during training, see fox_training.sparsity")
    seed: int = option(0, "of everything")
    output_dir: str = option("", "folder of the run; empty writes nothing")
    checkpoint_every: int = option(20, "updates between checkpoints")
    eval_episodes: int = option(0, "episodes of a greedy evaluation at the end, with a model card")


@dataclass
class Rollout:
    """One window of all environments, `(n, context + window)` unless said otherwise."""

    observation: Tensor  # (n, C + T, ...)
    is_init: Tensor
    action: Tensor  # (n, T) or (n, T, A), as the rest
    log_prob: Tensor
    advantage: Tensor
    target: Tensor


def build_policy(envs: gym.vector.VectorEnv, options: Options) -> FoxPolicyModel:
    """The policy that fits the spaces of the environments."""
    observation, action = envs.single_observation_space, envs.single_action_space
    if isinstance(observation, gym.spaces.Discrete):
        kind, size = "discrete", int(observation.n)
    elif len(observation.shape) == 3:
        kind, size = "pixels", observation.shape[0]
    elif len(observation.shape) == 1:
        kind, size = "vector", observation.shape[0]
    else:
        raise ValueError(f"env_id must have discrete, vector or pixel observations; got {observation}.")
    is_discrete = isinstance(action, gym.spaces.Discrete)
    config = FoxPolicyConfig(
        observation_type=kind,
        observation_size=size,
        action_type="discrete" if is_discrete else "continuous",
        action_size=int(action.n) if is_discrete else action.shape[0],
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        fgate_decay_time_max=options.longest_memory,
    )
    return FoxPolicyModel(config)


class Agent:
    """Environments, policy and optimizer of one process, from the start or from a checkpoint."""

    def __init__(self, options: Options, accelerator: Accelerator):
        common.check_positive(options, "num_envs", "window", "epochs", "minibatches", "checkpoint_every")
        if options.num_envs % options.minibatches:
            raise ValueError(
                f"num_envs must be a multiple of minibatches {options.minibatches}; got {options.num_envs}."
            )
        common.check_optimizer(options)
        self.options, self.accelerator = options, accelerator
        # The weights are the same in all processes, everything after them is not.
        common.seed_everything(options.seed)
        self.envs = common.make_environments(options.env_id, options.num_envs)
        self.policy = build_policy(self.envs, options)
        optimizer = build_optimizer(options.optimizer, self.policy.parameters(), options.learning_rate, eps=1e-5) if (
            options.optimizer != "kron"
        ) else build_optimizer("kron", self.policy.parameters(), options.learning_rate)  # fmt: skip
        self.model, self.optimizer = accelerator.prepare(self.policy, optimizer)
        self.peak_learning_rate = self.optimizer.param_groups[0]["lr"]
        seed = options.seed + 1 + accelerator.process_index
        common.seed_everything(seed)
        self.steps_per_update = options.num_envs * options.window * accelerator.num_processes
        self.num_updates = max(1, options.total_steps // self.steps_per_update)
        self.pruner = None
        if options.final_sparsity > 0:
            steps = self.num_updates * options.epochs * options.minibatches
            self.pruner = MaskedPruner(self.policy, SparsityConfig(final_sparsity=options.final_sparsity), steps)
        self.meter = common.EpisodeMeter(options.num_envs)
        self.update = 0
        self.observation = torch.as_tensor(self.envs.reset(seed=seed)[0])
        self.is_init = torch.ones(options.num_envs, dtype=torch.bool)
        self.context: tuple[list[Tensor], list[Tensor]] = ([], [])

    def state(self) -> dict:
        """Everything besides the environments that a resumed run needs."""
        names = ("meter", "update", "observation", "is_init", "context")
        return {name: getattr(self, name) for name in names} | {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "options": asdict(self.options),
        }

    def load(self, state: dict) -> None:
        """Inverse of `state`."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        for name in ("meter", "update", "observation", "is_init", "context"):
            setattr(self, name, state[name])
        if state["envs"] is not None:
            self.envs = state["envs"]
        else:
            self.observation, self.is_init = torch.as_tensor(self.envs.reset()[0]), torch.ones_like(self.is_init)
            self.context = ([], [])
        common.restore_random(state["random"])

    def set_learning_rate(self) -> None:
        """Linear decay over the updates: a policy that has learned must not be shaken off it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_learning_rate * (1.0 - self.update / self.num_updates)

    def act(self, cache, observation: Tensor, is_init: Tensor):
        """`policy.act` in eval mode and on the device."""
        device = self.accelerator.device
        return [x.cpu() for x in self.policy.act(observation.to(device), is_init.to(device), cache)]


def collect(agent: Agent) -> Rollout:
    """Play one window; the weights do not change meanwhile, so one cache serves all of it."""
    options, rows = agent.options, []
    agent.policy.eval()
    cache = agent.policy.new_cache()
    before = [torch.stack(x, dim=1) for x in agent.context if x]
    for t in range(len(agent.context[0])):
        agent.act(cache, before[0][:, t], before[1][:, t])
    last_step = None
    for _ in range(options.window):
        action, log_prob, value = agent.act(cache, agent.observation, agent.is_init)
        if last_step is not None:
            # The value of the state after the step before, unless its episode ended there.
            last_step["value_tp1"] = torch.where(last_step["ended"], last_step["value_tp1"], value)
        following, reward, terminated, truncated, info = agent.envs.step(action.numpy())
        ended = terminated | truncated
        row = {
            "observation": agent.observation, "is_init": agent.is_init, "action": action, "log_prob": log_prob,
            "value": value, "reward": torch.as_tensor(reward).float(), "terminated": torch.as_tensor(terminated),
            "ended": torch.as_tensor(ended), "value_tp1": torch.zeros_like(value),
        }  # fmt: skip
        if (truncated & ~terminated).any():
            row["value_tp1"] = peek_value(agent, cache, following, info, ended)
        rows.append(row)
        last_step = row
        agent.meter.update(reward, ended)
        agent.observation, agent.is_init = torch.as_tensor(following), torch.as_tensor(ended)
    final = peek_value(agent, cache, agent.observation.numpy(), {}, np.zeros(options.num_envs, dtype=bool))
    last_step["value_tp1"] = torch.where(last_step["ended"], last_step["value_tp1"], final)
    return pack(agent, rows)


def peek_value(agent: Agent, cache, following: np.ndarray, info: dict, ended: np.ndarray) -> Tensor:
    """Values of the states that an action led to, from a copy of the cache: they are not part of the rollout yet."""
    states = torch.as_tensor(common.true_following(following, info, ended))
    return agent.act(copy.deepcopy(cache), states, torch.zeros(len(states), dtype=torch.bool))[2]


def pack(agent: Agent, rows: list[dict[str, Tensor]]) -> Rollout:
    """Advantages, and the context before the window; keeps what the next window needs as context."""
    options = agent.options
    time_major = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    advantage = gae(
        time_major["reward"], time_major["value"], time_major["value_tp1"], time_major["terminated"],
        time_major["ended"], discount=options.discount, decay=options.gae_decay,
    )  # fmt: skip
    window = {name: x.transpose(0, 1) for name, x in time_major.items()}
    observation, is_init = [*agent.context[0], *time_major["observation"]], [*agent.context[1], *time_major["is_init"]]
    rollout = Rollout(
        observation=torch.stack(observation, dim=1),
        is_init=torch.stack(is_init, dim=1),
        action=window["action"],
        log_prob=window["log_prob"],
        advantage=advantage.transpose(0, 1),
        target=(advantage + time_major["value"]).transpose(0, 1),
    )
    kept = options.context_steps
    agent.context = (observation[len(observation) - kept :], is_init[len(is_init) - kept :])
    return rollout


def learn(agent: Agent, rollout: Rollout) -> dict[str, float]:
    """Some epochs of the clipped objective over minibatches of whole environments."""
    options, device, losses = agent.options, agent.accelerator.device, []
    agent.policy.train()
    size = options.num_envs // options.minibatches
    for _ in range(options.epochs):
        for chosen in torch.randperm(options.num_envs).split(size):
            batch = {name: value[chosen].to(device) for name, value in vars(rollout).items()}
            loss, parts = objective(agent, **batch)
            agent.accelerator.backward(loss)
            agent.accelerator.clip_grad_norm_(agent.policy.parameters(), options.max_grad_norm)
            agent.optimizer.step()
            agent.optimizer.zero_grad()
            losses.append(parts)
    return {name: float(np.mean([x[name] for x in losses])) for name in losses[0]}


def objective(agent: Agent, observation, is_init, action, log_prob, advantage, target) -> tuple[Tensor, dict]:
    """Clipped policy loss, value loss and entropy of a minibatch; the context in front has no loss."""
    options, steps = agent.options, action.shape[1]
    outputs = agent.model(observation, is_init)
    outputs.logits, outputs.value = outputs.logits[:, -steps:], outputs.value[:, -steps:]
    distribution = outputs.distribution()
    ratio = (distribution.log_prob(action) - log_prob).exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - options.clip, 1 + options.clip) * advantage).mean()
    value_loss = 0.5 * (outputs.value - target).square().mean()
    entropy = distribution.entropy().mean()
    loss = policy_loss + options.value_weight * value_loss - options.entropy_bonus * entropy
    return loss, {"policy_loss": policy_loss.item(), "value_loss": value_loss.item(), "entropy": entropy.item()}


def evaluate(policy: FoxPolicyModel, env_id: str, episodes: int, seed: int = 1) -> list[float]:
    """Returns of greedy episodes, one after the other."""
    envs, returns = common.make_environments(env_id, 1), []
    policy.eval()
    cache, observation = policy.new_cache(), envs.reset(seed=seed)[0]
    is_init, total = torch.ones(1, dtype=torch.bool), 0.0
    while len(returns) < episodes:
        observation = torch.as_tensor(observation).to(policy.device)
        action, _, _ = policy.act(observation, is_init.to(policy.device), cache, deterministic=True)
        observation, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
        total += float(reward[0])
        is_init = torch.as_tensor(terminated | truncated)
        if is_init[0]:
            returns.append(total)
            total = 0.0
    envs.close()
    return returns


def train(options: Options, quiet: bool = False) -> Agent:
    """Train, or go on from the checkpoint in `options.output_dir`; returns the agent."""
    accelerator = Accelerator()
    agent = Agent(options, accelerator)
    folder = Path(options.output_dir) if options.output_dir else None
    checkpoint = None if folder is None else folder / f"checkpoint_{accelerator.process_index}.pt"
    state = None if checkpoint is None else common.load_checkpoint(checkpoint)
    if state is not None:
        agent.load(state)
    if agent.pruner is not None:
        agent.pruner.attach(agent.optimizer)
    is_main = accelerator.is_main_process
    done = agent.update * agent.steps_per_update
    with common.Log(folder if is_main else None, options.total_steps, done, quiet or not is_main) as log:
        while agent.update < agent.num_updates:
            agent.set_learning_rate()
            losses = learn(agent, collect(agent))
            agent.update += 1
            sparsity = {} if agent.pruner is None else {"sparsity": agent.pruner.sparsity()}
            log.write(agent.update * agent.steps_per_update, episode_return=agent.meter.mean, **losses, **sparsity)
            is_last = agent.update == agent.num_updates
            if checkpoint is not None and (is_last or agent.update % options.checkpoint_every == 0):
                common.save_checkpoint(checkpoint, agent.envs, **agent.state())
    if is_main and folder is not None:
        agent.policy.save_pretrained(folder / "model")
        if options.eval_episodes:
            returns = evaluate(agent.policy, options.env_id, options.eval_episodes)
            common.write_card(
                folder / "model", "PPO with FoX memory", options.env_id, options, returns, "transformers"
            )
    agent.envs.close()
    return agent


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    agent = train(common.options_from_command_line(Options, __doc__, argv))
    sys.stdout.write(f"mean return of the last {len(agent.meter.returns)} episodes: {agent.meter.mean:.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
