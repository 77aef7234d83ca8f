"""Writes locks from today's choices, and makes dispatch take its kernels from one: `parallax_gen.use_lock`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from parallax_gen.codegen import device
from parallax_gen.codegen.build import ensure_triton_cache
from parallax_gen.errors import ArgumentError
from parallax_gen.memory.lock import Lock, LockedKernel, check_replaceable, read_lock, write_lock
from parallax_gen.memory.ranking import RecordSource
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import DispatchChoice, choose, compiler, default_dispatcher
from parallax_gen.runtime.plan import PlanCache


def use_lock(path: str | Path | None, *, missing: str = "error") -> Lock | None:
    """Take the kernels of all later calls from a lock of `parallax_gen.lock`, and from nothing else.

    path     the file, which is read now and not again; None for no lock, so that calls choose from records again
    missing  what a call gets whose kernel and sizes are not in the lock: "error", or "default" for its default config,
             which never depends on records. A warning tells the first such call. PARALLAX_GEN_STRICT makes it an error

    It replaces the lock of PARALLAX_GEN_LOCK. Locked kernels are not checked for spills, and nothing is tuned at first
    calls. Kernels that were chosen before are chosen again; captured CUDA graphs keep theirs. With several ranks, call
    it on all of them, before calls that follow: a rank whose lock differs from that of another, or that has none beside
    one that has, raises DistributedError at its next first call of a kernel.

    Returns the lock. Raises StoreError, which names the file and the line, if the file is no lock, and ArgumentError
    for another `missing`. Calls raise `parallax_gen.errors.LockError` if the lock lacks their kernel, or if this
    version renders another one or another Triton or ptxas is installed than those of the lock; its message has the
    command that mends it.
    """
    lock = None if path is None else read_lock(Path(path).expanduser().absolute(), missing)
    default_dispatcher().use_lock(lock)
    PlanCache.clear_all()
    return lock


def lock_kernels(
    path: Path, kernels: Iterable[tuple[KernelSpec, Shape]], gpu: Gpu, memory: RecordSource, *, add: bool = False
) -> tuple[Lock, list[DispatchChoice]]:
    """Write what calls of these kernels get from a memory. A lock that is in use now does not count.

    Borrowed kernels are compiled and checked, as a first call would, if the card is here.

    add  keep the file's kernels of other places

    Returns the lock, and the choices that were written. Raises ArgumentError without kernels, and StoreError, such as
    for a file that is no lock, which is not replaced.
    """
    kernels = list(kernels)
    if not kernels:
        raise ArgumentError("kernels", "none", "one or more to lock")
    check_replaceable(path)
    locked = dict(read_lock(path).kernels) if add and path.exists() else {}
    here = device.gpu_here(None)
    is_here = here is not None and here.name == gpu.name
    if is_here:
        ensure_triton_cache()
    choices = {}
    for spec, shape in kernels:
        choice = choose(spec, shape, gpu, memory, compiler(spec, shape, gpu) if is_here else None)
        choices[choice.place] = choice
    locked |= {place: LockedKernel.here(place, choice.candidate.config, gpu) for place, choice in choices.items()}
    write_lock(path, locked.values())
    return read_lock(path), list(choices.values())


def not_checked(choices: Iterable[DispatchChoice]) -> str:
    """A sentence on the kernels that were locked without a check; "" if there are none."""
    count = sum(not choice.checked for choice in choices)
    kernels = "1 borrowed kernel was" if count == 1 else f"{count} borrowed kernels were"
    return f"{kernels} locked without a check for spills: lock on the card to check them" if count else ""
