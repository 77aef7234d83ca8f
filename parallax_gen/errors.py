"""Every error that parallax_gen raises on purpose descends from `ParallaxGenError`."""

from __future__ import annotations

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
    """A config that does not fit its spec or its GPU (see `problem.space.why_invalid`)."""


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
