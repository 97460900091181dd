"""TD3 (arXiv:1802.09477), alone, with LEAST (arXiv:2506.13672), or with the random resets that LEAST has to beat.

    python -m fox_rl.agents.td3 --env-id Pendulum-v1 --total-steps 20000
    python -m fox_rl.agents.td3 --env-id HalfCheetah-v5 --stop least
    python -m fox_rl.agents.td3 --env-id HalfCheetah-v5 --stop random --mean-length 400

The mean length of the control is that of a LEAST run, which the log has as `episode_length`. Writes metrics.jsonl,
tensorboard/, checkpoint_0.pt and at the end model/ under --output-dir; with the same folder it goes on.
One process: with a replay buffer a second one would only repeat the first.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fox_rl.returns import td_target

from . import common, off_policy, training
from .common import option


@dataclass
class Options(off_policy.ContinuousOptions):
    """Options of the command line."""

    exploration: float = option(0.1, "deviation of the noise on actions in [-1, 1]")
    target_noise: float = option(0.2, "the same for the target, cut off at 0.5")
    policy_delay: int = option(2, "critic updates for one of the actor")


class Agent(off_policy.ContinuousAgent):
    """Deterministic actor with a target, two critics of which the lower one counts."""

    title = "TD3"
    modules = (*off_policy.ContinuousAgent.modules, "target_actor")

    def __init__(self, options: Options, accelerator: Accelerator | None = None):
        common.check_positive(options, "policy_delay")
        super().__init__(options, accelerator)
        self.target_actor = off_policy.frozen_copy(self.actor)
        updates = options.total_steps - options.start_steps
        self.prune("actor", self.actor, self.actor_optimizer, updates // options.policy_delay)
        self.prune("critics", self.critics, self.critic_optimizer, updates)

    def explore(self) -> np.ndarray:
        """The actor's actions with normal noise."""
        with torch.no_grad():
            action = self.network.mode(self.tensor(self.observation)).cpu().numpy()
        return np.clip(action + np.random.normal(0, self.noise_deviation(), action.shape), -1, 1)

    def following_value(self, observation: Tensor) -> Tensor:
        """Lower value of the target actor's action."""
        return self.target_critics(observation, self.target_actor(observation).tanh()).amin(dim=0)

    def learn(self) -> dict[str, float]:
        """One update of the critics, and every `policy_delay` of them one of the actor and the targets."""
        options, batch = self.options, self.batch()
        noise = torch.randn_like(batch["action"])
        loss = critic_loss(self.critics, self.target_critics, self.target_actor, batch, noise, options)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        self.num_updates += 1
        if self.num_updates % options.policy_delay == 0:
            off_policy.actor_step(self, actor_loss(self.actor, self.critics, batch["observation"]))
            self.polyak((self.target_actor, self.actor, "actor"), (self.target_critics, self.critics, "critics"))
        return {"loss": loss.item()}


def critic_loss(
    critics: nn.Module, target_critics: nn.Module, target_actor: nn.Module, batch: dict[str, Tensor], noise: Tensor,
    options: Options,
) -> Tensor:  # fmt: skip
    """Squared error: mean over the batch, summed over both critics, and over the runs where they are many.

    Args:
        critics, target_critics: `(..., B, O)` and `(..., B, A)` to `(2, ..., B)`.
        target_actor: `(..., B, O)` to `(..., B, A)`, before the tanh.
        batch: observation, action, reward, following, terminated.
        noise: Standard normal, like the actions.
        options: Deviation of the noise, discount.
    """
    with torch.no_grad():
        noise = (noise * options.target_noise).clamp(-0.5, 0.5)
        action = (target_actor(batch["following"]).tanh() + noise).clamp(-1, 1)
        value = target_critics(batch["following"], action).amin(dim=0)
        target = td_target(batch["reward"], value, batch["terminated"], options.discount)
    return (critics(batch["observation"], batch["action"]) - target).square().mean(dim=-1).sum()


def actor_loss(actor: nn.Module, critics: nn.Module, observation: Tensor) -> Tensor:
    """Minus the first critic's value of the actor's action; shapes as in `critic_loss`."""
    return -critics.first(observation, actor(observation).tanh()).mean(dim=-1).sum()


def train(options: Options, quiet: bool = False) -> Agent:
    """Train, or go on from the checkpoint in `options.output_dir`; returns the agent."""
    return training.run(Agent(options), quiet)


if __name__ == "__main__":
    sys.exit(training.main(Agent, Options, __doc__))
