"""Actor and critics of continuous control in one module that is saved, loaded and pushed to the Hub by itself.

Letters: B batch, O observation size, A action size. Actions of the networks are in [-1, 1]; `act` scales them to the
environment's.
"""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from .networks import MultiSkipMLP


def mlp(in_dim: int, out_dim: int, width: int, blocks: int, skip: str = "multi") -> nn.Module:
    """Two hidden layers, as in the papers of TD3 and SAC, or with `blocks` above 0 a `MultiSkipMLP`."""
    if blocks > 0:
        trunk = MultiSkipMLP(in_dim, width, width, blocks, skip=skip)
        return nn.Sequential(trunk, nn.ReLU(), nn.Linear(width, out_dim))
    return nn.Sequential(
        nn.Linear(in_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out_dim)
    )


class Critics(nn.Module):
    """Two action values, `(B, O)` and `(B, A)` to `(2, B)`."""

    def __init__(self, observation_size: int, action_size: int, width: int, blocks: int, skip: str = "multi"):
        super().__init__()
        self.nets = nn.ModuleList(mlp(observation_size + action_size, 1, width, blocks, skip) for _ in range(2))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([observation, action], dim=-1)
        return torch.stack([net(x).squeeze(-1) for net in self.nets])

    def first(self, observation: Tensor, action: Tensor) -> Tensor:
        """The first value alone, `(B,)`."""
        return self.nets[0](torch.cat([observation, action], dim=-1)).squeeze(-1)


class ActorCritic(nn.Module, PyTorchModelHubMixin, library_name="fox-transformers", tags=["reinforcement-learning"]):
    """Actor and two critics for bounded continuous actions.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are those of `huggingface_hub`: config.json and safetensors.

    Args:
        observation_size: O.
        low, high: Bounds of the actions, A numbers each.
        stochastic: The actor gives mean and deviation of a squashed normal (SAC), else the action (TD3).
        width, blocks, skip: Of `mlp`.
    """

    def __init__(
        self, observation_size: int, low: Sequence[float], high: Sequence[float], *, stochastic: bool = False,
        width: int = 256, blocks: int = 0, skip: str = "multi",
    ):  # fmt: skip
        super().__init__()
        size = len(low)
        self.stochastic = stochastic
        self.low, self.high = (np.asarray(x, dtype=np.float32) for x in (low, high))
        self.actor = mlp(observation_size, 2 * size if stochastic else size, width, blocks, skip)
        self.critics = Critics(observation_size, size, width, blocks, skip)

    @classmethod
    def for_spaces(cls, observation: gym.Space, action: gym.Space, **options) -> ActorCritic:
        """The networks that fit an environment.

        Raises:
            ValueError: For spaces they have no form for.
        """
        if not isinstance(action, gym.spaces.Box) or len(action.shape) != 1 or not np.isfinite(action.high).all():
            raise ValueError(
                f"env_id must have bounded continuous actions; got {action}. For discrete ones see fox_rl.agents.pqn."
            )
        if not isinstance(observation, gym.spaces.Box) or len(observation.shape) != 1:
            raise ValueError(f"env_id must have vector observations; got {observation}.")
        low, high = ([float(x) for x in bound] for bound in (action.low, action.high))
        return cls(observation.shape[0], low, high, **options)

    def mode(self, observation: Tensor) -> Tensor:
        """Action without exploration in [-1, 1], `(B, A)`."""
        out = self.actor(observation)
        return (out.chunk(2, dim=-1)[0] if self.stochastic else out).tanh()

    def sample(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Squashed normal of SAC (arXiv:1801.01290, appendix C): actions `(B, A)` and log probabilities `(B,)`.

        The logarithm of the deviation is cut off to [-20, 2].
        """
        mean, log_std = self.actor(observation).chunk(2, dim=-1)
        log_std = log_std.clamp(-20.0, 2.0)
        noise = torch.randn_like(mean)
        before = mean + log_std.exp() * noise
        # log N(before) - log |d tanh|, with log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2 x)).
        log_prob = -0.5 * noise.square() - log_std - 0.5 * np.log(2 * np.pi)
        log_prob = log_prob - 2.0 * (np.log(2.0) - before - F.softplus(-2.0 * before))
        return before.tanh(), log_prob.sum(dim=-1)

    def scale(self, action: np.ndarray) -> np.ndarray:
        """From [-1, 1] to the bounds."""
        return self.low + 0.5 * (np.asarray(action) + 1.0) * (self.high - self.low)

    def unscale(self, action: np.ndarray) -> np.ndarray:
        """Inverse of `scale`."""
        return 2.0 * (np.asarray(action) - self.low) / (self.high - self.low) - 1.0

    @torch.no_grad()
    def act(self, observation: np.ndarray) -> np.ndarray:
        """Actions of the environment without exploration, `(B, O)` to `(B, A)`."""
        device = next(self.actor.parameters()).device
        return self.scale(self.mode(torch.as_tensor(observation, dtype=torch.float32, device=device)).cpu().numpy())
