"""The fp64 truth, and what is checked against it."""
