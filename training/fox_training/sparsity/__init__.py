"""Training with masked weights: gradual magnitude pruning, fixed random masks and RigL, for any PyTorch optimizer."""

from .allocation import ALLOCATIONS, erk_sparsities, kept_weights, uniform_sparsities
from .config import DEFAULT_EXCLUDE, SparsityConfig
from .masks import MaskedPruner, sparsify
from .rules import RULES
from .schedules import SparsitySchedule

__all__ = [
    "ALLOCATIONS",
    "DEFAULT_EXCLUDE",
    "RULES",
    "MaskedPruner",
    "SparsityConfig",
    "SparsitySchedule",
    "erk_sparsities",
    "kept_weights",
    "sparsify",
    "uniform_sparsities",
]
