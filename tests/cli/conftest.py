"""Every test here has a database and a folder of shipped records of its own, and no GPU."""

from own_database import no_gpu, no_kernels_checked, shipped_folder, store

__all__ = ["no_gpu", "no_kernels_checked", "shipped_folder", "store"]
