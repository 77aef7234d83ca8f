"""Checks a borrowed kernel before a call uses it: the call gets the first kernel of the ranking that passes.

A kernel that was measured with another Triton or on another card may fit its registers there and spill here. So a
borrowed kernel is compiled before its first launch, unless it is the default. It is skipped if it spills far more than
the default, does not fit the card, or does not compile. The outcome is kept in the cache folder. So commands that
compile nothing name the same kernel, or say that it was not checked yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from parallax_gen.codegen.render import KernelSource, text_hash_of
from parallax_gen.codegen.resources import Resources
from parallax_gen.errors import BuildError, MachineError
from parallax_gen.files import cache_dir, replace_file
from parallax_gen.memory.bounds import LONGEST_LINE, check_int, check_text
from parallax_gen.memory.lock import Lock
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Candidate, RecordSource, Tier, default_of, ranked
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import Gpu

# How many more bytes per thread a borrowed kernel may spill than the default. At the 62 places of docs/borrowing.md,
# under Triton 3.9, kernels that spilled 64 and 112 bytes more were still 7 and 17 % faster than the default; kernels
# that spilled 216 and 272 bytes more were 21 and 6 % slower.
MAX_EXTRA_SPILLS = 128
MAX_CHECKED = 2  # borrowed kernels per place: each may take seconds to compile
NOT_BORROWED = (Tier.MEASURED_HERE, Tier.DEFAULT)  # these need no check
FORMAT = 1  # of the cache's files

# The resources of a config's kernel as compiled here; None if unknown. Raises BuildError if it does not compile.
CompiledResources = Callable[[KernelConfig], Resources | None]


@dataclass(frozen=True)
class CheckedChoice:
    """The kernel that a call gets.

    checked  False if only a first call can decide, by compiling: the kernel is borrowed and was not compiled here yet,
             or it spills and the default was not compiled yet
    refused  borrowed kernels that rank higher, each with the reason it is not used
    """

    candidate: Candidate
    checked: bool
    refused: tuple[tuple[Candidate, str], ...] = ()


def checked_choice(
    place: Place,
    gpu: Gpu,
    memory: RecordSource,
    compiled: CompiledResources | None = None,
    lock: Lock | None = None,
) -> CheckedChoice:
    """The kernel that a call at a place gets.

    compiled  by default, the cached outcomes of earlier checks
    lock      decides instead of the ranking: nothing is checked, and LockError is raised if it refuses the call
    """
    if lock is not None:
        return CheckedChoice(lock.candidate(place, gpu), True)
    compiled = compiled or (lambda config: _read_cached(text_hash_of(place.spec, config, gpu), gpu))
    default = default_of(place, gpu)
    refused: list[tuple[Candidate, str]] = []
    for candidate in launch_candidates(place, gpu, memory):
        borrowed = candidate.tier not in NOT_BORROWED and candidate.config != default
        reason = _why_refused(candidate.config, place, gpu, compiled) if borrowed else ""
        if not reason:
            return CheckedChoice(candidate, reason is not None, tuple(refused))
        refused.append((candidate, reason))
    return CheckedChoice(Candidate(Tier.DEFAULT, default, None), True, tuple(refused))


def launch_candidates(
    place: Place, gpu: Gpu, memory: RecordSource, here: Toolchain | None = None
) -> Iterator[Candidate]:
    """The candidates that a call at a place considers, best first: at most MAX_CHECKED borrowed kernels, each once.

    here  as in `ranked`

    Ends with the first candidate that is not borrowed. Renders lazily.
    """
    configs: list[KernelConfig] = []
    for candidate in ranked(place, gpu, memory, here):
        if candidate.config in configs:
            continue  # another record of the same kernel
        yield candidate
        configs.append(candidate.config)
        if candidate.tier in NOT_BORROWED or len(configs) == MAX_CHECKED:
            break


def _why_refused(config: KernelConfig, place: Place, gpu: Gpu, compiled: CompiledResources) -> str | None:
    """Why a borrowed kernel is not used; "" if it is used; None if something must be compiled to decide.

    The default is compiled only if the decision depends on its spills.
    """
    try:
        resources = compiled(config)
    except BuildError as error:
        return f"it does not compile here: {error}"
    if resources is None:
        return None
    if resources.shared_bytes > gpu.shared_per_block:
        return (
            f"it needs {resources.shared_bytes} bytes of shared memory; the card has {gpu.shared_per_block} per block"
        )
    if resources.spills <= MAX_EXTRA_SPILLS:
        return ""
    try:
        default = compiled(default_of(place, gpu))
    except BuildError:
        return ""
    if default is None:
        return None
    if resources.spills <= default.spills + MAX_EXTRA_SPILLS:
        return ""
    return f"it spills {resources.spills} bytes per thread when compiled here, the default {default.spills}"


def cached_resources(source: KernelSource, gpu: Gpu) -> Resources | None:
    """The cached resources of a kernel as compiled here; None if there are none or the entry is damaged.

    Raises BuildError if the cached outcome is that the kernel does not compile.
    """
    return _read_cached(source.text_hash, gpu)


def _read_cached(text_hash: str, gpu: Gpu) -> Resources | None:
    with contextlib.suppress(OSError, ValueError, TypeError, MachineError, RecursionError):
        cached = json.loads(_path(text_hash, gpu).read_text(encoding="utf-8"))
        if isinstance(cached, str):
            check_text("failure", cached)
            raise BuildError(cached)
        resources = Resources(**cached)
        for name, number in asdict(resources).items():
            check_int(name, number)
        return resources
    return None


def cache_resources(source: KernelSource, gpu: Gpu, outcome: Resources | BuildError) -> None:
    """Cache the outcome of a check for later processes. If the cache cannot be written, they compile again."""
    with contextlib.suppress(OSError, MachineError):
        failure = " ".join(str(outcome).split())[:LONGEST_LINE]
        entry = json.dumps(failure if isinstance(outcome, BuildError) else asdict(outcome))
        replace_file(_path(source.text_hash, gpu), entry)


def _path(text_hash: str, gpu: Gpu) -> Path:
    """The file of an outcome, keyed by the kernel's text, the toolchain and the architecture."""
    here = Toolchain.here()
    key = f"{text_hash} {here.triton} {here.cuda} {gpu.gfx or gpu.capability}"
    return cache_dir() / f"resources-{FORMAT}" / hashlib.sha256(key.encode()).hexdigest()[:32]
