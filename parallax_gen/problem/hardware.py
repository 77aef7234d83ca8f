"""The supported GPUs: limits and peak rates, by name or from a device's properties. `cards.py` has the figures.

Nothing here queries a device, so kernels can be chosen and compiled for a GPU that is not present.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches

from parallax_gen.errors import ArgumentError, UnknownGpuError
from parallax_gen.problem.cards import CARDS, GIB, KIB, LIMITS, MIB, OLDEST_CAPABILITY, RESERVED_SHARED, Card, Limits

__all__ = ["GIB", "GPUS", "KIB", "MIB", "STAND_IN", "Gpu", "gpu_by_name", "recognise"]

# A driver reports less memory than the data sheet: 1 % less for HBM, 8 % less for GDDR6 with ECC.
MEMORY_TOLERANCE = 0.12


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
    estimated                 whether the rates, and other values that the device did not report, are a similar card's,
                              or follow from other published rates
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


def _gpu(card: Card) -> Gpu:
    return Gpu(
        name=card.name,
        title=card.title,
        capability=card.capability,
        sms=card.sms,
        **LIMITS[card.capability].as_fields(),
        l2_bytes=card.l2 * MIB,
        memory_bytes=card.memory * GIB,
        bandwidth=card.bandwidth * 1e12,
        tensor_flops=card.tensor * 1e12,
        tf32_flops=card.tf32 * 1e12,
        fp32_flops=card.fp32 * 1e12,
        estimated=card.estimated,
    )


GPUS: dict[str, Gpu] = {card.name: _gpu(card) for card in CARDS}
STAND_IN = "h200"  # for a machine without a card: most shipped records are its


_COMMON_WORDS = "nvidia|tesla|geforce|tensorcore|gpu"


def _squeeze(name: str) -> str:
    """A name's letters and digits in lower case, without words that all cards share."""
    return re.sub(_COMMON_WORDS, "", re.sub(r"[^a-z0-9]", "", name.lower()))


_BY_ALIAS: dict[str, Gpu] = {
    _squeeze(alias): GPUS[card.name] for card in CARDS for alias in (card.name, card.title, *card.aliases)
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

    Otherwise the Gpu is named after the device and its SM count ("nvidia-rtx-a5000-64sm") and marked as estimated. Its
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


def _limits_of(capability: tuple[int, int]) -> Limits:
    if older := [c for c in LIMITS if c[0] == capability[0] and c <= capability]:
        return LIMITS[max(older)]
    all_limits = LIMITS.values()
    return Limits(
        max_warps_per_sm=min(limits.max_warps_per_sm for limits in all_limits),
        max_blocks_per_sm=min(limits.max_blocks_per_sm for limits in all_limits),
        shared_per_sm=min(limits.shared_per_sm for limits in all_limits),
    )


def _similar(device_name: str, capability: tuple[int, int]) -> Gpu:
    """The card whose rates are used: one whose name is a prefix of the device's, else one of the nearest capability."""
    name = re.sub(_COMMON_WORDS, "", device_name.lower())
    same_name = [a for a, gpu in _BY_ALIAS.items() if gpu.capability == capability and _begins_with(name, a)]
    if same_name:
        return _BY_ALIAS[max(same_name, key=len)]
    known = [gpu for gpu in GPUS.values() if not gpu.estimated]
    nearest = max(gpu.capability for gpu in known if gpu.capability <= capability)
    return next(gpu for gpu in known if gpu.capability == nearest)


def _begins_with(name: str, alias: str) -> bool:
    """Whether a name begins with a squeezed alias whose last number ends there: an "H20-3e" is an H20, an L40 no L4."""
    return re.match("[^a-z0-9]*" + "[^a-z0-9]*".join(alias) + r"(?!\d)", name) is not None


def _is_capability(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(part) is int and part >= 0 for part in value)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
