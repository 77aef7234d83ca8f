"""The base class of both decode ops, and decode itself: one query per sequence, and one length for all sequences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

from parallax_gen.ops.base import CostHints, Knob, Op, OpKind, Scratch, Value, register
from parallax_gen.ops.decode_form import DecodeConfig, DecodeForm
from parallax_gen.ops.head_dim import width_of
from parallax_gen.ops.lds import bytes_in_flight
from parallax_gen.ops.signature import SOFTCAP_ABOUT, Argument, Signature, number, pointers, score_scales
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec


class CacheOp(Op[DecodeConfig]):
    """The base class of decode and decode_varlen."""

    config = DecodeConfig
    knobs = (
        Knob("BLOCK_N", (16, 32, 64, 128)),
        Knob("BLOCK_H", (8, 16, 32, 64)),
        Knob("NUM_SPLITS", (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)),
        Knob("merge", ("none", "last", "kernel")),
        Knob("num_warps", (1, 2, 4, 8)),
        Knob("num_stages", (2, 3, 4, 5, 6)),
    )
    kind = OpKind.CACHE
    launch_names = MappingProxyType({"k": "k_cache", "v": "v_cache"})

    # -- the space of configs

    def usable(self, spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
        if knob.name == "BLOCK_H":
            return tuple(v for v in knob.values if isinstance(v, int) and not _half_empty(spec, v))
        return knob.values

    def why_invalid(self, spec: KernelSpec, config: DecodeConfig, gpu: Gpu) -> str | None:
        if _half_empty(spec, config.BLOCK_H):
            return f"BLOCK_H {config.BLOCK_H} would be half empty for {spec.group} query heads per kv head"
        if reason := self.why_not_merged(spec, config):
            return reason
        if config.BLOCK_N < 8 * config.num_warps:
            return f"each of {config.num_warps} warps would have fewer than 8 of the block's {config.BLOCK_N} keys"
        width = width_of(spec.head_dim, "padded")
        if spec.dtype == "fp32" and config.BLOCK_H * config.BLOCK_N * width**2 > max(
            (config.num_warps * gpu.warp_size // 32) << 21, 8 * 16 * width**2
        ):
            # As in the tiled ops: without tensor cores each thread also holds part of the operands.
            tile = f"an fp32 tile of {config.BLOCK_H} heads at head_dim {width}"
            return f"{tile} does not fit in the registers of {config.num_warps} warps"
        threads, registers = gpu.warp_size * config.num_warps, gpu.registers_per_thread(config.num_warps)
        accumulators = 2 * config.BLOCK_H * (width + config.BLOCK_N) // threads
        if accumulators > registers:
            return f"its accumulators need {accumulators} registers per thread; there are {registers}"
        return None

    @abstractmethod
    def why_not_merged(self, spec: KernelSpec, config: DecodeConfig) -> str | None:
        """Why the splits cannot be merged in the config's way; None if they can."""

    def shared_bytes(self, spec: KernelSpec, config: DecodeConfig, gpu: Gpu) -> int:
        """What Triton allocates: key blocks in flight, the tile of queries and probes, operands of matmuls.

        From compiling 538 kernels for sm_89, sm_90 and sm_100 with Triton 3.9, and some of them with 3.6, which gives
        the same numbers. No kernel took more. 507 of them have a head_dim that is a multiple of 16: 505 of these took
        at most 1 KiB less (the local variables scratch and pages below); two took 8 KiB less. Kernels with other
        head_dims in 16 bits may take much less: their loads are asynchronous only if strides are multiples of 16.
        """
        rows, keys = 2 * config.BLOCK_H, config.BLOCK_N
        width = width_of(max(spec.head_dim, 64) if spec.cache_dtype else spec.head_dim, "padded")
        pair = 2 * keys * width  # elements of a block of k and of v
        owned = (config.num_stages - 1) * pair * spec.cache_bytes + rows * width * spec.bytes_per_element
        weights = rows * keys * spec.bytes_per_element
        scratch = 4 * rows  # bytes: each row's sum or factor, exchanged between warps
        pages = 8 * keys if spec.page_size else 0  # bytes: each key's page offset, exchanged between threads
        if gpu.is_amd:  # q and r are in registers; threads exchange weights, or an fp32 accumulator
            in_flight = bytes_in_flight(pair * spec.cache_bytes, config.num_stages, gpu)
            return in_flight + max(2 * weights, 4 * rows * width, pages)
        asynchronous = rows >= 64 and config.num_warps >= 4 and spec.dtype != "fp32"
        if asynchronous and gpu.has_async_matmuls:
            # wgmma and tcgen05 read k and v from shared memory: one more block is in flight, or k or v is stored there
            # once more, widened from 8 bits.
            owned += (pair // 2 if spec.cache_dtype else pair) * spec.bytes_per_element
            if gpu.has_wgmma:
                return owned
            twice = spec.cache_dtype or spec.dtype == "tf32"  # whether tcgen05 keeps two copies of the weights there
            exchanged_bytes = 2 * weights if twice else weights + scratch
            if not spec.cache_dtype:  # threads of tcgen05 have a row each, and exchange the accumulator's rows
                exchanged_bytes = max(exchanged_bytes, 4 * rows * min(width, 128))
            return owned + exchanged_bytes + 64
        # Warps exchange weights through shared memory. A single warp has all weights of its rows. So does each warp if
        # the matmuls of an 8-bit cache, each over a quarter of head_dim, are split between warps by rows.
        exchanged = config.num_warps > 1 and not (spec.cache_dtype and rows >= width // 4)
        return owned + max(weights + scratch if exchanged else 0, pages)

    # -- where a search begins

    def defaults(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[DecodeConfig]:
        """Small programs, and enough splits to run several of them on each multiprocessor."""
        rows = spec.group * shape.seqlen_q
        block_h = 16 if rows > 8 else 8
        if rows > 64 and spec.dtype != "fp32":
            block_h = 64  # rows of a prompt: as many as fit in registers
        programs = shape.batch * shape.kv_heads * -(-rows // block_h)
        keys = min(shape.seqlen_kv, shape.window + shape.seqlen_q - 1) if shape.window else shape.seqlen_kv
        if block_h == 64 and not spec.batch_invariant:
            # On an H200 a split of a prompt's rows costs 0.1 to 0.2 ms, in which they attend to 4000 keys and more.
            most = min(gpu.sms // programs, keys // 16384)
        else:
            most = min(self.splits_wanted(spec, programs, keys, gpu), -(-keys // 32))
        splits = self.floor_of("NUM_SPLITS", max(1, most))
        merge = self.merge_of(spec, splits, programs)
        tiles = [*self.first_tiles(spec, block_h, programs, keys, splits, gpu), *_default_tiles(spec, block_h, gpu)]
        return [DecodeConfig(n, h, splits, merge, num_warps=w, num_stages=s) for n, h, w, s in tiles]

    def splits_wanted(self, spec: KernelSpec, programs: int, keys: int, gpu: Gpu) -> int:
        """The number of splits of a sequence. programs: how many there are without splits; keys: those attended to."""
        return max(1, 2 * gpu.sms // programs)  # more splits hide no more latency, and cost merging

    @abstractmethod
    def merge_of(self, spec: KernelSpec, splits: int, programs: int) -> str:
        """The default value of merge. programs: how many there are without splits."""

    def first_tiles(
        self, spec: KernelSpec, block_h: int, programs: int, keys: int, splits: int, gpu: Gpu
    ) -> list[tuple[int, int, int, int]]:
        """Tiles as in `_default_tiles` that go first. programs: without splits; keys: those attended to."""
        if block_h < 64 or not _defaults_were_timed(spec, gpu):
            return []
        return _hopper_tiles_of_prompts(spec, programs / gpu.sms, keys, splits)

    def promising(self, spec: KernelSpec, defaults: list[DecodeConfig]) -> list[DecodeConfig]:
        default = defaults[0]
        if default.NUM_SPLITS == 1:
            return []
        return [
            *(replace(default, merge=merge) for merge in ("last", "kernel")),
            replace(default, merge="kernel", num_warps=2, num_stages=3, BLOCK_N=64),
        ]

    # -- launches and checks

    def inputs(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("q", "r", "k", "v")

    def written(self, spec: KernelSpec) -> tuple[str, ...]:
        return ("out", "lse", "t_mean", "v_mean") if spec.stats else ("out",)

    @abstractmethod
    def argument_docs(self, spec: KernelSpec, config: DecodeConfig) -> Iterator[tuple[str, str]]:
        """The arguments of `launch` and what each is, for its docstring. A line without a name continues the last."""

    def awkward_shape(self, spec: KernelSpec, config: DecodeConfig, kv_heads: int = 3) -> Shape:
        blocks = min(2 * config.NUM_SPLITS + 1, 40)
        seqlen_q = config.BLOCK_H // spec.group + 3 if spec.multi_token else 1
        window = config.BLOCK_N + 9 if spec.window else 0
        return Shape(4, kv_heads * spec.group, kv_heads, seqlen_q, blocks * config.BLOCK_N - 7, window)


class DecodeOp(CacheOp):
    """One query per sequence, and one length for all sequences."""

    name = "decode"
    template = "decode.py.j2"
    costs = CostHints(spill_bytes=200, merge_bytes_us=40e3)  # a step is short, and each step spills

    def coerce(self, spec: KernelSpec, choices: dict[str, Value]) -> dict[str, Value]:
        """With one split there is nothing to merge."""
        if choices["NUM_SPLITS"] == 1:
            return {**choices, "merge": "none"}
        return {**choices, "merge": "last"} if choices["merge"] == "none" else choices

    def why_not_merged(self, spec: KernelSpec, config: DecodeConfig) -> str | None:
        if (config.NUM_SPLITS == 1) != (config.merge == "none"):
            return f"merge {config.merge!r} cannot be combined with NUM_SPLITS {config.NUM_SPLITS}"
        return None

    def splits_wanted(self, spec: KernelSpec, programs: int, keys: int, gpu: Gpu) -> int:
        """From an H200's fastest at 272 places with Triton 3.6 and 3.9, relative to its multiprocessors."""
        if not _defaults_were_timed(spec, gpu):
            return super().splits_wanted(spec, programs, keys, gpu)
        narrow, per_sm = spec.head_dim <= 64, programs / gpu.sms
        if per_sm > 0.75 or (narrow and keys <= 128):
            return 1  # a few warps more hide the latency of a program's loads, and there is nothing to merge
        waves, least_keys = 2, 32 if keys <= 512 else 64 if keys <= 2048 else 128
        if narrow:
            waves, least_keys = 4, 32 if keys <= (1024 if per_sm < 0.1 else 512) else 64
        elif per_sm > 0.35:
            waves, least_keys = 4, 64
        return max(1, min(waves * gpu.sms // programs, 64, max(32, gpu.sms // programs), keys // least_keys))

    def merge_of(self, spec: KernelSpec, splits: int, programs: int) -> str:
        # One program merges the states of several heads more slowly than a second kernel with a program per head.
        return "none" if splits == 1 else "last" if spec.group == 1 else "kernel"

    def first_tiles(
        self, spec: KernelSpec, block_h: int, programs: int, keys: int, splits: int, gpu: Gpu
    ) -> list[tuple[int, int, int, int]]:
        if keys < 64 or not _defaults_were_timed(spec, gpu):
            return []
        # At the same places. Programs that have a multiprocessor to themselves need large blocks to keep it busy.
        narrow, per_sm = spec.head_dim <= 64, programs / gpu.sms
        if splits == 1 and per_sm <= 1:
            return [(128, block_h, 4, 3) if narrow else (64, block_h, 4, 4)]
        if narrow and splits == 1:
            return [(64, block_h, 1, 3)] if per_sm <= 2 else []
        if per_sm < 0.04 and keys >= (16384 if narrow else 8192):
            return [(128, block_h, 4, 4 if narrow else 3)]
        if per_sm > (0.15 if narrow or spec.group > 1 else 0.1):
            return []
        if narrow:  # two warps are up to 1.12 times as fast with Triton 3.9, and as slow with 3.6
            return [(64, block_h, 1, 3)] if keys > 1024 else []
        return [(64, block_h, 2, 3) if keys > 512 else (32, block_h, 2, 2)]

    def scratch(self, spec: KernelSpec, config: DecodeConfig, batch: int, kv_heads: int, seqlen_q: int = 1) -> Scratch:
        form = self.form(spec, config)
        if not form.is_split:
            return Scratch()
        floats = batch * kv_heads * spec.group * config.NUM_SPLITS * form.floats_per_row
        return Scratch(floats, batch * kv_heads * form.tiles_per_group if config.merge == "last" else 0)

    def signatures(self, spec: KernelSpec, config: DecodeConfig) -> dict[str, Signature]:
        second_kernel = config.merge == "kernel"  # then that kernel writes out
        tensors = [tensor for tensor in self.tensors(spec, config) if not (second_kernel and tensor == "out")]
        out_strides = (number("stride_ob"), number("stride_oh"))
        passed = (
            *pointers(tensors),
            *(number(f"stride_{tensor}{dim}") for tensor in "qr" for dim in "bh"),
            *(Argument(tuple(f"stride_{c}{dim}" for dim in "bnh"), f"*{c}_cache.stride()[:3]") for c in "kv"),
            *(() if second_kernel else out_strides),
            *score_scales(spec),
            number("kv_heads"),
            number("seqlen_kv", "k_cache.shape[1]"),
        )
        kernels = {"decode": Signature(passed, ("kv_heads", "seqlen_kv"))}
        if second_kernel:
            merge = (*pointers(("out", "scratch")), *out_strides, number("heads"))
            kernels["merge"] = Signature(merge, ("heads",))
        return kernels

    def form(self, spec: KernelSpec, config: DecodeConfig) -> DecodeForm:
        return DecodeForm(spec, config)

    def argument_docs(self, spec: KernelSpec, config: DecodeConfig) -> Iterator[tuple[str, str]]:
        form = self.form(spec, config)
        kv_heads = form.kv_heads_doc
        row = f"{spec.head_dim}) {spec.dtype}"
        yield "q, r, out", f"(batch, 1, {form.heads_doc}, {row}, any strides with a contiguous last dimension"
        yield "k_cache, v_cache", f"(batch, seqlen, {kv_heads}, {row}, likewise"
        if form.is_split:
            yield "scratch", f"batch * heads * NUM_SPLITS * {form.floats_per_row} fp32 numbers"
        if config.merge == "last":
            each = f"{kv_heads} * {form.tiles_per_group}" if form.has_several_tiles else "kv_heads"
            yield "arrival_counters", f"batch * {each} int32, 0 before and after every launch"
        if spec.softcap:
            yield "softcap", SOFTCAP_ABOUT

    def bucket_suffix(self, spec: KernelSpec, bucket: Bucket) -> str:
        return f"_kv{bucket.seqlen_kv}"


def _defaults_were_timed(spec: KernelSpec, gpu: Gpu) -> bool:
    """Whether an H200's times decided the defaults: on Hopper, in 16 bits, up to head_dim 128."""
    return gpu.has_wgmma and spec.bytes_per_element == 2 and not spec.cache_dtype and spec.head_dim <= 128


def _half_empty(spec: KernelSpec, block_h: int) -> bool:
    """Whether half of a tile's rows or more are padding, although a smaller BLOCK_H exists: 8 is the smallest."""
    return block_h > 8 and block_h >= 2 * spec.group and not spec.multi_token


def _hopper_tiles_of_prompts(
    spec: KernelSpec, programs_per_sm: float, keys: int, splits: int
) -> list[tuple[int, int, int, int]]:
    """Tiles as in `_default_tiles` that go first: an H200's fastest at 94 places with Triton 3.9, most with 3.6 too.

    Blocks of 32 query rows and 4 warps: two programs or more share a multiprocessor. Over very many keys, which then
    come from memory, larger blocks reuse them more.

    programs_per_sm  with tiles of 64 rows, unsplit
    """
    if splits > 1:
        return [(128, 32, 4, 3) if spec.batch_invariant and spec.head_dim <= 64 else (128, 64, 8, 3)]
    if programs_per_sm < (4 if spec.head_dim <= 64 else 0.75) and not spec.window:
        return [(128, 32, 4, 3)]  # few programs to hide each other's latency
    return [(128, 64, 4 if spec.head_dim <= 64 else 8, 3) if keys >= 32768 else (64, 32, 4, 3)]


def _default_tiles(spec: KernelSpec, block_h: int, gpu: Gpu) -> list[tuple[int, int, int, int]]:
    """(BLOCK_N, BLOCK_H, num_warps, num_stages), best first."""
    if gpu.is_amd:  # from compiling a sample: these spill less than 200 bytes, those below up to 1200
        tall = [(32, 32, 4, 2)] * (block_h == 64 and spec.head_dim <= 128)
        return [*tall, (32, min(block_h, 16), 2, 2), (32, 8, 2, 2), (16, 8, 1, 2), (16, 8, 2, 2)]
    tiles = [(32, block_h, w, s) for w, s in ((1, 4), (2, 3), (2, 2))]
    if block_h == 64:
        tall = [(64, 64, 8, 3), (64, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)]
        # From compiling with head_dim over 128: blocks of 64 keys widened from 8 bits spill up to a kilobyte, blocks of
        # 32 keys 200 bytes; asynchronous matmuls in tf32 spill 900 bytes, those of 16 rows 320.
        if spec.head_dim > 128 and spec.cache_dtype:
            tall = [tall[0], tall[-1]]
        elif spec.head_dim > 128 and spec.dtype == "tf32" and gpu.has_async_matmuls:
            tall.pop()
        tiles = [*tall, *((n, 16, w, s) for n, _, w, s in tiles)]
    elif spec.cache_dtype and spec.head_dim <= 64:
        pass  # from compiling: with such narrow heads each of two warps would widen all elements
    elif spec.page_size or spec.cache_dtype or (spec.batch_invariant and not spec.multi_token):
        # More work for each key: two warps share it. With one query head for each kv head smaller blocks are as fast,
        # and up to 1.7 times as fast where splits have few keys (on an H200 under Triton 3.9).
        small = spec.group == 1 and not (spec.cache_dtype or spec.batch_invariant or spec.multi_token)
        tiles = [(32 if small else 64, block_h, 2, 3), *tiles]
    elif spec.multi_token:
        tiles = [(32, block_h, 2, 4), *tiles]
    # The last ones are for a head_dim or dtype so wide that none of the others fits.
    return [*tiles, (32, 8, 2, 2), (16, 8, 1, 2), (16, 8, 2, 2)]


register(DecodeOp())
