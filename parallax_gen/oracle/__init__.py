"""The fp64 oracle, and the checks of kernels against it."""
