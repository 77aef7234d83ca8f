"""`parallax-gen --verbose`: the package's log lines, on standard error."""

from __future__ import annotations

import logging
from collections.abc import Callable

import click

from parallax_gen.cli.text import print_text

LOGGER = logging.getLogger("parallax_gen")


class _ToStandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_text(self.format(record), indent="    ", err=True)


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


def verbose_option() -> click.Option:
    """-v of the program and of each command. Its value is not an argument of commands."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        root = ctx.find_root()
        if value and not ctx.resilient_parsing and not root.meta.get(__name__):
            root.meta[__name__] = True  # -v may be given twice
            root.call_on_close(show_logs())

    text = "Print on standard error which kernel is used, and why."
    return click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=show, help=text)


def with_verbose(command: click.Command) -> click.Command:
    """A command that takes -v, like its subcommands."""
    for part in (command, *(command.commands.values() if isinstance(command, click.Group) else ())):
        if not any("-v" in param.opts for param in part.params):
            part.params.append(verbose_option())
    return command
