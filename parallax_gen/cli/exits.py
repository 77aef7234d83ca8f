"""How the command line ends after an error: one line on standard error, and one exit status for each kind of error."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from click.exceptions import Exit, NoArgsIsHelpError

from parallax_gen.cli.text import width_of
from parallax_gen.errors import ArgumentError, ConfigError, ParallaxGenError, UnknownGpuError, tune_extra
from parallax_gen.tables import paragraph

# Errors that a disk or a system limit causes, not a bug.
DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE}
)

# Exit statuses, by kind of error.
FAILED = 1  # what was asked could not be done, or a check found a problem
WRONG_USAGE = 2  # an option, a value or a GPU that does not exist or does not fit
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def exit_status(error: BaseException) -> int | None:
    """The exit status for an expected error; None for a bug, which keeps its traceback."""
    if isinstance(error, click.UsageError | ArgumentError | ConfigError | UnknownGpuError):
        return WRONG_USAGE
    # Click turns Ctrl-C at a question into an Abort, like the answer no.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return INTERRUPTED
    # An OSError may be of any file, also of standard output; Click handles EPIPE.
    expected = isinstance(error, click.ClickException | click.Abort | ParallaxGenError)
    return FAILED if expected or (isinstance(error, OSError) and error.errno in DISK_ERRORS) else None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an expected error as one line, and end with its exit status."""
    try:
        with tune_extra("this command"):
            yield
    except NoArgsIsHelpError as error:  # not an error for people: Click shows the help
        error.show()
        raise Exit(WRONG_USAGE) from error
    except (Exception, KeyboardInterrupt) as error:
        status = exit_status(error)
        if status is None:
            raise
        if status != INTERRUPTED:
            width = width_of(err=True) if sys.stderr.isatty() else None  # elsewhere always one line
            click.echo(paragraph(f"error: {_message(error)}", width, "  "), err=True)
        raise Exit(status) from error


def _message(error: BaseException) -> str:
    if isinstance(error, click.Abort):
        return "not confirmed, so nothing was done"
    if not isinstance(error, click.ClickException):
        return " ".join(str(error).split())
    context = getattr(error, "ctx", None)
    advice = f" (see {context.command_path} --help)" if context else ""
    return " ".join(error.format_message().split()) + advice
