"""The implementation of `parallax_gen.compat`: functions with the signatures of other Parallax packages."""
