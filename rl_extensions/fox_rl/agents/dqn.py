"""DQN and its parts: double, dueling, several steps, prioritized replay, noisy layers, distributions (C51, Rainbow).

    python -m fox_rl.agents.dqn --env-id CartPole-v1
    python -m fox_rl.agents.dqn --env-id CartPole-v1 --rainbow --v-min 0 --v-max 100
    python -m fox_rl.agents.dqn --env-id ALE/Breakout-v5 --rainbow --encoder-width 3 --final-sparsity 0.95

--rainbow turns on all of arXiv:1710.02298, and each part has an option of its own: --double (on by default),
--dueling, --multi-steps 3, --prioritized, --noisy, --num-atoms 51. Writes metrics.jsonl, tensorboard/, checkpoint_0.pt
and at the end model/ under --output-dir; with the same folder it goes on. One process: with a replay buffer a second
one would only repeat the first.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from fox_rl.diagnostics import gradient_norms
from fox_rl.replay import MultiStep, PrioritizedReplay, Replay
from fox_rl.returns import categorical_target
from fox_training.optimizers import build_optimizer

from . import common, training
from .common import option


@dataclass
class Options(common.ValueOptions):
    """Options of the command line."""

    learning_rate: float = option(1e-3, "of the optimizer; kron takes a third, see fox_training.optimizers")
    log_every: int = option(1_000, "environment steps between log lines")
    start_steps: int = option(1_000, "steps with random actions before the first update")
    train_every: int = option(4, "environment steps for one update")
    batch_size: int = option(64, "transitions of an update")
    buffer_size: int = option(100_000, "transitions kept; one of 84 x 84 x 4 pixels takes 56 kB")
    discount: float = option(0.99, "gamma")
    target_every: int = option(1_000, "environment steps between copies to the target network")
    max_grad_norm: float = option(10.0, "gradient norm is clipped here")
    epsilon_end: float = option(0.05, "share of random actions at the end; it starts at 1; noisy layers need none")
    epsilon_fraction: float = option(0.2, "share of the steps over which it falls")
    rainbow: bool = option(False, "dueling, 3 steps, prioritized, noisy and 51 atoms at once")
    double: bool = option(True, "the online network chooses the action that the target network values")
    dueling: bool = option(False, "value and advantage apart")
    multi_steps: int = option(1, "steps of a return")
    prioritized: bool = option(False, "prioritized replay")
    priority_alpha: float = option(0.5, "prioritized: 0 is uniform")
    priority_beta: float = option(0.4, "prioritized: importance correction at the start, 1 at the end")
    noisy: bool = option(False, "noisy layers in the head in place of epsilon")
    num_atoms: int = option(1, "of the distribution; 1 learns the mean alone")
    v_min: float = option(-10.0, "lowest atom")
    v_max: float = option(10.0, "highest atom")

    def __post_init__(self):
        if self.rainbow:
            self.dueling = self.prioritized = self.noisy = True
            self.multi_steps, self.num_atoms = max(3, self.multi_steps), max(51, self.num_atoms)


class Agent(training.Agent):
    """Environments, networks and replay."""

    title, library = "DQN", "pytorch"
    snippet = 'from fox_rl.q_network import QNetwork\n\nnetwork = QNetwork.from_pretrained("{where}")'
    plays_at_once = True
    modules = ("network", "target", "optimizer", "replay")
    values = ("meter", "step", "observation", "multi_step")

    def __init__(self, options: Options, accelerator: Accelerator | None = None):
        super().__init__(options, accelerator)
        self.refuse_processes()
        common.check_positive(options, "train_every", "batch_size", "target_every", "multi_steps")
        self.title = "Rainbow" if options.rainbow else "C51" if options.num_atoms > 1 else "DQN"
        self.envs = common.make_environments(options.env_id, options.num_envs)
        self.network = common.build_q_network(
            self.envs, options, num_atoms=options.num_atoms, v_min=options.v_min, v_max=options.v_max,
            dueling=options.dueling, noisy=options.noisy,
        ).to(self.device)  # fmt: skip
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = build_optimizer(options.optimizer, self.network.parameters(), options.learning_rate)
        capacity = min(options.buffer_size, options.total_steps + options.num_envs)
        self.replay = PrioritizedReplay(capacity, options.priority_alpha) if options.prioritized else Replay(capacity)
        self.multi_step = MultiStep(options.num_envs, options.multi_steps, options.discount)
        updates = (options.total_steps - options.start_steps) // options.train_every
        self.prune("network", self.network, self.optimizer, updates)
        self.observation = self.envs.reset(seed=self.seed_process())[0]

    @property
    def epsilon(self) -> float:
        """Share of random actions now."""
        return epsilon(self.options, self.step)

    def advance(self) -> dict[str, float]:
        """One step of all environments, and an update for every `train_every` of them."""
        options = self.options
        following, reward, terminated, truncated, info = self.envs.step(action := self.explore())
        ended = terminated | truncated
        states = common.true_following(following, info, ended)
        rows = self.multi_step.add(self.observation, action, reward, states, terminated, ended)
        if rows is not None:
            self.replay.add(**rows)
        self.meter.update(reward, ended)
        self.observation = following
        before, self.step = self.step, self.step + options.num_envs
        values = {"epsilon": self.epsilon}
        if self.step >= options.start_steps and self.replay.size:
            for _ in range(self.step // options.train_every - before // options.train_every):
                values |= learn(self)
        if self.step // options.target_every > before // options.target_every:
            self.target.load_state_dict(self.network.state_dict())
        return values

    def explore(self) -> np.ndarray:
        """Actions of all environments, `(n,)`."""
        count = self.options.num_envs
        random = np.random.randint(self.network.num_actions, size=count)
        explores = np.random.random(count) < self.epsilon
        return random if explores.all() else np.where(explores, random, self.choose(self.observation))

    def choose(self, observation: np.ndarray, is_first: np.ndarray | None = None) -> np.ndarray:
        """The best actions; with noisy layers, in training mode, those of one draw of the noise."""
        with torch.no_grad():
            values = self.network.values(torch.as_tensor(observation, device=self.device))
        return values.argmax(dim=-1).cpu().numpy()

    def diagnose(self) -> dict[str, float]:
        """Gradients of the last update, dormant units and rank of the features on old observations."""
        first, *_, last = gradient_norms(self.network).values()
        sample = self.replay.rows(torch.arange(min(256, self.replay.size)))["observation"].to(self.device)
        return {"grad_first": first, "grad_last": last} | training.trunk_diagnostics(
            self.network, lambda: self.network.features(sample)
        )


def learn(agent: Agent) -> dict[str, float]:
    """One update; returns the mean loss and value of the batch."""
    options, replay = agent.options, agent.replay
    if options.prioritized:
        beta = options.priority_beta + (1 - options.priority_beta) * agent.step / agent.total_steps
        batch = replay.sample(options.batch_size, beta)
        place = batch.pop("place")
    else:
        batch = replay.sample(options.batch_size)
    batch = {name: x.to(agent.device) for name, x in batch.items()}
    error, priority, value = (distribution_error if options.num_atoms > 1 else value_error)(agent, batch)
    loss = (error * batch["weight"]).mean() if options.prioritized else error.mean()
    agent.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(agent.network.parameters(), options.max_grad_norm)
    agent.optimizer.step()
    if options.prioritized:
        replay.update(place, priority)
    return {"loss": loss.item(), "value": value.item()}


def next_actions(agent: Agent, following: Tensor) -> Tensor:
    """Actions that the target is built on, `(B,)`."""
    return (agent.network if agent.options.double else agent.target).values(following).argmax(dim=-1)


def epsilon(options: Options, step: int) -> float:
    """Share of random actions after so many steps."""
    if step < options.start_steps:
        return 1.0
    if options.noisy:
        return 0.0
    progress = min(1.0, step / max(1.0, options.epsilon_fraction * options.total_steps))
    return 1.0 + progress * (options.epsilon_end - 1.0)


def value_error(agent: Agent, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Huber loss and absolute error of each transition, `(B,)`, and the mean value."""
    with torch.no_grad():
        action = next_actions(agent, batch["following"])
        following = agent.target(batch["following"]).gather(1, action[:, None]).squeeze(1)
        target = batch["reward"] + batch["factor"] * (~batch["terminated"]) * following
    value = agent.network(batch["observation"]).gather(1, batch["action"][:, None]).squeeze(1)
    return F.smooth_l1_loss(value, target, reduction="none"), (value - target).abs(), target.mean()


def distribution_error(agent: Agent, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each transition with the projected target, `(B,)`, twice, and the mean value."""
    rows = torch.arange(len(batch["reward"]), device=agent.device)
    atoms = agent.network.atoms
    with torch.no_grad():
        action = next_actions(agent, batch["following"])
        following = agent.target(batch["following"])[rows, action].softmax(dim=-1)
        factor = batch["factor"] * (~batch["terminated"])
        target = categorical_target(following, batch["reward"], factor, atoms)
    log_probabilities = agent.network(batch["observation"])[rows, batch["action"]].log_softmax(dim=-1)
    error = -(target * log_probabilities).sum(dim=-1)
    return error, error, (target @ atoms).mean()


def train(options: Options, quiet: bool = False) -> Agent:
    """Train, or go on from the checkpoint in `options.output_dir`; returns the agent."""
    return training.run(Agent(options), quiet)


if __name__ == "__main__":
    sys.exit(training.main(Agent, Options, __doc__))
