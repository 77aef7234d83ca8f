"""Launch plans count their launches; this package writes the counts to no file."""

from __future__ import annotations

from functools import cache

from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


class CallCount:
    """How often one plan launched."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class CallCounts:
    """Makes the counts of plans."""

    def of(self, spec: KernelSpec, shape: Shape) -> CallCount:
        return CallCount()


@cache
def call_counts() -> CallCounts:
    """The counts of this process."""
    return CallCounts()
