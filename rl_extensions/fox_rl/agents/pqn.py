"""PQN (arXiv:2407.04811): Q(lambda) in parallel environments, without replay and without a target network.

One process:        python -m fox_rl.agents.pqn --env-id CartPole-v1
Several processes:  accelerate launch -m fox_rl.agents.pqn --env-id CartPole-v1

The agent in which to compare trunks (--skip multi, residual, none), optimizers (--optimizer radam, adamw, kron) and
pruning (--final-sparsity 0.95): LayerNorm and everything else stay the same. Writes metrics.jsonl, tensorboard/,
checkpoint.pt and at the end model/ under --output-dir; started again with the same folder it goes on.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from fox_rl.diagnostics import Recorder, feature_rank, gradient_norms
from fox_rl.q_network import QNetwork
from fox_rl.returns import lambda_returns
from fox_training.optimizers import build_optimizer
from fox_training.sparsity import MaskedPruner, SparsityConfig

from . import common
from .common import option


@dataclass
class Options:
    """Options of the command line."""

    env_id: str = option("CartPole-v1", "Gymnasium id; vector or 84 x 84 pixel observations, discrete actions")
    num_envs: int = option(32, "environments of each process")
    total_steps: int = option(150_000, "environment steps over all processes")
    window: int = option(32, "steps of each environment between two updates")
    learning_rate: float = option(5e-4, "of the optimizer; kron takes a third, see fox_training.optimizers")
    optimizer: str = option("radam", "radam, adamw or kron")
    discount: float = option(0.99, "gamma")
    decay: float = option(0.65, "lambda")
    epochs: int = option(2, "passes over a window")
    minibatches: int = option(32, "updates of a pass")
    max_grad_norm: float = option(10.0, "gradient norm is clipped here")
    epsilon_end: float = option(0.005, "share of random actions at the end; it starts at 1")
    epsilon_fraction: float = option(0.3, "share of the steps over which it falls")
    encoder: str = option("impala", "of pixels: impala or nature")
    encoder_width: int = option(1, "factor on the channels of the encoder")
    readout: str = option("gap", "of pixels: flatten, gap, per_conv_sum, per_conv_mean or soft_moe")
    width: int = option(128, "of the trunk")
    blocks: int = option(1, "residual blocks of the trunk, two layers each")
    skip: str = option("multi", "multi, residual or none")
    final_sparsity: float = option(0.0, "share of the weights pruned during training, see fox_training.sparsity")
    sparsity_method: str = option("magnitude", "magnitude, saliency, random, static_random or rigl")
    seed: int = option(0, "of everything")
    output_dir: str = option("", "folder of the run; empty writes nothing")
    checkpoint_every: int = option(50, "updates between checkpoints and diagnostics")
    eval_episodes: int = option(0, "episodes of a greedy evaluation at the end, with a model card")
    video_dir: str = option("", "folder for a video of the first evaluated episode; needs moviepy")


class Agent:
    """Environments, network and optimizer of one process, from the start or from a checkpoint."""

    def __init__(self, options: Options, accelerator: Accelerator):
        common.check_positive(options, "num_envs", "window", "epochs", "minibatches", "checkpoint_every")
        common.check_optimizer(options)
        self.options, self.accelerator = options, accelerator
        common.seed_everything(options.seed)
        self.envs = common.make_environments(options.env_id, options.num_envs)
        self.network = QNetwork.for_spaces(
            self.envs.single_observation_space, self.envs.single_action_space, width=options.width,
            blocks=options.blocks, skip=options.skip, encoder=options.encoder, encoder_width=options.encoder_width,
            readout=options.readout,
        )  # fmt: skip
        optimizer = build_optimizer(options.optimizer, self.network.parameters(), options.learning_rate)
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        seed = options.seed + 1 + accelerator.process_index
        common.seed_everything(seed)
        self.steps_per_update = options.num_envs * options.window * accelerator.num_processes
        self.num_updates = max(1, options.total_steps // self.steps_per_update)
        self.pruner = None
        if options.final_sparsity > 0:
            config = SparsityConfig(final_sparsity=options.final_sparsity, method=options.sparsity_method)
            steps = self.num_updates * options.epochs * options.minibatches
            self.pruner = MaskedPruner(self.network, config, steps)
        self.meter = common.EpisodeMeter(options.num_envs)
        self.update = 0
        self.observation = self.envs.reset(seed=seed)[0]

    @property
    def epsilon(self) -> float:
        """Share of random actions now."""
        progress = min(1.0, self.update / max(1.0, self.options.epsilon_fraction * self.num_updates))
        return 1.0 + progress * (self.options.epsilon_end - 1.0)

    def state(self) -> dict:
        """Everything besides the environments that a resumed run needs."""
        return {
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(), "meter": self.meter,
            "update": self.update, "observation": self.observation, "options": asdict(self.options),
        }  # fmt: skip

    def load(self, state: dict) -> None:
        """Inverse of `state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        self.meter, self.update, self.observation = state["meter"], state["update"], state["observation"]
        if state["envs"] is not None:
            self.envs = state["envs"]
        else:
            self.observation = self.envs.reset()[0]
        common.restore_random(state["random"])


@torch.no_grad()
def collect(agent: Agent) -> tuple[Tensor, Tensor, Tensor]:
    """One window: observations `(T n, ...)`, actions and targets `(T n,)`."""
    options, device, rows = agent.options, agent.accelerator.device, []
    for _ in range(options.window):
        observation = torch.as_tensor(agent.observation).to(device)
        greedy = agent.network(observation).argmax(dim=-1).cpu().numpy()
        explores = np.random.random(options.num_envs) < agent.epsilon
        action = np.where(explores, np.random.randint(agent.network.num_actions, size=options.num_envs), greedy)
        following, reward, terminated, truncated, info = agent.envs.step(action)
        ended = terminated | truncated
        states = torch.as_tensor(common.true_following(following, info, ended)).to(device)
        rows.append(
            (
                observation, torch.as_tensor(action).to(device), torch.as_tensor(reward).float().to(device),
                agent.network(states).amax(dim=-1), torch.as_tensor(terminated).to(device),
                torch.as_tensor(ended).to(device),
            )
        )  # fmt: skip
        agent.meter.update(reward, ended)
        agent.observation = following
    observation, action, *rest = (torch.stack(x) for x in zip(*rows, strict=True))
    target = lambda_returns(*rest, discount=options.discount, decay=options.decay)
    return observation.flatten(0, 1), action.flatten(), target.flatten()


def learn(agent: Agent, observation: Tensor, action: Tensor, target: Tensor) -> dict[str, float]:
    """Some epochs of regression of the chosen action's value on its target; gradient norms are of the last update."""
    options, losses = agent.options, []
    for _ in range(options.epochs):
        for chosen in torch.randperm(len(action)).chunk(options.minibatches):
            value = agent.model(observation[chosen]).gather(1, action[chosen, None]).squeeze(1)
            loss = F.mse_loss(value, target[chosen])
            agent.optimizer.zero_grad()
            agent.accelerator.backward(loss)
            agent.accelerator.clip_grad_norm_(agent.network.parameters(), options.max_grad_norm)
            agent.optimizer.step()
            losses.append(loss.item())
    first, *_, last = gradient_norms(agent.network).values()
    return {"loss": float(np.mean(losses)), "value": float(target.mean()), "grad_first": first, "grad_last": last}


@torch.no_grad()
def diagnose(agent: Agent, observation: Tensor) -> dict[str, float]:
    """Dormant units and rank of the features on a part of the window."""
    sample = observation[torch.linspace(0, len(observation) - 1, 256).long()]
    with Recorder(agent.network) as recorder:
        features = agent.network.features(sample)
    dormant = recorder.dormant()
    return {"dormant": sum(dormant.values()) / len(dormant), "feature_rank": feature_rank(features)}


def evaluate(network: QNetwork, env_id: str, episodes: int, seed: int = 1, video_dir: str = "") -> list[float]:
    """Returns of greedy episodes; with `video_dir` the first one is filmed."""
    import gymnasium as gym

    common.register_environments()
    env = gym.make(env_id, render_mode="rgb_array" if video_dir else None)
    if video_dir:
        env = gym.wrappers.RecordVideo(env, video_dir, episode_trigger=lambda number: number == 0)
    returns, device = [], next(network.parameters()).device
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        total, ended = 0.0, False
        while not ended:
            with torch.no_grad():
                action = int(network(torch.as_tensor(np.asarray(observation))[None].to(device)).argmax())
            observation, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
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
            observation, action, target = collect(agent)
            values = learn(agent, observation, action, target)
            agent.update += 1
            is_due = agent.update == agent.num_updates or agent.update % options.checkpoint_every == 0
            if is_due:
                values |= diagnose(agent, observation)
            if agent.pruner is not None:
                values["sparsity"] = agent.pruner.sparsity()
            log.write(agent.update * agent.steps_per_update, episode_return=agent.meter.mean, **values)
            if checkpoint is not None and is_due:
                common.save_checkpoint(checkpoint, agent.envs, **agent.state())
    if is_main and folder is not None:
        agent.network.save_pretrained(folder / "model")
        if options.eval_episodes:
            returns = evaluate(agent.network, options.env_id, options.eval_episodes, video_dir=options.video_dir)
            common.write_card(folder / "model", "PQN", options.env_id, options, returns, "pytorch")
    agent.envs.close()
    return agent


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    agent = train(common.options_from_command_line(Options, __doc__, argv))
    sys.stdout.write(f"mean return of the last {len(agent.meter.returns)} episodes: {agent.meter.mean:.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
