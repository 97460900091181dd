"""Memories to compare `FoxPolicyModel` with: a GRU, and a transformer that sees a fixed number of steps.

Both have the interface of `FoxPolicyModel` (`forward` on windows with `is_init`, `act` with a cache), the same encoder
of observations and the same heads, so that an agent runs with any of them.

Letters: B environments, T steps, S cached and new steps, E hidden size, H heads, W window.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from .networks import head
from .policy import FoxPolicyOutput, ObservationEncoder

MEMORIES = ("gru", "window")


class RivalPolicy(nn.Module, PyTorchModelHubMixin, library_name="fox-transformers", tags=["reinforcement-learning"]):
    """Observation encoder, a memory that is no FoX, policy head and value head.

    Args:
        memory: gru, or window: attention of each layer to the last `window` steps of the episode.
        observation_type, observation_size, action_type, action_size: As in `FoxPolicyConfig`.
        hidden_size: E.
        num_layers: Layers of the memory.
        num_heads: window only.
        window: window only: W, the step itself included.
        intermediate_ratio: window only: width of the MLP in E; at 3.5 a layer has the weights of a FoX (Pro) layer
            with an MLP of 2 E.
        encoder, encoder_width: Of pixels.
    """

    def __init__(
        self, memory: str, *, observation_type: str = "vector", observation_size: int = 1,
        action_type: str = "discrete", action_size: int = 2, hidden_size: int = 64, num_layers: int = 2,
        num_heads: int = 4, window: int = 64, intermediate_ratio: float = 3.5, encoder: str = "impala",
        encoder_width: int = 1,
    ):  # fmt: skip
        super().__init__()
        if memory not in MEMORIES:
            raise ValueError(f"memory must be one of {', '.join(MEMORIES)}; got {memory!r}. For fox: FoxPolicyModel.")
        if memory == "window" and (window < 1 or hidden_size % num_heads):
            raise ValueError(
                f"window must be at least 1 and hidden_size a multiple of num_heads {num_heads}; got {window} and "
                f"{hidden_size}."
            )
        self.memory = memory
        sizes = SimpleNamespace(
            observation_type=observation_type, observation_size=observation_size, hidden_size=hidden_size,
            encoder=encoder, encoder_width=encoder_width,
        )  # fmt: skip
        self.encoder = ObservationEncoder(sizes)
        if memory == "gru":
            self.trunk = GruTrunk(hidden_size, num_layers)
        else:
            self.trunk = WindowTrunk(
                hidden_size, num_layers, num_heads, window, round(intermediate_ratio * hidden_size)
            )
        self.policy_head, self.value_head = head(hidden_size, action_size), head(hidden_size, 1, gain=1.0)
        self.log_std = nn.Parameter(torch.zeros(action_size)) if action_type == "continuous" else None

    def forward(self, observations: Tensor, is_init: Tensor | None = None, cache: dict | None = None):
        """As `FoxPolicyModel.forward`; with a `cache` the steps follow those in it and change it.

        Args:
            observations: `(B, T, ...)`.
            is_init: `(B, T)` bool, first steps of episodes, which see nothing before them; None if there are none.
            cache: From `new_cache`.
        """
        if is_init is None:
            is_init = torch.zeros(observations.shape[:2], dtype=torch.bool, device=observations.device)
        hidden = self.trunk(self.encoder(observations), is_init, {} if cache is None else cache)
        return FoxPolicyOutput(
            logits=self.policy_head(hidden), value=self.value_head(hidden).squeeze(-1), log_std=self.log_std
        )

    def new_cache(self) -> dict[str, Tensor]:
        """Nothing seen so far."""
        return {}

    @torch.no_grad()
    def act(
        self, observation: Tensor, is_init: Tensor, cache: dict, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `FoxPolicyModel.act`."""
        outputs = self(observation[:, None], is_init[:, None], cache)
        distribution = outputs.distribution()
        action = distribution.mode if deterministic else distribution.sample()
        return action[:, 0], distribution.log_prob(action)[:, 0], outputs.value[:, 0]


class GruTrunk(nn.Module):
    """Layers of GRU whose state is set to zero where an episode begins."""

    def __init__(self, hidden_size: int, num_layers: int):
        super().__init__()
        self.gru = nn.GRU(hidden_size, hidden_size, num_layers, batch_first=True)

    def forward(self, x: Tensor, is_init: Tensor, cache: dict[str, Tensor]) -> Tensor:
        """`(B, T, E)` to the same; the state is `cache["state"]`, `(layers, B, E)`."""
        state = cache.get("state")
        if state is None:
            state = x.new_zeros(self.gru.num_layers, len(x), x.shape[2])
        # Runs of steps in which no environment begins an episode go through the GRU at once.
        starts = sorted({0, *is_init.any(dim=0).nonzero().flatten().tolist()})
        parts = []
        for begin, end in zip(starts, [*starts[1:], x.shape[1]], strict=True):
            state = state * (~is_init[:, begin])[None, :, None]
            part, state = self.gru(x[:, begin:end], state)
            parts.append(part)
        cache["state"] = state
        return torch.cat(parts, dim=1)


class WindowTrunk(nn.Module):
    """Pre-norm transformer whose layers attend to the last W steps, with a learned bias for each distance."""

    def __init__(self, hidden_size: int, num_layers: int, num_heads: int, window: int, intermediate_size: int):
        super().__init__()
        self.window = window
        self.layers = nn.ModuleList(
            WindowLayer(hidden_size, num_heads, window, intermediate_size) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size)

    def forward(self, x: Tensor, is_init: Tensor, cache: dict[str, Tensor]) -> Tensor:
        """`(B, T, E)` to the same; the cache keeps keys, values and episode numbers of the last W - 1 steps."""
        episode = is_init.long().cumsum(dim=1)
        if "episode" in cache:
            episode = torch.cat([cache["episode"], cache["episode"][:, -1:] + episode], dim=1)
        steps, total = x.shape[1], episode.shape[1]
        distance = torch.arange(total - steps, total, device=x.device)[:, None] - torch.arange(total, device=x.device)
        seen = (distance >= 0) & (distance < self.window)
        seen = seen & (episode[:, total - steps :, None] == episode[:, None])  # (B, T, S)
        for number, layer in enumerate(self.layers):
            x = layer(x, seen, distance, cache, f"{number}")
        kept = max(1, self.window - 1)
        for name in cache:
            cache[name] = cache[name][:, max(0, cache[name].shape[1] - kept) :]
        cache["episode"] = episode[:, max(0, total - kept) :]
        return self.norm(x)


class WindowLayer(nn.Module):
    """Attention and MLP of `WindowTrunk`."""

    def __init__(self, hidden_size: int, num_heads: int, window: int, intermediate_size: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.mlp_norm = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, window))
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, intermediate_size), nn.GELU(), nn.Linear(intermediate_size, hidden_size)
        )

    def forward(self, x: Tensor, seen: Tensor, distance: Tensor, cache: dict[str, Tensor], name: str) -> Tensor:
        queries, keys, values = self.qkv(self.norm(x)).chunk(3, dim=-1)
        key_values = torch.cat([keys, values], dim=-1)
        if name in cache:
            key_values = torch.cat([cache[name], key_values], dim=1)
        cache[name] = key_values
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (queries, *key_values.chunk(2, -1)))
        bias = self.distance_bias[:, distance.clamp(0, self.distance_bias.shape[1] - 1)]  # (H, T, S)
        bias = bias.masked_fill(~seen[:, None], -torch.inf)  # (B, H, T, S)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))
