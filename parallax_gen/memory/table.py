"""What dispatch asks for the best record of a key: the memory, or a table that was taken from one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from parallax_gen.memory.keys import Key
from parallax_gen.memory.results import Result


class Known(Protocol):
    """Where records are looked up."""

    def best(self, key: Key) -> Result | None:
        """The fastest config measured under `key`."""


class Table:
    """Records, one a key, with no file behind them: what processes have that must all choose alike."""

    def __init__(self, records: Iterable[Result]) -> None:
        self._records = {record.key: record for record in records}

    def best(self, key: Key) -> Result | None:
        return self._records.get(key)
