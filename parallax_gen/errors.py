"""The errors that parallax_gen raises on purpose, and which errors are the machine's fault."""

from __future__ import annotations

import builtins
import errno
import math
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

_Error = TypeVar("_Error", bound="ParallaxGenError")


class ParallaxGenError(Exception):
    """Base class of every error raised on purpose. The command line prints it without a traceback and exits non-zero.

    Every subclass pickles and copies with its fields and notes, whatever arguments its constructor takes, because it
    may be raised in a child process. Its cause and traceback are not pickled, as with all exceptions of Python.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Python would call the constructor with `args`, which holds the message alone.
        return _restored, (type(self), self.args), self.__dict__ or None


def _restored(cls: type[_Error], arguments: tuple[Any, ...]) -> _Error:
    """Rebuild an error without calling its constructor; pickle and copy restore its fields."""
    return cls.__new__(cls, *arguments)


class ArgumentError(ParallaxGenError, ValueError):
    """An argument of a public function or command is invalid. Names the argument, its value and the allowed values."""

    def __init__(self, argument: str, got: object, allowed: str):
        # super().__init__ is not called: torch.compile cannot trace it, and up to 2.11 it failed itself where this was
        # raised. `args` holds the arguments of `__new__`.
        self.argument, self.got, self.allowed = argument, got, allowed

    def __str__(self) -> str:
        return f"{self.argument}: got {self.got}; allowed: {self.allowed}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"  # torch.compile reports this text


class UnknownGpuError(ParallaxGenError):
    """A GPU name that is not in the table, or a GPU other than the requested one."""


class ConfigError(ParallaxGenError):
    """A config that does not fit its spec or its GPU (see `ops.space.why_invalid`)."""


class BuildError(ParallaxGenError):
    """A rendered kernel did not compile."""


class MachineError(ParallaxGenError):
    """The machine is at fault, not a kernel: a full disk, a missing assembler, a lost device (see `machine_error`).

    The operation ends, and no result is stored for the config that was being tried.
    """


class MemoryTakenError(MachineError):
    """Other processes hold the GPU or host memory that a trial needs. The trial may work once they end."""


class MeasureError(ParallaxGenError):
    """A kernel could not be checked or timed."""


class StoreError(ParallaxGenError):
    """The tuning database or a file of records cannot be used."""


class DistributedError(ParallaxGenError):
    """The ranks of a process group disagree on something that must be the same on all of them."""


class LockError(ParallaxGenError):
    """A lock does not have a call's kernel, or this process cannot run the kernel that it has."""


class UntunedError(ParallaxGenError):
    """A call's kernel was not measured on this GPU with this Triton, and PARALLAX_GEN_STRICT allows no other."""


# What the extra `tune` installs, by the names that programs import.
TUNE_EXTRA = {
    "click": "click",
    "optuna": "Optuna",
    "pygments": "Pygments",
    "rich": "rich",
    "sqlalchemy": "SQLAlchemy",
    "sqlite_utils": "sqlite-utils",
}


def install_command(extra: str) -> str:
    """The command that installs an extra of this package from where this installation is from.

    So it is right for a checkout, a file and an index, whether or not an index has the package.
    """
    import json
    from importlib import metadata
    from urllib.parse import unquote, urlsplit

    checkout = Path(__file__).parents[1]
    origin: dict[str, Any] = {"url": checkout.as_uri(), "dir_info": {"editable": True}}  # runs without installation
    with suppress(metadata.PackageNotFoundError):
        # Installers write this file (PEP 610) for all that is not from an index.
        origin = json.loads(metadata.distribution("parallax-gen").read_text("direct_url.json") or "{}")
    url = origin.get("url", "")
    if url.startswith("file:"):
        editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
        return f"pip install {editable}'{unquote(urlsplit(url).path)}[{extra}]'"
    if vcs := origin.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return f"pip install 'parallax-gen[{extra}]{url and f' @ {url}'}'"


@contextmanager
def tune_extra(what: str, kind: type[ParallaxGenError] = MachineError) -> Iterator[None]:
    """Turn a failed import of a package of the extra `tune` into an error of this kind that says how to install it.

    what  needs the package, as a sentence's subject

    Also decorates a function.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = TUNE_EXTRA.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise kind(f"{what} needs {package}: {install_command('tune')}") from error


# -- Faults of the machine, as opposed to failures of a kernel.
#
# A config is stored as failed only if it would fail again on a healthy machine. This module alone decides which
# failures are the machine's: by the type of the error, or by its text if only that says enough: for a
# RuntimeError from torch or Triton, for the last line that a child printed, and for rows that earlier versions stored.

# Errors that no kernel raises. Compiling and launching a kernel writes files and starts programs, which may raise them.
_TYPES = (OSError, MemoryError, ImportError, subprocess.SubprocessError)
_TYPE_NAMES = [
    *(name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, _TYPES)),
    *("CalledProcessError", "TimeoutExpired"),
]
MAYBE_MACHINE_ERRORS = (*_TYPES, RuntimeError, MachineError)  # code that catches these passes them to `machine_error`

_MEMORY_ERRNOS = (errno.ENOMEM, errno.EAGAIN)  # EAGAIN: from fork, at a limit on processes or memory
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
_FILES_ERRNOS = (errno.EMFILE, errno.ENFILE)

# Messages of Python, torch, Triton and ptxas when the host's memory is exhausted.
_MEMORY_TEXT = re.compile(
    r"Cannot allocate memory|can't allocate memory|can't start new thread|Resource temporarily unavailable"
    r"|std::bad_alloc|LLVM ERROR: out of memory|`ptxas` failed with error code (-9|137)\b"
)
# Messages when something is full, missing or too old.
_BROKEN_TEXT = re.compile(
    r"No space left on device|Disk quota exceeded|database or disk is full|disk I/O error|Read-only file system"
    r"|Too many open files|Input/output error"
    r"|Stale file handle|error while loading shared libraries|Cannot find ptxas|cuobjdump is missing"
    r"|`ptxas` failed with error code (126|127|-7|135|-15|143|-25|153)\b|ptxas fatal\s*: (Could not|Cannot) open"
    r"|Unsupported \.version|is not defined for option 'gpu-name'"
    r"|cannot write (the kernel|kernels to) "  # the message of earlier versions
)
# Messages when the device is lost or unusable. Errors that a kernel causes in its own process are left out: illegal
# access or instruction, misaligned address, failed assertion, launch failure.
_DEVICE_TEXT = re.compile(
    r"\bCUDA\b.*(busy or unavailable|no CUDA-capable device|invalid device ordinal|uncorrectable|unknown error"
    r"|GPU is lost|fallen off the bus|device is unavailable|driver shutting down|system not yet initialized"
    r"|initialization error|initialization failed|driver version is insufficient|unsupported display driver)"
    r"|No CUDA GPUs are available|Found no NVIDIA driver|[Dd]river/library version mismatch|0 active drivers"
    r"|CUDA_ERROR_ECC_UNCORRECTABLE|MPS client failed to connect|NVML_SUCCESS =="
)
# The driver's message when the card's memory is exhausted. torch's message also gives sizes.
_DRIVER_MEMORY_TEXT = re.compile(r"([\w.]+: )?(CUDA (driver )?error|Triton Error \[CUDA\]): out of memory")
OUT_OF_MEMORY = re.compile(r"\bout of memory\b")

# How a stored detail begins if it is an error of _TYPES: earlier versions stored its `gist`, or a child's last line.
_STORED_TYPE = re.compile(rf"(exit status \d+: )?({'|'.join(_TYPE_NAMES)})\b")
_STORED_SIGNAL = re.compile(r"exit status -(1|2|9|15): ")
_SEARCHED_CHARS = 1000  # at each end of a stored detail: a `gist` has two lines

CONTEXT_BYTES = 2**30  # card memory of a process that torch does not count: CUDA context, kernels, stacks
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def machine_error(error: BaseException) -> MachineError | None:
    """The machine's fault behind an error, with advice on what to do; None for a kernel's failure or a bug.

    The causes of the error (`raise ... from`) are checked too: Triton's frontend wraps the errors that it catches.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MachineError):
            return cause
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in _MEMORY_ERRNOS):
            return _host_memory_error(gist(cause))
        if isinstance(cause, OSError):
            return MachineError(gist(cause) + _advice(cause))
        if isinstance(cause, _TYPES):
            return MachineError(gist(cause))
        if fault := _from_text(str(cause), gist(cause)):
            return fault
        cause = cause.__cause__
    return None


def machine_error_of_exit(status: int, last_line: str) -> MachineError | None:
    """The machine's fault that ended a child, by its exit status and last line; None if the child's work may have.

    Not for a child that this process killed.
    """
    message = f"exit status {status}: {last_line}"
    if status == -signal.SIGKILL:
        return _host_memory_error(
            f"a child process was killed ({message}), as the kernel does when the host's memory is full"
        )
    if _STORED_SIGNAL.match(message):
        return MachineError(f"a child process was killed from outside ({message})")
    return _from_text(last_line, message) if status > 0 else None


def is_stored_machine_error(detail: str) -> bool:
    """Whether a stored row's detail is a fault of the machine, which earlier versions stored as the config's own."""
    if not detail:
        return False
    if len(detail) > 2 * _SEARCHED_CHARS:  # some patterns take time quadratic in the length
        detail = f"{detail[:_SEARCHED_CHARS]}\n{detail[-_SEARCHED_CHARS:]}"
    return bool(_STORED_TYPE.match(detail) or _STORED_SIGNAL.match(detail) or _from_text(detail, detail))


def held_by_other_processes(message: str) -> bool:
    """Whether a failed allocation would have succeeded if no other process had used the card.

    message  of a torch.OutOfMemoryError
    """

    def size(pattern: str) -> float:
        match = re.search(pattern.replace("SIZE", r"([\d.]+) (bytes|[KMGT]iB)"), message)
        return float(match[1]) * _UNITS[match[2]] if match else math.nan

    requested, total, free = (size(p) for p in ("allocate SIZE", "capacity of SIZE", "of which SIZE is free"))
    used, cached = size("SIZE is allocated by PyTorch"), size("SIZE is reserved by PyTorch but")
    own = used + cached + CONTEXT_BYTES
    return total - free > own and requested + own <= total  # both are false if a size is missing (NaN)


def gist(error: BaseException) -> str:
    """The error's type, and its first and last line: Triton's first line says where, its last line says what."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ends = lines if len(lines) < 3 else [lines[0], lines[-1]]
    return f"{type(error).__name__}: {' '.join(ends)}"


def _from_text(text: str, message: str) -> MachineError | None:
    """The machine's fault that a text shows, or None. message: the text for the error."""
    if _MEMORY_TEXT.search(text):
        return _host_memory_error(message)
    if _DRIVER_MEMORY_TEXT.match(text) or (OUT_OF_MEMORY.search(text) and held_by_other_processes(text)):
        return MemoryTakenError(f"{message} (other processes hold the card's memory: end them, or wait)")
    if _BROKEN_TEXT.search(text):
        lines = [line.strip() for line in text.splitlines() if _BROKEN_TEXT.search(line)]
        return MachineError(message if lines[0] in message else f"{message} ({lines[0]})")
    return MachineError(message) if _DEVICE_TEXT.search(text) else None


def _host_memory_error(message: str) -> MemoryTakenError:
    return MemoryTakenError(
        f"{message} (the host has no free memory or processes: end other processes, or lower --workers)"
    )


def _advice(error: OSError) -> str:
    tools = [name for name in os.environ if name.startswith("TRITON_") and name.endswith("_PATH")]
    if variables := [name for name in tools if os.environ[name] == error.filename]:
        return f" ({variables[0]} is set to this path)"
    if error.errno in _DISK_ERRNOS:
        return " (set PARALLAX_GEN_CACHE_DIR, TRITON_CACHE_DIR and TMPDIR to writable folders with free space)"
    return " (raise `ulimit -n`, or lower --workers)" if error.errno in _FILES_ERRNOS else ""
