"""Floating-point operations of a training step, and the share of the device's peak that they reach (MFU)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dense bf16 tensor-core peak in TFLOP/s of one device, from NVIDIA's data sheets ("without sparsity").
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4, "GH200": 989.4, "A100": 312.0, "L40S": 362.0}

FORMULA = (
    "6 N + 6 layers T heads D per token: two operations per weight and token forward and four backward, N the weights "
    "without the input embedding; attention as if every query saw half of the T keys, whatever pruning skips"
)
"""What `flops_per_token` counts, for reports."""


def flops_per_token(model: PreTrainedModel, length: int) -> float:
    """Operations of forward and backward pass per token in rows of `length` tokens; see `FORMULA`.

    Operations that activation checkpointing repeats are not counted, nor is pruned attention left out: the same number
    for every model of this shape, so that MFU compares times.

    Args:
        model: A causal language model of Transformers, not sharded.
        length: T, tokens in a row.
    """
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    weights = sum(p.numel() for p in model.parameters())
    # A tied embedding is the output layer as well.
    if not getattr(config, "tie_word_embeddings", False):
        weights -= model.get_input_embeddings().weight.numel()
    return 6.0 * weights + 6.0 * config.num_hidden_layers * length * heads * head_dim


def peak_flops(device_name: str) -> float | None:
    """Peak of one device in FLOP/s by its name, as `torch.cuda.get_device_name` gives it; None if it is not known."""
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in device_name), None)
