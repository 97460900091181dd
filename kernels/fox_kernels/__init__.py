"""Attention kernels of the Forgetting Transformer; needs torch, and Triton on a GPU."""

from .decode import GrowingSums, append_gates, empty_sums, forgetting_attention_decode
from .forgetting_attention import forgetting_attention
from .gates import GateSums, gate_sums
from .pruning import PruningStats
from .reference import forgetting_attention_reference
from .varlen import forgetting_attention_varlen

__all__ = [
    "GateSums",
    "GrowingSums",
    "PruningStats",
    "append_gates",
    "empty_sums",
    "forgetting_attention",
    "forgetting_attention_decode",
    "forgetting_attention_reference",
    "forgetting_attention_varlen",
    "gate_sums",
]
