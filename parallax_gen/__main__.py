"""`python -m parallax_gen` is `parallax-gen`, and this is its entry point, which needs no click to say that it does."""

from __future__ import annotations

import sys

from parallax_gen.errors import MachineError, tune_extra


def main() -> None:
    """Run the command line. Without click, print in one line how to install it, and exit with 1."""
    try:
        with tune_extra("the command line"):
            from parallax_gen.cli import main as command
    except MachineError as error:
        sys.exit(f"error: {error}")
    command(prog_name="parallax-gen")


if __name__ == "__main__":
    main()
