"""PQN (arXiv:2407.04811): Q(lambda) in parallel environments, without replay and without a target network.

One process:        python -m fox_rl.agents.pqn --env-id CartPole-v1
Several processes:  accelerate launch -m fox_rl.agents.pqn --env-id CartPole-v1

The agent in which to compare trunks (--skip multi, residual, none), optimizers (--optimizer radam, adamw, kron) and
pruning (--final-sparsity 0.95): LayerNorm and everything else stay the same. Writes metrics.jsonl, tensorboard/,
checkpoints and at the end model/ under --output-dir; started again with the same folder it goes on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from fox_rl.diagnostics import gradient_norms
from fox_rl.returns import lambda_returns
from fox_training.optimizers import build_optimizer

from . import common, training
from .common import option


@dataclass
class Options(common.ValueOptions):
    """Options of the command line."""

    num_envs: int = option(32, "environments of each process")
    total_steps: int = option(150_000, "environment steps over all processes")
    learning_rate: float = option(5e-4, "of the optimizer; kron takes a third, see fox_training.optimizers")
    optimizer: str = option("radam", "radam, adamw or kron")
    window: int = option(32, "steps of each environment between two updates")
    discount: float = option(0.99, "gamma")
    decay: float = option(0.65, "lambda")
    epochs: int = option(2, "passes over a window")
    minibatches: int = option(32, "updates of a pass")
    max_grad_norm: float = option(10.0, "gradient norm is clipped here")
    epsilon_end: float = option(0.05, "share of random actions at the end; it starts at 1")
    epsilon_fraction: float = option(0.5, "share of the steps over which it falls")
    mixed_precision: str = option("auto", "auto: what accelerate launch says; no, bf16 (all but the head)")
    env_threads: int = option(0, "Atari: threads that step the games; 0 for one a core")


class Agent(training.OnPolicyAgent):
    """Environments, network and optimizer of one process."""

    title, library = "PQN", "pytorch"
    snippet = 'from fox_rl.q_network import QNetwork\n\nnetwork = QNetwork.from_pretrained("{where}")'
    plays_at_once = True

    def __init__(self, options: Options, accelerator: Accelerator | None = None):
        if options.mixed_precision not in ("auto", "no", "bf16"):
            raise ValueError(f"mixed_precision must be auto, no or bf16; got {options.mixed_precision!r}.")
        if accelerator is None and options.mixed_precision != "auto":
            accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=options.mixed_precision)
        super().__init__(options, accelerator)
        threads = {"num_threads": options.env_threads} if options.env_id.startswith("ALE/") else {}
        self.envs = common.make_environments(options.env_id, options.num_envs, **threads)
        self.network = common.build_q_network(self.envs, options)
        if self.device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)  # of convolutions; the tensor cores want it
        optimizer = build_optimizer(options.optimizer, self.network.parameters(), options.learning_rate)
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.prune("network", self.network, self.optimizer, self.optimizer_steps)
        self.observation = self.envs.reset(seed=self.seed_process())[0]
        first, on_gpu = torch.as_tensor(self.observation), self.device.type == "cuda"
        self.staged = torch.empty_like(first, pin_memory=on_gpu)
        self.greedy = torch.empty(options.num_envs, dtype=torch.long, pin_memory=on_gpu)
        self.done = torch.cuda.Event(blocking=True) if on_gpu else None
        self.window_observation = torch.empty(options.window, *first.shape, dtype=first.dtype, device=self.device)

    @property
    def epsilon(self) -> float:
        """Share of random actions now."""
        progress = min(1.0, self.update / max(1.0, self.options.epsilon_fraction * self.num_updates))
        return 1.0 + progress * (self.options.epsilon_end - 1.0)

    def wait(self) -> None:
        """Until the GPU is through; asleep, for the games need the cores."""
        if self.done is not None:
            self.done.record()
            self.done.synchronize()

    def advance(self) -> dict[str, float]:
        """One window."""
        observation, action, target = collect(self)
        self.step += self.stride
        return learn(self, observation, action, target)

    def choose(self, observation: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """The best actions."""
        with torch.no_grad():
            return self.network(torch.as_tensor(observation).to(self.device)).argmax(dim=-1).cpu().numpy()

    def diagnose(self) -> dict[str, float]:
        """Gradients of the last update, dormant units and rank of the features on a part of the window."""
        first, *_, last = gradient_norms(self.network).values()
        observation = self.window_observation.flatten(0, 1)
        sample = observation[torch.linspace(0, len(observation) - 1, 256).long()]
        return {"grad_first": first, "grad_last": last} | training.trunk_diagnostics(
            self.network, lambda: self.network.features(sample)
        )


@torch.no_grad()
def collect(agent: Agent) -> tuple[Tensor, Tensor, Tensor]:
    """One window: observations `(T n, ...)`, actions and targets `(T n,)`.

    The value of the state after step t is that of the state before step t + 1, which the next choice computes anyway;
    only where an episode was cut off is it another state. Observations are valid until the next call.
    """
    options, device, envs = agent.options, agent.device, agent.options.num_envs
    shape = (options.window, envs)
    action, reward = np.empty(shape, np.int64), np.empty(shape, np.float32)
    terminated, ended = np.empty(shape, bool), np.empty(shape, bool)
    value_tp1 = torch.empty(shape, device=device)
    cut_off = []  # (step, environments, values of their last states)
    for t in range(options.window):
        agent.staged.numpy()[:] = agent.observation
        agent.window_observation[t].copy_(agent.staged, non_blocking=True)
        values = agent.network(agent.window_observation[t])
        if t > 0:
            value_tp1[t - 1] = values.amax(dim=-1)
        agent.greedy.copy_(values.argmax(dim=-1), non_blocking=True)
        agent.wait()
        explores = np.random.random(envs) < agent.epsilon
        action[t] = np.where(explores, np.random.randint(agent.network.num_actions, size=envs), agent.greedy.numpy())
        following, reward[t], terminated[t], truncated, info = agent.envs.step(action[t])
        ended[t] = terminated[t] | truncated
        if (truncated & ~terminated[t]).any():
            cut = np.flatnonzero(truncated & ~terminated[t])
            states = torch.as_tensor(common.true_following(following, info, ended[t])[cut]).to(device)
            cut_off.append((t, torch.as_tensor(cut, device=device), agent.network(states).amax(dim=-1)))
        agent.meter.update(reward[t], ended[t])
        agent.observation = following
    value_tp1[-1] = agent.network(torch.as_tensor(agent.observation).to(device)).amax(dim=-1)
    for t, cut, value in cut_off:
        value_tp1[t, cut] = value
    reward_t, terminated_t, ended_t = (torch.as_tensor(x).to(device) for x in (reward, terminated, ended))
    target = lambda_returns(
        reward_t, value_tp1, terminated_t, ended_t, discount=options.discount, decay=options.decay
    )  # fmt: skip
    return agent.window_observation.flatten(0, 1), torch.as_tensor(action).to(device).flatten(), target.flatten()


def learn(agent: Agent, observation: Tensor, action: Tensor, target: Tensor) -> dict[str, float]:
    """Some epochs of regression of the chosen action's value on its target."""
    options, losses = agent.options, []
    # Sent at once: an index from the host would make every update wait for the one before.
    orders = torch.stack([torch.randperm(len(action)) for _ in range(options.epochs)]).to(agent.device)
    for order in orders:
        for chosen in order.chunk(options.minibatches):
            value = agent.model(observation[chosen]).gather(1, action[chosen, None]).squeeze(1)
            loss = F.mse_loss(value, target[chosen])
            agent.optimizer.zero_grad()
            agent.accelerator.backward(loss)
            agent.accelerator.clip_grad_norm_(agent.network.parameters(), options.max_grad_norm)
            agent.optimizer.step()
            losses.append(loss.detach())
    agent.wait()
    return {"loss": float(torch.stack(losses).mean()), "value": float(target.mean())}


def train(options: Options, quiet: bool = False) -> Agent:
    """Train, or go on from the checkpoint in `options.output_dir`; returns the agent."""
    return training.run(Agent(options), quiet)


if __name__ == "__main__":
    sys.exit(training.main(Agent, Options, __doc__))
