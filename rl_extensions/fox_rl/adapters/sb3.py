"""Stable-Baselines3: pruning as a callback, our encoders as a features extractor.

agent = DQN("MlpPolicy", "CartPole-v1")
agent.learn(50_000, callback=PruningCallback(final_sparsity=0.9))
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
from torch import Tensor, nn

from fox_rl.networks import ImpalaEncoder, NatureEncoder, TokenReadout
from fox_training.sparsity import MaskedPruner, SparsityConfig

try:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
except ImportError as error:
    raise ImportError("fox_rl.adapters.sb3 needs Stable-Baselines3: pip install 'fox-transformers[rl]'.") from error


class PruningCallback(BaseCallback):
    """Prunes the networks of any agent of Stable-Baselines3 while it learns.

    PPO, A2C and DQN have one network, SAC and TD3 an actor and critics, each with its optimizer and a pruner of its
    own. Target networks are masked before every rollout. Logs `train/sparsity`.

    Args:
        final_sparsity: Share of the weights that is zero at the end, in [0, 1).
        total_updates: Optimizer steps of the whole training; None counts them from the settings of the agent.
        config: More fields of `SparsityConfig`.

    Attributes:
        pruners: `{"policy": ...}` or `{"actor": ..., "critic": ...}`, from the start of training on.
    """

    def __init__(self, final_sparsity: float, *, total_updates: int | None = None, **config: Any):
        super().__init__()
        self.config = SparsityConfig(final_sparsity=final_sparsity, **config)
        self.total_updates = total_updates
        self.pruners: dict[str, MaskedPruner] = {}
        self._targets: list[tuple[MaskedPruner, nn.Module]] = []
        self._saved: dict[str, dict[str, Tensor]] = {}

    def _on_training_start(self) -> None:
        for pruner in self.pruners.values():
            pruner.detach()
        self._targets.clear()
        updates = self.total_updates or count_updates(self.model, self.locals["total_timesteps"])
        for name, (network, optimizer, target, delay) in trained_networks(self.model).items():
            pruner = MaskedPruner(network, self.config, max(1, updates // delay))
            if name in self._saved:
                pruner.load_state_dict(self._saved[name])
            self.pruners[name] = pruner.attach(optimizer)
            if target is not None:
                self._targets.append((pruner, target))

    def _on_rollout_start(self) -> None:
        # Polyak averaging brings back a little of what was pruned since.
        for pruner, target in self._targets:
            pruner.apply_to(target)
        for name, pruner in self.pruners.items():
            self.logger.record(f"train/sparsity_{name}", pruner.sparsity())

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        for pruner, target in self._targets:
            pruner.apply_to(target)
        for pruner in self.pruners.values():
            pruner.detach()
        self._saved = self.state_dict()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Masks and step of every pruner, to be saved beside the agent."""
        return {name: pruner.state_dict() for name, pruner in self.pruners.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Masks to go on with; call it before `learn`."""
        self._saved = state


def trained_networks(agent: Any) -> dict[str, tuple[nn.Module, Any, nn.Module | None, int]]:
    """`{name: (network, optimizer, target network or None, updates of the agent for one of it)}`."""
    policy = agent.policy
    if hasattr(policy, "q_net"):
        return {"policy": (policy.q_net, policy.optimizer, policy.q_net_target, 1)}
    if hasattr(policy, "critic") and hasattr(policy, "actor"):
        delay = getattr(agent, "policy_delay", 1)
        actor_target = getattr(policy, "actor_target", None)
        return {
            "actor": (policy.actor, policy.actor.optimizer, actor_target, delay),
            "critic": (policy.critic, policy.critic.optimizer, policy.critic_target, 1),
        }
    return {"policy": (policy, policy.optimizer, None, 1)}


def count_updates(agent: Any, total_timesteps: int) -> int:
    """Optimizer steps that `agent.learn(total_timesteps)` makes, from its settings."""
    if isinstance(agent, OffPolicyAlgorithm):
        steps = max(0, total_timesteps - agent.learning_starts)
        if agent.train_freq.unit.value == "episode":
            return max(1, steps)
        collected = agent.train_freq.frequency * agent.n_envs
        updates = agent.gradient_steps if agent.gradient_steps > 0 else collected
        return max(1, steps // collected * updates)
    collected = agent.n_steps * agent.n_envs
    per_rollout = getattr(agent, "n_epochs", 1) * math.ceil(collected / getattr(agent, "batch_size", collected))
    return math.ceil(total_timesteps / collected) * per_rollout


class PixelExtractor(BaseFeaturesExtractor):
    """Nature or IMPALA encoder with one of our readouts: `policy_kwargs={"features_extractor_class": PixelExtractor}`.

    Args:
        observation_space: `(C, 84, 84)` uint8 images.
        encoder: nature or impala.
        width: Factor on the channels of the encoder.
        readout: flatten, gap, per_conv_sum, per_conv_mean or soft_moe.
        features_dim: Features; with soft_moe the number is that of the encoder.
    """

    def __init__(
        self, observation_space: gym.Space, encoder: str = "impala", width: int = 1, readout: str = "gap",
        features_dim: int = 512,
    ):  # fmt: skip
        if encoder not in ("impala", "nature"):
            raise ValueError(f"encoder must be impala or nature; got {encoder!r}.")
        encoder_class, side = (ImpalaEncoder, 11) if encoder == "impala" else (NatureEncoder, 7)
        network = encoder_class(observation_space.shape[0], width)
        shape = (network.out_channels, side, side)
        head = TokenReadout(shape, None if readout == "soft_moe" else features_dim, readout)
        super().__init__(observation_space, head.out_dim)
        self.layers = nn.Sequential(network, head, nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        # Stable-Baselines3 has divided by 255 already.
        return self.layers(observations)
