"""What the ranking asks for the records of a place: the memory, or a table that was taken from one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from parallax_gen.memory.place import Place
from parallax_gen.memory.result import Result


class Known(Protocol):
    """Where records are looked up."""

    def results(self, place: Place) -> list[Result]:
        """All that is known of a place, of any kernel and toolchain: the measured first, from fast to slow."""


class Table:
    """Records with no file behind them: what processes have that must all choose alike."""

    def __init__(self, records: Iterable[Result]) -> None:
        self._records: dict[Place, list[Result]] = {}
        for record in records:
            self._records.setdefault(record.place, []).append(record)

    def results(self, place: Place) -> list[Result]:
        return self._records.get(place, [])
