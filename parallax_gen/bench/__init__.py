"""Ours beside other packages' kernels, timed in one process on the same inputs."""
