"""Keeps a call from a borrowed kernel that compiles badly here: what a call gets, of what the ranking has.

A kernel that was measured with another Triton or on another card may keep its registers there and spill them here. So
one that is borrowed is compiled before its first launch, and passed over where it spills far more than the default,
does not fit the card, or does not compile. What compiling showed is kept in the cache folder, so that commands that
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
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Candidate, Known, Tier, default_of, ranked
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import Gpu

# Bytes a thread that a borrowed kernel may spill more than the default. Of the 62 places in docs/borrowing.md, under
# Triton 3.9, kernels that spilled 64 and 112 bytes more were 7 and 17 % faster than the default all the same; those of
# 216 and 272 were 21 and 6 % slower.
MOST_MORE_SPILLS = 128
MOST_CHECKED = 2  # borrowed kernels a place: each may take seconds to compile
UNCHECKED = (Tier.MEASURED_HERE, Tier.DEFAULT)  # not borrowed
FORMAT = 1  # of what is kept

# What a config's kernel needs as compiled here; None where that is not known. Raises BuildError where it does not
# compile.
Compiled = Callable[[KernelConfig], Resources | None]


@dataclass(frozen=True)
class Guarded:
    """What a call gets.

    checked  whether nothing need be compiled first to know that it is the one: False of a borrowed one that was not
             compiled here yet, or spills where the default was not
    refused  borrowed ones that rank higher, each with why it is not used
    """

    candidate: Candidate
    checked: bool
    refused: tuple[tuple[Candidate, str], ...] = ()


def guarded(place: Place, gpu: Gpu, known: Known, compiled: Compiled | None = None) -> Guarded:
    """What a call at a place gets. compiled: by default, what was kept of earlier checks."""
    compiled = compiled or (lambda config: _kept(text_hash_of(place.spec, config, gpu), gpu))
    refused: list[tuple[Candidate, str]] = []
    for candidate in looked_at(place, gpu, known):
        borrowed = candidate.tier not in UNCHECKED
        why = _why_refused(candidate.config, place, gpu, compiled) if borrowed else ""
        if not why:
            return Guarded(candidate, why is not None, tuple(refused))
        refused.append((candidate, why))
    return Guarded(Candidate(Tier.DEFAULT, default_of(place, gpu), None), True, tuple(refused))


def looked_at(place: Place, gpu: Gpu, known: Known) -> Iterator[Candidate]:
    """What a call at a place may look at, the best first: borrowed kernels, each once and no more than are checked.

    One that is not borrowed is the last. Renders no more than is asked for.
    """
    borrowed: list[KernelConfig] = []
    for candidate in ranked(place, gpu, known):
        if candidate.config in borrowed:
            continue  # the same kernel, by another record
        yield candidate
        borrowed.append(candidate.config)
        if candidate.tier in UNCHECKED or len(borrowed) == MOST_CHECKED:
            break


def _why_refused(config: KernelConfig, place: Place, gpu: Gpu, compiled: Compiled) -> str | None:
    """Why a borrowed kernel is not used, "" where it is; None where what decides that was not compiled yet.

    The default is only compiled where that decides.
    """
    try:
        resources = compiled(config)
    except BuildError as error:
        return f"it does not compile here: {error}"
    if resources is None:
        return None
    if resources.shared_bytes > gpu.shared_per_block:
        return f"it needs {resources.shared_bytes} bytes of shared memory, over {gpu.shared_per_block}"
    if resources.spills <= MOST_MORE_SPILLS:
        return ""
    try:
        default = compiled(default_of(place, gpu))
    except BuildError:
        return ""
    if default is None:
        return None
    if resources.spills <= default.spills + MOST_MORE_SPILLS:
        return ""
    return f"it spills {resources.spills} bytes a thread as compiled here, the default {default.spills}"


def kept(source: KernelSource, gpu: Gpu) -> Resources | None:
    """What an earlier check found of a kernel as compiled here; None where none did, or what is there is damaged.

    Raises BuildError where it found that the kernel does not compile.
    """
    return _kept(source.text_hash, gpu)


def _kept(text_hash: str, gpu: Gpu) -> Resources | None:
    with contextlib.suppress(OSError, ValueError, TypeError, MachineError, RecursionError):
        found = json.loads(_path(text_hash, gpu).read_text(encoding="utf-8"))
        if isinstance(found, str):
            check_text("failure", found)
            raise BuildError(found)
        resources = Resources(**found)
        for name, number in asdict(resources).items():
            check_int(name, number)
        return resources
    return None


def keep(source: KernelSource, gpu: Gpu, found: Resources | BuildError) -> None:
    """For later processes; where there is no room for it, they find it out again."""
    with contextlib.suppress(OSError, MachineError):
        failure = " ".join(str(found).split())[:LONGEST_LINE]
        note = json.dumps(failure if isinstance(found, BuildError) else asdict(found))
        replace_file(_path(source.text_hash, gpu), note)


def _path(text_hash: str, gpu: Gpu) -> Path:
    """By the kernel's text, what compiles it, and for which capability."""
    here = Toolchain.here()
    which = f"{text_hash} {here.triton} {here.cuda} {gpu.capability}"
    return cache_dir() / f"resources-{FORMAT}" / hashlib.sha256(which.encode()).hexdigest()[:32]
