"""`python -m parallax_gen` is `parallax-gen`."""

from parallax_gen.cli import main

main(prog_name="parallax-gen")
