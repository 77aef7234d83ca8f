"""Every error raised on purpose descends from `ParallaxGenError`; and which failures are the machine's."""

from __future__ import annotations

import builtins
import errno
import math
import os
import re
import signal
import subprocess
from typing import Any, TypeVar

_Error = TypeVar("_Error", bound="ParallaxGenError")


class ParallaxGenError(Exception):
    """Root of the tree. The command line prints these without a traceback and exits non-zero.

    Every error below it pickles and copies with its fields and notes, whatever its constructor takes: it may be raised
    in a child process. As with all exceptions of Python, its cause and its traceback stay behind.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Python would call the constructor with `args`, which holds the message alone.
        return _restored, (type(self), self.args), self.__dict__ or None


def _restored(cls: type[_Error], arguments: tuple[Any, ...]) -> _Error:
    """An error as it was after its constructor, without calling that; pickle and copy add its fields."""
    return cls.__new__(cls, *arguments)


class ArgumentError(ParallaxGenError, ValueError):
    """An argument of a public function or command is not usable: names it, what came and what is allowed."""

    def __init__(self, argument: str, got: object, allowed: str):
        # No call of super().__init__: torch.compile cannot trace one, and up to 2.11 failed itself where this was
        # raised. `args` is what `__new__` was given.
        self.argument, self.got, self.allowed = argument, got, allowed

    def __str__(self) -> str:
        return f"{self.argument}: got {self.got}; allowed: {self.allowed}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"  # which torch.compile tells of it


class UnknownGpuError(ParallaxGenError):
    """A GPU name that the table does not hold, or a GPU that is not the one asked for."""


class ConfigError(ParallaxGenError):
    """A config that does not fit its spec or its GPU (see `ops.space.why_invalid`)."""


class BuildError(ParallaxGenError):
    """A rendered kernel did not compile."""


class MachineError(ParallaxGenError):
    """The machine is at fault, not a kernel: a full disk, a missing assembler, a lost device (see `machine`).

    It ends what it happens to, and nothing is stored of the config that was tried.
    """


class MemoryTakenError(MachineError):
    """Others hold the memory, of the GPU or of the host, that a trial needs. It may work once they are done."""


class MeasureError(ParallaxGenError):
    """A kernel could not be checked or timed."""


class StoreError(ParallaxGenError):
    """The tuning database or a file of records cannot be used."""


class DistributedError(ParallaxGenError):
    """Ranks of a process group that must choose alike do not."""


class UntunedError(ParallaxGenError):
    """A call's kernel was not measured on this GPU with this Triton, and PARALLAX_GEN_STRICT allows no other."""


# -- Where the machine fails: faults that are no kernel's.
#
# A config is remembered as failed only where it would fail again on a sound machine. Which failures are the machine's
# is decided here alone: by the type of an error where it has one, and by its text where only text is left, in a
# RuntimeError of torch's or Triton's, in the last words of a child, in rows that earlier versions stored.

# Errors that no kernel raises: to compile and launch one is to write files and to start programs.
_TYPES = (OSError, MemoryError, ImportError, subprocess.SubprocessError)
_TYPE_NAMES = [
    *(name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, _TYPES)),
    *("CalledProcessError", "TimeoutExpired"),
]
SUSPECTS = (*_TYPES, RuntimeError, MachineError)  # whoever catches these asks `machine_error` about them

_MEMORY_ERRNOS = (errno.ENOMEM, errno.EAGAIN)  # EAGAIN: of a fork, where processes or memory are limited
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
_FILES_ERRNOS = (errno.EMFILE, errno.ENFILE)

# What Python, torch, Triton and ptxas say where others hold the host's memory, ...
_MEMORY_TEXT = re.compile(
    r"Cannot allocate memory|can't allocate memory|can't start new thread|Resource temporarily unavailable"
    r"|std::bad_alloc|LLVM ERROR: out of memory|`ptxas` failed with error code (-9|137)\b"
)
# ... where something is full, missing or too old, ...
_BROKEN_TEXT = re.compile(
    r"No space left on device|Disk quota exceeded|database or disk is full|disk I/O error|Read-only file system"
    r"|Too many open files|Input/output error"
    r"|Stale file handle|error while loading shared libraries|Cannot find ptxas|cuobjdump is missing"
    r"|`ptxas` failed with error code (126|127|-7|135|-15|143|-25|153)\b|ptxas fatal\s*: (Could not|Cannot) open"
    r"|Unsupported \.version|is not defined for option 'gpu-name'"
    r"|cannot write (the kernel|kernels to) "  # as earlier versions said it
)
# ... and where the device is lost, or cannot be used. What a kernel does to its own process is not among these:
# illegal access or instruction, misaligned address, failed assertion, launch failure.
_DEVICE_TEXT = re.compile(
    r"\bCUDA\b.*(busy or unavailable|no CUDA-capable device|invalid device ordinal|uncorrectable|unknown error"
    r"|GPU is lost|fallen off the bus|device is unavailable|driver shutting down|system not yet initialized"
    r"|initialization error|initialization failed|driver version is insufficient|unsupported display driver)"
    r"|No CUDA GPUs are available|Found no NVIDIA driver|[Dd]river/library version mismatch|0 active drivers"
    r"|CUDA_ERROR_ECC_UNCORRECTABLE|MPS client failed to connect|NVML_SUCCESS =="
)
# The driver's own words for a card whose memory is taken; torch's tell sizes.
_DRIVER_MEMORY_TEXT = re.compile(r"([\w.]+: )?(CUDA (driver )?error|Triton Error \[CUDA\]): out of memory")
OUT_OF_MEMORY = re.compile(r"\bout of memory\b")

# As `gist` and a child's last words begin, where earlier versions stored an error of _TYPES.
_STORED_TYPE = re.compile(rf"(exit status \d+: )?({'|'.join(_TYPE_NAMES)})\b")
_STORED_SIGNAL = re.compile(r"exit status -(1|2|9|15): ")
_LOOKED_AT = 1000  # characters at each end of what a row tells: `gist` has two lines

CONTEXT_BYTES = 2**30  # of a card, what a process has that torch does not count: CUDA's context, kernels, their stacks
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def machine_error(error: BaseException) -> MachineError | None:
    """A failure as the machine's, in a sentence that says what to do; None where it is a kernel's, or a mistake.

    What an error was raised from counts too: Triton's frontend wraps what it meets.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MachineError):
            return cause
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in _MEMORY_ERRNOS):
            return _memory_taken(gist(cause))
        if isinstance(cause, OSError):
            return MachineError(gist(cause) + _advice(cause))
        if isinstance(cause, _TYPES):
            return MachineError(gist(cause))
        if found := _from_text(str(cause), gist(cause)):
            return found
        cause = cause.__cause__
    return None


def ended_from_outside(status: int, words: str) -> MachineError | None:
    """Why a child ended that nobody here killed, by its exit status and last words; None where its work may be why."""
    told = f"exit status {status}: {words}"
    if status == -signal.SIGKILL:
        return _memory_taken(f"a child process was killed ({told}), as the kernel does where the host's memory is full")
    if _STORED_SIGNAL.match(told):
        return MachineError(f"a child process was ended from outside ({told})")
    return _from_text(words, told) if status > 0 else None


def stored_of_machine(detail: str) -> bool:
    """Whether a row's detail, as earlier versions stored it, tells of a fault of the machine as its config's own."""
    if not detail:
        return False
    if len(detail) > 2 * _LOOKED_AT:  # the time that some patterns take grows with the square of it
        detail = f"{detail[:_LOOKED_AT]}\n{detail[-_LOOKED_AT:]}"
    return bool(_STORED_TYPE.match(detail) or _STORED_SIGNAL.match(detail) or _from_text(detail, detail))


def taken_by_others(message: str) -> bool:
    """Whether an allocation that torch tells of would have gone well if its process had had the card to itself.

    message  that of a torch.OutOfMemoryError
    """

    def size(pattern: str) -> float:
        found = re.search(pattern.replace("SIZE", r"([\d.]+) (bytes|[KMGT]iB)"), message)
        return float(found[1]) * _UNITS[found[2]] if found else math.nan

    asked, total, free = (size(p) for p in ("allocate SIZE", "capacity of SIZE", "of which SIZE is free"))
    used, cached = size("SIZE is allocated by PyTorch"), size("SIZE is reserved by PyTorch but")
    mine = used + cached + CONTEXT_BYTES
    return total - free > mine and asked + mine <= total  # of a size that is not told, both are false


def gist(error: BaseException) -> str:
    """The error's type, and its first and last line: Triton says where first, and what last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ends = lines if len(lines) < 3 else [lines[0], lines[-1]]
    return f"{type(error).__name__}: {' '.join(ends)}"


def _from_text(text: str, told: str) -> MachineError | None:
    """What a text shows of the machine. told: how to say it."""
    if _MEMORY_TEXT.search(text):
        return _memory_taken(told)
    if _DRIVER_MEMORY_TEXT.match(text) or (OUT_OF_MEMORY.search(text) and taken_by_others(text)):
        return MemoryTakenError(f"{told} (other processes hold the card's memory: end them, or wait)")
    if _BROKEN_TEXT.search(text):
        lines = [line.strip() for line in text.splitlines() if _BROKEN_TEXT.search(line)]
        return MachineError(told if lines[0] in told else f"{told} ({lines[0]})")
    return MachineError(told) if _DEVICE_TEXT.search(text) else None


def _memory_taken(told: str) -> MemoryTakenError:
    return MemoryTakenError(f"{told} (the host's memory or processes are used up: end others, or lower --workers)")


def _advice(error: OSError) -> str:
    tools = [name for name in os.environ if name.startswith("TRITON_") and name.endswith("_PATH")]
    if named := [name for name in tools if os.environ[name] == error.filename]:
        return f" (which {named[0]} names)"
    if error.errno in _DISK_ERRNOS:
        return " (PARALLAX_GEN_CACHE_DIR, TRITON_CACHE_DIR and TMPDIR can name folders with room to write)"
    return " (raise `ulimit -n`, or lower --workers)" if error.errno in _FILES_ERRNOS else ""
