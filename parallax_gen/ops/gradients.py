"""The base of dkdv and dqdr, which recompute scores and sum gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from parallax_gen.ops.base import Knob, Value
from parallax_gen.ops.signature import Argument, number, row_stats_strides
from parallax_gen.ops.tiles import TileConfig, TiledOp
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

MASK = Knob("MASK", ("after_exp", "before_exp"))
QR_TILE = Knob("QR_TILE", ("separate", "stacked"))


@dataclass(frozen=True)
class GradientConfig(TileConfig):
    """The base of the configs of dkdv and dqdr, which explain these fields.

    MASK     where the causal mask is applied
    QR_TILE  how q and r are held
    """

    MASK: str = "after_exp"
    QR_TILE: str = "separate"


G = TypeVar("G", bound=GradientConfig)


class GradientOp(TiledOp[G]):
    """The base of dkdv and dqdr, which recompute scores from preprocess's row statistics and sum gradients."""

    def usable(self, spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
        unused = (knob.name == "MASK" and not spec.causal) or (knob.name == "QR_TILE" and spec.dtype == "fp32")
        return knob.values[:1] if unused else super().usable(spec, knob)

    def why_invalid(self, spec: KernelSpec, config: G, gpu: Gpu) -> str | None:
        if config.MASK == "before_exp" and not spec.causal:
            return "MASK 'before_exp' needs causal attention: without it there is no mask"
        owned, _ = self.owned_and_streamed(config)
        if config.QR_TILE == "stacked" and (spec.dtype == "fp32" or owned < 16 * config.num_warps):
            # Otherwise s and t of one score are in different warps. Without tensor cores there is nothing to gain.
            return (
                f"QR_TILE 'stacked' needs tensor cores and 16 rows of a tile per warp, {16 * config.num_warps} in all"
            )
        return super().why_invalid(spec, config, gpu)

    def defaults(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[G]:
        """As of the other ops, but q and r are stacked on Hopper.

        From one H200, in bf16: dkdv takes 1 to 12 % less time under Triton 3.6 and 3 to 16 % less under 3.9; dqdr takes
        4 to 11 % less under 3.9, and under 3.6 1 to 5 % more at head_dim 64 and 128, 5 to 9 % less at 96 and 256.
        """
        configs = super().defaults(spec, shape, gpu)
        if not gpu.has_wgmma or spec.bytes_per_element != 2:
            return configs
        stacked = [replace(config, QR_TILE="stacked") for config in configs]
        pairs = zip(stacked, configs, strict=True)
        return [with_qr if self.why_invalid(spec, with_qr, gpu) is None else config for with_qr, config in pairs]

    def exchanged_rows(self, config: G) -> int:
        return (2 if config.QR_TILE == "stacked" else 1) * super().exchanged_rows(config)

    def inputs(self, spec: KernelSpec) -> tuple[str, ...]:
        return (*super().inputs(spec), "do", "row_stats")

    def parameters_before_scale_log2(self, spec: KernelSpec) -> tuple[Argument, ...]:
        return (*row_stats_strides(spec), number("softmax_scale"))
