"""The GPU table, its aliases, and GPUs that are not in the table."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

from parallax_gen.errors import ArgumentError, UnknownGpuError
from parallax_gen.problem.hardware import GIB, GPUS, KIB, MIB, Gpu, gpu_by_name, recognise

# What torch reports: name, capability, SMs, total_memory, shared_memory_per_block_optin.
REPORTED = {
    "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 81154 * MIB, 163 * KIB),
    "a100-pcie": ("NVIDIA A100 80GB PCIe", (8, 0), 108, 81051 * MIB, 163 * KIB),
    "a100-40gb": ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 42298834944, 163 * KIB),
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 81090 * MIB, 227 * KIB),
    "h100-pcie": ("NVIDIA H100 PCIe", (9, 0), 114, 81008 * MIB, 227 * KIB),
    "h100-nvl": ("NVIDIA H100 NVL", (9, 0), 132, 95830 * MIB, 227 * KIB),
    "h800": ("NVIDIA H800", (9, 0), 132, 81079 * MIB, 227 * KIB),
    "h20": ("NVIDIA H20", (9, 0), 78, 97871 * MIB, 227 * KIB),
    "h200": ("NVIDIA H200", (9, 0), 132, 143156 * MIB, 227 * KIB),
    "gh200": ("NVIDIA GH200 480GB", (9, 0), 132, 97871 * MIB, 227 * KIB),
    "gh200-144gb": ("NVIDIA GH200 144G HBM3e", (9, 0), 132, 146831 * MIB, 227 * KIB),
    "b200": ("NVIDIA B200", (10, 0), 148, 182642 * MIB, 227 * KIB),
    "gb200": ("NVIDIA GB200", (10, 0), 152, 189471 * MIB, 227 * KIB),
    "b300": ("NVIDIA B300 SXM6 AC", (10, 3), 148, 275040 * MIB, 227 * KIB),
    "l4": ("NVIDIA L4", (8, 9), 58, 22574 * MIB, 99 * KIB),
    "a10": ("NVIDIA A10", (8, 6), 72, 22731 * MIB, 99 * KIB),
    "a6000": ("NVIDIA RTX A6000", (8, 6), 84, 48685 * MIB, 99 * KIB),
    "rtxpro6000": ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (12, 0), 188, 97249 * MIB, 99 * KIB),
    "rtxpro6000-maxq": ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", (12, 0), 188, 97249 * MIB, 99 * KIB),
    "rtxpro6000-server": ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 188, 97249 * MIB, 99 * KIB),
    "gb10": ("NVIDIA GB10", (12, 1), 48, 122502 * MIB, 99 * KIB),
    "l40s": ("NVIDIA L40S", (8, 9), 142, 47576711168, 99 * KIB),
    "rtx4090": ("NVIDIA GeForce RTX 4090", (8, 9), 128, 24563 * MIB, 99 * KIB),
    "rtx3090": ("NVIDIA GeForce RTX 3090", (8, 6), 82, 25414860800, 99 * KIB),
    "rtx5090": ("NVIDIA GeForce RTX 5090", (12, 0), 170, 33677180928, 99 * KIB),
}
# What ROCm's torch reports: name, compute units, total_memory, gcnArchName.
REPORTED_BY_ROCM = {
    "mi300x": ("AMD Instinct MI300X", 304, 205822885888, "gfx942:sramecc+:xnack-"),
    "mi325x": ("AMD Instinct MI325X", 304, 274861129728, "gfx942:sramecc+:xnack-"),
    "mi300a": ("AMD Instinct MI300A", 228, 128 * GIB, "gfx942:sramecc+:xnack+"),
    "mi350x": ("AMD Instinct MI350X", 256, 309220868096, "gfx950:sramecc+:xnack-"),
    "mi355x": ("AMD Instinct MI355X", 256, 309220868096, "gfx950:sramecc+:xnack-"),
}
NVIDIA = {name: gpu for name, gpu in GPUS.items() if not gpu.is_amd}


def test_every_card_has_reported_properties() -> None:
    assert set(GPUS) == set(REPORTED) | set(REPORTED_BY_ROCM)


@pytest.mark.parametrize("name", REPORTED_BY_ROCM)
def test_every_amd_card_is_recognised_by_its_driver_properties(name: str) -> None:
    device_name, units, memory, gfx = REPORTED_BY_ROCM[name]
    gpu = recognise(device_name, (9, 4), units, memory, gfx=gfx)
    assert gpu is GPUS[name]
    assert gpu_by_name(device_name) is gpu
    assert gpu.arch == gpu.target == gfx.partition(":")[0]
    assert gpu.shared_per_block == {"gfx942": 64, "gfx950": 160}[gpu.target] * KIB
    assert (gpu.warp_size, gpu.max_registers_per_thread) == (64, 512)
    assert [gpu.registers_per_thread(warps) for warps in (1, 4, 8, 16)] == [512, 512, 256, 128]


def test_an_amd_card_is_no_nvidia_card() -> None:
    """Its gfx942 is not capability 9.4, which would be Hopper's."""
    for gpu in (GPUS[name] for name in REPORTED_BY_ROCM):
        assert not any((gpu.has_wgmma, gpu.has_tcgen05, gpu.has_async_matmuls))
        assert all(gpu.capability < other.capability and gpu.arch != other.arch for other in NVIDIA.values())
        assert gpu.has_tf32 == (gpu.target == "gfx942")


def test_a_partition_of_an_amd_card_is_another_gpu() -> None:
    gpu = recognise("AMD Instinct MI300X", (9, 4), 38, 24 * GIB, gfx="gfx942:sramecc+:xnack-")
    assert (gpu.name, gpu.title) == ("amd-instinct-mi300x-38cu", "AMD Instinct MI300X (38 CUs)")
    assert (gpu.gfx, gpu.shared_per_block, gpu.estimated) == ("gfx942", 64 * KIB, True)
    assert gpu.bandwidth == pytest.approx(5.3e12 * 38 / 304)


@pytest.mark.parametrize("name", NVIDIA)
def test_every_card_is_recognised_by_its_driver_properties(name: str) -> None:
    device_name, capability, sms, memory, shared = REPORTED[name]
    assert recognise(device_name, capability, sms, memory) is GPUS[name]
    assert recognise(device_name, capability, sms, memory, shared_per_block=shared, l2_bytes=1) is GPUS[name]
    assert gpu_by_name(device_name) is GPUS[name]


@pytest.mark.parametrize("name", GPUS)
def test_every_card_is_found_by_name_and_title(name: str) -> None:
    gpu = GPUS[name]
    for spelling in (name, name.upper(), name.replace("-", " "), name.replace("-", "_"), gpu.title):
        assert gpu_by_name(spelling) is gpu


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("H100 SXM", "h100"),
        ("H100-PCIe", "h100-pcie"),
        ("NVIDIA H100 Tensor Core GPU", "h100"),
        ("A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("RTX 4090", "rtx4090"),
        ("GeForce_RTX_4090", "rtx4090"),
        ("HGX B200", "b200"),
        ("GH200", "gh200"),
        ("GH200 144GB", "gh200-144gb"),
        ("H100 NVL 94GB", "h100-nvl"),
        ("H800 SXM5", "h800"),
        ("H20", "h20"),
        ("B300 SXM6", "b300"),
        ("GB200 NVL72", "gb200"),
        ("DGX Spark", "gb10"),
        ("RTX A6000", "a6000"),
        ("A10", "a10"),
        ("Tesla L4", "l4"),
        ("RTX PRO 6000", "rtxpro6000"),
        ("PRO 6000 Max-Q", "rtxpro6000-maxq"),
        ("MI300X", "mi300x"),
        ("AMD MI355X", "mi355x"),
        ("Instinct MI325X 256GB", "mi325x"),
    ],
)
def test_marketing_names(spelling: str, name: str) -> None:
    assert gpu_by_name(spelling).name == name


@pytest.mark.parametrize("name", ["", "h1000", "NVIDIA", "L40", "H100 80GB HBM3 MIG 1g.10gb", "RTX 4090 Laptop GPU"])
def test_the_error_for_an_unknown_name_lists_known_names(name: str) -> None:
    with pytest.raises(UnknownGpuError, match=r"known GPUs: a100, .*h200"):
        gpu_by_name(name)


def test_a_name_that_is_not_a_string() -> None:
    with pytest.raises(ArgumentError, match="gpu: got None"):
        gpu_by_name(None)  # type: ignore[arg-type]


def test_limits_that_kernels_depend_on() -> None:
    h200 = GPUS["h200"]
    assert (h200.arch, h200.sms, h200.registers_per_sm, h200.max_registers_per_thread) == (90, 132, 65536, 255)
    assert (h200.shared_per_sm, h200.shared_per_block) == (228 * 1024, 227 * 1024)
    assert h200.peak("bf16") == h200.peak("fp16") == pytest.approx(989.4e12)
    assert h200.peak("tf32") == pytest.approx(494.7e12)
    assert h200.peak("fp32") == pytest.approx(66.9e12)
    assert h200.bandwidth == pytest.approx(4.8e12)
    assert GPUS["b200"].arch == 100
    assert GPUS["a100"].shared_per_block == 163 * 1024
    with pytest.raises(ArgumentError, match=r"dtype: got 'fp8'; allowed: bf16, fp16, tf32, fp32$"):
        h200.peak("fp8")


@pytest.mark.parametrize("name", REPORTED_BY_ROCM)
def test_rates_of_amd_are_plausible(name: str) -> None:
    """A compute unit of CDNA 3 does 2048 FLOPs in bf16 a clock, one of CDNA 4 4096; at 2.1 to 2.4 GHz."""
    gpu = GPUS[name]
    assert 2.0e9 < gpu.tensor_flops / gpu.sms / {"gfx942": 2048, "gfx950": 4096}[gpu.target] < 2.5e9
    assert 2.0e9 < gpu.fp32_flops / gpu.sms / 256 < 2.5e9
    assert gpu.tf32_flops == pytest.approx(gpu.tensor_flops / 2 if gpu.has_tf32 else gpu.fp32_flops, rel=0.01)
    assert 5e12 < gpu.bandwidth <= 8e12


@pytest.mark.parametrize("gpu", NVIDIA.values(), ids=NVIDIA)
def test_rates_are_plausible(gpu: Gpu) -> None:
    """Catches wrong units or columns: the FLOPs per SM and clock of each tensor core generation are known."""
    per_clock = {8: 1024, 9: 4096, 10: 8192, 12: 1024}[gpu.capability[0]]
    if gpu.capability == (8, 0):
        per_clock = 2048
    if gpu.name.startswith("rtx") and "pro" not in gpu.name:
        per_clock = 512  # a GeForce card has half the rate
    if gpu.name == "h20":
        per_clock = 1024  # sold with a quarter of the rate
    assert 1.2e9 < gpu.tensor_flops / gpu.sms / per_clock < 2.7e9
    assert 1.3e9 < gpu.fp32_flops / gpu.sms / (128 if gpu.arch == 80 else 256) < 2.7e9
    assert gpu.tf32_flops == pytest.approx(gpu.tensor_flops / 2, rel=0.02)
    assert (0.5e12 if gpu.name not in ("l4", "gb10") else 0.25e12) < gpu.bandwidth < 10e12
    assert gpu.max_warps_per_sm in (48, 64)
    assert gpu.estimated == (gpu.name == "gb10")  # of which no rate of bf16 is published
    assert hash(gpu) == hash(dataclasses.replace(gpu))


def test_a_mig_slice_is_another_gpu_than_the_whole_card() -> None:
    gpu = recognise("NVIDIA H100 80GB HBM3", (9, 0), 16, 10 * GIB)
    assert gpu.name == "nvidia-h100-80gb-hbm3-16sm"
    assert gpu.estimated
    assert (gpu.sms, gpu.memory_bytes, gpu.shared_per_block) == (16, 10 * GIB, 227 * KIB)
    assert gpu.bandwidth == pytest.approx(3.35e12 * 16 / 132)
    assert gpu.peak("bf16") == pytest.approx(989.4e12 * 16 / 132)
    of_h200 = recognise("NVIDIA H200 MIG 1g.18gb", (9, 0), 16, 16 * GIB)
    assert of_h200.bandwidth == pytest.approx(4.8e12 * 16 / 132)


@pytest.mark.parametrize(
    ("device_name", "capability", "sms", "memory"),
    [
        ("NVIDIA L40", (8, 9), 142, 45 * GIB),  # like an L40S, with half its tensor rate
        ("NVIDIA H200 NVL", (9, 0), 132, 140 * GIB),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, 40 * GIB),
        ("NVIDIA H100 80GB HBM3", (9, 1), 132, 79 * GIB),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, 48 * GIB),
    ],
)
def test_a_similar_card_gets_its_own_name(device_name: str, capability: tuple[int, int], sms: int, memory: int) -> None:
    gpu = recognise(device_name, capability, sms, memory)
    assert gpu.estimated
    assert gpu.name not in GPUS
    assert gpu.capability == capability


# torch.cuda.get_device_name of cards that share a chip, or most of their name, with one in the table.
SIMILAR_CARDS = [
    ("NVIDIA H200 NVL", (9, 0), 132, 143771 * MIB),
    ("NVIDIA A100-SXM-64GB", (8, 0), 124, 65247 * MIB),
    ("NVIDIA A800-SXM4-80GB", (8, 0), 108, 81251 * MIB),
    ("NVIDIA A30", (8, 0), 56, 24169 * MIB),
    ("NVIDIA A10G", (8, 6), 80, 22731 * MIB),
    ("NVIDIA H20-3e", (9, 0), 78, 143771 * MIB),
    ("NVIDIA H800 PCIe", (9, 0), 114, 81079 * MIB),
    ("NVIDIA L40", (8, 9), 142, 45 * GIB),
    ("NVIDIA RTX A5000", (8, 6), 64, 24110 * MIB),
    ("NVIDIA GB300", (10, 3), 152, 283 * GIB),
    ("NVIDIA RTX PRO 5000 Blackwell", (12, 0), 110, 48506 * MIB),
    ("NVIDIA RTX 6000 Ada Generation", (8, 9), 142, 48647 * MIB),
    ("NVIDIA GeForce RTX 4090 D", (8, 9), 114, 24203 * MIB),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 76, 15952 * MIB),
    ("NVIDIA GeForce RTX 3090 Ti", (8, 6), 84, 24251 * MIB),
    # MIG slices, even the slice that is the whole card, have it in their name.
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 16, 9984 * MIB),
    ("NVIDIA H100 80GB HBM3 MIG 1g.20gb", (9, 0), 16, 20096 * MIB),
    ("NVIDIA H100 80GB HBM3 MIG 7g.80gb", (9, 0), 132, 81090 * MIB),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", (8, 0), 42, 19968 * MIB),
    ("NVIDIA H200 MIG 7g.141gb", (9, 0), 132, 143156 * MIB),
    # The whole card's name with fewer SMs: under MPS with a limited thread percentage.
    ("NVIDIA H100 80GB HBM3", (9, 0), 66, 81090 * MIB),
    ("NVIDIA A100-SXM4-80GB", (8, 0), 54, 81154 * MIB),
]


def test_similar_cards_and_slices_have_their_own_names() -> None:
    named = [recognise(*reported) for reported in SIMILAR_CARDS]
    for gpu, (device_name, capability, sms, memory) in zip(named, SIMILAR_CARDS, strict=True):
        assert gpu.estimated, device_name
        assert (gpu.capability, gpu.sms, gpu.memory_bytes) == (capability, sms, memory)
        assert re.fullmatch(r"[a-z0-9-]+", gpu.name)  # it is also a file name
        assert 0.1e12 < gpu.bandwidth < 10e12
    assert len({gpu.name for gpu in named} | set(GPUS)) == len(SIMILAR_CARDS) + len(GPUS)


@pytest.mark.parametrize(
    ("device_name", "like", "name"),
    [
        ("A100-SXM4-40GB", "a100-40gb", "a100-40gb"),  # older drivers omit "NVIDIA"
        ("NVIDIA A100-PCIE-40GB", "a100-40gb", "a100-40gb"),
        ("A100-SXM4-80GB", "a100", "a100"),
        ("NVIDIA H100 PCIe", "h100-pcie", "h100-pcie"),
        ("NVIDIA H100", "h100", "h100"),
        ("GeForce RTX 3090", "rtx3090", "rtx3090"),
        ("NVIDIA H100 PCIe", "h100", "nvidia-h100-pcie-132sm"),  # the name contradicts the SM count
        ("NVIDIA A100-SXM4-80GB", "a100-40gb", "nvidia-a100-sxm4-80gb-108sm"),
    ],
)
def test_name_and_device_properties_decide_together(device_name: str, like: str, name: str) -> None:
    _, capability, sms, memory, shared = REPORTED[like]
    assert recognise(device_name, capability, sms, memory, shared_per_block=shared).name == name


def test_an_unknown_card_has_the_limits_of_its_architecture() -> None:
    gpu = recognise("NVIDIA RTX A5000", (8, 6), 64, 23 * GIB)
    assert gpu.name == "nvidia-rtx-a5000-64sm"
    assert (gpu.max_warps_per_sm, gpu.max_blocks_per_sm, gpu.shared_per_block) == (48, 16, 99 * KIB)
    assert recognise("NVIDIA GB300", (10, 3), 152, 283 * GIB).shared_per_block == 227 * KIB


@pytest.mark.parametrize(
    ("device_name", "capability", "like"),
    [
        ("NVIDIA L40", (8, 9), "l40s"),  # not the L4, whose name it begins with
        ("NVIDIA H20-3e", (9, 0), "h20"),
        ("NVIDIA A10G", (8, 6), "a10"),
        ("NVIDIA GB300", (10, 3), "b300"),
        ("NVIDIA Thor", (11, 0), "b300"),
        ("NVIDIA GB20", (12, 1), "rtx5090"),  # the only card of its capability is estimated
    ],
)
def test_an_unknown_card_has_the_rates_of_a_similar_one(
    device_name: str, capability: tuple[int, int], like: str
) -> None:
    gpu = recognise(device_name, capability, GPUS[like].sms, GIB)
    assert (gpu.bandwidth, gpu.tensor_flops) == pytest.approx((GPUS[like].bandwidth, GPUS[like].tensor_flops))


def test_an_unknown_architecture_has_the_lowest_of_all_limits() -> None:
    gpu = recognise("NVIDIA Next", (13, 0), 200, 300 * GIB)
    for field in ("max_warps_per_sm", "max_blocks_per_sm", "shared_per_sm", "shared_per_block"):
        assert getattr(gpu, field) == min(getattr(known, field) for known in NVIDIA.values())


def test_device_properties_override_estimates() -> None:
    gpu = recognise(
        "NVIDIA Thor", (11, 0), 20, 122 * GIB, shared_per_block=227 * KIB, l2_bytes=32 * MIB, bandwidth=273e9
    )
    assert (gpu.shared_per_block, gpu.shared_per_sm) == (227 * KIB, 228 * KIB)
    assert (gpu.l2_bytes, gpu.bandwidth) == (32 * MIB, 273e9)


@pytest.mark.parametrize(
    ("device_name", "capability", "gfx", "message"),
    [
        ("Tesla V100-SXM2-16GB", (7, 0), "", r"compute capability 7\.0; kernels need 8\.0"),
        (
            "AMD Instinct MI300X",
            (9, 4),
            "",
            r"the architecture \(unknown\); of AMD's, kernels run on gfx942 and gfx950",
        ),
        ("AMD Instinct MI250X", (9, 0), "gfx90a:sramecc+:xnack-", "the architecture gfx90a; of AMD's"),
    ],
)
def test_devices_that_cannot_run_kernels(device_name: str, capability: tuple[int, int], gfx: str, message: str) -> None:
    with pytest.raises(UnknownGpuError, match=message):
        recognise(device_name, capability, 80, 16 * GIB, gfx=gfx)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("device_name", ""),
        ("device_name", None),
        ("capability", 90),
        ("capability", (9, "0")),
        ("sms", 0),
        ("sms", None),
        ("memory_bytes", 80.0),
        ("shared_per_block", -1),
        ("l2_bytes", True),
        ("bandwidth", 0.0),
        ("bandwidth", "fast"),
    ],
)
def test_recognise_names_the_invalid_argument(argument: str, value: object) -> None:
    arguments = {"device_name": "NVIDIA H100", "capability": (9, 0), "sms": 132, "memory_bytes": 80 * GIB}
    with pytest.raises(ArgumentError, match=f"^{argument}: got "):
        recognise(**{**arguments, argument: value})  # type: ignore[arg-type]


def test_importing_hardware_imports_no_torch() -> None:
    code = "import sys, parallax_gen.problem.hardware; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
