"""The versions of Triton and ptxas that compile kernels here: read once per process, without importing Triton."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from parallax_gen.problem.cards import FIRST_TRITON

# Triton's PTX assemblers, in the order of `cuda_version`. Triton 3.5 has only the first one.
ASSEMBLERS = ("ptxas", "ptxas-blackwell")

NEWEST_TESTED = (3, 9)  # the newest Triton that the tests ran with


class UntestedTritonWarning(UserWarning):
    """The installed Triton is newer than any that this version was tested with."""


@dataclass(frozen=True)
class Toolchain:
    """The compiler of a kernel.

    triton  its full version; old records have major.minor only
    cuda    releases of its ptxas, which allocates registers and schedules: see `cuda_version`. "" if it is unknown
    """

    triton: str
    cuda: str

    @classmethod
    def here(cls) -> Toolchain:
        """The toolchain of this process."""
        return cls(triton_version(), cuda_version())

    def compiles_like(self, other: Toolchain) -> bool:
        """Whether both compile to the same programs: Triton changes with major.minor, ptxas with every release."""
        return minor(self.triton) == minor(other.triton) and self.cuda == other.cuda != ""

    def __str__(self) -> str:
        return f"Triton {minor(self.triton)}, ptxas {self.cuda or 'unknown'}"


def minor(version: str) -> str:
    """major.minor of a version."""
    return ".".join(version.split(".")[:2])


@cache
def triton_version() -> str:
    """The version of the installed Triton, read without importing it if its package is named triton."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build under another name, by torch or a vendor
        import triton

        return str(triton.__version__)


def newer_than_tested() -> str:
    """That the installed Triton is newer than any tested one, in a sentence; "" if it is not."""
    version = triton_version()
    numbers = re.match(r"(\d+)\.(\d+)", version)  # None for a build that is named otherwise, such as "main"
    if numbers is None or (int(numbers[1]), int(numbers[2])) <= NEWEST_TESTED:
        return ""
    newest = ".".join(map(str, NEWEST_TESTED))
    return (
        f"Triton {version} is newer than {newest}, the newest that this parallax_gen was tested with: kernels may fail "
        "to compile, or take longer. If so, install an older Triton or a newer parallax_gen."
    )


def too_old_for(capability: tuple[int, int]) -> str:
    """That the installed Triton cannot compile for a compute capability, in a sentence; "" if it can."""
    version, first = triton_version(), FIRST_TRITON.get(capability)
    numbers = re.match(r"(\d+)\.(\d+)", version)  # None for a build that is named otherwise, such as "main"
    if first is None or numbers is None or (int(numbers[1]), int(numbers[2])) >= first:
        return ""
    needed, (major, minor) = ".".join(map(str, first)), capability
    return f"Triton {version} compiles no kernels for compute capability {major}.{minor}: install {needed} or newer"


@cache
def cuda_version() -> str:
    """CUDA release of each ptxas that the installed Triton may run, such as "12.8/12.9"; "" if there is none.

    The second is ptxas-blackwell's. Triton decides which of the two assembles a GPU's kernels, and that changes with
    its version (3.6: the second from capability 10.0 on; 3.9: from 9.0 on), so both are named.
    """
    return "/".join(release for release in map(_release, ASSEMBLERS) if release)


def _release(assembler: str) -> str | None:
    """The release of the assembler that Triton runs (its knobs.py, 3.5 to 3.9): its path variable, else bundled."""
    configured = os.environ.get(f"TRITON_{assembler.upper().replace('-', '_')}_PATH")
    package = find_spec("triton")
    folders = package.submodule_search_locations if package is not None else None
    bundled = [str(Path(folder, "backends", "nvidia", "bin", assembler)) for folder in folders or ()]
    for path in ([configured] if configured else []) + bundled:
        try:
            output = subprocess.run(
                [path, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=True
            ).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        if match := re.search(r"release (\d+\.\d+)", output):
            return match[1]
    return None
