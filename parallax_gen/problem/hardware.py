"""The supported GPUs: limits and peak rates, by name or from a device's properties.

This is plain data. Nothing here queries a device, so kernels can be chosen and compiled for a GPU that is not present.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any

from parallax_gen.errors import ArgumentError, UnknownGpuError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# A driver reports less memory than the data sheet: 1 % less for HBM, 8 % less for GDDR6 with ECC.
MEMORY_TOLERANCE = 0.12
# CUDA reserves this much of a multiprocessor's shared memory for every resident block.
RESERVED_SHARED = KIB
# The first capability with bf16 matmuls and asynchronous copies, which every kernel uses.
OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    name                      short and stable: used in records and file names ("h200")
    title                     for people ("NVIDIA H200 SXM")
    capability                compute capability, (major, minor)
    sms                       streaming multiprocessors
    registers_per_sm          32-bit registers
    max_registers_per_thread
    max_warps_per_sm          resident at a time
    max_blocks_per_sm         resident at a time
    shared_per_sm             bytes
    shared_per_block          bytes, with the opt-in that Triton makes
    l2_bytes
    memory_bytes              as sold; a driver reports somewhat less
    bandwidth                 of device memory, bytes/s
    tensor_flops              bf16 and fp16 matmuls with fp32 accumulation, dense, FLOP/s
    tf32_flops                the same for tf32
    fp32_flops                outside the tensor cores
    estimated                 whether the rates, and other values that the device did not report, are a similar card's
    """

    name: str
    title: str
    capability: tuple[int, int]
    sms: int
    registers_per_sm: int
    max_registers_per_thread: int
    max_warps_per_sm: int
    max_blocks_per_sm: int
    shared_per_sm: int
    shared_per_block: int
    l2_bytes: int
    memory_bytes: int
    bandwidth: float
    tensor_flops: float
    tf32_flops: float
    fp32_flops: float
    estimated: bool = False

    @property
    def arch(self) -> int:
        """The capability as one number, as in Triton's targets: 90 for (9, 0)."""
        return 10 * self.capability[0] + self.capability[1]

    def peak(self, dtype: str) -> float:
        """The peak FLOP/s for inputs of `dtype`. fp32 is exact here, so it runs outside the tensor cores."""
        tensor = self.tensor_flops
        peaks = {"bf16": tensor, "fp16": tensor, "tf32": self.tf32_flops, "fp32": self.fp32_flops}
        if dtype not in peaks:
            raise ArgumentError("dtype", repr(dtype), ", ".join(peaks))
        return peaks[dtype]


@dataclass(frozen=True)
class _Limits:
    """The limits that a compute capability determines.

    From "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide 13, in which KB is
    1024 bytes. All capabilities from 8.0 on have 64 K registers per multiprocessor and at most 255 per thread.
    """

    max_warps_per_sm: int
    max_blocks_per_sm: int
    shared_per_sm: int
    registers_per_sm: int = 64 * 1024
    max_registers_per_thread: int = 255

    def as_fields(self) -> dict[str, Any]:
        """These limits as arguments of Gpu."""
        return {**asdict(self), "shared_per_block": self.shared_per_sm - RESERVED_SHARED}


_LIMITS: dict[tuple[int, int], _Limits] = {
    (8, 0): _Limits(64, 32, 164 * KIB),
    (8, 6): _Limits(48, 16, 100 * KIB),
    (8, 7): _Limits(48, 16, 164 * KIB),
    (8, 9): _Limits(48, 24, 100 * KIB),
    (9, 0): _Limits(64, 32, 228 * KIB),
    (10, 0): _Limits(64, 32, 228 * KIB),
    (12, 0): _Limits(48, 24, 100 * KIB),
}


def _card(
    name: str,
    title: str,
    capability: tuple[int, int],
    sms: int,
    l2_mib: int,
    memory_gib: int,
    bandwidth: float,
    tensor: float,
    tf32: float,
    fp32: float,
) -> Gpu:
    return Gpu(
        name=name,
        title=title,
        capability=capability,
        sms=sms,
        **_LIMITS[capability].as_fields(),
        l2_bytes=l2_mib * MIB,
        memory_bytes=memory_gib * GIB,
        bandwidth=bandwidth * 1e12,
        tensor_flops=tensor * 1e12,
        tf32_flops=tf32 * 1e12,
        fp32_flops=fp32 * 1e12,
    )


# SMs | L2, MiB | memory, GiB | bandwidth, TB/s | TFLOP/s: tensor cores with bf16 or fp16, with tf32; fp32 without.
# Memory sold as "80 GB" is 80 GiB. Tensor rates are the dense ones: data sheets print the rates with 2:4 sparsity,
# which are twice as high.
_CARDS = (
    # NVIDIA A100 data sheets: 80 GB SXM; 80 GB PCIe; 40 GB, for both SXM and PCIe. SMs, L2: Ampere white paper.
    _card("a100", "NVIDIA A100 SXM 80GB", (8, 0), 108, 40, 80, 2.039, 312, 156, 19.5),
    _card("a100-pcie", "NVIDIA A100 PCIe 80GB", (8, 0), 108, 40, 80, 1.935, 312, 156, 19.5),
    _card("a100-40gb", "NVIDIA A100 40GB", (8, 0), 108, 40, 40, 1.555, 312, 156, 19.5),
    # NVIDIA H100 white paper, columns SXM5 and PCIe. Bandwidth: H100 data sheets.
    _card("h100", "NVIDIA H100 SXM", (9, 0), 132, 50, 80, 3.35, 989.4, 494.7, 66.9),
    _card("h100-pcie", "NVIDIA H100 PCIe", (9, 0), 114, 50, 80, 2.0, 756, 378, 51.2),
    # NVIDIA H200 data sheet; the SMs are those of the H100 SXM. L2, that of a whole GH100 with six HBM stacks: its
    # driver.
    _card("h200", "NVIDIA H200 SXM", (9, 0), 132, 60, 141, 4.8, 989.4, 494.7, 66.9),
    # NVIDIA Blackwell data sheet, HGX B200. The card was announced with 192 GB at 8 TB/s, but is sold with less:
    # drivers report 178 GiB, and 7680 bits at 3996 MHz, 7.67 TB/s. L2: CUDA Blackwell Tuning Guide.
    _card("b200", "NVIDIA B200 SXM", (10, 0), 148, 126, 180, 7.7, 2250, 1125, 75),
    # NVIDIA L40S data sheet. SMs, L2: its driver.
    _card("l40s", "NVIDIA L40S", (8, 9), 142, 96, 48, 0.864, 362.05, 183, 91.6),
    # NVIDIA white papers on Ada, Ampere GA102 and RTX Blackwell. A GeForce accumulates fp16 products in fp32 at half
    # the rate of fp16 accumulation; the rates here are those with fp32 accumulation.
    _card("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 72, 24, 1.008, 165.2, 82.6, 82.6),
    _card("rtx3090", "NVIDIA GeForce RTX 3090", (8, 6), 82, 6, 24, 0.936, 71, 35.6, 35.6),
    _card("rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), 170, 96, 32, 1.792, 209.5, 104.8, 104.8),
)

GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _CARDS}
STAND_IN = "h200"  # for a machine without a card: most shipped records are its

# Other names of each card, from drivers, data sheets and people; compared after `_squeeze`.
_ALIASES: dict[str, tuple[str, ...]] = {
    "a100": ("A100 SXM", "A100 SXM4", "A100 80GB", "A100 SXM 80GB", "A100-SXM4-80GB", "A100 80GB SXM"),
    "a100-pcie": ("A100 80GB PCIe", "A100 PCIe 80GB"),
    "a100-40gb": ("A100-SXM4-40GB", "A100-PCIE-40GB", "A100 SXM 40GB", "A100 40GB SXM", "A100 40GB PCIe"),
    "h100": (
        "H100 80GB HBM3",
        "H100 SXM",
        "H100 SXM5",
        "H100 80GB",
        "H100 SXM 80GB",
        "H100 SXM5 80GB",
        "H100 80GB SXM",
    ),
    "h100-pcie": ("H100 PCIe 80GB", "H100 80GB PCIe"),
    "h200": ("H200 SXM", "H200 SXM5", "H200 141GB", "H200 SXM 141GB", "H200 141GB HBM3e"),
    "b200": ("B200 SXM", "B200 SXM6", "HGX B200", "DGX B200", "B200 180GB", "B200 192GB"),
    "l40s": ("L40S 48GB", "L40S PCIe"),
    "rtx4090": ("4090", "RTX 4090 24GB"),
    "rtx3090": ("3090", "RTX 3090 24GB"),
    "rtx5090": ("5090", "RTX 5090 32GB"),
}


def _squeeze(name: str) -> str:
    """A name's letters and digits in lower case, without words that all cards share."""
    return re.sub(r"nvidia|tesla|geforce|tensorcore|gpu", "", re.sub(r"[^a-z0-9]", "", name.lower()))


_BY_ALIAS: dict[str, Gpu] = {
    _squeeze(alias): gpu for gpu in _CARDS for alias in (gpu.name, gpu.title, *_ALIASES[gpu.name])
}


def gpu_by_name(name: str) -> Gpu:
    """The GPU with this name or alias, in any case and punctuation. Raises UnknownGpuError.

    For a GPU in this machine use `recognise`: a MIG slice of a card has the card's name.
    """
    if not isinstance(name, str):
        raise ArgumentError("gpu", repr(name), "a name, such as 'h100'")
    gpu = _BY_ALIAS.get(_squeeze(name))
    if gpu is None:
        similar = get_close_matches(_squeeze(name), _BY_ALIAS, n=1, cutoff=0.7)
        advice = f"; did you mean {_BY_ALIAS[similar[0]].name}?" if similar else ""
        raise UnknownGpuError(f"unknown GPU {name!r}; known GPUs: {', '.join(GPUS)}{advice}")
    return gpu


def recognise(
    device_name: str,
    capability: tuple[int, int],
    sms: int,
    memory_bytes: int,
    *,
    shared_per_block: int | None = None,
    l2_bytes: int | None = None,
    bandwidth: float | None = None,
) -> Gpu:
    """The GPU with these device properties: one of GPUS, or a new Gpu for this device.

    It is one of GPUS only if its name, architecture, SM count, memory and, if given, shared memory all agree: results
    of a whole card do not apply to its MIG slice, and results of an L40 do not apply to an L40S.

    Otherwise the Gpu is named after the device and its SM count ("nvidia-rtx-a6000-84sm") and marked as estimated. Its
    limits are those of its capability, or of the next lower known one of the same major version; for an unknown major
    version the minimum of all known limits. Values that are not given (L2, rates) are a similar card's, scaled by the
    SMs: right to an order of magnitude.

    Raises ArgumentError, and UnknownGpuError for a device that cannot run these kernels at all.
    """
    if not isinstance(device_name, str) or not re.search(r"[A-Za-z0-9]", device_name):
        raise ArgumentError("device_name", repr(device_name), "the name that the driver reports")
    if not _is_capability(capability):
        raise ArgumentError("capability", repr(capability), "a pair of ints, (major, minor)")
    sizes = {"sms": sms, "memory_bytes": memory_bytes}
    sizes |= {n: v for n, v in (("shared_per_block", shared_per_block), ("l2_bytes", l2_bytes)) if v is not None}
    for argument, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ArgumentError(argument, repr(size), "an int of 1 or more")
    if bandwidth is not None and not (isinstance(bandwidth, (int, float)) and bandwidth > 0):
        raise ArgumentError("bandwidth", repr(bandwidth), "bytes/s, more than 0")
    if re.search(r"\b(amd|radeon|instinct)\b", device_name.lower()):
        raise UnknownGpuError(f"{device_name} is not an NVIDIA GPU; kernels run only on these")
    if capability < OLDEST_CAPABILITY:
        raise UnknownGpuError(
            f"{device_name} has compute capability {_dotted(capability)}; kernels need {_dotted(OLDEST_CAPABILITY)}"
        )

    card = _BY_ALIAS.get(_squeeze(device_name))
    if (
        card is not None
        and card.capability == capability
        and card.sms == sms
        and abs(memory_bytes / card.memory_bytes - 1) <= MEMORY_TOLERANCE
        and shared_per_block in (None, card.shared_per_block)
    ):
        return card

    similar = _similar(device_name, capability)
    scale = sms / similar.sms
    limits = _limits_of(capability)
    if shared_per_block is not None:
        limits = replace(limits, shared_per_sm=shared_per_block + RESERVED_SHARED)
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return Gpu(
        name=f"{slug}-{sms}sm",
        title=f"{device_name} ({sms} SMs)",
        capability=capability,
        sms=sms,
        **limits.as_fields(),
        l2_bytes=round(similar.l2_bytes * scale) if l2_bytes is None else l2_bytes,
        memory_bytes=memory_bytes,
        bandwidth=similar.bandwidth * scale if bandwidth is None else float(bandwidth),
        tensor_flops=similar.tensor_flops * scale,
        tf32_flops=similar.tf32_flops * scale,
        fp32_flops=similar.fp32_flops * scale,
        estimated=True,
    )


def _limits_of(capability: tuple[int, int]) -> _Limits:
    if older := [c for c in _LIMITS if c[0] == capability[0] and c <= capability]:
        return _LIMITS[max(older)]
    all_limits = _LIMITS.values()
    return _Limits(
        max_warps_per_sm=min(limits.max_warps_per_sm for limits in all_limits),
        max_blocks_per_sm=min(limits.max_blocks_per_sm for limits in all_limits),
        shared_per_sm=min(limits.shared_per_sm for limits in all_limits),
    )


def _similar(device_name: str, capability: tuple[int, int]) -> Gpu:
    """The card whose rates are used: one whose name is a prefix of the device's, else one of the nearest capability."""
    squeezed = _squeeze(device_name)
    same_name = [a for a, gpu in _BY_ALIAS.items() if gpu.capability == capability and squeezed.startswith(a)]
    if same_name:
        return _BY_ALIAS[max(same_name, key=len)]
    nearest = max(gpu.capability for gpu in _CARDS if gpu.capability <= capability)
    return next(gpu for gpu in _CARDS if gpu.capability == nearest)


def _is_capability(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(part) is int and part >= 0 for part in value)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
