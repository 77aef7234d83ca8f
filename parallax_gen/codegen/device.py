"""The GPUs of this machine, by torch. For processes that may touch CUDA."""

from __future__ import annotations

from functools import cache
from typing import Any

from parallax_gen.errors import UnknownGpuError
from parallax_gen.problem.hardware import Gpu, gpu_by_name, recognise


@cache
def gpu_of_device(index: int) -> Gpu:
    """The GPU of CUDA device `index`; in a ROCm build of torch CUDA devices are AMD GPUs."""
    import torch

    device: Any = torch.cuda.get_device_properties(index)  # torch's type stub lacks fields
    if torch.version.hip:
        sizes = device.multi_processor_count, device.total_memory
        return recognise(device.name, (device.major, device.minor), *sizes, gfx=device.gcnArchName)
    return recognise(
        device.name,
        (device.major, device.minor),
        device.multi_processor_count,
        device.total_memory,
        shared_per_block=device.shared_memory_per_block_optin,
        l2_bytes=device.L2_cache_size,
    )


def gpu_here(index: int | None = None) -> Gpu | None:
    """The GPU of CUDA device `index`, by default the current one; None if CUDA finds none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return gpu_of_device(torch.cuda.current_device() if index is None else index)


@cache
def card_named(name: str) -> Gpu | None:
    """The GPU with this name in records, if it is in the table or is CUDA's first device."""
    try:
        return gpu_by_name(name)
    except UnknownGpuError:
        card = gpu_here(0)
        return card if card is not None and card.name == name else None
