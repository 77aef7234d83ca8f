"""parallax_gen: specialised, tuned Triton kernels for Parallax attention."""

__version__ = "0.1.0"
