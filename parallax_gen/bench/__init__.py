"""Benchmarks our kernels against other packages' in one process on the same inputs."""
