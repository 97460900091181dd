"""Networks of agents: encoders of pixels, ways to read them out, SoftMoE, and the multi-skip MLP.

Letters: B batch, C channels, (h, w) positions of the encoded image, T = h w tokens, D token size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NatureEncoder(nn.Module):
    """Three convolutions of DQN (Mnih et al., Nature 2015): 32-64-64 channels, kernels 8-4-3, strides 4-2-1.

    `(B, C, 84, 84)` to `(B, 64, 7, 7)`. Takes uint8 pixels (divided by 255) or floats.

    Args:
        in_channels: Stacked frames times colours.
        width: Factor on the number of channels.
    """

    def __init__(self, in_channels: int = 4, width: int = 1):
        super().__init__()
        sizes = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
        layers, before = [], in_channels
        for channels, kernel, stride in sizes:
            layers += [nn.Conv2d(before, channels * width, kernel, stride), nn.ReLU()]
            before = channels * width
        self.layers = nn.Sequential(*layers)
        self.out_channels = before

    def forward(self, observation: Tensor) -> Tensor:
        return self.layers(as_floats(observation))


class ImpalaEncoder(nn.Module):
    """Residual encoder of IMPALA (arXiv:1802.01561), `(B, C, 84, 84)` to `(B, 32, 11, 11)`: 16-32-32 channels.

    A stack is a 3 x 3 convolution, a 3 x 3 max-pool of stride 2, and two residual blocks of two convolutions each;
    relu at the end. Xavier-uniform weights, zero biases, as in Dopamine.

    Args:
        in_channels: Stacked frames times colours.
        width: Factor on the number of channels.
    """

    def __init__(self, in_channels: int = 4, width: int = 1):
        super().__init__()
        stacks, before = [], in_channels
        for channels in (16, 32, 32):
            stacks.append(ImpalaStack(before, channels * width))
            before = channels * width
        self.stacks = nn.ModuleList(stacks)
        self.out_channels = before
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, observation: Tensor) -> Tensor:
        x = as_floats(observation)
        for stack in self.stacks:
            x = stack(x)
        return F.relu(x)


class ImpalaStack(nn.Module):
    """One stack of `ImpalaEncoder`."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.first(x), 3, stride=2, padding=1)
        for first, second in self.blocks:
            x = x + second(F.relu(first(F.relu(x))))
        return x


def as_floats(observation: Tensor) -> Tensor:
    """uint8 pixels to [0, 1]; floats as they are."""
    return observation.float() / 255.0 if observation.dtype == torch.uint8 else observation


def expert_slots(num_tokens: int, num_experts: int, capacity: float = 1.0) -> int:
    """Slots of each expert, `ceil(num_tokens capacity / num_experts)`: the rule of arXiv:2402.08609."""
    return max(1, math.ceil(num_tokens * capacity / num_experts))


class SoftMoE(nn.Module):
    """Soft mixture of experts (arXiv:2308.00951) over the tokens of one observation, `(B, T, D)` to `(B, T, D)`.

        logits = X Phi, (T, n p)
        slots = softmax over tokens(logits)^T X
        Y = softmax over slots(logits) experts(slots)

    Expert i maps its p slots through `W2 relu(W1 s)`, D to `hidden` to D (arXiv:2402.08609). Phi is LeCun normal, the
    experts Xavier uniform with zero biases.

    Not causal: every slot mixes all tokens, the later ones too. Along time it lets each token read the future, so it
    must never stand in a language model; it is made for the positions of an image.

    Args:
        dim: D.
        hidden: Width of an expert.
        num_experts: n.
        slots_per_expert: p, see `expert_slots`.
        normalize: Use l2-normalized tokens and Phi with a learned scale; published as helpful for large D only.
    """

    def __init__(self, dim: int, hidden: int, num_experts: int, slots_per_expert: int, normalize: bool = False):
        super().__init__()
        for name, value in (("dim", dim), ("hidden", hidden), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert must be at least 1; got {slots_per_expert}. Use expert_slots(...).")
        self.num_experts, self.slots_per_expert = num_experts, slots_per_expert
        self.slot_embeddings = nn.Parameter(torch.empty(dim, num_experts * slots_per_expert))  # Phi
        self.scale = nn.Parameter(torch.ones(())) if normalize else None
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b1 = nn.Parameter(torch.zeros(num_experts, 1, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.b2 = nn.Parameter(torch.zeros(num_experts, 1, dim))
        nn.init.trunc_normal_(self.slot_embeddings, std=1.0, a=-2.0, b=2.0)
        with torch.no_grad():
            # LeCun: variance 1 / D. A normal cut off at two deviations has a deviation of 0.8796.
            self.slot_embeddings.mul_(dim**-0.5 / 0.87962566103423978)
        for weight in (self.w1, self.w2):
            for expert in weight:
                nn.init.xavier_uniform_(expert)

    def weights(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Dispatch and combine weights of `(B, T, D)`: `(B, T, n p)` each, summing to 1 over T and over n p."""
        phi = self.slot_embeddings
        if self.scale is not None:
            tokens, phi = F.normalize(tokens, dim=-1), self.scale * F.normalize(phi, dim=0)
        logits = tokens @ phi
        return logits.softmax(dim=1), logits.softmax(dim=2)

    def forward(self, tokens: Tensor) -> Tensor:
        dispatch, combine = self.weights(tokens)
        slots = dispatch.transpose(1, 2) @ tokens  # (B, n p, D)
        slots = slots.view(len(tokens), self.num_experts, self.slots_per_expert, -1)
        hidden = F.relu(slots @ self.w1 + self.b1)
        return combine @ (hidden @ self.w2 + self.b2).flatten(1, 2)


READOUTS = ("flatten", "gap", "per_conv_sum", "per_conv_mean", "soft_moe")


class TokenReadout(nn.Module):
    """From an encoded image `(B, C, h, w)` to features `(B, out_dim)`, without activation at the end.

        flatten        one dense layer over all C h w numbers: for IMPALA 95 % of all weights of the agent
        gap            mean over the positions, then a dense layer (arXiv:2505.17749)
        per_conv_sum   positions are tokens of size C: one dense layer for all, relu, then the sum (arXiv:2410.01930)
        per_conv_mean  the same with the mean
        soft_moe       SoftMoE over these tokens, flattened: `out_dim` is C h w, `hidden` the width of an expert

    The relu before the sum is our reading of the paper's description; the code of that variant is not public.

    Args:
        in_shape: (C, h, w).
        out_dim: Features; None with soft_moe.
        mode: One of the above.
        scale: Factor on `out_dim` or on the width of an expert.
        num_experts: soft_moe only.
        capacity: soft_moe only, see `expert_slots`; 1.0 as published, 0.1 does as well.
        hidden: soft_moe only: width of an expert, 512 as published.
    """

    def __init__(
        self, in_shape: tuple[int, int, int], out_dim: int | None = 512, mode: str = "gap", *, scale: int = 1,
        num_experts: int = 1, capacity: float = 1.0, hidden: int = 512,
    ):  # fmt: skip
        super().__init__()
        channels, height, width = in_shape
        if mode not in READOUTS:
            raise ValueError(f"mode must be one of {', '.join(READOUTS)}; got {mode!r}.")
        if (mode == "soft_moe") != (out_dim is None):
            raise ValueError(f"out_dim must be None for soft_moe and a number else; got {out_dim} with mode {mode}.")
        self.mode, self.in_shape = mode, in_shape
        if mode == "soft_moe":
            slots = expert_slots(height * width, num_experts, capacity)
            self.moe = SoftMoE(channels, hidden * scale, num_experts, slots)
            self.out_dim = channels * height * width
            return
        self.out_dim = out_dim * scale
        self.dense = nn.Linear(channels * height * width if mode == "flatten" else channels, self.out_dim)
        nn.init.xavier_uniform_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    @staticmethod
    def tokens(encoded: Tensor) -> Tensor:
        """`(B, C, h, w)` to `(B, T, C)`, one token for each position in row order."""
        return encoded.flatten(2).transpose(1, 2)

    def forward(self, encoded: Tensor) -> Tensor:
        if tuple(encoded.shape[1:]) != tuple(self.in_shape):
            raise ValueError(f"encoded must be (batch, {self.in_shape}); got {tuple(encoded.shape)}.")
        if self.mode == "flatten":
            return self.dense(encoded.flatten(1))
        if self.mode == "gap":
            return self.dense(encoded.mean(dim=(2, 3)))
        tokens = self.tokens(encoded)
        if self.mode == "soft_moe":
            return self.moe(tokens).flatten(1)
        projected = F.relu(self.dense(tokens))
        return projected.sum(dim=1) if self.mode == "per_conv_sum" else projected.mean(dim=1)


SKIPS = ("multi", "residual", "none")


class MultiSkipMLP(nn.Module):
    """Deep MLP whose gradients survive (arXiv:2506.15544): the projected input is added after every residual block.

        h0 = LN(W_in x);   x_0 = h0;   x_{l+1} = x_l + LN(W2 relu(LN(W1 relu(x_l)))) + h0;   y = LN(W_out x_L)

    No activation after `h0` and `y`, coefficient 1 on every skip. Orthogonal weights with gain sqrt(2), zero biases.
    `skip="residual"` leaves out the `+ h0`; `skip="none"` is the plain net of the same depth that the paper compares
    with, `2 blocks + 2` linear layers, each but the last followed by LN and relu.

    Args:
        in_dim: Size of the input, e.g. 3136 for `NatureEncoder` flattened.
        width: Of the hidden layers; 512 to 5120 in the paper.
        out_dim: Features, to which relu and a `head` are applied. The sizes in the paper's table 1 are those of
            `out_dim = width`; its code has 512 throughout.
        blocks: L; 1, 3, 5, 10 in the paper.
        skip: multi, residual or none.
        norm: LayerNorm after every linear layer, or none at all.
    """

    def __init__(self, in_dim: int, width: int, out_dim: int, blocks: int, *, skip: str = "multi", norm: bool = True):
        super().__init__()
        if skip not in SKIPS:
            raise ValueError(f"skip must be one of {', '.join(SKIPS)}; got {skip!r}.")
        if blocks < 0:
            raise ValueError(f"blocks must be at least 0; got {blocks}.")
        make_norm: Callable[[int], nn.Module] = nn.LayerNorm if norm else lambda _: nn.Identity()
        self.skip = skip
        self.project = nn.Sequential(dense(in_dim, width), make_norm(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), dense(width, width), make_norm(width), nn.ReLU(), dense(width, width), make_norm(width)
            )
            for _ in range(blocks)
        )
        self.out = nn.Sequential(dense(width, out_dim), make_norm(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_dim)` to `(B, out_dim)`."""
        x = first = self.project(x)
        for block in self.blocks:
            x = block(x) if self.skip == "none" else x + block(x)
            if self.skip == "multi":
                x = x + first
        return self.out(F.relu(x) if self.skip == "none" else x)


def dense(in_dim: int, out_dim: int, gain: float = math.sqrt(2.0)) -> nn.Linear:
    """Linear layer with orthogonal weight of this gain and zero bias."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def head(in_dim: int, out_dim: int, gain: float = 0.01) -> nn.Linear:
    """Last layer of an agent: gain 0.01 for action values and policies, 1.0 for the value of a critic."""
    return dense(in_dim, out_dim, gain)


class NoisyLinear(nn.Module):
    """Linear layer with learned, factorised noise (arXiv:1706.10295): `w = mu + sigma f(e_out) f(e_in)`.

    `f(x) = sign(x) sqrt(|x|)`. New noise at every forward pass in training mode, none in evaluation mode.

    Args:
        in_dim, out_dim: As of `nn.Linear`.
        sigma: Noise at the start, times `in_dim ** -0.5`; 0.5 as published.
    """

    def __init__(self, in_dim: int, out_dim: int, sigma: float = 0.5):
        super().__init__()
        bound = in_dim**-0.5
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_dim).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((out_dim, in_dim), sigma * bound))
        self.bias_sigma = nn.Parameter(torch.full((out_dim,), sigma * bound))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.weight, self.bias)
        noise_in, noise_out = (
            n.sign() * n.abs().sqrt() for n in (torch.randn_like(self.weight[0]), torch.randn_like(self.bias))
        )
        weight = self.weight + self.weight_sigma * torch.outer(noise_out, noise_in)
        return F.linear(x, weight, self.bias + self.bias_sigma * noise_out)


class QHead(nn.Module):
    """Features `(B, width)` to logits or values `(B, A, num_atoms)`.

    With `dueling` (arXiv:1511.06581) value and advantage have a hidden layer and an output each, and the result is
    `value + advantage - mean over actions of advantage`, atom by atom as in Rainbow (arXiv:1710.02298).

    Args:
        width: Of the features and of the hidden layers.
        num_actions: A.
        num_atoms: 1 for plain values.
        dueling: See above; else one linear layer.
        noisy: Noisy layers throughout the head.
    """

    def __init__(
        self, width: int, num_actions: int, num_atoms: int = 1, *, dueling: bool = False, noisy: bool = False
    ):
        super().__init__()
        self.num_actions, self.num_atoms, self.dueling = num_actions, num_atoms, dueling

        def last(out_dim: int) -> nn.Module:
            return NoisyLinear(width, out_dim) if noisy else head(width, out_dim)

        def stream(out_dim: int) -> nn.Module:
            hidden = NoisyLinear(width, width) if noisy else dense(width, width)
            return nn.Sequential(hidden, nn.ReLU(), last(out_dim))

        self.advantage = (stream if dueling else last)(num_actions * num_atoms)
        self.value = stream(num_atoms) if dueling else None

    def forward(self, features: Tensor) -> Tensor:
        advantage = self.advantage(features).view(-1, self.num_actions, self.num_atoms)
        if self.value is None:
            return advantage
        return self.value(features)[:, None] + advantage - advantage.mean(dim=1, keepdim=True)
