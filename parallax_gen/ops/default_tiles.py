"""The form of an op's default tiles. Those of AMD GPUs are by registers and LDS alone, and tf32 has those of fp32."""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape

Tile = tuple[int, int, int, int]


@dataclass(frozen=True)
class Tiles:
    """Default tiles as (BLOCK_M, BLOCK_N, num_warps, num_stages), in order of speed on an H200 in bf16.

    usual   at head_dim 96 and 128
    narrow  at head_dim 64
    wide    at head_dim 256, where the accumulators leave few registers
    split   at head_dim 256 with HEAD_DIM_LAYOUT "split", which is faster
    fp32    for fp32, where registers limit the tiles, because there are no tensor cores
    chunked at a head_dim up to 128 with HEAD_DIM_LAYOUT "chunked", before the usual ones
    """

    usual: tuple[Tile, ...]
    narrow: tuple[Tile, ...]
    wide: tuple[Tile, ...]
    split: tuple[Tile, ...]
    fp32: tuple[Tile, ...]
    chunked: tuple[Tile, ...] = ()


# For a head_dim so wide, or a card so small, that no other tile fits.
SMALLEST_TILES = ((32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))


def is_few(shape: Shape, gpu: Gpu) -> bool:
    """Whether at most two programs of 64 query rows run on a multiprocessor: then more stages cost no occupancy."""
    return shape.batch * shape.heads * -(-shape.seqlen_q // 64) <= 2 * gpu.sms
