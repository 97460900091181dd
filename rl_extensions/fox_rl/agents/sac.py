"""SAC (arXiv:1801.01290, temperature of arXiv:1812.05905), alone, with LEAST, or with random resets.

    python -m fox_rl.agents.sac --env-id Pendulum-v1 --total-steps 10000 --start-steps 1000
    python -m fox_rl.agents.sac --env-id HalfCheetah-v5 --stop least
    python -m fox_rl.agents.sac --env-id Walker2d-v5 --width 1280 --final-sparsity 0.95

The entropy is driven to minus the number of actions. With LEAST normal noise of up to --noise-max is added to actions
while many episodes are stopped early. Writes metrics.jsonl, tensorboard/, checkpoint_0.pt and at the end model/ under
--output-dir; with the same folder it goes on. One process, as TD3.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fox_rl.returns import td_target

from . import off_policy, training
from .common import option


@dataclass
class Options(off_policy.ContinuousOptions):
    """Options of the command line."""

    noise_max: float = option(0.2, "least: largest deviation of the added noise when many episodes are stopped early")
    temperature: float = option(1.0, "weight of the entropy at the start; learned from then on")


class Agent(off_policy.ContinuousAgent):
    """Stochastic actor with a learned temperature, two critics of which the lower one counts."""

    title, stochastic = "SAC", True
    modules = (*off_policy.ContinuousAgent.modules, "temperature_optimizer")
    values = (*off_policy.ContinuousAgent.values, "log_temperature_value")

    def __init__(self, options: Options, accelerator: Accelerator | None = None):
        super().__init__(options, accelerator)
        if options.temperature <= 0:
            raise ValueError(f"temperature must be above 0; got {options.temperature}.")
        start = float(np.log(options.temperature))
        self.log_temperature = torch.tensor(start, device=self.device, requires_grad=True)
        self.temperature_optimizer = torch.optim.Adam([self.log_temperature], lr=options.learning_rate)
        self.target_entropy = -float(len(self.network.low))
        for name, module in (("actor", self.actor), ("critics", self.critics)):
            optimizer = self.actor_optimizer if name == "actor" else self.critic_optimizer
            self.prune(name, module, optimizer, options.total_steps - options.start_steps)

    @property
    def log_temperature_value(self) -> float:
        """For checkpoints."""
        return float(self.log_temperature.detach())

    @log_temperature_value.setter
    def log_temperature_value(self, value: float) -> None:
        self.log_temperature.data.fill_(value)

    def explore(self) -> np.ndarray:
        """Actions drawn from the policy, with the noise of LEAST."""
        with torch.no_grad():
            action = self.network.sample(self.tensor(self.observation))[0].cpu().numpy()
        deviation = self.noise_deviation()
        return action if deviation == 0 else np.clip(action + np.random.normal(0, deviation, action.shape), -1, 1)

    def following_value(self, observation: Tensor) -> Tensor:
        """Lower value of an action of the policy, with the entropy that it brings."""
        action, log_prob = self.network.sample(observation)
        return self.target_critics(observation, action).amin(dim=0) - self.log_temperature.exp() * log_prob

    def learn(self) -> dict[str, float]:
        """One update of critics, actor, temperature and targets."""
        options, batch = self.options, self.batch()
        with torch.no_grad():
            value = self.following_value(batch["following"])
            target = td_target(batch["reward"], value, batch["terminated"], options.discount)
        loss = 0.5 * (self.critics(batch["observation"], batch["action"]) - target).square().mean(dim=1).sum()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        self.num_updates += 1
        action, log_prob = self.network.sample(batch["observation"])
        temperature = self.log_temperature.detach().exp()
        value = self.critics(batch["observation"], action).amin(dim=0)
        off_policy.actor_step(self, (temperature * log_prob - value).mean())
        self.temperature_optimizer.zero_grad()
        (-self.log_temperature * (log_prob.detach() + self.target_entropy).mean()).backward()
        self.temperature_optimizer.step()
        self.polyak((self.target_critics, self.critics, "critics"))
        return {"loss": loss.item(), "temperature": float(temperature), "entropy": float(-log_prob.detach().mean())}


def train(options: Options, quiet: bool = False) -> Agent:
    """Train, or go on from the checkpoint in `options.output_dir`; returns the agent."""
    return training.run(Agent(options), quiet)


if __name__ == "__main__":
    sys.exit(training.main(Agent, Options, __doc__))
