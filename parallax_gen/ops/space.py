"""Which configs there are: each op's knobs, typed, and the one predicate that says what cannot work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace

from parallax_gen.ops.base import (
    CONFIG_OF_OP,
    TILED,
    DecodeConfig,
    DkDvConfig,
    DqDrConfig,
    ForwardConfig,
    KernelConfig,
    PreprocessConfig,
    TileConfig,
    config_from_dict,
)
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import KernelSpec

Value = int | str

MOST_REGISTERS = 255  # a thread


@dataclass(frozen=True)
class Knob:
    """One field of a config: the values it may take, in the order in which they are neighbours."""

    name: str
    values: tuple[Value, ...]

    def neighbours(self, value: Value) -> tuple[Value, ...]:
        """The values one step away from `value`."""
        at = self.values.index(value)
        return self.values[max(0, at - 1) : at] + self.values[at + 1 : at + 2]


_TILES = (
    Knob("BLOCK_M", (16, 32, 64, 128)),
    Knob("BLOCK_N", (16, 32, 64, 128)),
    Knob("HEAD_GROUP", (1, 2, 4, 8, 16, 32, 0)),
    Knob("num_warps", (4, 8)),
    Knob("num_stages", (1, 2, 3, 4)),
    Knob("HEAD_DIM_AS", ("whole", "halves", "pieces", "padded")),
    Knob("maxnreg", (0, 168, 128)),
)

_MASK = Knob("MASK", ("weights", "scores"))

KNOBS: dict[str, tuple[Knob, ...]] = {
    "forward": (*_TILES, Knob("ROW_MAX", ("running", "first"))),
    "preprocess": (Knob("BLOCK_M", (4, 8, 16, 32, 64, 128)), Knob("num_warps", (1, 2, 4, 8))),
    "dkdv": (*_TILES, _MASK, Knob("ROW_NUMBERS", ("apart", "together"))),
    "dqdr": (*_TILES, _MASK),
    "decode": (
        Knob("BLOCK_N", (16, 32, 64, 128)),
        Knob("BLOCK_H", (8, 16, 32, 64)),
        Knob("NUM_SPLITS", (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)),
        Knob("merge", ("none", "last", "kernel")),
        Knob("num_warps", (1, 2, 4, 8)),
        Knob("num_stages", (2, 3, 4, 5, 6)),
    ),
}


def knobs_of(spec: KernelSpec) -> tuple[Knob, ...]:
    """The op's knobs, without the values that no config of this spec can use."""
    return tuple(replace(knob, values=_usable(spec, knob)) for knob in KNOBS[spec.op])


def why_invalid(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> str | None:
    """Why `config` cannot serve `spec` on `gpu`, in a sentence; None when it can be tried.

    The one predicate of tuner, heuristics and dispatcher. What only compiling can show (registers, spills)
    is not its business.
    """
    if type(config) is not CONFIG_OF_OP[spec.op]:
        return f"a {type(config).__name__} does not configure a {spec.op} kernel"
    for knob in KNOBS[spec.op]:
        value = getattr(config, knob.name)
        if value not in knob.values:
            return f"{knob.name} is {value}; it may be one of {', '.join(map(str, knob.values))}"
    if isinstance(config, DecodeConfig):
        reason = _why_decode_invalid(spec, config)
    elif isinstance(config, PreprocessConfig):
        reason = _why_preprocess_invalid(spec, config)
    else:
        reason = _why_tiles_invalid(spec, config, gpu)
    if reason is None and (shared := shared_bytes(spec, config, gpu)) > gpu.shared_per_block:
        reason = f"its tiles need {shared} bytes of shared memory; a block of {gpu.title} has {gpu.shared_per_block}"
    return reason


def shared_bytes(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> int:
    """Shared memory a kernel needs: of decode what Triton allocates (see below), of the other ops the least of it."""
    if isinstance(config, PreprocessConfig):
        return 0
    if isinstance(config, DecodeConfig):
        return _decode_shared_bytes(spec, config, gpu)
    # Triton keeps num_stages - 1 blocks in flight when the loads feed matmuls; the tiles a program owns stay.
    in_flight = max(1, config.num_stages - 1)
    owned = {"forward": 2 * config.BLOCK_M, "dqdr": 3 * config.BLOCK_M, "dkdv": 2 * config.BLOCK_N}[spec.op]
    if spec.op == "dkdv" and gpu.capability[0] == 10:
        # From compiling: there, tensor cores take p w, gt and gs and what is transposed from shared memory.
        owned += (8 if spec.dtype == "tf32" else 7) * config.BLOCK_M
    least = owned * _row_bytes(spec, config) + in_flight * block_bytes(spec, config)
    if spec.op == "dqdr" and gpu.capability[0] not in (9, 10) and config.HEAD_DIM_AS != "pieces":
        # From compiling: there, half a tile of scores passes from thread to thread at the least.
        least += config.BLOCK_M * config.BLOCK_N * spec.bytes_per_element // 2
    return least


def _decode_shared_bytes(spec: KernelSpec, config: DecodeConfig, gpu: Gpu) -> int:
    """What Triton allocates for decode: key blocks in flight, the tile of queries and probes, operands of matmuls.

    From compiling 538 kernels for sm_89, sm_90 and sm_100 with Triton 3.9, and some of them with 3.6, which gives the
    same numbers. None took more. Of the 507 whose head_dim is a multiple of 16, 505 took 1 KiB less at the most, which
    is what `scratch` and `pages` come to, and two 8 KiB less. Other head_dims of 16-bit numbers may take much less:
    their loads are asynchronous only where strides happen to be multiples of 16.
    """
    rows, keys = 2 * config.BLOCK_H, config.BLOCK_N
    width = _width(max(spec.head_dim, 64) if spec.cache_dtype else spec.head_dim, "padded")
    pair = 2 * keys * width  # numbers of a block of k and v
    owned = (config.num_stages - 1) * pair * spec.cache_bytes + rows * width * spec.bytes_per_element
    weights = rows * keys * spec.bytes_per_element
    scratch = 4 * rows  # of a row's sum or factor, passed between warps
    pages = 8 * keys if spec.page_size else 0  # passed between threads where each key has its own page
    asynchronous = rows >= 64 and config.num_warps >= 4 and spec.dtype != "fp32"
    if asynchronous and gpu.capability[0] in (9, 10):
        # wgmma and tcgen05 take k and v from shared memory: one block more is in flight, or k or v widened from 8 bits.
        owned += (pair // 2 if spec.cache_dtype else pair) * spec.bytes_per_element
        if gpu.capability[0] == 9:
            return owned
        twice = spec.cache_dtype or spec.dtype == "tf32"  # how often tcgen05 has the weights there
        return owned + (2 * weights if twice else weights + scratch) + 64
    # One warp has all weights that its rows need. So has each of several where both matmuls of an 8-bit cache, which
    # sum a fourth of head_dim each, are split by rows.
    passed = config.num_warps > 1 and not (spec.cache_dtype and rows >= width // 4)
    return owned + max(weights + scratch if passed else 0, pages)


def block_bytes(spec: KernelSpec, config: TileConfig) -> int:
    """What one block in flight takes: k and v; for dkdv q, r and do. A program owns q, r (and do); k and v."""
    a_row = _row_bytes(spec, config)
    if spec.op == "dkdv":
        return 3 * config.BLOCK_M * a_row
    if spec.op == "forward":  # of v it takes what it sums
        return config.BLOCK_N * (a_row + a_row // _programs_a_head(config))
    return 2 * config.BLOCK_N * a_row


def _programs_a_head(config: TileConfig) -> int:
    """How many programs share a tile, each of which sums its part of head_dim."""
    return 2 if config.HEAD_DIM_AS == "halves" else 1


def _row_bytes(spec: KernelSpec, config: TileConfig) -> int:
    return _width(spec.head_dim, config.HEAD_DIM_AS) * spec.bytes_per_element


def neighbours(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> list[KernelConfig]:
    """The valid configs that differ from `config` in one knob by one step."""
    found = []
    for knob in knobs_of(spec):
        for value in knob.neighbours(getattr(config, knob.name)):
            near = coerce(spec, {**asdict(config), knob.name: value})
            if near not in found and near != config and why_invalid(spec, near, gpu) is None:
                found.append(near)
    return found


def every_config(spec: KernelSpec, gpu: Gpu) -> Iterator[KernelConfig]:
    """Every valid config, each once."""
    knobs = knobs_of(spec)
    for values in itertools.product(*(knob.values for knob in knobs)):
        config = config_from_dict(spec.op, dict(zip((knob.name for knob in knobs), values, strict=True)))
        if why_invalid(spec, config, gpu) is None:
            yield config


def coerce(spec: KernelSpec, choices: dict[str, Value]) -> KernelConfig:
    """The config nearest to `choices` whose knobs agree with each other: one split has nothing to merge, say."""
    if spec.op == "decode" and spec.ragged:
        if choices["merge"] == "none" or spec.many_queries:
            choices = {**choices, "merge": "last"}
    elif spec.op == "decode":
        if choices["NUM_SPLITS"] == 1:
            choices = {**choices, "merge": "none"}
        elif choices["merge"] == "none":
            choices = {**choices, "merge": "last"}
    return config_from_dict(spec.op, choices)


def _usable(spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
    if knob.name == "BLOCK_H":
        return tuple(v for v in knob.values if isinstance(v, int) and not _half_empty(spec, v))
    if knob.name == "merge" and spec.ragged:
        return ("last",) if spec.many_queries else ("last", "kernel")
    if knob.name == "HEAD_DIM_AS":
        return forms_of(spec.head_dim)
    if (knob.name == "MASK" and not spec.causal) or (knob.name == "ROW_MAX" and spec.dtype == "fp16"):
        return knob.values[:1]
    if knob.name == "BLOCK_N" and spec.op in TILED and spec.bytes_per_element == 2:
        return tuple(v for v in knob.values if v != 16)  # tensor cores want more keys at a time
    return knob.values


def forms_of(head_dim: int) -> tuple[str, ...]:
    """The values that HEAD_DIM_AS may have. Tensor cores want 16 numbers at the least."""
    in_sixteens = -(-head_dim // 16) * 16
    if in_sixteens & (in_sixteens - 1):
        return ("pieces", "padded")
    if head_dim != in_sixteens:
        return ("padded",)
    return ("whole", "halves") if head_dim > 128 else ("whole",)


def _width(head_dim: int, form: str) -> int:
    """What a row of head_dim numbers takes in a tile, of the form HEAD_DIM_AS: padding counts."""
    return max(16, 1 << (head_dim - 1).bit_length()) if form == "padded" else -(-head_dim // 16) * 16


def _half_empty(spec: KernelSpec, block_h: int) -> bool:
    """Whether a tile taller than need be, 8, has rows for twice the heads of a group or more: mostly padding."""
    return block_h > 8 and block_h >= 2 * spec.group and not spec.many_queries


def _why_tiles_invalid(spec: KernelSpec, config: TileConfig, gpu: Gpu) -> str | None:
    tile = f"a {config.BLOCK_M}x{config.BLOCK_N} tile"
    if isinstance(config, DkDvConfig | DqDrConfig) and config.MASK == "scores" and not spec.causal:
        return "MASK 'scores' does not go with full attention: it has no mask"
    if isinstance(config, ForwardConfig) and config.ROW_MAX == "first":
        if spec.dtype == "fp16":
            return "ROW_MAX 'first' does not go with fp16: weights that are not scaled soon pass its largest number"
        if config.HEAD_DIM_AS == "halves":
            return "ROW_MAX 'first' does not go with HEAD_DIM_AS 'halves'"
    if config.HEAD_DIM_AS not in forms_of(spec.head_dim):
        return f"HEAD_DIM_AS {config.HEAD_DIM_AS!r} does not go with head_dim {spec.head_dim}"
    head_dim = _width(spec.head_dim, config.HEAD_DIM_AS)
    if spec.dtype == "fp32":
        # Without tensor cores a thread holds its share of the operands too: from compiling, beyond this they spill
        # by hundreds of bytes, and soon by thousands. The backward has half as many tiles again in its hands.
        most = config.num_warps << (20 if spec.op == "forward" else 19)
        if config.BLOCK_M * config.BLOCK_N * head_dim**2 > max(most, 16 * 16 * head_dim**2):
            return f"{tile} of fp32 at head_dim {head_dim} is too large for the registers of {config.num_warps} warps"
    elif (config.BLOCK_N == 16 and spec.dtype != "tf32") or max(
        config.BLOCK_M, config.BLOCK_N, head_dim // 2
    ) < 16 * config.num_warps:
        # 16 rows a warp; of a wide head_dim two warps may share rows, and halve their sums' columns.
        return f"{tile} is too small for {config.num_warps} warps"
    # Two sums of its own rows stay in registers, beside two tiles of scores at the least: past 255 registers a thread
    # they spill for certain.
    owned, step = (config.BLOCK_N, config.BLOCK_M) if spec.op == "dkdv" else (config.BLOCK_M, config.BLOCK_N)
    a_thread = 2 * owned * (head_dim // _programs_a_head(config) + step) // (32 * config.num_warps)
    if a_thread > MOST_REGISTERS and not (spec.dtype == "fp32" and owned == step == 16):
        return f"its accumulators need {a_thread} registers a thread; there are {MOST_REGISTERS}"
    return _why_maxnreg_invalid(config, a_thread, gpu)


def _why_maxnreg_invalid(config: TileConfig, a_thread: int, gpu: Gpu) -> str | None:
    most = config.maxnreg
    if most == 0:
        return None
    many, few = (gpu.registers_per_sm // (32 * config.num_warps * each) for each in (most, MOST_REGISTERS))
    if many == few:
        return f"maxnreg {most} lets no more programs of {config.num_warps} warps run together than {MOST_REGISTERS}"
    if a_thread > most:
        return f"its accumulators need {a_thread} registers a thread; maxnreg is {most}"
    return None


def _why_preprocess_invalid(spec: KernelSpec, config: PreprocessConfig) -> str | None:
    a_thread = 3 * config.BLOCK_M * _width(spec.head_dim, "padded") // (32 * config.num_warps)
    if a_thread > MOST_REGISTERS:
        return f"its rows need {a_thread} registers a thread; there are {MOST_REGISTERS}"
    return None


def _why_decode_invalid(spec: KernelSpec, config: DecodeConfig) -> str | None:
    if _half_empty(spec, config.BLOCK_H):
        return f"BLOCK_H {config.BLOCK_H} would be half empty for {spec.group} query heads a kv head"
    if spec.ragged and config.merge == "none":
        return "merge 'none' does not go with sequences of their own lengths: each has its own splits"
    if spec.many_queries and config.merge == "kernel":
        return "merge 'kernel' does not go with many queries: there are too many rows for a program each"
    if not spec.ragged and (config.NUM_SPLITS == 1) != (config.merge == "none"):
        return f"merge {config.merge!r} does not go with NUM_SPLITS {config.NUM_SPLITS}"
    if config.BLOCK_N < 8 * config.num_warps:
        return f"{config.num_warps} warps have less than 8 of {config.BLOCK_N} keys each"
    width = _width(spec.head_dim, "padded")
    if spec.dtype == "fp32" and config.BLOCK_H * config.BLOCK_N * width**2 > max(
        config.num_warps << 21, 8 * 16 * width**2
    ):
        # As of the other kernels: without tensor cores a thread holds its share of the operands too.
        return f"{config.BLOCK_H} heads of fp32 at head_dim {width} are too many for the registers of its warps"
    a_thread = 2 * config.BLOCK_H * (width + config.BLOCK_N) // (32 * config.num_warps)
    if a_thread > MOST_REGISTERS:
        return f"its accumulators need {a_thread} registers a thread; there are {MOST_REGISTERS}"
    return None


for _op, _kind in CONFIG_OF_OP.items():  # a knob that is missing or misnamed shows at import, not in a tune
    assert [knob.name for knob in KNOBS[_op]] == [f.name for f in fields(_kind)], _op
