"""The tuner and the compilers for Python programs and notebooks: `parallax_gen.tune` and `parallax_gen.prepare`."""
