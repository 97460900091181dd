"""Tile sizes of the Triton kernels, by head dimension and element size.

Chosen so that every kernel compiles without spills for sm_80, sm_90 and sm_100 (tests/test_kernels_compile.py holds that) and
fits the 99 KiB of shared memory that the smallest of today's GPUs gives a block where the head dimension allows it.
"""

from typing import NamedTuple


class TileSizes(NamedTuple):
    """`block_t` queries by `block_s` keys, `num_warps` warps of 32 threads, `num_stages` loads in flight."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that the tensor cores work on."""
    return max(16, 1 << (head_dim - 1).bit_length())


def forward_tiles(head_dim: int, element_size: int) -> TileSizes:
    """Tiles of the forward kernel; `element_size` in bytes."""
    dim = padded_head_dim(head_dim)
    if element_size >= 4:
        return TileSizes(32, 32, 4, 1) if dim > 128 else TileSizes(64, 32, 4, 1)
    if dim <= 64:
        return TileSizes(128, 64, 4, 3)
    if dim <= 128:
        return TileSizes(128, 64, 8, 2)
    return TileSizes(64, 32, 4, 2)


def backward_query_tiles(head_dim: int, element_size: int) -> TileSizes:
    """Tiles of the kernel that owns a tile of queries and writes their gradient."""
    dim = padded_head_dim(head_dim)
    if element_size >= 4:
        return TileSizes(32, 32, 4, 1) if dim > 64 else TileSizes(64, 32, 4, 1)
    if dim <= 64:
        return TileSizes(128, 64, 4, 2)
    if dim <= 128:
        return TileSizes(128, 64, 8, 2)
    return TileSizes(64, 32, 8, 1)


def backward_key_tiles(head_dim: int, element_size: int) -> TileSizes:
    """Tiles of the kernel that owns a tile of keys and writes the gradients of keys and values."""
    dim = padded_head_dim(head_dim)
    if element_size >= 4:
        return TileSizes(32, 32, 4, 1)
    if dim <= 64:
        return TileSizes(64, 128, 8, 2)
    if dim <= 128:
        return TileSizes(32, 128, 8, 2)
    return TileSizes(32, 64, 8, 1)
