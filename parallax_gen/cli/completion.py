"""`parallax-gen completion`: the shell script that completes commands, options and their values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
PROGRAM = "parallax-gen"
COMPLETE_VARIABLE = "_PARALLAX_GEN_COMPLETE"  # the variable that click's script sets to request completions


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the shell's completion script.

    \b
    Example
      parallax-gen completion bash > parallax-gen.sh    source it in ~/.bashrc
      parallax-gen completion zsh > _parallax-gen       into a folder of $fpath
      parallax-gen completion fish > ~/.config/fish/completions/parallax-gen.fish
    """
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(ctx.find_root().command, {}, PROGRAM, COMPLETE_VARIABLE).source())
