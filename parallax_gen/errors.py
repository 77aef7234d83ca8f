"""Every error that parallax_gen raises on purpose descends from `ParallaxGenError`."""

from __future__ import annotations


class ParallaxGenError(Exception):
    """Root of the tree. The command line prints these without a traceback and exits non-zero."""


class ArgumentError(ParallaxGenError, ValueError):
    """An argument of a public function or command is not usable: names it, what came and what is allowed."""

    def __init__(self, argument: str, got: object, allowed: str):
        super().__init__(f"{argument}: got {got}; allowed: {allowed}")
        self.argument, self.got, self.allowed = argument, got, allowed


class UnknownGpuError(ParallaxGenError):
    """A GPU name that the table does not hold, or a GPU that is not the one asked for."""


class ConfigError(ParallaxGenError):
    """A config that does not fit its spec or its GPU (see `problem.space.why_invalid`)."""


class BuildError(ParallaxGenError):
    """A rendered kernel did not compile."""


class MeasureError(ParallaxGenError):
    """A kernel could not be checked or timed."""


class StoreError(ParallaxGenError):
    """The tuning database or a file of records cannot be used."""


class DistributedError(ParallaxGenError):
    """Ranks of a process group that must choose alike do not."""
