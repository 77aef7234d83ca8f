"""`parallax-gen --verbose`: the package's log lines, on standard error."""

from __future__ import annotations

import logging
from collections.abc import Callable

import click

LOGGER = logging.getLogger("parallax_gen")


class _ToStandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


def show_logs() -> Callable[[], None]:
    """Show log lines of level INFO and above from now on. Returns the function that stops it."""
    handler, original = _ToStandardError(), LOGGER.level
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)

    def stop() -> None:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(original)

    return stop
