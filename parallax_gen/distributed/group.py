"""Who is in a process group."""

from __future__ import annotations

import torch.distributed as dist

from parallax_gen.errors import ArgumentError


def members(group: dist.ProcessGroup | None) -> tuple[int, list[int]]:
    """This process's rank in a group, and of all its members their ranks among all processes. Raises ArgumentError."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ArgumentError("group", "no group", "one of torch.distributed: call init_process_group first")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ArgumentError("group", "a group without this rank", "one that this rank is in")
    return rank, dist.get_process_group_ranks(group or dist.group.WORLD)
