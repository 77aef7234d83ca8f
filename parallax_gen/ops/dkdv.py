"""The gradients of k and v: a program owns keys and streams query rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallax_gen.ops.base import CostHints, Knob, register
from parallax_gen.ops.default_tiles import Tile, Tiles
from parallax_gen.ops.gradients import MASK, QR_TILE, GradientConfig, GradientOp
from parallax_gen.ops.tile_form import GradientForm, tile_fields
from parallax_gen.ops.tiles import TILE_KNOBS, row_bytes
from parallax_gen.problem.hardware import KIB, Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class DkDvConfig(GradientConfig):
    """The config of dkdv: a program owns BLOCK_N keys and streams the rows of every query head of its group.

    GROUP_HEADS counts kv heads here.

    MASK       where the causal mask is applied, in blocks that the diagonal or a window's edge crosses: "after_exp", to
               the weights, or "before_exp", to the scores
    QR_TILE    how a step holds its rows of q and r: "separate", in a tile each; or "stacked", in one tile, so that one
               matmul gives s and t, and one sums dk: these read less shared memory for each of their operations
    ROW_STATS  how a step loads the four statistics of each query row: "separate", each where it is used, which takes
               fewer registers; or "fused", in one load, which takes fewer instructions
    """

    ROW_STATS: str = "separate"


class DkDvOp(GradientOp[DkDvConfig]):
    """Reads q, r, k, v, do and preprocess's row statistics; writes dk and dv."""

    name = "dkdv"
    config = DkDvConfig
    knobs = (*TILE_KNOBS, MASK, QR_TILE, Knob("ROW_STATS", ("separate", "fused")))
    template = "dkdv.py.j2"
    # Row statistics lie along the columns of tiles, which costs registers: a program holds them and tiles of scores.
    costs = CostHints(reached=0.5, spilled=3.0)
    owns_keys = True
    streamed = ("q", "r", "do")
    tiles = Tiles(
        usual=((32, 64, 4, 3), (32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
        narrow=((64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 3)),
        wide=((64, 32, 8, 2), (32, 32, 4, 1), (32, 32, 8, 2)),
        split=((32, 128, 8, 2), (32, 64, 4, 3), (32, 64, 4, 2)),
        fp32=((32, 32, 8, 2), (16, 16, 4, 2)),
    )
    tiles_of_synchronous_matmuls = replace(
        tiles,
        usual=((32, 64, 4, 3), (16, 64, 4, 3), (32, 32, 4, 2)),
        narrow=(),
        wide=((64, 32, 8, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
        split=((32, 64, 8, 2), (32, 32, 4, 2)),
        chunked=((16, 64, 4, 3),),
    )

    tiles_of_amd = replace(
        tiles,
        usual=((16, 64, 4, 2), (16, 32, 4, 2)),
        narrow=(),
        wide=((16, 32, 4, 2),),
        split=((16, 32, 4, 2),),
        fp32=((16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    )

    def described(self, config: DkDvConfig) -> tuple[tuple[str, ...], ...]:
        return (("q", "r"), ("do",)) if config.QR_TILE == "stacked" else super().described(config)

    def owned_rows(self, spec: KernelSpec, config: DkDvConfig, gpu: Gpu) -> int:
        owned = 2 * config.BLOCK_N
        if gpu.has_tcgen05:
            # From compiling: on Blackwell tensor cores read p w, dt, ds and transposed operands from shared memory.
            owned += (8 if spec.dtype == "tf32" else 7) * config.BLOCK_M
        return owned

    def block_bytes(self, spec: KernelSpec, config: DkDvConfig) -> int:
        """A block of q, r and do."""
        return 3 * config.BLOCK_M * row_bytes(spec, config)

    def extra_shared_bytes(self, spec: KernelSpec, config: DkDvConfig, gpu: Gpu) -> int:
        """On Blackwell `owned_rows` already counts what matmuls keep in flight."""
        if gpu.has_tcgen05:
            return 2 * KIB  # one of them for row statistics
        return super().extra_shared_bytes(spec, config, gpu)

    def heads_in_l2(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> int:
        """The number of kv heads whose query rows fill half of L2: the tiles of a kv head all read them.

        But at least as many as have tiles for about a wave of two programs per multiprocessor, and up to 4 if their
        tiles are at most two waves: launching the longest tiles first does not balance the load of fewer. On an H200
        16 heads in place of 8 took 0.71 to 1.00 of the time with 1024 tokens, 8 in place of 4 took 0.69 to 1.01 with
        2048, and 4 in place of 1 or 2 took 0.85 to 1.06 with GQA 4:1 and 4096 or 8192, but 1.04 with head_dim 256.
        """
        head_bytes = 3 * shape.seqlen_q * shape.group * spec.head_dim * spec.bytes_per_element
        in_l2 = max(1, gpu.l2_bytes // 2 // head_bytes)
        if spec.head_dim > 128:
            return in_l2
        tiles_per_head, wave = -(-shape.seqlen_kv // 64), 2 * gpu.sms  # BLOCK_N is 64 by default
        return max(in_l2, wave // tiles_per_head, min(4, 2 * wave // tiles_per_head))

    def tiles_on_hopper(self, spec: KernelSpec, layout: str, shape: Shape, few: bool) -> tuple[Tile, ...]:
        if spec.head_dim > 128 or layout == "padded":
            return ()
        if layout == "chunked":
            return () if spec.varlen else ((64, 64, 4, 2),)
        # Small calls too: on an H200 tiles of twice the keys take 1.8 times as long there under Triton 3.9.
        return (self.tiles.usual if spec.head_dim > 64 else self.tiles.narrow)[:1]

    def descriptors_pay(self, config: DkDvConfig) -> bool:
        return True

    def with_fewer_instructions(self, config: DkDvConfig) -> DkDvConfig:
        return replace(config, MASK="before_exp", ROW_STATS="fused")

    def fewer_instructions_pay(self, spec: KernelSpec, config: DkDvConfig) -> bool:
        # These tiles just fit in the registers.
        return spec.causal and config.BLOCK_N == 64 and config.HEAD_DIM_LAYOUT == "native"

    def instructions_factor(self, spec: KernelSpec, config: DkDvConfig) -> float:
        """ROW_STATS from one H100, at head_dim 64 and 128: narrow heads gain more. Registers cost by the spills.

        QR_TILE from one H200, at head_dim 64 to 256: the mean of 1.07 under Triton 3.6 and 1.15 under 3.9; LOADS
        likewise: that of 1.06 and 1.11.
        """
        factor = (1.1 if config.QR_TILE == "stacked" else 1.0) * (1.08 if config.LOADS == "descriptors" else 1.0)
        if config.ROW_STATS != "fused":
            return factor
        return factor * (1.07 if spec.head_dim <= 64 else 0.95)

    def written(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("dk", "dv")

    def sizes(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("window_size",) * spec.window + ("max_seqlen_k",) * spec.varlen

    def form(self, spec: KernelSpec, config: DkDvConfig) -> GradientForm:
        mask = config.MASK if spec.causal else ""
        fields = tile_fields(self, spec, config, ("dk", "dv"))
        return GradientForm(*fields, mask, config.ROW_STATS == "separate")


register(DkDvOp())
