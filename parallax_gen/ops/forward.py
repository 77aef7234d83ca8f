"""The forward: a program owns query rows and steps over keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallax_gen.ops.base import CostHints, Knob, Value, register
from parallax_gen.ops.pieces import Piece, half_of, pieces_of
from parallax_gen.ops.signature import Signature
from parallax_gen.ops.tile_form import ForwardForm, basics
from parallax_gen.ops.tiles import TILE_KNOBS, TileConfig, TiledOp, Tiles, programs_a_head, row_bytes
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class ForwardConfig(TileConfig):
    """The forward: a program owns BLOCK_M query rows and steps over keys.

    SOFTMAX  "online" subtracts a row's running maximum from its scores and rescales its sums in every step;
             "fixed_reference" subtracts the score of one visible key throughout, and a second kernel computes the
             tiles whose sums overflowed again, online
    """

    SOFTMAX: str = "online"


class ForwardOp(TiledOp[ForwardConfig]):
    """q, r, k and v in; out, and with stats what the backward and joining of parts need."""

    name = "forward"
    config = ForwardConfig
    knobs = (*TILE_KNOBS, Knob("SOFTMAX", ("online", "fixed_reference")))
    template = "forward.py.j2"
    costs = CostHints(reached=0.6, spilled=0.4)  # it can do one score after the other
    stats_in_error = False
    pads_wide = True
    fp32_shift = 20
    tiles = Tiles(
        usual=((128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        narrow=((64, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3)),
        wide=((64, 64, 8, 2), (64, 32, 8, 3), (64, 32, 8, 2), (32, 64, 8, 2)),
        halves=((128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2)),
        fp32=((64, 32, 8, 2), (32, 32, 4, 2), (32, 16, 8, 2), (16, 16, 4, 2)),
    )

    def usable(self, spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
        return knob.values[:1] if knob.name == "SOFTMAX" and spec.dtype == "fp16" else super().usable(spec, knob)

    def why_invalid(self, spec: KernelSpec, config: ForwardConfig, gpu: Gpu) -> str | None:
        if config.SOFTMAX == "fixed_reference":
            if spec.dtype == "fp16":
                return "SOFTMAX 'fixed_reference' does not go with fp16: unscaled weights soon overflow"
            if config.HEAD_DIM_LAYOUT == "split":
                return "SOFTMAX 'fixed_reference' does not go with HEAD_DIM_LAYOUT 'split'"
        return super().why_invalid(spec, config, gpu)

    def owned_rows(self, spec: KernelSpec, config: ForwardConfig, gpu: Gpu) -> int:
        return 2 * config.BLOCK_M

    def block_bytes(self, spec: KernelSpec, config: ForwardConfig) -> int:
        """k, and of v what it sums."""
        a_row = row_bytes(spec, config)
        return config.BLOCK_N * (a_row + a_row // programs_a_head(config))

    def scored_and_summed(self, head_dim: int, form: str) -> tuple[list[Piece], list[Piece]]:
        if form != "split":
            return super().scored_and_summed(head_dim, form)
        return pieces_of(head_dim, "native"), [half_of(head_dim)]

    def lean(self, config: ForwardConfig) -> ForwardConfig:
        return replace(config, SOFTMAX="fixed_reference")

    def pays_to_be_lean(self, spec: KernelSpec, config: ForwardConfig) -> bool:
        return not spec.window  # there each row's own key is read first, which 513 keys do not repay

    def instructions_factor(self, spec: KernelSpec, config: ForwardConfig) -> float:
        """From one H100, at head_dim 64 and 128: more to narrow heads, which have less to multiply."""
        if config.SOFTMAX != "fixed_reference":
            return 1.0
        return 1.08 if spec.head_dim <= 64 else 1.06

    def written(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("out", "lse", "t_mean", "v_mean") if spec.stats else ("out",)

    def signatures(self, spec: KernelSpec, config: ForwardConfig) -> dict[str, Signature]:
        if config.SOFTMAX != "fixed_reference":
            return super().signatures(spec, config)
        sizes, again = self.sizes_passed(spec, config, fills=False), self.sizes_passed(spec, config, tiled=False)
        return {"forward": self.signature(spec, config, sizes), "fixup": self.signature(spec, config, again)}

    def form(self, spec: KernelSpec, config: ForwardConfig) -> ForwardForm:
        return ForwardForm(*basics(self, spec, config, ("o",)), fixed=config.SOFTMAX == "fixed_reference")


register(ForwardOp())
