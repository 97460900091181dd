"""Targets of agents as pure functions over time-major arrays, `(T, n)`: T steps of n environments.

Time is in the names: `reward_t` follows the action at t, `value_tp1` is of the state it leads to. A termination ends
the return; a truncation only ends the data, so that the value of the last state stands for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def td_target(reward_t: Tensor, value_tp1: Tensor, terminated_t: Tensor, discount: float) -> Tensor:
    """`r + discount (1 - terminated) v`: truncated transitions bootstrap like any other. Any shape."""
    return reward_t + discount * value_tp1 * (~terminated_t).to(value_tp1.dtype)


def gae(
    reward_t: Tensor, value_t: Tensor, value_tp1: Tensor, terminated_t: Tensor, ended_t: Tensor, *,
    discount: float = 0.99, decay: float = 0.95,
) -> Tensor:  # fmt: skip
    """Generalized advantage estimates (arXiv:1506.02438), `(T, n)`.

        delta_t = r_t + discount (1 - terminated) v_tp1 - v_t;   A_t = delta_t + discount decay (1 - ended) A_tp1

    Args:
        reward_t: `(T, n)`.
        value_t: `(T, n)`, of the state in which the action was taken.
        value_tp1: `(T, n)`, of the state after it: at the end of an episode its last state, not the next one's first.
        terminated_t: `(T, n)` bool.
        ended_t: `(T, n)` bool, terminated or truncated.
        discount: gamma.
        decay: lambda.
    """
    delta_t = td_target(reward_t, value_tp1, terminated_t, discount) - value_t
    carry = (~ended_t).to(delta_t.dtype) * discount * decay
    advantage, last = torch.empty_like(delta_t), torch.zeros_like(delta_t[0])
    for t in reversed(range(len(delta_t))):
        last = delta_t[t] + carry[t] * last
        advantage[t] = last
    return advantage


def lambda_returns(
    reward_t: Tensor, value_tp1: Tensor, terminated_t: Tensor, ended_t: Tensor, *, discount: float, decay: float
) -> Tensor:
    """Q(lambda) as PQN uses it (arXiv:2407.04811), `(T, n)`.

        G_t = r_t + discount (1 - terminated) (decay G_tp1 + (1 - decay) v_tp1),   v_tp1 = max_a Q(s_tp1, a)

    and with v_tp1 alone in the brackets at the end of an episode or of the data.

    Args:
        reward_t: `(T, n)`.
        value_tp1: `(T, n)`, of the state after the action, as in `gae`.
        terminated_t: `(T, n)` bool.
        ended_t: `(T, n)` bool, terminated or truncated.
        discount: gamma.
        decay: lambda.
    """
    returns, following = torch.empty_like(reward_t), value_tp1[-1]
    for t in reversed(range(len(reward_t))):
        mixed = decay * following + (1 - decay) * value_tp1[t]
        mixed = torch.where(ended_t[t], value_tp1[t], mixed)
        following = returns[t] = td_target(reward_t[t], mixed, terminated_t[t], discount)
    return returns


def categorical_target(probabilities: Tensor, reward: Tensor, factor: Tensor, atoms: Tensor) -> Tensor:
    """Distribution of `reward + factor Z` on the atoms (C51, arXiv:1707.06887, algorithm 1), `(B, n)`.

    Every shifted atom is cut off to the range and shared out between its two neighbours in proportion to how near they
    are, which keeps the mean where nothing is cut off.

    Args:
        probabilities: Of Z, `(B, n)`.
        reward: `(B,)`.
        factor: `(B,)`: the discount, 0 after a termination.
        atoms: `(n,)`, increasing by equal steps, n at least 2.
    """
    step = (atoms[-1] - atoms[0]) / (len(atoms) - 1)
    shifted = (reward[:, None] + factor[:, None] * atoms).clamp(atoms[0], atoms[-1])
    place = ((shifted - atoms[0]) / step).clamp(0, len(atoms) - 1)
    lower = place.floor().long().clamp(max=len(atoms) - 2)
    share = place - lower  # of the upper neighbour
    target = torch.zeros_like(probabilities)
    target.scatter_add_(1, lower, probabilities * (1 - share))
    return target.scatter_add_(1, lower + 1, probabilities * share)
