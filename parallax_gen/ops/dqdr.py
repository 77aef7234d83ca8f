"""The gradients of q and r: a program owns query rows and streams keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallax_gen.ops.base import CostHints, register
from parallax_gen.ops.default_tiles import Tile, Tiles
from parallax_gen.ops.gradients import MASK, QR_TILE, GradientConfig, GradientOp
from parallax_gen.ops.tile_form import GradientForm, tile_fields
from parallax_gen.ops.tiles import TILE_KNOBS
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class DqDrConfig(GradientConfig):
    """The config of dqdr: a program owns BLOCK_M query rows and streams keys.

    MASK     where the causal mask is applied: "after_exp", to the weights, in every block, or with a window only in
             blocks that the diagonal or the window's edge crosses; "before_exp", to the scores, only in those blocks
    QR_TILE  how a program holds its rows of q and r: "separate", in a tile each; or "stacked", in one tile, so that one
             matmul gives s and t
    """


class DqDrOp(GradientOp[DqDrConfig]):
    """Reads q, r, k, v, do and preprocess's row statistics; writes dq and dr."""

    name = "dqdr"
    config = DqDrConfig
    knobs = (*TILE_KNOBS, MASK, QR_TILE)
    template = "dqdr.py.j2"
    # In a backward each score takes more non-matmul operations, and more tiles of scores are live at a time.
    costs = CostHints(reached=0.65, spilled=1.5)
    tiles = Tiles(
        usual=((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        narrow=((64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3)),
        wide=((32, 32, 4, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
        split=((64, 32, 4, 3), (128, 32, 8, 1), (64, 32, 4, 2), (64, 64, 8, 2)),
        fp32=((32, 32, 8, 2), (16, 16, 4, 2)),
    )
    tiles_of_synchronous_matmuls = replace(
        tiles, usual=((64, 32, 4, 3), (32, 32, 4, 2), (64, 32, 4, 2)), narrow=(), wide=((32, 32, 4, 2), (32, 32, 4, 1))
    )

    tiles_of_amd = replace(
        tiles,
        usual=((64, 32, 4, 2), (32, 32, 4, 2)),
        narrow=(),
        wide=((32, 32, 4, 2), (16, 32, 4, 2)),
        split=((32, 32, 4, 2), (16, 32, 4, 2)),
        fp32=((64, 16, 4, 1), (16, 16, 4, 1), (64, 16, 4, 1)),  # the first twice: small calls skip one
    )

    def owned_rows(self, spec: KernelSpec, config: DqDrConfig, gpu: Gpu) -> int:
        return 3 * config.BLOCK_M

    def shared_bytes(self, spec: KernelSpec, config: DqDrConfig, gpu: Gpu) -> int:
        least = super().shared_bytes(spec, config, gpu)
        if not (gpu.has_async_matmuls or gpu.is_amd) and config.HEAD_DIM_LAYOUT != "chunked":
            # From compiling: these exchange at least half a tile of scores between threads.
            least += config.BLOCK_M * config.BLOCK_N * spec.bytes_per_element // 2
        return least

    def async_bytes(self, spec: KernelSpec, config: DqDrConfig) -> int:
        """Up to half a block more than in other ops."""
        return self.block_bytes(spec, config) * 3 // 2

    def tiles_on_hopper(self, spec: KernelSpec, layout: str, shape: Shape, few: bool) -> tuple[Tile, ...]:
        """From one H200 at 76 places, causal, over tiles of 128 rows by pointers under Triton 3.9 and 3.6.

        At head_dim 128: with few programs half to 0.9 of the time; else 0.87 to 1, the most gained on short sequences.
        Packed sequences were measured at 128 tokens: 0.68.
        """
        if spec.head_dim > 128 or layout == "padded":
            return ()
        if spec.varlen:
            return ((64, 32, 4, 3),) if shape.seqlen_kv <= 256 and spec.head_dim > 64 else ()
        if layout == "chunked" or spec.head_dim <= 64:
            return ((64, 64, 4, 3),)
        if spec.window:
            return ((64, 64, 4, 2),)
        if few:
            return ((64, 64, 4, 3),)
        if shape.seqlen_kv <= 512:
            return ((64, 32, 4, 3),)
        return ((64, 64, 4, 2),) if shape.seqlen_kv <= (2048 if spec.group == 1 else 4096) else ()

    def with_fewer_instructions(self, config: DqDrConfig) -> DqDrConfig:
        return replace(config, MASK="before_exp")

    def fewer_instructions_pay(self, spec: KernelSpec, config: DqDrConfig) -> bool:
        # Where q and r are stacked, from an H200: at head_dim 64 to 128, and with a window, under Triton 3.6 and 3.9.
        return spec.causal

    def instructions_factor(self, spec: KernelSpec, config: DqDrConfig) -> float:
        """MASK from one H100, at head_dim 64 and 128: narrow heads gain more, since they have less to multiply.

        QR_TILE from one H200: the mean of 0.98 under Triton 3.6 and 1.06 under 3.9. LOADS likewise, with 4 warps: that
        of 1.01 and 1.10.
        """
        factor = 1.02 if config.QR_TILE == "stacked" else 1.0
        if config.LOADS == "descriptors" and config.num_warps == 4:
            factor *= 1.05
        if config.MASK != "before_exp":
            return factor
        return factor * (1.035 if spec.head_dim <= 64 else 0.99)

    def written(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("dq", "dr")

    def form(self, spec: KernelSpec, config: DqDrConfig) -> GradientForm:
        mask = config.MASK if spec.causal else ""
        if mask == "after_exp" and not spec.window:
            mask = "after_exp always"  # the branch would cost more than the mask
        return GradientForm(*tile_fields(self, spec, config, ("dq", "dr")), mask)


register(DqDrOp())
