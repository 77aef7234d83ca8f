"""The resources of a compiled kernel: registers, spilled bytes, shared memory."""

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
    """The resources of a launch's first kernel: later ones only merge splits or redo overflowed tiles.

    registers     32-bit registers per thread
    spills        stack bytes per thread
    shared_bytes  shared memory per block
    """

    registers: int
    spills: int
    shared_bytes: int


def resources_of(compiled: Sequence[Any]) -> Resources:
    """The resources of a launch's compiled kernels, read from the machine code. Raises MachineError if that fails."""
    if not compiled:
        raise BuildError("nothing was compiled")
    asm, shared_bytes = compiled[0].asm, int(compiled[0].metadata.shared)
    if "amdgcn" in asm:
        return Resources(*usage_of_amdgcn(asm["amdgcn"]), shared_bytes)
    return Resources(*_usage(asm["cubin"]), shared_bytes)


def usage_of_amdgcn(assembly: str) -> tuple[int, int]:
    """(registers, bytes of scratch memory) per thread, from the metadata of AMD's assembly.

    The registers are vector registers; on CDNA 3 and 4 accumulation registers are among them. The scratch memory holds
    what is spilled.
    """
    usages = [re.findall(rf"\.{name}: +(\d+)", assembly) for name in ("vgpr_count", "private_segment_fixed_size")]
    if not all(usages):
        raise MachineError("AMD's assembly has no metadata that says how many registers it uses")
    registers, scratch = (max(map(int, numbers)) for numbers in usages)
    return registers, scratch


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) per thread, reported by cuobjdump: `REG:168 STACK:0 SHARED:0 LOCAL:0 ...`."""
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
    usages = re.findall(r"REG:(\d+) STACK:(\d+)", report)
    if not usages:
        raise MachineError(f"cuobjdump reported no registers: {report.strip()!r}")
    return max(int(registers) for registers, _ in usages), max(int(stack) for _, stack in usages)


@cache
def cuobjdump() -> Path:
    """The cuobjdump in Triton's wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise MachineError(f"Triton's cuobjdump is missing: {path}")
    return path
