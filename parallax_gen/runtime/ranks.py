"""What ranks of torch.distributed ask of each other at calls: nothing that waits for another rank."""

from __future__ import annotations

from parallax_gen.errors import DistributedError
from parallax_gen.memory.lock import Lock

KEY = "parallax_gen/lock"  # in the store of torch.distributed: the lock of the rank that came first, or NO_LOCK
NO_LOCK = "none"


def is_first_rank() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def check_same_lock(lock: Lock | None, before: str) -> str:
    """Compare a lock, or that there is none, with the rank that came first, through the store that all ranks share.

    It does not wait for other ranks, which may make other calls: of two ranks that differ the later one finds it.

    before  the text that this returned for the lock that this process had before, which all ranks may replace

    Without a lock and with `before` from there, it does nothing. Returns the lock's text for the next comparison; ""
    without other ranks. Raises DistributedError.
    """
    import torch.distributed as dist

    own = NO_LOCK if lock is None else lock.identity
    if before == own == NO_LOCK:
        return own
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ""
    try:
        store = dist.distributed_c10d._get_default_store()
        held = store.compare_set(KEY, "", own).decode()  # sets it only if there is none
        if held == before != own:
            held = store.compare_set(KEY, before, own).decode()
    except RuntimeError:
        if lock is None:  # a store that cannot compare, or is gone, does not stop ranks that use no locks
            return own
        raise
    if held != own:
        mine, other = (
            (f"{lock.path} ({own})" if lock is not None else "no lock"),
            ("no lock" if held == NO_LOCK else held),
        )
        raise DistributedError(
            f"the ranks hold different locks: rank {dist.get_rank()} has {mine}, another rank has {other}; "
            f"copy one file to all hosts, switch it on on all ranks, and begin again"
        )
    return own
