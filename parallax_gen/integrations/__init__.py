"""Parallax attention in other libraries' models, one module per library. Only these modules import them."""
