"""Specs, shapes, GPUs and workloads: pure data and functions, without device or disk access."""
