"""The gradients of q and r: a program owns query rows and steps over keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallax_gen.ops.base import CostHints, register
from parallax_gen.ops.tile_form import GradientForm, basics
from parallax_gen.ops.tiles import MASK, TILE_KNOBS, GradientOp, MaskedConfig, Tiles
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class DqDrConfig(MaskedConfig):
    """The gradients of q and r: a program owns BLOCK_M query rows and steps over keys.

    MASK  where the causal mask is applied: to the weights, "after_exp", in every block, or with a window in those that
          the diagonal or the window's edge crosses; to the scores, "before_exp", in those blocks alone
    """


class DqDrOp(GradientOp[DqDrConfig]):
    """q, r, k, v, do and preprocess's rows in; dq and dr out."""

    name = "dqdr"
    config = DqDrConfig
    knobs = (*TILE_KNOBS, MASK)
    template = "dqdr.py.j2"
    # A backward's element takes more operations beside the matmuls, and more tiles of scores at a time.
    costs = CostHints(reached=0.65, spilled=1.5)
    tiles = Tiles(
        usual=((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        narrow=((64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)),
        wide=((32, 32, 4, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
        halves=((128, 32, 8, 1), (64, 32, 4, 3), (64, 32, 4, 2), (64, 64, 8, 2)),
        fp32=((32, 32, 8, 2), (16, 16, 4, 2)),
    )

    def owned_rows(self, spec: KernelSpec, config: DqDrConfig, gpu: Gpu) -> int:
        return 3 * config.BLOCK_M

    def shared_bytes(self, spec: KernelSpec, config: DqDrConfig, gpu: Gpu) -> int:
        least = super().shared_bytes(spec, config, gpu)
        if gpu.capability[0] not in (9, 10) and config.HEAD_DIM_LAYOUT != "chunked":
            # From compiling: there, half a tile of scores passes from thread to thread at the least.
            least += config.BLOCK_M * config.BLOCK_N * spec.bytes_per_element // 2
        return least

    def ahead_bytes(self, spec: KernelSpec, config: DqDrConfig) -> int:
        """Up to half a block more than others."""
        return self.block_bytes(spec, config) * 3 // 2

    def lean(self, config: DqDrConfig) -> DqDrConfig:
        return replace(config, MASK="before_exp")

    def pays_to_be_lean(self, spec: KernelSpec, config: DqDrConfig) -> bool:
        return spec.causal and not spec.window and spec.head_dim < 128

    def instructions_factor(self, spec: KernelSpec, config: DqDrConfig) -> float:
        """From one H100, at head_dim 64 and 128: more to narrow heads, which have less to multiply."""
        if config.MASK != "before_exp":
            return 1.0
        return 1.035 if spec.head_dim <= 64 else 0.99

    def written(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("dq", "dr")

    def form(self, spec: KernelSpec, config: DqDrConfig) -> GradientForm:
        mask = config.MASK if spec.causal else ""
        if mask == "after_exp" and not spec.window:
            mask = "after_exp always"  # a branch costs more
        return GradientForm(*basics(self, spec, config, ("dq", "dr")), mask)


register(DqDrOp())
