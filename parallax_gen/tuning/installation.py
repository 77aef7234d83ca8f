"""The checks of `parallax-gen doctor`: whether everything that calls and the tuner need is installed and works.

A check yields findings, (status, text): "ok", "note" (good to know, not an error) or "broken". An expected error that
it raises is a finding, too: "broken".
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import metadata
from typing import TYPE_CHECKING

from parallax_gen.codegen import device
from parallax_gen.environment import BATCH_INVARIANT, is_on
from parallax_gen.errors import BuildError, StoreError
from parallax_gen.memory.commands import NOT_MEASURED
from parallax_gen.problem.hardware import GPUS, Gpu, gpu_by_name
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from parallax_gen.memory.result import Result

COMPILE_TIMEOUT_S = 120.0
COMPILE_FOR = "h100"  # the target of the check if there is no card


def _versions() -> Iterator[tuple[str, str]]:
    import torch
    import triton

    import parallax_gen
    from parallax_gen.memory.toolchain import cuda_version, newer_than_tested

    yield "ok", f"parallax_gen {parallax_gen.__version__}, Python {platform.python_version()}, {platform.machine()}"
    optuna = metadata.version("optuna")
    hip = torch.version.hip
    platform_of_torch = f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda or 'none'}"
    yield "ok", f"torch {torch.__version__}, {platform_of_torch}, Triton {triton.__version__}, Optuna {optuna}"
    if message := newer_than_tested():
        yield "note", message
    if not hip:
        release = cuda_version()
        yield "ok" if release else "broken", f"ptxas {release or 'none'}, which assembles Triton's kernels"


def _device() -> Iterator[tuple[str, str]]:
    from parallax_gen.memory.toolchain import too_old_for

    card = device.gpu_here(0)
    if card is None:
        yield "note", "no CUDA device: kernels can be rendered, compiled and ranked, but not run or measured"
    else:
        known = (
            "in the table of GPUs" if card.name in GPUS else "not in the table of GPUs: its peak rates are estimated"
        )
        yield "ok", f"{card.title}, recognised as {card.name} ({known})"
        if card.is_amd:
            yield "note", f"{card.target}: {NOT_MEASURED}"
        if message := too_old_for(card.capability):
            yield "broken", message


def _cache() -> Iterator[tuple[str, str]]:
    import warnings

    from parallax_gen.files import cache_dir

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = cache_dir()  # warns if it must fall back to another folder
    for warning in caught:
        yield "note", str(warning.message)
    with tempfile.TemporaryFile(dir=folder):
        pass
    kernels = sum(1 for _ in folder.glob("kernels/*.py"))
    yield "ok", f"{folder}: writable, {kernels} kernels"


def _database() -> Iterator[tuple[str, str]]:
    from parallax_gen.memory.descriptions import differences_from_here
    from parallax_gen.memory.store import Store, default_path

    path = default_path()
    try:
        existing = path if path.exists() else next(folder for folder in path.absolute().parents if folder.exists())
    except PermissionError as error:  # a home folder of another user
        raise StoreError(f"{path} cannot be read ({error}); PARALLAX_GEN_DB can name a file elsewhere") from error
    if not os.access(existing, os.W_OK) or not os.access(existing if existing.is_dir() else path.parent, os.W_OK):
        raise StoreError(f"{path} cannot be written, so tune cannot run; PARALLAX_GEN_DB can name a file elsewhere")
    with Store(read_only=True) as store:
        results = store.all()
        used = sum(not differences_from_here(r) for r in results)
        rows = f"{len(results)} rows, {used} of today's kernels and this toolchain"
        yield "ok", f"{path}: {rows if path.exists() else 'not yet created'}"
        if store.unreadable:
            yield "note", f"{store.unreadable} rows cannot be read and are ignored"


def _records() -> Iterator[tuple[str, str]]:
    from parallax_gen.files import data_dir
    from parallax_gen.memory.descriptions import borrowed_places, choice_text, chosen
    from parallax_gen.memory.ranking import RecordTable
    from parallax_gen.memory.shipped import shipped_gpus

    if not shipped_gpus():
        yield "note", f"no records in {data_dir('tuning_db')}"
    results, sources = _usable_results()
    table = RecordTable(results)
    places = dict.fromkeys(record.place for record in results)
    if (here := device.gpu_here(0)) is not None:  # also what its calls borrow from other cards
        own = (place for place in borrowed_places(here.name, results) if place not in places)
        places |= dict.fromkeys(place for place in own if chosen(place, table).candidate.record)
    for name in sorted({place.gpu for place in places}):
        card_places = [place for place in places if place.gpu == name]
        by_evidence = Counter(choice_text(chosen(place, table), place.gpu) for place in card_places)
        counts = ", ".join(f"{evidence}: {count}" for evidence, count in by_evidence.most_common())
        yield "ok", f"{name}: {len(card_places)} kernels and sizes in {sources}; configs of calls come from {counts}"


def _usable_results() -> tuple[list[Result], str]:
    """The results that calls choose from, and their sources. Without the user's database if that is unusable."""
    from parallax_gen.memory.descriptions import open_memory
    from parallax_gen.memory.shipped import Memory

    try:
        return open_memory().all(), "your database and the shipped records"
    except StoreError:  # the database check reports it; an error in a shipped file is raised again
        return Memory().all(), "only the shipped records"


def _mode() -> Iterator[tuple[str, str]]:
    if is_on(BATCH_INVARIANT):
        yield "ok", f"calls are batch-invariant unless they say otherwise: {BATCH_INVARIANT} is on"


def _lock() -> Iterator[tuple[str, str]]:
    from parallax_gen.memory.descriptions import card_of
    from parallax_gen.memory.lock import NO_CHECK, lock_of_environment, lock_text

    lock = lock_of_environment()
    if lock is None:
        yield "ok", lock_text(lock)
        return
    here = device.gpu_here(0)
    if here is not None and all(place.gpu != here.name for place in lock.kernels):
        status = "broken" if lock.refuses_others else "note"
        yield status, f"no kernel of {lock.path} is for this card, {here.name}: calls get {lock.others}"
    found = (lock.problem(kernel, card_of(kernel.place)) for kernel in lock.kernels.values())
    problems = [problem for problem in found if problem]
    if problems:
        yield "broken", f"calls of {len(problems)} of {len(lock.kernels)} locked kernels fail; the first: {problems[0]}"
    else:
        yield "ok", f"{lock_text(lock)}; {NO_CHECK}"


def _cuobjdump() -> Iterator[tuple[str, str]]:
    import torch

    from parallax_gen.codegen.resources import cuobjdump

    if torch.version.hip:
        return  # AMD's machine code is not read with it
    yield "ok", str(cuobjdump())


def _compile() -> Iterator[tuple[str, str]]:
    yield _compiled_for(device.gpu_here(0) or gpu_by_name(COMPILE_FOR))


def _compiled_for(gpu: Gpu) -> tuple[str, str]:
    """The finding that a small kernel compiles for a card. Raises BuildError if it does not."""
    from parallax_gen.ops.space import default_config
    from parallax_gen.tuning.workers.messages import Compile, KernelInstance
    from parallax_gen.tuning.workers.worker import Worker

    spec, shape = KernelSpec("decode", 64, "bf16"), Shape(1, 1, 1, 1, 128)
    instance = KernelInstance(spec, default_config(spec, shape, gpu), shape, gpu)
    with closing(Worker(device=None)) as worker:
        reply = worker.ask(Compile(instance), COMPILE_TIMEOUT_S)
    if reply.outcome.failed:
        raise BuildError(f"a small kernel for {gpu.name}: {reply.outcome}: {reply.detail}")
    return "ok", f"a small kernel for {gpu.name}, in a child process, in {reply.seconds:.1f} s"


def checks_of(name: str | None) -> dict[str, Callable[[], Iterator[tuple[str, str]]]]:
    """The checks of a card that need not be in this machine; none without a name. Raises UnknownGpuError."""
    if name is None:
        return {}
    gpu = gpu_by_name(name)

    def check() -> Iterator[tuple[str, str]]:
        yield _compiled_for(gpu)
        if gpu.is_amd:
            yield "note", f"{gpu.title} ({gpu.target}): {NOT_MEASURED}"

    return {"card": check}


CHECKS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "versions": _versions,
    "device": _device,
    "cache": _cache,
    "database": _database,
    "records": _records,
    "mode": _mode,
    "lock": _lock,
    "cuobjdump": _cuobjdump,
    "compile": _compile,
}
