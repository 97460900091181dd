"""PPO (arXiv:1707.06347) with a memory of forgetting attention, or of its rivals (--memory gru, window).

One process:        python -m fox_rl.agents.ppo_fox --env-id fox_rl/RepeatFirst-v0
Several processes:  accelerate launch -m fox_rl.agents.ppo_fox --env-id fox_rl/RepeatFirst-v0

The policy acts with a cache of bounded size and learns from whole windows, in which episodes are kept apart by closed
gates. What an episode did before the window is given to it again as `--context-steps` observations without loss.
Writes metrics.jsonl, tensorboard/, checkpoints and at the end model/ under --output-dir; started again with the same
folder it goes on from the checkpoint.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fox_rl.diagnostics import gradient_norms
from fox_rl.policy import FoxPolicyConfig, FoxPolicyModel
from fox_rl.returns import gae
from fox_rl.rivals import RivalPolicy
from fox_training.optimizers import build_optimizer

from . import common, training
from .common import option


@dataclass
class Options(common.RunOptions):
    """Options of the command line."""

    env_id: str = option("fox_rl/RepeatFirst-v0", "Gymnasium id; discrete, vector or 84 x 84 pixel observations")
    num_envs: int = option(32, "environments of each process")
    total_steps: int = option(133_120, "environment steps over all processes")
    learning_rate: float = option(1e-3, "of AdamW, falls to 0 in a line; kron takes a third, see fox_training")
    window: int = option(52, "steps of each environment between two updates")
    context_steps: int = option(0, "steps before the window that the policy reads again, without loss")
    discount: float = option(0.99, "gamma")
    gae_decay: float = option(0.95, "lambda")
    epochs: int = option(4, "passes over a window")
    minibatches: int = option(4, "updates of a pass, over whole environments")
    clip: float = option(0.2, "largest change of a probability ratio")
    entropy_bonus: float = option(0.01, "weight of the entropy")
    value_weight: float = option(0.5, "weight of the value loss")
    max_grad_norm: float = option(0.5, "gradient norm is clipped here")
    memory: str = option("fox", "fox; gru or window, to compare with: see fox_rl.rivals")
    hidden_size: int = option(64, "width of the policy")
    num_layers: int = option(2, "layers of the policy")
    num_heads: int = option(4, "attention heads")
    multi_skip: bool = option(False, "fox: add the encoded observation after every layer, see FoxConfig")
    longest_memory: float = option(128.0, "fox: decay time of the slowest head at the start, in steps")
    attention_window: int = option(64, "window: steps that a layer sees")


@dataclass
class Rollout:
    """One window of all environments, `(n, context + window)` unless said otherwise."""

    observation: Tensor  # (n, C + T, ...)
    is_init: Tensor
    action: Tensor  # (n, T) or (n, T, A), as the rest
    log_prob: Tensor
    advantage: Tensor
    target: Tensor


def build_policy(envs: gym.vector.VectorEnv, options: Options) -> FoxPolicyModel | RivalPolicy:
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
    spaces = {
        "observation_type": kind,
        "observation_size": size,
        "action_type": "discrete" if is_discrete else "continuous",
        "action_size": int(action.n) if is_discrete else action.shape[0],
    }
    if options.memory != "fox":
        return RivalPolicy(
            options.memory, **spaces, hidden_size=options.hidden_size, num_layers=options.num_layers,
            num_heads=options.num_heads, window=options.attention_window,
        )  # fmt: skip
    config = FoxPolicyConfig(
        **spaces,
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        fgate_decay_time_max=options.longest_memory,
        use_multi_skip=options.multi_skip,
    )
    return FoxPolicyModel(config)


class Agent(training.OnPolicyAgent):
    """Environments, policy and optimizer of one process."""

    title, library = "PPO with FoX memory", "transformers"
    snippet = (
        'import fox_rl.policy\nfrom transformers import AutoModel\n\npolicy = AutoModel.from_pretrained("{where}")'
    )
    values = ("meter", "step", "observation", "is_init", "context")

    def __init__(self, options: Options, accelerator: Accelerator | None = None):
        super().__init__(options, accelerator)
        if options.num_envs % options.minibatches:
            raise ValueError(
                f"num_envs must be a multiple of minibatches {options.minibatches}; got {options.num_envs}."
            )
        self.envs = common.make_environments(options.env_id, options.num_envs)
        self.network = build_policy(self.envs, options)
        if options.memory != "fox":
            self.title, self.library = f"PPO with memory {options.memory}", "pytorch"
            self.snippet = 'from fox_rl.rivals import RivalPolicy\n\npolicy = RivalPolicy.from_pretrained("{where}")'
        exact = {} if options.optimizer == "kron" else {"eps": 1e-5}
        optimizer = build_optimizer(options.optimizer, self.network.parameters(), options.learning_rate, **exact)
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.peak_learning_rate = self.optimizer.param_groups[0]["lr"]
        self.prune("network", self.network, self.optimizer, self.optimizer_steps)
        self.observation = torch.as_tensor(self.envs.reset(seed=self.seed_process())[0])
        self.is_init = torch.ones(options.num_envs, dtype=torch.bool)
        self.context: tuple[list[Tensor], list[Tensor]] = ([], [])

    def restore_environments(self, envs) -> None:
        """Environments that are made anew start new episodes."""
        super().restore_environments(envs)
        if envs is None:
            self.observation, self.is_init = torch.as_tensor(self.observation), torch.ones_like(self.is_init)
            self.context = ([], [])

    def advance(self) -> dict[str, float]:
        """One window; the learning rate falls in a line: a policy that has learned must not be shaken off it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_learning_rate * (1.0 - self.update / self.num_updates)
        self.rollout = collect(self)
        self.step += self.stride
        return learn(self, self.rollout)

    def act(self, cache, observation: Tensor, is_init: Tensor):
        """`network.act` on the device."""
        return [x.cpu() for x in self.network.act(observation.to(self.device), is_init.to(self.device), cache)]

    def evaluate(self, episodes: int, *, seed: int = 1, video_dir: str = "") -> list[float]:
        """As in `Agent`, with a fresh cache."""
        self.play_cache = self.network.new_cache()
        return super().evaluate(episodes, seed=seed, video_dir=video_dir)

    def choose(self, observation: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """The most likely actions; the memory is that of `evaluate`."""
        tensors = (torch.as_tensor(x).to(self.device) for x in (observation, is_first))
        return self.network.act(*tensors, self.play_cache, deterministic=True)[0].cpu().numpy()

    def diagnose(self) -> dict[str, float]:
        """Gradients of the last update."""
        first, *_, last = gradient_norms(self.network).values()
        return {"grad_first": first, "grad_last": last}


def collect(agent: Agent) -> Rollout:
    """Play one window; the weights do not change meanwhile, so one cache serves all of it."""
    options, rows = agent.options, []
    agent.network.eval()
    cache = agent.network.new_cache()
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
    agent.network.train()
    size = options.num_envs // options.minibatches
    for _ in range(options.epochs):
        for chosen in torch.randperm(options.num_envs).split(size):
            batch = {name: value[chosen].to(device) for name, value in vars(rollout).items()}
            loss, parts = objective(agent, **batch)
            agent.optimizer.zero_grad()
            agent.accelerator.backward(loss)
            agent.accelerator.clip_grad_norm_(agent.network.parameters(), options.max_grad_norm)
            agent.optimizer.step()
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


def train(options: Options, quiet: bool = False) -> Agent:
    """Train, or go on from the checkpoint in `options.output_dir`; returns the agent."""
    return training.run(Agent(options), quiet)


if __name__ == "__main__":
    sys.exit(training.main(Agent, Options, __doc__))
