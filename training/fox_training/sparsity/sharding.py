"""Whole tensors from the parts of FSDP2 and back. A mask is made from the whole layer, one layer at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """All of a tensor on every process.

    Args:
        tensor: Plain tensor or DTensor.
        like: If given, `tensor` is this process's part of something laid out as this DTensor.
    """
    if like is not None and is_sharded(like):
        from torch.distributed.tensor import DTensor

        # uint8, as not every backend gathers bool.
        parts = DTensor.from_local(
            tensor.to(torch.uint8), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
        return parts.full_tensor().bool()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a plain tensor that all of them hold, cut as `like` is. Needs no communication."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing torch.distributed for those who do not use it."""
    return hasattr(tensor, "full_tensor")
