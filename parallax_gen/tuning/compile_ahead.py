"""Compiles kernels in parallel child processes, so that later calls find the programs in Triton's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from parallax_gen.codegen.render import text_hash_of
from parallax_gen.tuning.tuner import start_compilers
from parallax_gen.tuning.workers.messages import Compile, KernelInstance, Reply
from parallax_gen.tuning.workers.pool import Pool, usable_cpus

WAIT_S = 0.5


def compile_ahead(
    instances: Sequence[KernelInstance], workers: int | None, on_compiled: Callable[[], None] = lambda: None
) -> list[Reply]:
    """Compile every instance, and return the replies in order: the outcomes are OK, COMPILE, TIMEOUT or CRASH.

    Needs no device. A program is compiled once, for a call of its shape with contiguous tensors.

    workers      child processes, by default one per usable CPU, and never more than instances
    on_compiled  called after each

    Raises MachineError if the machine is at fault.
    """
    if not instances:
        return []
    pool = Pool({}, start_compilers(min(workers or usable_cpus(), len(instances)), devices=0))
    replies: dict[int, Reply] = {}
    try:
        for number, instance in enumerate(instances):
            source_key = text_hash_of(instance.spec, instance.config, instance.gpu)
            pool.compile(number, source_key, Compile(instance))
        while len(replies) < len(instances):
            completed = pool.next(WAIT_S)
            if completed is not None:
                replies[completed.owner] = completed.reply
                on_compiled()
    finally:
        pool.close()
    return [replies[number] for number in range(len(instances))]
