"""Action values: encoder, trunk and head in one module that is saved, loaded and pushed to the Hub by itself."""

from __future__ import annotations

import gymnasium as gym
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from .networks import ImpalaEncoder, MultiSkipMLP, NatureEncoder, QHead, TokenReadout


class QNetwork(nn.Module, PyTorchModelHubMixin, library_name="fox-transformers", tags=["reinforcement-learning"]):
    """Observation to the values of A actions (of every atom of them, with `num_atoms`).

    `save_pretrained`, `from_pretrained` and `push_to_hub` are those of `huggingface_hub`: config.json and safetensors.

    Args:
        observation_size: Numbers of a vector, or channels of 84 x 84 pixels.
        num_actions: A.
        pixels: Whether observations are images.
        width, blocks, skip: Of `MultiSkipMLP`.
        encoder, encoder_width, readout: Of pixels; see `networks`.
        num_atoms: 1 for values, 51 for the distribution of C51 (arXiv:1707.06887).
        v_min, v_max: Lowest and highest atom.
        dueling, noisy: Of `QHead`.
    """

    def __init__(
        self, observation_size: int, num_actions: int, *, pixels: bool = False, width: int = 128, blocks: int = 1,
        skip: str = "multi", encoder: str = "impala", encoder_width: int = 1, readout: str = "gap", num_atoms: int = 1,
        v_min: float = -10.0, v_max: float = 10.0, dueling: bool = False, noisy: bool = False,
    ):  # fmt: skip
        super().__init__()
        if num_atoms < 1 or v_min >= v_max:
            raise ValueError(
                f"num_atoms must be at least 1 and v_min below v_max; got {num_atoms}, {v_min} and {v_max}."
            )
        self.num_actions, self.num_atoms = num_actions, num_atoms
        self.encoder = self.readout = None
        size = observation_size
        if pixels:
            if encoder not in ("impala", "nature"):
                raise ValueError(f"encoder must be impala or nature; got {encoder!r}.")
            encoder_class, side = (ImpalaEncoder, 11) if encoder == "impala" else (NatureEncoder, 7)
            self.encoder = encoder_class(observation_size, encoder_width)
            shape = (self.encoder.out_channels, side, side)
            self.readout = TokenReadout(shape, None if readout == "soft_moe" else 512, readout)
            size = self.readout.out_dim
        self.trunk = MultiSkipMLP(size, width, width, blocks, skip=skip)
        self.activation = nn.ReLU()
        self.head = QHead(width, num_actions, num_atoms, dueling=dueling, noisy=noisy)
        self.register_buffer("atoms", torch.linspace(v_min, v_max, num_atoms), persistent=False)

    @classmethod
    def for_spaces(cls, observation: gym.Space, action: gym.Space, **options) -> QNetwork:
        """The network that fits an environment.

        Raises:
            ValueError: For spaces it has no form for.
        """
        if not isinstance(action, gym.spaces.Discrete):
            raise ValueError(
                f"env_id must have discrete actions; got {action}. For continuous ones see fox_rl.agents.td3."
            )
        if not isinstance(observation, gym.spaces.Box) or len(observation.shape) not in (1, 3):
            raise ValueError(f"env_id must have vector or pixel observations; got {observation}.")
        pixels = len(observation.shape) == 3
        return cls(int(observation.shape[0]), int(action.n), pixels=pixels, **options)

    def features(self, observation: Tensor) -> Tensor:
        """What the head reads, `(B, width)`."""
        x = observation.float() if self.encoder is None else F.relu(self.readout(self.encoder(observation)))
        return self.activation(self.trunk(x))

    def forward(self, observation: Tensor) -> Tensor:
        """`(B, A)` values, or `(B, A, num_atoms)` logits."""
        features = self.features(observation)
        with torch.autocast(features.device.type, enabled=False):
            # Values of actions differ by less than bfloat16 resolves.
            out = self.head(features.to(self.atoms.dtype))
        return out.squeeze(-1) if self.num_atoms == 1 else out

    def values(self, observation: Tensor) -> Tensor:
        """`(B, A)` values, of a distribution its mean."""
        out = self(observation)
        return out if self.num_atoms == 1 else out.softmax(dim=-1) @ self.atoms
