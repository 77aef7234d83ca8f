"""Parallax attention in other libraries' models, one module a library: each imports its library, this imports none."""
