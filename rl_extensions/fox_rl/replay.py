"""Replay: uniform and prioritized buffers, and returns over several steps."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Replay:
    """The last transitions, drawn uniformly. A row says `terminated`, not `ended`: truncated ones bootstrap.

    Memory is taken as it fills.

    Args:
        capacity: Transitions kept.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1; got {capacity}.")
        self.capacity, self.size, self.next = capacity, 0, 0
        self.data: dict[str, Tensor] = {}

    def add(self, **rows: np.ndarray) -> np.ndarray:
        """Append some transitions, `(count, ...)` each; returns their places."""
        count = len(next(iter(rows.values())))
        places = (self.next + np.arange(count)) % self.capacity
        for name, values in rows.items():
            if name not in self.data:
                tensor = torch.as_tensor(np.asarray(values))
                dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
                # Pages of zeros cost memory only once they are written.
                self.data[name] = torch.zeros(self.capacity, *tensor.shape[1:], dtype=dtype)
            self.data[name].numpy()[places] = values  # the same memory; NumPy writes single rows faster
        self.next = (self.next + count) % self.capacity
        self.size = min(self.size + count, self.capacity)
        return places

    def sample(self, count: int) -> dict[str, Tensor]:
        """Transitions drawn with replacement, `(count, ...)` each."""
        return self.rows(torch.randint(self.size, (count,)))

    def rows(self, places: Tensor) -> dict[str, Tensor]:
        """The transitions in these places."""
        return {name: values[places] for name, values in self.data.items()}

    def state_dict(self) -> dict[str, Any]:
        """What is filled of the buffer."""
        filled = {name: values[: self.size].clone() for name, values in self.data.items()}
        return {"data": filled, "size": self.size, "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.size, self.next = state["size"], state["next"]
        for name, values in state["data"].items():
            self.data[name] = torch.zeros(self.capacity, *values.shape[1:], dtype=values.dtype)
            self.data[name][: self.size] = values


class SumTree:
    """Non-negative numbers in `capacity` places, with their sum, and the search for a prefix sum in O(log capacity).

    Args:
        capacity: Places.
    """

    def __init__(self, capacity: int):
        self.num_leaves = 1 << max(0, (capacity - 1).bit_length())
        self.nodes = np.zeros(2 * self.num_leaves)  # node i has the children 2 i and 2 i + 1, the root is 1

    @property
    def total(self) -> float:
        """Sum of all."""
        return float(self.nodes[1])

    def values(self, places: np.ndarray) -> np.ndarray:
        """The numbers in these places."""
        return self.nodes[self.num_leaves + places]

    def update(self, places: np.ndarray, values: np.ndarray) -> None:
        """Set the numbers in these places."""
        self.nodes[self.num_leaves + places] = values
        parents = np.unique((self.num_leaves + places) // 2)
        while parents[0] >= 1:
            self.nodes[parents] = self.nodes[2 * parents] + self.nodes[2 * parents + 1]
            parents = np.unique(parents // 2)

    def find(self, mass: np.ndarray) -> np.ndarray:
        """For each mass in [0, total) the first place at which the running sum exceeds it."""
        node, mass = np.ones(len(mass), dtype=np.int64), np.array(mass, dtype=float)
        while node[0] < self.num_leaves:
            left = self.nodes[2 * node]
            goes_right = mass >= left
            mass -= np.where(goes_right, left, 0.0)
            node = 2 * node + goes_right
        return node - self.num_leaves


class PrioritizedReplay(Replay):
    """Proportional prioritized replay (arXiv:1511.05952).

        P(i) = p_i^alpha / sum_k p_k^alpha,    weight_i = (size P(i))^-beta / max_j weight_j over the batch

    A batch is drawn with one transition from each of `count` equal parts of the sum. New transitions get the largest
    priority so far.

    Args:
        capacity: Transitions kept.
        alpha: 0 is uniform; 0.5 in Rainbow.
        epsilon: Added to priorities, so that none is never drawn again.
    """

    def __init__(self, capacity: int, alpha: float = 0.5, epsilon: float = 1e-6):
        super().__init__(capacity)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1]; got {alpha}.")
        self.alpha, self.epsilon = alpha, epsilon
        self.tree, self.largest = SumTree(capacity), 1.0

    def add(self, **rows: np.ndarray) -> np.ndarray:
        """As in `Replay`."""
        places = super().add(**rows)
        self.tree.update(places, np.full(len(places), self.largest**self.alpha))
        return places

    def sample(self, count: int, beta: float = 1.0) -> dict[str, Tensor]:
        """As in `Replay`, with `weight` `(count,)` and `place` `(count,)` for `update`."""
        part = self.tree.total / count
        mass = (np.arange(count) + np.random.random(count)) * part
        places = np.minimum(self.tree.find(np.minimum(mass, self.tree.total * (1 - 1e-12))), self.size - 1)
        weight = (self.size * self.tree.values(places) / self.tree.total) ** -beta
        rows = self.rows(torch.as_tensor(places))
        rows["weight"] = torch.as_tensor(weight / weight.max(), dtype=torch.float32)
        rows["place"] = torch.as_tensor(places)
        return rows

    def update(self, places: Tensor, priorities: Tensor) -> None:
        """Give transitions new priorities, e.g. the absolute error of each, `(count,)` at least 0."""
        values = priorities.detach().cpu().double().numpy() + self.epsilon
        self.largest = max(self.largest, float(values.max()))
        self.tree.update(places.numpy(), values**self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """As in `Replay`, with the priorities."""
        return super().state_dict() | {
            "priorities": self.tree.values(np.arange(self.size)), "largest": self.largest,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        super().load_state_dict(state)
        self.largest = state["largest"]
        if self.size:
            self.tree.update(np.arange(self.size), state["priorities"])


class MultiStep:
    """Turns single steps of n environments into transitions over up to `steps` of them.

        R = sum_{k < m} discount^k r_{t+k},   following = s_{t+m},   factor = discount^m,   m = steps

    and m smaller for the last steps of an episode. The target is `R + factor (1 - terminated) v(following)`.

    Args:
        num_envs: n.
        steps: 1 for single steps, 3 in Rainbow.
        discount: gamma.

    Attributes:
        envs: Environment of each of the rows that were returned last, ascending.
    """

    def __init__(self, num_envs: int, steps: int, discount: float):
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}.")
        self.steps, self.discount = steps, discount
        self.envs = np.zeros(0, dtype=np.int64)
        self.open: list[deque] = [deque() for _ in range(num_envs)]

    def add(
        self, observation: np.ndarray, action: np.ndarray, reward: np.ndarray, following: np.ndarray,
        terminated: np.ndarray, ended: np.ndarray,
    ) -> dict[str, np.ndarray] | None:  # fmt: skip
        """One step of every environment, `(n, ...)` each; returns the rows that are complete now, or None."""
        rows: list[tuple] = []
        envs: list[int] = []
        for env, waiting in enumerate(self.open):
            waiting.append((observation[env], action[env], float(reward[env])))
            while waiting and (len(waiting) == self.steps or ended[env]):
                total = sum(self.discount**k * r for k, (_, _, r) in enumerate(waiting))
                factor = self.discount ** len(waiting)
                first = waiting.popleft()
                rows.append((first[0], first[1], total, following[env], terminated[env], factor))
                envs.append(env)
        self.envs = np.array(envs, dtype=np.int64)
        if not rows:
            return None
        names = ("observation", "action", "reward", "following", "terminated", "factor")
        return {name: np.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
