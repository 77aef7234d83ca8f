"""The implementation of `parallax_gen.compat`, whose docstring says what it is."""
