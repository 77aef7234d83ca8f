"""The table of supported cards, and the limits of their architectures: plain data, with sources.

`hardware.py` makes Gpus of it, and recognises a card by its name and properties.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# CUDA reserves this much of a multiprocessor's shared memory for every resident block.
RESERVED_SHARED = KIB
# The first capability with bf16 matmuls and asynchronous copies, which every kernel uses.
OLDEST_CAPABILITY = (8, 0)
NO_CAPABILITY = (0, 0)  # of an AMD GPU: compute capabilities are NVIDIA's


@dataclass(frozen=True)
class Limits:
    """The limits that an architecture determines.

    From "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide 13, in which KB is
    1024 bytes. All capabilities from 8.0 on have 64 K registers per multiprocessor and at most 255 per thread.

    reserved_shared  of shared_per_sm, what each resident block loses
    """

    max_warps_per_sm: int
    max_blocks_per_sm: int
    shared_per_sm: int
    registers_per_sm: int = 64 * 1024
    max_registers_per_thread: int = 255
    reserved_shared: int = RESERVED_SHARED

    def as_fields(self) -> dict[str, Any]:
        """These limits as arguments of Gpu."""
        limits = asdict(self)
        return limits | {"shared_per_block": self.shared_per_sm - limits.pop("reserved_shared")}


LIMITS: dict[tuple[int, int], Limits] = {
    (8, 0): Limits(64, 32, 164 * KIB),
    (8, 6): Limits(48, 16, 100 * KIB),
    (8, 7): Limits(48, 16, 164 * KIB),
    (8, 9): Limits(48, 24, 100 * KIB),
    (9, 0): Limits(64, 32, 228 * KIB),
    (10, 0): Limits(64, 32, 228 * KIB),
    (10, 3): Limits(64, 32, 228 * KIB),
    (12, 0): Limits(48, 24, 100 * KIB),
    (12, 1): Limits(48, 24, 100 * KIB),
}

# AMD's architectures by their names in compilers: CDNA 3 and CDNA 4. A multiprocessor is a compute unit, a warp a
# wavefront of 64 threads, and shared memory is LDS, of which nothing is reserved. LDS, and 128 KB of vector registers
# for each of a compute unit's four SIMDs: "AMD GPU specifications" of ROCm's documentation. 8 wavefronts per SIMD, 16
# workgroups per compute unit, and 512 registers per thread, half of them for accumulation: LLVM's AMDGPU backend.
AMD_LIMITS: dict[str, Limits] = {
    "gfx942": Limits(32, 16, 64 * KIB, 128 * 1024, 512, reserved_shared=0),
    "gfx950": Limits(32, 16, 160 * KIB, 128 * 1024, 512, reserved_shared=0),
}

# The first Triton whose ptxas knows a capability, where the oldest supported Triton's does not.
FIRST_TRITON: dict[tuple[int, int], tuple[int, int]] = {(10, 3): (3, 6), (12, 1): (3, 6)}


class Card(NamedTuple):
    """A card as sold.

    capability of an NVIDIA card; of an AMD card the architecture, such as "gfx942"
    sms        streaming multiprocessors; compute units
    l2         MiB
    memory     GiB. Memory sold as "80 GB" is 80 GiB
    bandwidth  of device memory, TB/s
    tensor     TFLOP/s of the tensor cores with bf16 or fp16, and with tf32: the dense rates. Data sheets print the
    tf32       rates with 2:4 sparsity, which are twice as high
    fp32       TFLOP/s without tensor cores
    aliases    other names, from drivers, data sheets and people
    estimated  whether its vendor publishes no rates of the tensor cores with bf16, so that they follow from others
    """

    name: str
    title: str
    capability: tuple[int, int] | str
    sms: int
    l2: int
    memory: int
    bandwidth: float
    tensor: float
    tf32: float
    fp32: float
    aliases: tuple[str, ...] = ()
    estimated: bool = False


A100_NAMES = ("A100 SXM", "A100 SXM4", "A100 80GB", "A100 SXM 80GB", "A100-SXM4-80GB", "A100 80GB SXM")
A100_40_NAMES = ("A100-SXM4-40GB", "A100-PCIE-40GB", "A100 SXM 40GB", "A100 40GB SXM", "A100 40GB PCIe")
H100_NAMES = ("H100 SXM5", "H100 80GB", "H100 SXM 80GB", "H100 SXM5 80GB", "H100 80GB SXM", "H100 80GB HBM3")
H200_NAMES = ("H200 SXM", "H200 SXM5", "H200 141GB", "H200 SXM 141GB", "H200 141GB HBM3e")
B200_NAMES = ("B200 SXM", "B200 SXM6", "HGX B200", "DGX B200", "B200 180GB", "B200 192GB")
B300_NAMES = ("B300 SXM6 AC", "B300 SXM6", "HGX B300", "DGX B300", "B300 288GB", "Blackwell Ultra")
GH200_NAMES = ("GH200 480GB", "GH200 96GB HBM3", "Grace Hopper")
MI300X_NAMES = ("MI300X", "MI300X OAM", "MI300X 192GB")
MI325X_NAMES = ("MI325X", "MI325X OAM", "MI325X 256GB")
MI300A_NAMES = ("MI300A", "MI300A APU", "MI300A 128GB")
MI350X_NAMES = ("MI350X", "MI350X OAM", "MI350X 288GB")
MI355X_NAMES = ("MI355X", "MI355X OAM", "MI355X 288GB")
GB10_NAMES = ("DGX Spark", "GB10 Superchip", "Grace Blackwell GB10")
PRO_6000_NAMES = (
    "RTX PRO 6000 Blackwell Workstation Edition",
    "RTX PRO 6000 Workstation Edition",
    "RTX PRO 6000 Blackwell",
    "RTX PRO 6000 96GB",
    "PRO 6000",
)
PRO_6000_MAXQ_NAMES = ("RTX PRO 6000 Blackwell Max-Q Workstation Edition", "PRO 6000 Max-Q")
PRO_6000_SERVER_NAMES = ("RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Server Edition", "PRO 6000 Server")

# name | title | capability | SMs, L2, memory | bandwidth | tensor, tf32, fp32 | aliases. The first of a capability is
# the one whose rates are scaled for an unknown card.
CARDS = (
    # NVIDIA A100 data sheets: 80 GB SXM; 80 GB PCIe; 40 GB, for both SXM and PCIe. SMs, L2: Ampere white paper.
    Card("a100", "NVIDIA A100 SXM 80GB", (8, 0), 108, 40, 80, 2.039, 312, 156, 19.5, A100_NAMES),
    Card("a100-pcie", "NVIDIA A100 PCIe 80GB", (8, 0), 108, 40, 80, 1.935, 312, 156, 19.5, ("A100 80GB PCIe",)),
    Card("a100-40gb", "NVIDIA A100 40GB", (8, 0), 108, 40, 40, 1.555, 312, 156, 19.5, A100_40_NAMES),
    # NVIDIA H100 white paper, columns SXM5 and PCIe. Bandwidth: H100 data sheets.
    Card("h100", "NVIDIA H100 SXM", (9, 0), 132, 50, 80, 3.35, 989.4, 494.7, 66.9, H100_NAMES),
    Card(
        "h100-pcie", "NVIDIA H100 PCIe", (9, 0), 114, 50, 80, 2.0, 756, 378, 51.2, ("H100 PCIe 80GB", "H100 80GB PCIe")
    ),
    # NVIDIA H100 data sheet, column NVL. SMs: its driver. L2 is not published: that of a whole GH100 with six HBM
    # stacks, as the H200's.
    Card("h100-nvl", "NVIDIA H100 NVL", (9, 0), 132, 60, 94, 3.9, 835.5, 417.5, 60, ("H100 NVL 94GB", "H100 94GB")),
    # Sold in China, with no data sheet on NVIDIA's site. H800: an H100 SXM but for fp64 and NVLink. H20: the figures
    # that vendors of servers print, 148 TFLOP/s of fp16 and 74 of tf32, both dense; SMs: its driver.
    Card("h800", "NVIDIA H800 SXM", (9, 0), 132, 50, 80, 3.35, 989.4, 494.7, 66.9, ("H800", "H800 SXM5", "H800 80GB")),
    Card("h20", "NVIDIA H20", (9, 0), 78, 60, 96, 4.0, 148, 74, 44, ("H20 96GB", "H20 SXM", "HGX H20")),
    # NVIDIA H200 data sheet; the SMs are those of the H100 SXM. L2, that of a whole GH100 with six HBM stacks: its
    # driver.
    Card("h200", "NVIDIA H200 SXM", (9, 0), 132, 60, 141, 4.8, 989.4, 494.7, 66.9, H200_NAMES),
    # NVIDIA GH200 data sheet, with 96 GB of HBM3 and with 144 GB of HBM3e. SMs, L2: "NVIDIA Grace Hopper Superchip
    # Architecture In-Depth", NVIDIA's developer blog. The driver's "480GB" is the memory of the CPU.
    Card("gh200", "NVIDIA GH200 96GB", (9, 0), 132, 60, 96, 4.0, 989.4, 494.7, 66.9, GH200_NAMES),
    Card("gh200-144gb", "NVIDIA GH200 144GB", (9, 0), 132, 60, 144, 4.9, 989.4, 494.7, 66.9, ("GH200 144G HBM3e",)),
    # NVIDIA Blackwell data sheet, HGX B200. The card was announced with 192 GB at 8 TB/s, but is sold with less:
    # drivers report 178 GiB, and 7680 bits at 3996 MHz, 7.67 TB/s. L2: CUDA Blackwell Tuning Guide.
    Card("b200", "NVIDIA B200 SXM", (10, 0), 148, 126, 180, 7.7, 2250, 1125, 75, B200_NAMES),
    # NVIDIA GB200 NVL72 data sheet, a 72nd of the rack: 13.4 TB at 576 TB/s, and 360 PFLOP/s with sparsity. SMs: its
    # driver. L2: the B200's.
    Card("gb200", "NVIDIA GB200", (10, 0), 152, 126, 186, 8.0, 2500, 1250, 80, ("GB200 NVL72", "GB200 186GB")),
    # NVIDIA HGX B300 data sheet, an eighth of the board; 288 GB are 268 GiB, and drivers report that. SMs: its driver.
    # L2 is not published: the B200's.
    Card("b300", "NVIDIA B300 SXM", (10, 3), 148, 126, 268, 8.0, 2250, 1125, 75, B300_NAMES),
    # NVIDIA data sheets of the L40S and the L4. SMs, L2: their drivers.
    Card("l40s", "NVIDIA L40S", (8, 9), 142, 96, 48, 0.864, 362.05, 183, 91.6, ("L40S 48GB", "L40S PCIe")),
    Card("l4", "NVIDIA L4", (8, 9), 58, 48, 24, 0.3, 121, 60, 30.3, ("L4 24GB", "L4 PCIe")),
    # NVIDIA white papers on Ada, Ampere GA102 and RTX Blackwell. A GeForce accumulates fp16 products in fp32 at half
    # the rate of fp16 accumulation; the rates here are those with fp32 accumulation.
    Card(
        "rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 72, 24, 1.008, 165.2, 82.6, 82.6, ("4090", "RTX 4090 24GB")
    ),
    Card("rtx3090", "NVIDIA GeForce RTX 3090", (8, 6), 82, 6, 24, 0.936, 71, 35.6, 35.6, ("3090", "RTX 3090 24GB")),
    Card(
        "rtx5090",
        "NVIDIA GeForce RTX 5090",
        (12, 0),
        170,
        96,
        32,
        1.792,
        209.5,
        104.8,
        104.8,
        ("5090", "RTX 5090 32GB"),
    ),
    # NVIDIA A10 data sheet; SMs, L2: its driver. The white paper on Ampere GA102 has the RTX A6000.
    Card("a10", "NVIDIA A10", (8, 6), 72, 6, 24, 0.6, 125, 62.5, 31.2, ("A10 24GB", "A10 PCIe")),
    Card("a6000", "NVIDIA RTX A6000", (8, 6), 84, 6, 48, 0.768, 154.8, 77.4, 38.7, ("RTX A6000 48GB",)),
    # NVIDIA white paper on RTX Blackwell PRO, Workstation Edition. Of the other two data sheets have bandwidth and
    # fp32; the tensor cores have four times fp32's rate, as the first's: the Max-Q's 3511 TFLOP/s of fp4 with sparsity
    # are 8 times that.
    Card("rtxpro6000", "NVIDIA RTX PRO 6000", (12, 0), 188, 128, 96, 1.792, 503.8, 251.9, 126, PRO_6000_NAMES),
    Card(
        "rtxpro6000-maxq",
        "NVIDIA RTX PRO 6000 Max-Q",
        (12, 0),
        188,
        128,
        96,
        1.792,
        438.9,
        219.5,
        109.7,
        PRO_6000_MAXQ_NAMES,
    ),
    Card(
        "rtxpro6000-server",
        "NVIDIA RTX PRO 6000 Server",
        (12, 0),
        188,
        128,
        96,
        1.597,
        480,
        240,
        120,
        PRO_6000_SERVER_NAMES,
    ),
    # NVIDIA DGX Spark data sheet: memory, which the CPU shares, and bandwidth. SMs, L2, fp32: NVIDIA's talk at Hot
    # Chips 2025. Of the tensor cores only fp4 with sparsity is published, 1000 TFLOP/s: on RTX PRO 8 times bf16's.
    Card("gb10", "NVIDIA GB10", (12, 1), 48, 24, 128, 0.273, 125, 62.5, 31, GB10_NAMES, estimated=True),
    # AMD Instinct data sheets, without sparsity; fp32: "vector". Compute units, memory, L2: "AMD GPU specifications" of
    # ROCm's documentation. L2 is one die's, which caches what the die's own compute units read. CDNA 4 has no tf32: the
    # rate is fp32's.
    Card("mi300x", "AMD Instinct MI300X", "gfx942", 304, 4, 192, 5.3, 1307.4, 653.7, 163.4, MI300X_NAMES),
    Card("mi325x", "AMD Instinct MI325X", "gfx942", 304, 4, 256, 6.0, 1307.4, 653.7, 163.4, MI325X_NAMES),
    Card("mi300a", "AMD Instinct MI300A", "gfx942", 228, 4, 128, 5.3, 980.6, 490.3, 122.6, MI300A_NAMES),
    Card("mi350x", "AMD Instinct MI350X", "gfx950", 256, 4, 288, 8.0, 2306.9, 144.2, 144.2, MI350X_NAMES),
    Card("mi355x", "AMD Instinct MI355X", "gfx950", 256, 4, 288, 8.0, 2516.6, 157.3, 157.3, MI355X_NAMES),
)
