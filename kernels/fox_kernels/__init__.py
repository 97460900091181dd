"""Attention kernels of the Forgetting Transformer; needs torch, and Triton on a GPU."""

from .forgetting_attention import forgetting_attention
from .pruning import PruningStats
from .reference import forgetting_attention_reference

__all__ = ["PruningStats", "forgetting_attention", "forgetting_attention_reference"]
