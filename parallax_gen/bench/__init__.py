"""Benchmarks our kernels and those of other packages in one process, on the same inputs."""
