"""LDS, the shared memory of AMD GPUs: what kernels take of it at the most.

Queries, and other tiles that a program owns, are in registers. In LDS are blocks in flight, and what threads exchange:
tiles of scores, and tiles of rows that they lay out otherwise. The bounds are from lowering random configs of all ops
for gfx942 and gfx950 with Triton 3.6 and 3.9; many kernels take less.
"""

from __future__ import annotations

from parallax_gen.problem.hardware import Gpu


def bytes_in_flight(block_bytes: int, num_stages: int, gpu: Gpu) -> int:
    """The most that blocks in flight take; with one stage there are none.

    On gfx942 a block is loaded to registers, and then stored to one of num_stages - 1 buffers. On gfx950 it is copied
    to one of num_stages buffers, whose padding is up to a 32nd. Some loops are not pipelined, and take less.
    """
    if num_stages == 1:
        return 0
    if gpu.gfx == "gfx942":
        return (num_stages - 1) * block_bytes
    return num_stages * block_bytes * 33 // 32
