"""The supported GPUs: limits and peak rates, by name or from a device's properties. `cards.py` has the figures.

Nothing here queries a device, so kernels can be chosen and compiled for a GPU that is not present.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches

from parallax_gen.errors import ArgumentError, UnknownGpuError
from parallax_gen.problem.cards import (
    AMD_LIMITS,
    CARDS,
    GIB,
    KIB,
    LIMITS,
    MIB,
    NO_CAPABILITY,
    OLDEST_CAPABILITY,
    Card,
    Limits,
)

__all__ = ["GIB", "GPUS", "KIB", "MIB", "STAND_IN", "Gpu", "gpu_by_name", "recognise"]

# A driver reports less memory than the data sheet: 1 % less for HBM, 8 % less for GDDR6 with ECC.
MEMORY_TOLERANCE = 0.12


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    name                      short and stable: used in records and file names ("h200")
    title                     for people ("NVIDIA H200 SXM")
    capability                compute capability, (major, minor); (0, 0) of an AMD GPU
    sms                       streaming multiprocessors; of an AMD GPU its compute units
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
    gfx                       the architecture of an AMD GPU ("gfx942"); "" of an NVIDIA GPU
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
    gfx: str = ""

    @property
    def arch(self) -> int | str:
        """As in Triton's targets: 90 for capability (9, 0), "gfx942"."""
        return self.gfx or 10 * self.capability[0] + self.capability[1]

    @property
    def target(self) -> str:
        """What its machine code is for: "sm_90", "gfx942"."""
        return self.gfx or f"sm_{self.arch}"

    @property
    def is_amd(self) -> bool:
        return self.gfx != ""

    @property
    def warp_size(self) -> int:
        return 64 if self.is_amd else 32

    @property
    def has_wgmma(self) -> bool:
        """Whether it has Hopper's asynchronous matmuls."""
        return self.capability[0] == 9

    @property
    def has_tcgen05(self) -> bool:
        """Whether it has the asynchronous matmuls of B200 and B300."""
        return self.capability[0] == 10

    @property
    def has_async_matmuls(self) -> bool:
        return self.has_wgmma or self.has_tcgen05

    @property
    def has_tf32(self) -> bool:
        """Whether it has matmuls in tf32: CDNA 4 dropped CDNA 3's."""
        return self.gfx != "gfx950"

    def registers_per_thread(self, num_warps: int) -> int:
        """How many registers a thread of a program of this many warps can have."""
        return min(self.max_registers_per_thread, self.registers_per_sm // (self.warp_size * num_warps))

    def peak(self, dtype: str) -> float:
        """The peak FLOP/s for inputs of `dtype`. fp32 is exact here, so it runs outside the tensor cores."""
        tensor = self.tensor_flops
        peaks = {"bf16": tensor, "fp16": tensor, "tf32": self.tf32_flops, "fp32": self.fp32_flops}
        if dtype not in peaks:
            raise ArgumentError("dtype", repr(dtype), ", ".join(peaks))
        return peaks[dtype]


def _limits_of(capability: tuple[int, int], gfx: str) -> Limits:
    if gfx:
        return AMD_LIMITS[gfx]
    if older := [c for c in LIMITS if c[0] == capability[0] and c <= capability]:
        return LIMITS[max(older)]
    all_limits = LIMITS.values()
    return Limits(
        max_warps_per_sm=min(limits.max_warps_per_sm for limits in all_limits),
        max_blocks_per_sm=min(limits.max_blocks_per_sm for limits in all_limits),
        shared_per_sm=min(limits.shared_per_sm for limits in all_limits),
    )


def _gpu(card: Card) -> Gpu:
    gfx = card.capability if isinstance(card.capability, str) else ""
    capability = NO_CAPABILITY if isinstance(card.capability, str) else card.capability
    return Gpu(
        name=card.name,
        title=card.title,
        capability=capability,
        gfx=gfx,
        sms=card.sms,
        **_limits_of(capability, gfx).as_fields(),
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


_COMMON_WORDS = "nvidia|tesla|geforce|tensorcore|gpu|amd|instinct"


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
        meant = _of_architecture(name) or [_BY_ALIAS[alias].name for alias in similar]
        advice = f"; did you mean {' or '.join(meant)}?" if meant else ""
        raise UnknownGpuError(f"unknown GPU {name!r}; known GPUs: {', '.join(GPUS)}{advice}")
    return gpu


def _of_architecture(name: str) -> list[str]:
    """The names of the GPUs of an architecture, such as gfx942 or sm_90."""
    return [gpu.name for gpu in GPUS.values() if _squeeze(gpu.target) == _squeeze(name)]


def recognise(
    device_name: str,
    capability: tuple[int, int],
    sms: int,
    memory_bytes: int,
    *,
    shared_per_block: int | None = None,
    l2_bytes: int | None = None,
    bandwidth: float | None = None,
    gfx: str = "",
) -> Gpu:
    """The GPU with these device properties: one of GPUS, or a new Gpu for this device.

    gfx  the architecture of an AMD GPU, as its driver names it ("gfx942:sramecc+:xnack-"): it replaces the capability

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
    gfx = gfx.split(":", 1)[0]
    is_amd = bool(gfx or re.search(r"\b(amd|radeon|instinct)\b", device_name.lower()))
    if is_amd and gfx not in AMD_LIMITS:
        of = f"has the architecture {gfx or '(unknown)'}"
        raise UnknownGpuError(f"{device_name} {of}; of AMD's, kernels run on {' and '.join(AMD_LIMITS)}")
    if is_amd:
        capability = NO_CAPABILITY
    elif capability < OLDEST_CAPABILITY:
        raise UnknownGpuError(
            f"{device_name} has compute capability {_dotted(capability)}; kernels need {_dotted(OLDEST_CAPABILITY)}"
        )

    card = _BY_ALIAS.get(_squeeze(device_name))
    if (
        card is not None
        and (card.capability, card.gfx) == (capability, gfx)
        and card.sms == sms
        and abs(memory_bytes / card.memory_bytes - 1) <= MEMORY_TOLERANCE
        and shared_per_block in (None, card.shared_per_block)
    ):
        return card

    similar = _similar(device_name, capability, gfx)
    scale = sms / similar.sms
    limits = _limits_of(capability, gfx)
    if shared_per_block is not None:
        limits = replace(limits, shared_per_sm=shared_per_block + limits.reserved_shared)
    unit = "cu" if gfx else "sm"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return Gpu(
        name=f"{slug}-{sms}{unit}",
        title=f"{device_name} ({sms} {unit.upper()}s)",
        capability=capability,
        gfx=gfx,
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


def _similar(device_name: str, capability: tuple[int, int], gfx: str) -> Gpu:
    """The card whose rates are used: one whose name is a prefix of the device's, else one of the nearest capability."""
    name = re.sub(_COMMON_WORDS, "", device_name.lower())
    arch = capability, gfx
    same_name = [a for a, gpu in _BY_ALIAS.items() if (gpu.capability, gpu.gfx) == arch and _begins_with(name, a)]
    if same_name:
        return _BY_ALIAS[max(same_name, key=len)]
    known = [gpu for gpu in GPUS.values() if not gpu.estimated and gpu.gfx == gfx]
    nearest = max(gpu.capability for gpu in known if gpu.capability <= capability)
    return next(gpu for gpu in known if gpu.capability == nearest)


def _begins_with(name: str, alias: str) -> bool:
    """Whether a name begins with a squeezed alias whose last number ends there: an "H20-3e" is an H20, an L40 no L4."""
    return re.match("[^a-z0-9]*" + "[^a-z0-9]*".join(alias) + r"(?!\d)", name) is not None


def _is_capability(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(part) is int and part >= 0 for part in value)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
