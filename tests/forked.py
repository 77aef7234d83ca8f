"""Child processes that are forked from one process, which has imported torch: the import takes seconds for each.

Their environment is that of this process at their start.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["torch.distributed.tensor.debug", "parallax_gen.runtime.kvcache", "parallax_gen.tuning.tuner", "pytest"]
TIMEOUT_S = 120


def start(work: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a child that calls `work`, a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=_with_environment, args=(dict(os.environ), work, *arguments))
    child.start()
    return child


def _with_environment(environment: Mapping[str, str], work: Callable[..., None], *arguments: object) -> None:
    os.environ.clear()
    os.environ.update(environment)
    work(*arguments)


# -- ranks


def run_ranks(work: Callable[..., None], ranks: int, folder: Path, *arguments: object) -> None:
    """Call work(rank, *arguments) in `ranks` processes of one group over gloo, which meet in `folder`.

    Fails if it raises in any, or takes two minutes.
    """
    failures = multiprocessing.get_context("forkserver").SimpleQueue()
    children = [start(_rank, rank, ranks, folder, failures, work, *arguments) for rank in range(ranks)]
    for child in children:
        child.join(TIMEOUT_S)
    stuck = [child for child in children if child.is_alive()]
    for child in stuck:
        child.kill()
    assert failures.empty(), failures.get()
    assert not stuck
    assert [child.exitcode for child in children] == [0] * ranks


def _rank(rank: int, ranks: int, folder: Path, failures: Any, work: Callable[..., None], *arguments: object) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        work(rank, *arguments)
    except BaseException:
        failures.put(f"rank {rank} of {ranks}:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


# -- programs


def start_program(program: Path, *arguments: object, stdout: Path, stderr: Path | None = None) -> BaseProcess:
    """Start a child that runs a file as the main program, with this process's sys.path."""
    return start(_main, program, [str(argument) for argument in arguments], stdout, stderr)


def _main(program: Path, arguments: list[str], stdout: Path, stderr: Path | None) -> None:
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        if path is not None:
            with path.open("w", encoding="utf-8") as file:
                os.dup2(file.fileno(), stream.fileno())
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")


def run_code(code: str, folder: Path) -> CompletedProcess[str]:
    """Run `code` as a main program, with files in `folder`, and return what it printed."""
    program, out, err = (folder / f"program.{end}" for end in ("py", "out", "err"))
    program.write_text(code, encoding="utf-8")
    child = start_program(program, stdout=out, stderr=err)
    child.join(TIMEOUT_S)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode is not None
    texts = (file.read_text(encoding="utf-8") for file in (out, err))
    return CompletedProcess(code, child.exitcode, *texts)
