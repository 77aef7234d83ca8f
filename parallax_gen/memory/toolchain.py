"""Which Triton and which ptxas turn sources into programs here: read once a process, and without importing Triton."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

# Triton's assemblers of PTX, in the order that a version names them. Triton 3.5 has the first one only.
ASSEMBLERS = ("ptxas", "ptxas-blackwell")


@dataclass(frozen=True)
class Toolchain:
    """What compiled a kernel.

    triton  its full version; of old records major.minor alone
    cuda    releases of its ptxas, which allocates registers and schedules: see `cuda_version`. "" where not known
    """

    triton: str
    cuda: str

    @classmethod
    def here(cls) -> Toolchain:
        """That of this process."""
        return cls(triton_version(), cuda_version())

    def like(self, other: Toolchain) -> bool:
        """Whether both make the same programs: Triton's code generation changes with major.minor, ptxas with any."""
        return minor(self.triton) == minor(other.triton) and self.cuda == other.cuda != ""

    def __str__(self) -> str:
        return f"Triton {minor(self.triton)}, ptxas {self.cuda or 'unknown'}"


def minor(version: str) -> str:
    """major.minor of a version."""
    return ".".join(version.split(".")[:2])


@cache
def triton_version() -> str:
    """Of the installed Triton, read without importing it where it was installed under its name."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build of torch's or a vendor's own
        import triton

        return str(triton.__version__)


@cache
def cuda_version() -> str:
    """CUDA release of each ptxas that the installed Triton may run, such as "12.8/12.9"; "" where there is none.

    The second is ptxas-blackwell's. Which of the two a GPU's kernels go through is Triton's own affair and changes
    with its version (3.6: the second from capability 10.0 on; 3.9: from 9.0 on), so both are named.
    """
    return "/".join(release for release in map(_release, ASSEMBLERS) if release)


def _release(assembler: str) -> str | None:
    """Looked for as Triton does (its knobs.py, 3.5 to 3.9): where TRITON_PTXAS_PATH says, else beside its backend."""
    named = os.environ.get(f"TRITON_{assembler.upper().replace('-', '_')}_PATH")
    package = find_spec("triton")
    folders = package.submodule_search_locations if package is not None else None
    bundled = [str(Path(folder, "backends", "nvidia", "bin", assembler)) for folder in folders or ()]
    for path in ([named] if named else []) + bundled:
        try:
            told = subprocess.run(
                [path, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=True
            ).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        if found := re.search(r"release (\d+\.\d+)", told):
            return found[1]
    return None
