"""Small environments that ask for memory, as Gymnasium environments."""

from __future__ import annotations

import gymnasium as gym
import numpy as np


class RepeatFirst(gym.Env):
    """Say at every step which suit the first card had: the rule of POPGym's RepeatFirst (arXiv:2303.01859).

    The observation is a suit, 0 to 3, plus 4 in the first step of an episode, drawn anew at every step. An action is a
    suit; each right one gives `1 / length`, each wrong one the negative. Without memory the return is -0.5 at best on
    average, with it 1.

    Args:
        length: Steps of an episode; 52 with one deck.
    """

    def __init__(self, length: int = 52):
        self.length = length
        self.observation_space = gym.spaces.Discrete(8)
        self.action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Deal the first card."""
        super().reset(seed=seed)
        self._step = 0
        self._first = int(self.np_random.integers(4))
        return np.int64(self._first + 4), {}

    def step(self, action):
        """Score the answer and deal the next card."""
        reward = (1.0 if int(action) == self._first else -1.0) / self.length
        self._step += 1
        return np.int64(self.np_random.integers(4)), reward, self._step >= self.length, False, {}


def register_environments() -> None:
    """Make `fox_rl/RepeatFirst-v0` known to `gymnasium.make`."""
    if "fox_rl/RepeatFirst-v0" not in gym.registry:
        gym.register("fox_rl/RepeatFirst-v0", entry_point=RepeatFirst)
