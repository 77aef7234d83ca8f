"""What ranks of torch.distributed ask of each other at calls: nothing that waits for another rank."""

from __future__ import annotations

from parallax_gen.errors import DistributedError
from parallax_gen.memory.lock import Lock

KEY = "parallax_gen/lock"  # in the store of torch.distributed: the lock of the rank that came first


def is_first_rank() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def check_same_lock(lock: Lock, before: str) -> str:
    """Compare a lock with that of the rank that came first, through the store that all ranks share.

    It does not wait for other ranks, which may make other calls. A rank without a lock takes no part in it: only
    `share_tuning` finds such a rank.

    before  the text that this returned for the lock that this process had before, which all ranks may replace

    Returns the lock's text for the next comparison; "" without other ranks. Raises DistributedError.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ""
    store, own = dist.distributed_c10d._get_default_store(), lock.identity
    held = store.compare_set(KEY, "", own).decode()  # sets it only if there is none
    if held == before != own:
        held = store.compare_set(KEY, before, own).decode()
    if held != own:
        raise DistributedError(
            f"the ranks hold different locks: rank {dist.get_rank()} has {lock.path} ({own}), another rank has {held}; "
            f"copy one file to all hosts and begin again"
        )
    return own
