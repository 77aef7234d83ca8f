"""The backward's first kernel: computes the row statistics that dkdv and dqdr need."""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.ops.base import (
    PADDED_TO,
    PADDED_TO_IN_KERNELS,
    CostHints,
    KernelConfig,
    Knob,
    Op,
    OpKind,
    register,
)
from parallax_gen.ops.head_dim import power_of_2, width_of
from parallax_gen.ops.signature import (
    Argument,
    Constant,
    Signature,
    dim_constants,
    number,
    pointers,
    row_stats_strides,
)
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class PreprocessConfig(KernelConfig):
    """The config of preprocess, which is bound by memory.

    BLOCK_M      query rows that a program owns
    num_warps    warps per program
    """

    BLOCK_M: int
    num_warps: int


@dataclass(frozen=True)
class RowForm:
    """A row of head_dim elements in a tile, whose width is a power of two.

    row_size   the width as kernels write it: by name if it has one
    padded     whether it is more than head_dim
    constants  of the kernel
    """

    row_size: str
    padded: bool
    constants: tuple[Constant, ...]


class PreprocessOp(Op[PreprocessConfig]):
    """Reads do and the forward's outputs; writes four statistics per query row."""

    padded_to = PADDED_TO
    name = "preprocess"
    config = PreprocessConfig
    knobs = (Knob("BLOCK_M", (4, 8, 16, 32, 64, 128)), Knob("num_warps", (1, 2, 4, 8)))
    template = "preprocess.py.j2"
    kind = OpKind.ROWS
    costs = CostHints()
    uses_sibling_records = False

    def why_invalid(self, spec: KernelSpec, config: PreprocessConfig, gpu: Gpu) -> str | None:
        needed = 3 * config.BLOCK_M * width_of(spec.head_dim, "padded") // (gpu.warp_size * config.num_warps)
        if needed > (registers := gpu.registers_per_thread(config.num_warps)):
            return f"its rows need {needed} registers per thread; there are {registers}"
        return None

    def shared_bytes(self, spec: KernelSpec, config: PreprocessConfig, gpu: Gpu) -> int:
        return 4 * config.BLOCK_M if gpu.is_amd else 0  # bytes: each row's sum, laid out otherwise

    def defaults(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[PreprocessConfig]:
        # Programs of 4 KiB a tensor: with 2 KiB, small calls take 1.2 times as long at head_dim 64 (H200, Triton 3.9).
        sizes = (32, 16, 8) if spec.head_dim <= 64 else (16, 32, 8)
        return [PreprocessConfig(BLOCK_M=m, num_warps=4) for m in sizes]

    def inputs(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("do", "out", "v_mean", "lse", "t_mean")

    def written(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("row_stats",)

    def lengths(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("cu_seqlens_q",) if spec.varlen else ()

    def signatures(self, spec: KernelSpec, config: PreprocessConfig) -> dict[str, Signature]:
        dims = "mh" if spec.varlen else "bmh"
        strides = [
            Argument(tuple(f"stride_{name}{dim}" for dim in dims), f"*{tensor}.stride()[:{len(dims)}]")
            for tensor, name in (("do", "do"), ("out", "o"), ("v_mean", "vmean"))
        ]
        length = number("total_q", "do.shape[0]") if spec.varlen else number("seqlen_q")
        passed = (
            *pointers(self.tensors(spec, config)),
            *strides,
            *row_stats_strides(spec),
            number("softmax_scale"),
            number("heads"),
            length,
            number("num_tiles"),
        )
        return {"preprocess": Signature(passed, ("heads", *length.parameters, "num_tiles"))}

    def form(self, spec: KernelSpec, config: PreprocessConfig) -> RowForm:
        width = power_of_2(spec.head_dim)
        padded = width != spec.head_dim
        constants = (
            Constant("LOG2_E", 1.4426950408889634),
            *dim_constants(spec.head_dim, width),
            Constant("BLOCK_M", config.BLOCK_M, "query rows per program"),
            *(PADDED_TO_IN_KERNELS,) * spec.varlen,
        )
        return RowForm("PADDED_DIM" if padded else "HEAD_DIM", padded, constants)

    def awkward_shape(self, spec: KernelSpec, config: PreprocessConfig, kv_heads: int = 3) -> Shape:
        return Shape(2, kv_heads, kv_heads, 2 * config.BLOCK_M + 3, 2 * config.BLOCK_M + 3)

    def bucket_suffix(self, spec: KernelSpec, bucket: Bucket) -> str:
        return f"_q{bucket.seqlen_q}"


register(PreprocessOp())
