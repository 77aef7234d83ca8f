"""The forward: a program owns query rows and streams keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallax_gen.ops.base import CostHints, Knob, Value, register
from parallax_gen.ops.default_tiles import Tile, Tiles
from parallax_gen.ops.forward_form import ForwardForm
from parallax_gen.ops.head_dim import Chunk, chunks_of, this_half_of
from parallax_gen.ops.signature import Argument, Signature, head_strides
from parallax_gen.ops.tile_form import tile_fields
from parallax_gen.ops.tiles import TILE_KNOBS, TileConfig, TiledOp, programs_per_tile, row_bytes
from parallax_gen.problem.hardware import KIB, Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class ForwardConfig(TileConfig):
    """The config of the forward: a program owns BLOCK_M query rows and streams keys.

    SOFTMAX  "online" subtracts a row's running maximum from its scores and rescales its sums in every step;
             "fixed_reference" subtracts the score of one visible key throughout, and a second kernel computes the
             tiles whose sums overflowed again, online
    """

    SOFTMAX: str = "online"


class ForwardOp(TiledOp[ForwardConfig]):
    """Reads q, r, k and v; writes out, and with stats also lse, t̄ and v̄ for the backward and for merging states."""

    name = "forward"
    config = ForwardConfig
    knobs = (*TILE_KNOBS, Knob("SOFTMAX", ("online", "fixed_reference")))
    template = "forward.py.j2"
    costs = CostHints(reached=0.6, spilled=0.4)  # it needs few registers: it can compute s and t one after the other
    stats_in_error = False
    pads_wide = True
    fp32_shift = 20
    tiles = Tiles(
        usual=((128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        narrow=((64, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3)),
        wide=((64, 64, 8, 2), (64, 32, 8, 3), (64, 32, 8, 2), (32, 64, 8, 2)),
        split=((128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2)),
        fp32=((64, 32, 8, 2), (32, 32, 4, 2), (32, 16, 8, 2), (16, 16, 4, 2)),
    )
    tiles_of_synchronous_matmuls = replace(
        tiles,
        usual=((64, 32, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2)),
        narrow=(),
        wide=((64, 32, 8, 3), (64, 32, 8, 2)),
        split=((64, 32, 8, 2), (32, 32, 4, 2)),
    )

    tiles_of_amd = replace(
        tiles,
        usual=((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        narrow=(),
        wide=((32, 32, 4, 2), (16, 32, 4, 2)),
        split=((64, 32, 4, 2), (32, 32, 4, 2)),
        fp32=((64, 32, 4, 1), (64, 16, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    )

    def usable(self, spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
        return knob.values[:1] if knob.name == "SOFTMAX" and spec.dtype == "fp16" else super().usable(spec, knob)

    def why_invalid(self, spec: KernelSpec, config: ForwardConfig, gpu: Gpu) -> str | None:
        if config.SOFTMAX == "fixed_reference":
            if spec.dtype == "fp16":
                return "SOFTMAX 'fixed_reference' cannot be combined with fp16: unscaled weights soon overflow"
            if config.HEAD_DIM_LAYOUT == "split":
                return "SOFTMAX 'fixed_reference' cannot be combined with HEAD_DIM_LAYOUT 'split'"
        return super().why_invalid(spec, config, gpu)

    def owned_rows(self, spec: KernelSpec, config: ForwardConfig, gpu: Gpu) -> int:
        return 2 * config.BLOCK_M

    def block_bytes(self, spec: KernelSpec, config: ForwardConfig) -> int:
        """A block of k, and the part of v that the program accumulates."""
        k_row = row_bytes(spec, config)
        return config.BLOCK_N * (k_row + k_row // programs_per_tile(config))

    def shared_bytes(self, spec: KernelSpec, config: ForwardConfig, gpu: Gpu) -> int:
        return super().shared_bytes(spec, config, gpu) + self._split_in_flight(spec, config, gpu)

    def extra_shared_bytes(self, spec: KernelSpec, config: ForwardConfig, gpu: Gpu) -> int:
        exchanged = self._exchanged(config, gpu)
        return super().extra_shared_bytes(spec, config, gpu) + exchanged - self._split_in_flight(spec, config, gpu)

    def _split_in_flight(self, spec: KernelSpec, config: ForwardConfig, gpu: Gpu) -> int:
        """What every kernel with a split head_dim takes on Blackwell, from compiling: a block more is in flight."""
        if not gpu.has_tcgen05 or config.HEAD_DIM_LAYOUT != "split" or config.num_stages == 1:
            return 0
        return self.block_bytes(spec, config) + self._exchanged(config, gpu)

    def _exchanged(self, config: ForwardConfig, gpu: Gpu) -> int:
        """What the 8 warps of a tile of 128 rows exchange of its rows on Blackwell, from compiling."""
        return 4 * KIB if gpu.has_tcgen05 and config.BLOCK_M == 128 else 0

    def exchanged_rows(self, config: ForwardConfig) -> int:
        """More with a fixed reference, which first reads a key for each row."""
        rows = super().exchanged_rows(config)
        return max(4 * config.BLOCK_M, rows) if config.SOFTMAX == "fixed_reference" else rows

    def score_and_output_chunks(self, head_dim: int, head_dim_layout: str) -> tuple[list[Chunk], list[Chunk]]:
        if head_dim_layout != "split":
            return super().score_and_output_chunks(head_dim, head_dim_layout)
        return chunks_of(head_dim, "native"), [this_half_of(head_dim)]

    def streamed_chunks(self, spec: KernelSpec, config: ForwardConfig, tensor: str) -> list[Chunk]:
        """Of v a program loads the part that it accumulates."""
        return self.score_and_output_chunks(spec.head_dim, config.HEAD_DIM_LAYOUT)[tensor == "v"]

    def defaults(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[ForwardConfig]:
        """As of the other ops, but three programs of 4 warps are resident instead of two where that spills nothing.

        From one H200, at head_dim 64: 9 to 14 % less time, with stats and without, under Triton 3.6 and 3.9. The
        registers and spills were compiled for, at head_dim 32, 48 and 64; packed kernels spill.
        """
        return [
            replace(config, maxnreg=168)
            if config.SOFTMAX == "fixed_reference"
            and spec.head_dim <= 64
            and not spec.varlen
            and (config.BLOCK_M, config.BLOCK_N, config.num_warps) == (64, 64, 4)
            else config
            for config in super().defaults(spec, shape, gpu)
        ]

    def tiles_on_hopper(self, spec: KernelSpec, layout: str, shape: Shape, few: bool) -> tuple[Tile, ...]:
        """From one H200, over tiles of 128 rows by pointers: 1 to 6 % more time under Triton 3.6 on long sequences
        at head_dim 128, 2 to 12 % less on short ones and with a window; under 3.9 5 to 12 % less.

        Three stages take 0.76 to 0.95 of the time of two where programs are few, else 1.2 to 1.3 times as long. Packed
        sequences were measured at 128 tokens: 0.86 of the time of 128 rows.
        """
        if not 64 < spec.head_dim <= 128 or layout == "padded":
            return ()
        if spec.varlen:
            return ((64, 64, 4, 2),) if shape.seqlen_kv <= 256 else ()
        return ((64, 64, 4, 3 if layout == "chunked" or few else 2),)

    def with_fewer_instructions(self, config: ForwardConfig) -> ForwardConfig:
        return replace(config, SOFTMAX="fixed_reference")

    def fewer_instructions_pay(self, spec: KernelSpec, config: ForwardConfig) -> bool:
        # With a window each row first reads its last key: too expensive for a window of 513 keys.
        return not spec.window

    def instructions_factor(self, spec: KernelSpec, config: ForwardConfig) -> float:
        """SOFTMAX from one H100, at head_dim 64 and 128: narrow heads gain more, since they have less to multiply.

        LOADS from one H200, at head_dim 64 to 128: the mean of 1.04 under Triton 3.6 and 1.09 under 3.9.
        """
        of_loads = 1.06 if config.LOADS == "descriptors" and config.num_warps == 4 else 1.0
        if config.SOFTMAX != "fixed_reference":
            return of_loads
        return of_loads * (1.08 if spec.head_dim <= 64 else 1.06)

    def written(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("out", "lse", "t_mean", "v_mean") if spec.stats else ("out",)

    def signatures(self, spec: KernelSpec, config: ForwardConfig) -> dict[str, Signature]:
        if config.SOFTMAX != "fixed_reference":
            return super().signatures(spec, config)
        sizes = self.sizes_passed(spec, config, fills_padding=False)
        fixup_sizes = self.sizes_passed(spec, config, finds_tile=False)
        return {
            "forward": self.signature(spec, config, sizes, self.descriptors(spec, config)),
            "fixup": self.signature(spec, config, fixup_sizes),
        }

    def also_by_pointer(self, config: ForwardConfig) -> tuple[str, ...]:
        return ("k",) if config.SOFTMAX == "fixed_reference" else ()  # the reference is the score of one key

    def strides_by_pointer(self, spec: KernelSpec, tensor: str, described: bool) -> tuple[Argument, ...]:
        if described and not spec.window:
            return head_strides(tensor)  # it is the first key
        return super().strides_by_pointer(spec, tensor, described)

    def form(self, spec: KernelSpec, config: ForwardConfig) -> ForwardForm:
        return ForwardForm(
            *tile_fields(self, spec, config, ("o",)), fixed_reference=config.SOFTMAX == "fixed_reference"
        )


register(ForwardOp())
