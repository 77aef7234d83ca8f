"""The command line: `parallax-gen COMMAND`, one file per command, imported when the command runs."""

from __future__ import annotations

import codecs
import io
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

import parallax_gen
from parallax_gen.cli.exits import one_line_errors
from parallax_gen.cli.logs import verbose_option, with_verbose
from parallax_gen.environment import SWITCHES, is_on

# Command -> module:function. The files import torch, Triton, Optuna and the database inside functions, to keep help
# fast.
COMMANDS = {
    "tune": "parallax_gen.cli.tune:tune",
    "list": "parallax_gen.cli.listing:list_known",
    "show": "parallax_gen.cli.show:show",
    "explain": "parallax_gen.cli.explain:explain",
    "lock": "parallax_gen.cli.lock:lock",
    "render": "parallax_gen.cli.render:render_kernel",
    "export": "parallax_gen.cli.export:export",
    "bench": "parallax_gen.cli.bench:bench",
    "report": "parallax_gen.cli.report:report",
    "sweep": "parallax_gen.cli.sweep:sweep",
    "replay": "parallax_gen.cli.replay:replay",
    "ship": "parallax_gen.cli.ship:ship",
    "db": "parallax_gen.cli.db:db",
    "doctor": "parallax_gen.cli.doctor:doctor",
    "completion": "parallax_gen.cli.completion:completion",
}


class LazyGroup(click.Group):
    """A group that imports its commands when needed, and prints each error as one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _print_utf8()
        return super().main(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, target in COMMANDS.items() if find_spec(target.partition(":")[0])]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return with_verbose(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        name = args[0]
        if not ctx.resilient_parsing and name not in names and not name.startswith("-"):
            similar = get_close_matches(name, names, cutoff=0.7)
            advice = f" Did you mean {' or '.join(map(repr, similar))}?" if similar else ""
            ctx.fail(f"No such command {name!r}.{advice}")
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


def _print_utf8() -> None:
    """Print UTF-8 in every locale, because redirected kernels and records must be UTF-8 files."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(parallax_gen.__version__, prog_name="parallax-gen")
def main() -> None:
    """Specialised, tuned Triton kernels for Parallax attention: generate, tune, remember, launch.

    \b
    Begin with
      parallax-gen doctor             check that everything needed is installed
      parallax-gen tune --model PATH  find the best kernels for a model
      parallax-gen list               list the best results so far

    \b
    Exit status
      0 done, 1 an error (printed in one line), 2 wrong usage, 130 Ctrl-C
    """
    for variable in SWITCHES:
        is_on(variable)  # raises for an invalid value before the command starts


main.params.append(verbose_option())
