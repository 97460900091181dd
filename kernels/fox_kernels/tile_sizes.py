"""Tile sizes of the Triton kernels, by head dimension, element size and architecture.

Chosen so that no bfloat16 kernel spills registers inside a loop on sm_80, sm_90 and sm_100, but for the rows that say
what the spills bought on a measured machine; tests/test_kernels_compile.py holds the list. Any other GPU takes the
sizes of sm_80. float32 is for checking: beyond 64 channels it spills.
"""

from functools import lru_cache
from typing import NamedTuple

import torch


class TileSizes(NamedTuple):
    """`block_t` queries by `block_s` keys, `num_warps` warps, `num_stages` tiles of keys (or queries) in flight."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int


def architecture(device: torch.device) -> int:
    """80 for Ampere, 90 for Hopper, 100 for Blackwell, ...; 0 for AMD and for the interpreter."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def _num_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs_at_once(device: torch.device, per_sm: int = 1) -> int:
    """As many as run at once; for the interpreter few, but not a divisor of anything."""
    return _num_multiprocessors(device.index) * per_sm if device.type == "cuda" else 7


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that the tensor cores work on."""
    return max(16, 1 << (head_dim - 1).bit_length())


def forward_tiles(head_dim: int, element_size: int, arch: int, num_queries: int) -> TileSizes:
    """Tiles of the forward kernel; `element_size` in bytes."""
    dim = padded_head_dim(head_dim)
    if element_size >= 4:
        tiles = TileSizes(64, 32, 4, 1) if dim <= 64 else TileSizes(32, 32, 4, 1)
    elif dim <= 64 and arch != 90:
        tiles = TileSizes(128, 64, 8, 2)
    elif dim <= 64:
        # Hopper, 16384 tokens, 48 heads: 3.98 ms; with 8 warps 6.01 ms, 64 queries 4.38 ms, 128 keys 6.01 ms.
        tiles = TileSizes(128, 64, 4, 3)
    elif dim <= 128:
        # Hopper, 16384 tokens, 32 heads: 4.64 ms with 128 keys, 4.86 ms with 64 and 4 stages.
        tiles = TileSizes(128, 128, 8, 2) if arch == 90 else TileSizes(128, 64, 8, 2)
    else:
        tiles = TileSizes(64, 32, 4, 2) if arch >= 90 else TileSizes(64, 32, 8, 2)
    # Decoding: one query would leave all rows but one of a large tile empty.
    return tiles._replace(block_t=min(tiles.block_t, max(16, 1 << (num_queries - 1).bit_length())))


def backward_query_tiles(head_dim: int, element_size: int, arch: int) -> TileSizes:
    """Tiles of the kernel that owns a tile of queries and writes their gradient."""
    dim = padded_head_dim(head_dim)
    if element_size >= 4:
        return TileSizes(64, 32, 4, 1) if dim <= 64 else TileSizes(32, 32, 4, 1)
    if dim <= 64:
        # Hopper, 16384 tokens, 48 heads: 4.87 ms; 4.70 ms with 128 queries, which spill when Triton 3.9 compiles them,
        # and 6.82 ms with 8 warps.
        return TileSizes(64, 64, 4, 3) if arch == 90 else TileSizes(128, 64, 8, 2)
    if dim <= 128:
        # Hopper, 16384 tokens, 32 heads: 6.03 ms with 3 stages, 7.37 ms with 2.
        if arch >= 90:
            return TileSizes(128, 64, 8, 3)
        return TileSizes(64, 64, 8, 2)
    # On Hopper 64 rows go to the warpgroup product, whose operands do not fit the registers at this width.
    return TileSizes(32, 32, 8, 1) if arch >= 90 else TileSizes(64, 32, 8, 1)


def backward_key_tiles(head_dim: int, element_size: int, arch: int) -> TileSizes:
    """Tiles of the kernel that owns a tile of keys and writes the gradients of keys and values, and in one pass dq."""
    dim = padded_head_dim(head_dim)
    if element_size >= 4:
        return TileSizes(32, 32, 4, 1)
    if dim <= 64:
        # Hopper, 16384 tokens, 48 heads: 7.09 ms with 3 stages, 7.73 ms with 2, 9.70 ms with 128 keys and 8 warps.
        return TileSizes(64, 64, 4, 3) if arch == 90 else TileSizes(32, 128, 8, 2)
    if dim <= 128:
        # Two accumulators of 128 columns are half of a thread's registers. Hopper, 16384 tokens, 32 heads: 8.08 ms and
        # spills, most of them in the masked loop; 9.29 ms with 3 stages, 9.19 ms with 128 keys and 8 warps, 12.1 ms
        # with 32 queries at a time.
        return TileSizes(64, 64, 4, 2) if arch == 90 else TileSizes(32, 64, 8, 2)
    return TileSizes(32, 32, 8, 1)


def descriptor_strides(x: torch.Tensor) -> list[int]:
    """Steps of a 4-dimensional tensor as the tensor memory accelerator takes them.

    The step of a dimension of size 1 may be anything, but the hardware wants multiples of 16 bytes.
    """
    aligned = 16 // x.element_size()
    steps = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return [step if n > 1 else -(-x.shape[-1] // aligned) * aligned for n, step in steps] + [1]
