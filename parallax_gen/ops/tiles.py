"""What the three ops have in common whose programs own a tile and step over others: forward, dkdv and dqdr."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, TypeVar

from parallax_gen.ops.base import MAX_REGISTERS_PER_THREAD, PADDED_TO, KernelConfig, Knob, Layout, Op, Value
from parallax_gen.ops.pieces import Piece, forms_of, half_of, other_half_of, width_of
from parallax_gen.ops.signature import Passed, Signature, number, pointers, strides, strides_of_rows
from parallax_gen.problem.hardware import KIB, Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class TileConfig(KernelConfig):
    """Choices of a kernel that owns a block of rows or of keys, and steps over blocks of the other.

    BLOCK_M          query rows a tile
    BLOCK_N          keys a tile
    GROUP_HEADS      heads whose tiles are launched together, the longest tiles first: fewer heads keep the keys that
                     they share in L2, more spread the causal triangle evenly; 0 for all heads
    num_warps        warps a program
    num_stages       blocks in flight
    HEAD_DIM_LAYOUT  how tensor cores see a row of head_dim numbers: "native", a power of two; "chunked", powers of two
                     side by side (96 = 64 + 32); "padded", the next power of two, filled with zeros; "split", for wide
                     heads: two programs share a tile, compute all scores each, and sum half of the dimensions each
    maxnreg          the most registers a thread, so that more programs run on a multiprocessor; 0 for no limit
    """

    BLOCK_M: int
    BLOCK_N: int
    GROUP_HEADS: int
    num_warps: int
    num_stages: int
    HEAD_DIM_LAYOUT: str = "native"
    maxnreg: int = 0


T = TypeVar("T", bound=TileConfig)

TILE_KNOBS = (
    Knob("BLOCK_M", (16, 32, 64, 128)),
    Knob("BLOCK_N", (16, 32, 64, 128)),
    Knob("GROUP_HEADS", (1, 2, 4, 8, 16, 32, 0)),
    Knob("num_warps", (4, 8)),
    Knob("num_stages", (1, 2, 3, 4)),
    Knob("HEAD_DIM_LAYOUT", ("native", "split", "chunked", "padded")),
    Knob("maxnreg", (0, 168, 128)),
)

# Tensors of query rows, and of keys, that a program owns a tile of or steps over.
ROWS_LIKE, KEYS_LIKE = ("q", "r", "do", "out", "dq", "dr"), ("k", "v", "dk", "dv")

Tile = tuple[int, int, int, int]


@dataclass(frozen=True)
class Tiles:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages), those first that were fastest on an H200 in bf16.

    usual   at head_dim 96 and 128
    narrow  at 64
    wide    at 256, where few registers are left beside the sums
    halves  with halves, faster there still
    fp32    without tensor cores registers bound the tiles
    """

    usual: tuple[Tile, ...]
    narrow: tuple[Tile, ...]
    wide: tuple[Tile, ...]
    halves: tuple[Tile, ...]
    fp32: tuple[Tile, ...]


# Where head_dim is so wide, or the card so small, that none of them fits.
SMALLEST = ((32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))


class TiledOp(Op[T]):
    """What an op of tiles adds.

    tiles       where its defaults are taken from
    owns_keys   whether a program owns keys and steps over query rows, not the other way round
    pads_wide   whether every head wider than 128 that is no power of two is padded by default
    fp32_shift  the tile that a warp's registers hold in fp32, as a power of two: see `why_invalid`
    """

    layout = Layout.TILES
    tiles: ClassVar[Tiles]
    owns_keys: ClassVar[bool] = False
    pads_wide: ClassVar[bool] = False
    fp32_shift: ClassVar[int] = 19

    def owned_and_step(self, config: T) -> tuple[int, int]:
        """What a program owns, and what it steps over: query rows and keys, or keys and query rows."""
        return (config.BLOCK_N, config.BLOCK_M) if self.owns_keys else (config.BLOCK_M, config.BLOCK_N)

    # -- which configs there are

    def usable(self, spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
        if knob.name == "HEAD_DIM_LAYOUT":
            return forms_of(spec.head_dim)
        if knob.name == "BLOCK_N" and spec.bytes_per_element == 2:
            return tuple(v for v in knob.values if v != 16)  # tensor cores want more keys at a time
        return knob.values

    def why_invalid(self, spec: KernelSpec, config: T, gpu: Gpu) -> str | None:
        tile = f"a {config.BLOCK_M}x{config.BLOCK_N} tile"
        if config.HEAD_DIM_LAYOUT not in forms_of(spec.head_dim):
            return f"HEAD_DIM_LAYOUT {config.HEAD_DIM_LAYOUT!r} does not go with head_dim {spec.head_dim}"
        head_dim = width_of(spec.head_dim, config.HEAD_DIM_LAYOUT)
        if spec.dtype == "fp32":
            # Without tensor cores a thread holds its share of the operands too: from compiling, beyond this they spill
            # by hundreds of bytes, and soon by thousands. The backward has half as many tiles again in its hands.
            most = config.num_warps << self.fp32_shift
            if config.BLOCK_M * config.BLOCK_N * head_dim**2 > max(most, 16 * 16 * head_dim**2):
                of = f"{tile} of fp32 at head_dim {head_dim}"
                return f"{of} is too large for the registers of {config.num_warps} warps"
        elif (config.BLOCK_N == 16 and spec.dtype != "tf32") or max(
            config.BLOCK_M, config.BLOCK_N, head_dim // 2
        ) < 16 * config.num_warps:
            # 16 rows a warp; of a wide head_dim two warps may share rows, and halve their sums' columns.
            return f"{tile} is too small for {config.num_warps} warps"
        # Two sums of its own rows stay in registers, beside two tiles of scores at the least: past 255 registers a
        # thread they spill for certain.
        owned, step = self.owned_and_step(config)
        a_thread = 2 * owned * (head_dim // programs_a_head(config) + step) // (32 * config.num_warps)
        if a_thread > MAX_REGISTERS_PER_THREAD and not (spec.dtype == "fp32" and owned == step == 16):
            return f"its accumulators need {a_thread} registers a thread; there are {MAX_REGISTERS_PER_THREAD}"
        return _why_maxnreg_invalid(config, a_thread, gpu)

    def shared_bytes(self, spec: KernelSpec, config: T, gpu: Gpu) -> int:
        # Triton keeps num_stages - 1 blocks in flight when the loads feed matmuls; the tiles a program owns stay.
        in_flight = max(1, config.num_stages - 1)
        return self.owned_rows(spec, config, gpu) * row_bytes(spec, config) + in_flight * self.block_bytes(spec, config)

    @abstractmethod
    def owned_rows(self, spec: KernelSpec, config: T, gpu: Gpu) -> int:
        """Rows of head_dim numbers that a program has in shared memory from begin to end."""

    def block_bytes(self, spec: KernelSpec, config: T) -> int:
        """What one block in flight takes: k and v where a program owns q, r (and do)."""
        return 2 * config.BLOCK_N * row_bytes(spec, config)

    def room_bytes(self, spec: KernelSpec, config: T, gpu: Gpu) -> int:
        """From compiling: matmuls of Hopper and Blackwell, which run on while the program does, keep more in flight.

        Those of other GPUs, and of tiles too small for the former, pass up to two padded tiles of scores from thread
        to thread.
        """
        more = config.BLOCK_M * (2 * config.BLOCK_N + 4) * spec.bytes_per_element
        if gpu.capability[0] in (9, 10):
            more = max(more, self.ahead_bytes(spec, config))
        return more + KIB

    def ahead_bytes(self, spec: KernelSpec, config: T) -> int:
        """What such matmuls keep in flight: a block more."""
        return self.block_bytes(spec, config)

    def scored_and_summed(self, head_dim: int, form: str) -> tuple[list[Piece], list[Piece]]:
        """They are the same, but where HEAD_DIM_LAYOUT is "split" and two programs share the sums.

        The backward multiplies by the very tiles that scores come from, so its own half is a piece of its own there.
        """
        if form != "split":
            return super().scored_and_summed(head_dim, form)
        mine = half_of(head_dim, "_mine")
        return [mine, other_half_of(head_dim)], [mine]

    # -- where a search begins

    def defaults(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[T]:
        head_group = self.floor_of("GROUP_HEADS", self.together(spec, shape, gpu))
        tiles: Sequence[Tile] = self.tiles.fp32 if spec.dtype == "fp32" else self.tiles.usual
        if spec.head_dim <= 64 and spec.dtype != "fp32":
            tiles = (*self.tiles.narrow, *tiles)
        elif spec.head_dim > 128 and spec.dtype != "fp32":
            tiles = (*self.tiles.wide, *tiles)
        blocks = shape.batch * shape.heads * (shape.seqlen_q // 128 + 1)
        if blocks < gpu.sms:  # too few large tiles to fill the card
            tiles = tiles[1:]
        kind, forms = self.config, forms_of(spec.head_dim)
        # From compiling: beside a piece of 128 there is no room for a narrow one, and the forward's tiles would be
        # small.
        wide = spec.head_dim > 128 and "padded" in forms and (self.pads_wide or spec.head_dim % 64 > 0)
        form = "padded" if wide else forms[0]
        halves = self.tiles.halves if "split" in forms and spec.bytes_per_element == 2 else ()
        found = [
            *(kind(m, n, head_group, w, s, "split") for m, n, w, s in halves),
            *(kind(m, n, head_group, w, s, form) for m, n, w, s in (*tiles, *SMALLEST)),
        ]
        return [self.lean(config) if self._pays(spec, config, gpu) else config for config in found]

    def together(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> int:
        """As many heads together as have what they share, keys and values, in half of L2."""
        a_head = 2 * shape.seqlen_kv * spec.head_dim * spec.bytes_per_element
        return max(1, gpu.l2_bytes // 2 // a_head) * shape.group

    def promising(self, spec: KernelSpec, found: list[T]) -> list[T]:
        default, first = found[0], found[:3]
        return [
            *(plain if (plain := self._plain(config)) != config else self.lean(config) for config in first),
            *(replace(default, GROUP_HEADS=together) for together in (1, 4, 16, 0)),
            *(replace(default, HEAD_DIM_LAYOUT=form) for form in forms_of(spec.head_dim)),
            # Three programs of 4 warps on a multiprocessor, not two, at the price of some spills.
            *(replace(config, maxnreg=168) for config in first),
        ]

    @abstractmethod
    def lean(self, config: T) -> T:
        """With fewer instructions beside the matmuls, and of the backward's with more registers."""

    def _plain(self, config: T) -> T:
        """Without."""
        return self.config(*(getattr(config, f.name) for f in fields(TileConfig)))

    @abstractmethod
    def pays_to_be_lean(self, spec: KernelSpec, config: T) -> bool:
        """Whether it did on an H100, in bf16 at head_dim 64, 96 and 128, without halves."""

    def _pays(self, spec: KernelSpec, config: T, gpu: Gpu) -> bool:
        """Elsewhere nothing is known."""
        if gpu.capability[0] != 9 or spec.dtype != "bf16" or config.HEAD_DIM_LAYOUT == "split" or spec.head_dim > 128:
            return False
        return self.pays_to_be_lean(spec, config)

    # -- how it is launched and checked

    def given(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("q", "r", "k", "v")

    def lengths(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("cu_seqlens_q", "cu_seqlens_k") if spec.varlen else ()

    @property
    def heads(self) -> str:
        """Of which heads a program owns a tile."""
        return "kv_heads" if self.owns_keys else "heads"

    def last_first(self, spec: KernelSpec) -> bool:
        """Whether tiles are launched last first: of a causal mask those of query rows have most work there."""
        return spec.causal and not self.owns_keys

    def signatures(self, spec: KernelSpec, config: T) -> dict[str, Signature]:
        return {self.name: self.signature(spec, config, self.sizes_passed(spec, config))}

    def signature(self, spec: KernelSpec, config: T, sizes: dict[str, str]) -> Signature:
        """Of a kernel that takes these numbers behind all else.

        Of what a program steps over, a row's stride is a constant: it hardly changes, and offsets that are known take
        fewer registers.
        """
        stepped = ROWS_LIKE if self.owns_keys else KEYS_LIKE
        tensors = [t for t in (*self.given(spec), *self.written(spec)) if t in (*ROWS_LIKE, *KEYS_LIKE)]
        passed = (
            *pointers(self.tensors(spec, config)),
            *(strides(spec, t, "n" if t in KEYS_LIKE else "m", constant=t in stepped) for t in tensors),
            *self.scales(spec),
            number("scale_log2", "softmax_scale * LOG2_E"),
            *(number(name, expression) for name, expression in sizes.items()),
        )
        return Signature(passed, tuple(sizes))

    def scales(self, spec: KernelSpec) -> tuple[Passed, ...]:
        """What a kernel takes between strides and scale_log2."""
        return ()

    def sizes_passed(self, spec: KernelSpec, config: T, tiled: bool = True, fills: bool = True) -> dict[str, str]:
        """Numbers that change from call to call: a kernel's name for each, and what `launch` passes.

        tiled  whether each program has a tile to find: it needs to know how many there are, or heads
        fills  whether the kernel writes rows that no sequence has; their `total` tells where lse and t_mean lie, too
        """
        of = "k" if self.owns_keys else "q"
        sizes = {"batch_heads": f"batch * {self.heads}"} if config.GROUP_HEADS != 1 or not tiled else {}
        sizes[self.heads] = self.heads
        if spec.window:
            sizes["window_size"] = "window_size"
        if not spec.varlen:
            return sizes | {"seqlen_q": "seqlen_q", "seqlen_kv": "k.shape[1]"}
        if fills:
            sizes["sequences"] = "batch"
        if fills or spec.stats:
            sizes[f"total_{of}"] = f"{of}.shape[0]"
        if tiled and (config.GROUP_HEADS > 0 or self.last_first(spec)):
            sizes["max_seqlen"] = f"max_seqlen_{of}"
        return sizes

    def awkward_shape(self, spec: KernelSpec, config: T, kv_heads: int = 3) -> Shape:
        window = config.BLOCK_N + 9 if spec.window else 0
        batch = 3 if spec.varlen else 1
        return Shape(batch, kv_heads * spec.group, kv_heads, 2 * config.BLOCK_M + 11, 3 * config.BLOCK_N + 5, window)


MASK = Knob("MASK", ("after_exp", "before_exp"))


@dataclass(frozen=True)
class MaskedConfig(TileConfig):
    """Choices of dkdv and dqdr alike.

    MASK  what a causal mask is put on, see each
    """

    MASK: str = "after_exp"


M = TypeVar("M", bound=MaskedConfig)


class GradientOp(TiledOp[M]):
    """dkdv and dqdr: from what preprocess wrote they find scores once more, and sum gradients."""

    padded_to = PADDED_TO

    def usable(self, spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
        return knob.values[:1] if knob.name == "MASK" and not spec.causal else super().usable(spec, knob)

    def why_invalid(self, spec: KernelSpec, config: M, gpu: Gpu) -> str | None:
        if config.MASK == "before_exp" and not spec.causal:
            return "MASK 'scores' does not go with full attention: it has no mask"
        return super().why_invalid(spec, config, gpu)

    def given(self, spec: KernelSpec) -> tuple[str, ...]:
        return (*super().given(spec), "do", "row_stats")

    def scales(self, spec: KernelSpec) -> tuple[Passed, ...]:
        return (strides_of_rows(spec), number("softmax_scale"))


def row_bytes(spec: KernelSpec, config: TileConfig) -> int:
    """What a row of head_dim numbers takes in a tile."""
    return width_of(spec.head_dim, config.HEAD_DIM_LAYOUT) * spec.bytes_per_element


def programs_a_head(config: TileConfig) -> int:
    """How many programs share a tile, each of which sums its part of head_dim."""
    return 2 if config.HEAD_DIM_LAYOUT == "split" else 1


def _why_maxnreg_invalid(config: TileConfig, accumulators: int, gpu: Gpu) -> str | None:
    """Why maxnreg does not fit. accumulators: the registers a thread that they take."""
    limit = config.maxnreg
    if limit == 0:
        return None
    unlimited = MAX_REGISTERS_PER_THREAD
    with_limit, without = (gpu.registers_per_sm // (32 * config.num_warps * each) for each in (limit, unlimited))
    if with_limit == without:
        return f"maxnreg {limit} lets no more programs of {config.num_warps} warps run together than {unlimited}"
    if accumulators > limit:
        return f"its accumulators need {accumulators} registers a thread; maxnreg is {limit}"
    return None
