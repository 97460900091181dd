"""Attention kernels of the Forgetting Transformer; needs torch, and Triton on a GPU."""

from .decode import GrowingSums, append_gates, empty_sums, forgetting_attention_decode
from .forgetting_attention import forgetting_attention
from .gates import GateSums, gate_sums
from .pruning import PruningStats
from .reference import forgetting_attention_reference

__all__ = [
    "GateSums",
    "GrowingSums",
    "PruningStats",
    "append_gates",
    "empty_sums",
    "forgetting_attention",
    "forgetting_attention_decode",
    "forgetting_attention_reference",
    "gate_sums",
]
