"""The base of forward, dkdv and dqdr, whose programs own a tile and stream blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, TypeVar

from parallax_gen.ops.base import MAX_REGISTERS_PER_THREAD, KernelConfig, Knob, Op, OpKind, Value
from parallax_gen.ops.default_tiles import SMALLEST_TILES, Tile, Tiles, is_few
from parallax_gen.ops.descriptors import (
    LOADS,
    Descriptor,
    descriptor_arguments,
    descriptors_of,
    other_loads,
    why_no_descriptors,
)
from parallax_gen.ops.head_dim import Chunk, head_dim_layouts, other_half_of, this_half_of, width_of
from parallax_gen.ops.lds import bytes_in_flight
from parallax_gen.ops.signature import Argument, Signature, number, pointers, score_scales, strides
from parallax_gen.problem.hardware import KIB, Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class TileConfig(KernelConfig):
    """The config of a kernel whose program owns a tile of query rows or of keys, and streams blocks of the other.

    BLOCK_M          query rows per tile
    BLOCK_N          keys per tile
    GROUP_HEADS      heads whose tiles are launched together, the longest tiles first. Few heads keep the keys that they
                     share in L2; many spread the causal triangle evenly; 0 for all heads
    num_warps        warps per program
    num_stages       blocks in flight
    HEAD_DIM_LAYOUT  a row of head_dim elements in tiles: "native", one power of two; "chunked", several powers of two
                     (96 = 64 + 32); "padded", the next power of two, filled with zeros; "split", for wide heads: two
                     programs share a tile, each computes all scores, and each accumulates half of the output
    maxnreg          a limit of registers per thread, so that more programs are resident; 0 for no limit
    LOADS            how blocks are loaded: by "pointers", one for each element; or by tensor "descriptors", for dense
                     tensors in 16 bits whose start and strides are multiples of 16 bytes
    """

    BLOCK_M: int
    BLOCK_N: int
    GROUP_HEADS: int
    num_warps: int
    num_stages: int
    HEAD_DIM_LAYOUT: str = "native"
    maxnreg: int = 0
    LOADS: str = "pointers"


T = TypeVar("T", bound=TileConfig)

TILE_KNOBS = (
    Knob("BLOCK_M", (16, 32, 64, 128)),
    Knob("BLOCK_N", (16, 32, 64, 128)),
    Knob("GROUP_HEADS", (1, 2, 4, 8, 16, 32, 0)),
    Knob("num_warps", (4, 8)),
    Knob("num_stages", (1, 2, 3, 4)),
    Knob("HEAD_DIM_LAYOUT", ("native", "split", "chunked", "padded")),
    Knob("maxnreg", (0, 168, 128)),
    LOADS,
)

# Tensors whose rows are query rows, and tensors whose rows are keys.
QUERY_ROW_TENSORS, KEY_TENSORS = ("q", "r", "do", "out", "dq", "dr"), ("k", "v", "dk", "dv")


class TiledOp(Op[T]):
    """The base of the tiled ops.

    tiles       the tiles of its default configs
    tiles_of_synchronous_matmuls  the same for GPUs without asynchronous matmuls: all but Hopper, B200 and B300. There
                operands are in registers, too, so larger tiles spill, from compiling, up to 6 KB a thread
    tiles_of_amd  the same for AMD GPUs, from compiling alone: these spill little or nothing, of 4 warps and two stages
    owns_keys   whether a program owns keys and streams query rows, not the reverse
    pads_wide   whether by default every head_dim over 128 that is no power of two is padded
    fp32_shift  log2 of the fp32 tile size that a warp's registers hold: see `why_invalid`
    streamed    the tensors that a program streams in blocks
    """

    kind = OpKind.TILES
    tiles: ClassVar[Tiles]
    tiles_of_synchronous_matmuls: ClassVar[Tiles]
    tiles_of_amd: ClassVar[Tiles]
    owns_keys: ClassVar[bool] = False
    pads_wide: ClassVar[bool] = False
    fp32_shift: ClassVar[int] = 19
    streamed: ClassVar[tuple[str, ...]] = ("k", "v")

    def owned_and_streamed(self, config: T) -> tuple[int, int]:
        """The block sizes of the side that a program owns and of the side that it streams."""
        return (config.BLOCK_N, config.BLOCK_M) if self.owns_keys else (config.BLOCK_M, config.BLOCK_N)

    # -- the space of configs

    def usable(self, spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
        if knob.name == "HEAD_DIM_LAYOUT":
            return head_dim_layouts(spec.head_dim)
        if knob.name == LOADS.name and (spec.varlen or spec.bytes_per_element != 2):
            return knob.values[:1]
        if knob.name == "BLOCK_N" and spec.bytes_per_element == 2:
            return tuple(v for v in knob.values if v != 16)  # too few keys for tensor cores
        return knob.values

    def why_invalid(self, spec: KernelSpec, config: T, gpu: Gpu) -> str | None:
        if config.LOADS == "descriptors" and (reason := why_no_descriptors(spec, gpu)) is not None:
            return reason
        tile = f"a {config.BLOCK_M}x{config.BLOCK_N} tile"
        if config.HEAD_DIM_LAYOUT not in head_dim_layouts(spec.head_dim):
            return f"HEAD_DIM_LAYOUT {config.HEAD_DIM_LAYOUT!r} cannot be combined with head_dim {spec.head_dim}"
        head_dim = width_of(spec.head_dim, config.HEAD_DIM_LAYOUT)
        if spec.dtype == "fp32":
            # Without tensor cores each thread also holds part of the operands. From compiling: beyond this limit they
            # spill hundreds of bytes, and soon thousands. The backward holds 1.5 times as many tiles.
            limit = (config.num_warps * gpu.warp_size // 32) << self.fp32_shift
            if config.BLOCK_M * config.BLOCK_N * head_dim**2 > max(limit, 16 * 16 * head_dim**2):
                what = f"{tile} of fp32 at head_dim {head_dim}"
                return f"{what} is too large for the registers of {config.num_warps} warps"
        elif (config.BLOCK_N == 16 and spec.dtype != "tf32") or max(
            config.BLOCK_M, config.BLOCK_N, head_dim // 2
        ) < 16 * config.num_warps:
            # A warp needs 16 rows. With a wide head_dim two warps may share rows, each with half of the sums' columns.
            return f"{tile} is too small for {config.num_warps} warps"
        # Two accumulators and at least two tiles of scores are in registers, of which a thread has 255 on NVIDIA GPUs.
        owned, streamed = self.owned_and_streamed(config)
        threads, registers = gpu.warp_size * config.num_warps, gpu.registers_per_thread(config.num_warps)
        accumulators = 2 * owned * (head_dim // programs_per_tile(config) + streamed) // threads
        if accumulators > registers and not (spec.dtype == "fp32" and owned == streamed == 16):
            return f"its accumulators need {accumulators} registers per thread; there are {registers}"
        return _why_maxnreg_invalid(config, accumulators, gpu)

    def shared_bytes(self, spec: KernelSpec, config: T, gpu: Gpu) -> int:
        if gpu.is_amd:
            in_flight = bytes_in_flight(self.block_bytes(spec, config), config.num_stages, gpu)
            scores = config.BLOCK_M * config.BLOCK_N * spec.bytes_per_element
            return 2 * scores + max(in_flight, self.exchanged_rows(config) * row_bytes(spec, config))
        # Triton keeps num_stages - 1 blocks in flight if the loads feed matmuls. The owned tiles stay throughout.
        in_flight = max(1, config.num_stages - 1)
        return self.owned_rows(spec, config, gpu) * row_bytes(spec, config) + in_flight * self.block_bytes(spec, config)

    def exchanged_rows(self, config: T) -> int:
        """The most rows of head_dim elements that threads exchange at a time on AMD GPUs."""
        return max(config.BLOCK_M, config.BLOCK_N)

    @abstractmethod
    def owned_rows(self, spec: KernelSpec, config: T, gpu: Gpu) -> int:
        """The rows of head_dim elements that a program keeps in shared memory throughout."""

    def block_bytes(self, spec: KernelSpec, config: T) -> int:
        """The shared memory of one block in flight: of k and v, unless the program owns keys."""
        return 2 * config.BLOCK_N * row_bytes(spec, config)

    def extra_shared_bytes(self, spec: KernelSpec, config: T, gpu: Gpu) -> int:
        """From compiling: the asynchronous matmuls of Hopper and Blackwell keep more in flight.

        On other GPUs, and with tiles too small for asynchronous matmuls, threads exchange up to two padded tiles of
        scores. For AMD GPUs `shared_bytes` already is the most.
        """
        if gpu.is_amd:
            return 0
        more = config.BLOCK_M * (2 * config.BLOCK_N + 4) * spec.bytes_per_element
        if gpu.has_async_matmuls:
            more = max(more, self.async_bytes(spec, config))
        if config.LOADS == "descriptors":  # barriers, and on Blackwell half a block more
            more += KIB + (self.block_bytes(spec, config) // 2 if gpu.has_tcgen05 else 0)
        return more + KIB

    def async_bytes(self, spec: KernelSpec, config: T) -> int:
        """What asynchronous matmuls keep in flight in addition: one block."""
        return self.block_bytes(spec, config)

    def score_and_output_chunks(self, head_dim: int, head_dim_layout: str) -> tuple[list[Chunk], list[Chunk]]:
        """All chunks for both, unless HEAD_DIM_LAYOUT is "split": then a program accumulates its half only.

        The backward multiplies by the same tiles that scores are computed from, so its half is a chunk there too.
        """
        if head_dim_layout != "split":
            return super().score_and_output_chunks(head_dim, head_dim_layout)
        this_half = this_half_of(head_dim, "_this")
        return [this_half, other_half_of(head_dim)], [this_half]

    # -- where a search begins

    def defaults(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[T]:
        group_heads = self.floor_of("GROUP_HEADS", self.heads_in_l2(spec, shape, gpu))
        of = self.tiles if gpu.has_async_matmuls else self.tiles_of_synchronous_matmuls
        of = self.tiles_of_amd if gpu.is_amd else of
        in_fp32 = spec.dtype == "fp32" or (gpu.is_amd and spec.dtype == "tf32")
        tiles: Sequence[Tile] = of.fp32 if in_fp32 else of.usual
        if spec.head_dim <= 64 and not in_fp32:
            tiles = (*of.narrow, *tiles)
        elif spec.head_dim > 128 and not in_fp32:
            tiles = (*of.wide, *tiles)
        blocks = shape.batch * shape.heads * (shape.seqlen_q // 128 + 1)
        if blocks < gpu.sms:  # too few large tiles to fill the card
            tiles = tiles[1:]
        layouts = head_dim_layouts(spec.head_dim)
        # From compiling: registers have no room for a narrow chunk next to one of 128, and the forward's tiles would
        # have to be small.
        pads = spec.head_dim > 128 and "padded" in layouts and (self.pads_wide or spec.head_dim % 64 > 0)
        layout = "padded" if pads else layouts[0]
        split_tiles = of.split if "split" in layouts and spec.bytes_per_element == 2 else ()
        if layout == "chunked" and spec.head_dim <= 128 and spec.dtype != "fp32":
            tiles = (*of.chunked, *tiles)
        if gpu.has_wgmma and spec.bytes_per_element == 2:
            tiles = (*self.tiles_on_hopper(spec, layout, shape, is_few(shape, gpu)), *tiles)
        configs = [
            *(self.config(m, n, group_heads, w, s, "split") for m, n, w, s in split_tiles),
            *(self.config(m, n, group_heads, w, s, layout) for m, n, w, s in (*tiles, *SMALLEST_TILES)),
        ]
        configs = [
            self.with_fewer_instructions(config) if self._has_fewer_by_default(spec, config, gpu) else config
            for config in configs
        ]
        if not gpu.has_wgmma or why_no_descriptors(spec, gpu) is not None:
            return configs
        return [replace(config, LOADS="descriptors") if self.descriptors_pay(config) else config for config in configs]

    def tiles_on_hopper(self, spec: KernelSpec, layout: str, shape: Shape, few: bool) -> tuple[Tile, ...]:
        """Default tiles that go first on Hopper in bf16 and fp16. layout: HEAD_DIM_LAYOUT; few: `is_few`."""
        return ()

    def descriptors_pay(self, config: T) -> bool:
        """Whether a default config on Hopper loads by descriptors: where they were faster on an H200.

        Under Triton 3.6 and 3.9, with windows, GQA and softcap. Their loops take more registers: 8-warp programs spill.
        """
        return config.num_warps == 4

    def heads_in_l2(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> int:
        """The number of query heads whose keys and values fill half of L2."""
        head_bytes = 2 * shape.seqlen_kv * spec.head_dim * spec.bytes_per_element
        return max(1, gpu.l2_bytes // 2 // head_bytes) * shape.group

    def promising(self, spec: KernelSpec, defaults: list[T]) -> list[T]:
        default, first = defaults[0], defaults[:3]
        return [
            *(
                plain if (plain := self._plain(config)) != config else self.with_fewer_instructions(config)
                for config in first
            ),
            *(replace(config, LOADS=other_loads(config.LOADS)) for config in first),
            *(replace(default, GROUP_HEADS=heads) for heads in (1, 4, 16, 0)),
            *(replace(default, HEAD_DIM_LAYOUT=layout) for layout in head_dim_layouts(spec.head_dim)),
            # Three resident programs of 4 warps instead of two, at the price of some spills.
            *(replace(config, maxnreg=168) for config in first),
        ]

    @abstractmethod
    def with_fewer_instructions(self, config: T) -> T:
        """The config with fewer non-matmul instructions; in the backward it needs more registers."""

    def _plain(self, config: T) -> T:
        """The config with every knob of the op's own at its default: the opposite of `with_fewer_instructions`."""
        return self.config(*(getattr(config, f.name) for f in fields(TileConfig)))

    @abstractmethod
    def fewer_instructions_pay(self, spec: KernelSpec, config: T) -> bool:
        """Whether these configs were faster on an H100, in bf16 at head_dim 64, 96 and 128, without "split"."""

    def _has_fewer_by_default(self, spec: KernelSpec, config: T, gpu: Gpu) -> bool:
        """Whether a default config has fewer instructions: only where `fewer_instructions_pay` was measured."""
        if not gpu.has_wgmma or spec.dtype != "bf16" or config.HEAD_DIM_LAYOUT == "split" or spec.head_dim > 128:
            return False
        return self.fewer_instructions_pay(spec, config)

    # -- launches and checks

    def inputs(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("q", "r", "k", "v")

    def lengths(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("cu_seqlens_q", "cu_seqlens_k") if spec.varlen else ()

    @property
    def heads(self) -> str:
        """The kernel's name for the number of heads whose tiles programs own."""
        return "kv_heads" if self.owns_keys else "heads"

    def reverses_tiles(self, spec: KernelSpec) -> bool:
        """Whether a head's tiles are launched in reverse: with a causal mask the last query rows have the most work."""
        return spec.causal and not self.owns_keys

    def signatures(self, spec: KernelSpec, config: T) -> dict[str, Signature]:
        sizes = self.sizes_passed(spec, config)
        return {self.name: self.signature(spec, config, sizes, self.descriptors(spec, config))}

    def descriptors(self, spec: KernelSpec, config: T) -> tuple[Descriptor, ...]:
        """The descriptors of the tensors that a program streams."""
        if config.LOADS == "pointers":
            return ()
        _, rows = self.owned_and_streamed(config)
        return tuple(
            descriptor
            for tensors in self.described(config)
            for descriptor in descriptors_of(tensors, rows, self.streamed_chunks(spec, config, tensors[0]))
        )

    def described(self, config: T) -> tuple[tuple[str, ...], ...]:
        """The streamed tensors by descriptor: one each, or one for two."""
        return tuple((tensor,) for tensor in self.streamed)

    def streamed_chunks(self, spec: KernelSpec, config: T, tensor: str) -> list[Chunk]:
        """The chunks of a head in which a program loads a streamed tensor."""
        return self.score_and_output_chunks(spec.head_dim, config.HEAD_DIM_LAYOUT)[0]

    def signature(
        self, spec: KernelSpec, config: T, sizes: dict[str, str], descriptors: tuple[Descriptor, ...] = ()
    ) -> Signature:
        """The signature of a kernel that takes `descriptors` first and `sizes` last.

        The row strides of tensors that a program streams are compile-time constants: they hardly ever change, and
        constant offsets take fewer registers.
        """
        described = {tensor for descriptor in descriptors for tensor in descriptor.tensors}
        by_pointer = {*self.tensors(spec, config)} - described | {*self.also_by_pointer(config)}
        given = [tensor for tensor in self.tensors(spec, config) if tensor in by_pointer]
        tensors = [t for t in (*self.inputs(spec), *self.written(spec)) if t in (*QUERY_ROW_TENSORS, *KEY_TENSORS)]
        passed = (
            *descriptor_arguments(descriptors),
            *pointers(given),
            *(a for t in tensors if t in by_pointer for a in self.strides_by_pointer(spec, t, t in described)),
            *self.parameters_before_scale_log2(spec),
            *score_scales(spec),
            *(number(name, expression) for name, expression in sizes.items()),
        )
        return Signature(passed, tuple(sizes))

    def also_by_pointer(self, config: T) -> tuple[str, ...]:
        """The tensors that a kernel reads by a pointer, too, if it loads their blocks by descriptors."""
        return ()

    def strides_by_pointer(self, spec: KernelSpec, tensor: str, described: bool) -> tuple[Argument, ...]:
        """The strides of a tensor with a pointer. described: whether the kernel also has a descriptor of it."""
        letter = "n" if tensor in KEY_TENSORS else "m"
        return (strides(spec, tensor, letter, constant=tensor in self.streamed),)

    def parameters_before_scale_log2(self, spec: KernelSpec) -> tuple[Argument, ...]:
        """The parameters between the strides and scale_log2."""
        return ()

    def sizes_passed(
        self, spec: KernelSpec, config: T, finds_tile: bool = True, fills_padding: bool = True
    ) -> dict[str, str]:
        """The numbers that change from call to call: the kernel's name for each -> the expression in `launch`.

        finds_tile     whether each program computes its tile from its index, which takes the number of tiles or heads
        fills_padding  whether the kernel writes rows of no sequence, which takes `total`, which the offsets of lse and
                       t_mean need too
        """
        tensor = "k" if self.owns_keys else "q"
        sizes = {"batch_heads": f"batch * {self.heads}"} if config.GROUP_HEADS != 1 or not finds_tile else {}
        sizes[self.heads] = self.heads
        if spec.window:
            sizes["window_size"] = "window_size"
        if not spec.varlen:
            return sizes | {"seqlen_q": "seqlen_q", "seqlen_kv": "seqlen_kv" if self.owns_keys else "k.shape[1]"}
        if fills_padding:
            sizes["num_seqs"] = "batch"
        if fills_padding or spec.stats:
            sizes[f"total_{tensor}"] = f"{tensor}.shape[0]"
        if finds_tile and (config.GROUP_HEADS > 0 or self.reverses_tiles(spec)):
            sizes["max_seqlen"] = f"max_seqlen_{tensor}"
        return sizes

    def awkward_shape(self, spec: KernelSpec, config: T, kv_heads: int = 3) -> Shape:
        window = config.BLOCK_N + 9 if spec.window else 0
        batch = 3 if spec.varlen else 1
        return Shape(batch, kv_heads * spec.group, kv_heads, 2 * config.BLOCK_M + 11, 3 * config.BLOCK_N + 5, window)


def row_bytes(spec: KernelSpec, config: TileConfig) -> int:
    """The bytes of a row of head_dim elements in a tile, with its padding."""
    return width_of(spec.head_dim, config.HEAD_DIM_LAYOUT) * spec.bytes_per_element


def programs_per_tile(config: TileConfig) -> int:
    """How many programs share a tile. Each accumulates its part of head_dim."""
    return 2 if config.HEAD_DIM_LAYOUT == "split" else 1


def _why_maxnreg_invalid(config: TileConfig, accumulators: int, gpu: Gpu) -> str | None:
    """Why maxnreg does not fit. accumulators: the registers per thread that they take."""
    limit = config.maxnreg
    if limit == 0:
        return None
    if gpu.is_amd:
        return f"maxnreg is a limit for ptxas; {gpu.name} is AMD's {gpu.gfx}"
    unlimited = MAX_REGISTERS_PER_THREAD
    with_limit, without = (gpu.registers_per_sm // (32 * config.num_warps * each) for each in (limit, unlimited))
    if with_limit == without:
        return f"maxnreg {limit} lets no more programs of {config.num_warps} warps run together than {unlimited}"
    if accumulators > limit:
        return f"its accumulators need {accumulators} registers per thread; maxnreg is {limit}"
    return None
