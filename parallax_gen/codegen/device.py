"""Which GPU a CUDA device is: asked of torch, in a process that may touch CUDA."""

from __future__ import annotations

from functools import cache
from typing import Any

from parallax_gen.problem.hardware import Gpu, recognise


@cache
def gpu_of_device(index: int) -> Gpu:
    """The GPU that CUDA device `index` is."""
    import torch

    device: Any = torch.cuda.get_device_properties(index)  # torch's stub of it lacks fields
    return recognise(
        device.name,
        (device.major, device.minor),
        device.multi_processor_count,
        device.total_memory,
        shared_per_block=device.shared_memory_per_block_optin,
        l2_bytes=device.L2_cache_size,
    )
