"""Ctrl-C at a safe point: between a trial's end and the write of its row it would lose the trial."""

from __future__ import annotations

import os
import signal
from types import FrameType

STDERR = 2  # a file descriptor: a signal may interrupt a print, and sys.stderr is not reentrant


class Interrupt:
    """A context in which the first Ctrl-C waits for the next `check`, and the second interrupts at once.

    Otherwise an interrupt could come between a trial's end and the write of its row, and lose the trial.
    """

    def __init__(self) -> None:
        self._was_pressed = False
        self._handles_sigint = False

    def __enter__(self) -> Interrupt:
        # Otherwise SIGINT is ignored or has another handler, which stays.
        self._handles_sigint = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._handles_sigint:
            signal.signal(signal.SIGINT, self._request_stop)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handles_sigint:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed."""
        if self._was_pressed:
            raise KeyboardInterrupt

    def _request_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._was_pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(STDERR, b"\nstopping after this trial; Ctrl-C again stops at once\n")
