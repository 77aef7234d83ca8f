"""Ctrl-C at a point where it does no harm."""

from __future__ import annotations

import os
import signal
from types import FrameType

STDERR = 2  # a file descriptor: a signal may come in the middle of a print, which sys.stderr does not allow


class Interrupt:
    """A context in which the first Ctrl-C waits for the next `check`, and the second does not wait.

    An interrupt may come anywhere, also between a trial's end and its row in the database: the trial under way is
    worth the fraction of a second that waiting takes.
    """

    def __init__(self) -> None:
        self._asked = False
        self._ours = False

    def __enter__(self) -> Interrupt:
        self._ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, or another's
        if self._ours:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed."""
        if self._asked:
            raise KeyboardInterrupt

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(STDERR, b"\nstopping after this trial; Ctrl-C again stops at once\n")
