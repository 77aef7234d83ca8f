"""What a compiled kernel needs of a multiprocessor: registers, spilled bytes, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from parallax_gen.errors import BuildError, MachineError, gist, machine_error


@dataclass(frozen=True)
class Resources:
    """Of the kernel that does a launch's work: its first. Those behind it join, or seldom have anything to do.

    registers     32-bit registers a thread
    spills        bytes a thread keeps on its stack for want of registers
    shared_bytes  shared memory a block
    """

    registers: int
    spills: int
    shared_bytes: int


def resources_of(compiled: Sequence[Any]) -> Resources:
    """Of a launch's compiled kernels in order, read from the machine code. Raises MachineError where it cannot be."""
    if not compiled:
        raise BuildError("nothing was compiled")
    return Resources(*_usage(compiled[0].asm["cubin"]), int(compiled[0].metadata.shared))


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) a thread, as cuobjdump reports them: `REG:168 STACK:0 SHARED:0 LOCAL:0 ...`."""
    try:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [str(cuobjdump()), "-res-usage", file.name]
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=60
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise machine_error(error) or MachineError(gist(error)) from error
    report = done.stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", report)
    if not found:
        raise MachineError(f"cuobjdump said nothing of registers: {report.strip()!r}")
    return max(int(registers) for registers, _ in found), max(int(stack) for _, stack in found)


@cache
def cuobjdump() -> Path:
    """The one that Triton's wheel carries."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise MachineError(f"Triton's cuobjdump is missing: {path}")
    return path
