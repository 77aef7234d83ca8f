"""The interface of an op: one object that defines how its kernels are configured, launched, checked and timed."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum, auto
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

from parallax_gen.errors import ConfigError
from parallax_gen.ops.head_dim import Chunk, chunks_of
from parallax_gen.ops.signature import Constant, Signature
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import PER_SEQUENCE_LENGTH_OPS, QUERY_ROW_OPS, KernelSpec, public_op_of

Value = int | str

MAX_REGISTERS_PER_THREAD = 255
# The largest block, in rows or keys. Kernels compute offsets within a block in 32 bits, and offsets of blocks in 64.
LARGEST_BLOCK = 128
# dkdv and dqdr step over the output of preprocess. Each sequence's rows in it are padded to a multiple of this, so that
# every block is whole and begins at an aligned address, as wide loads need.
PADDED_TO = LARGEST_BLOCK
# The same in kernels on packed sequences.
PADDED_TO_IN_KERNELS = Constant(
    "PADDED_TO", PADDED_TO, "row_stats pads each sequence's rows to a multiple of this: to whole blocks"
)
# Bounds of a config that is read from a file, far beyond the values of any knob.
MAX_NUMBER = 2**31 - 1
MAX_WORD_LENGTH = 64  # characters


class KernelConfig:
    """The choices that change a kernel's speed and never its result. Every op has its own frozen dataclass.

    num_warps  warps per program
    """

    num_warps: int
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


C = TypeVar("C", bound=KernelConfig)


@dataclass(frozen=True)
class Knob:
    """One field of a config and its possible values, ordered such that adjacent values are neighbours."""

    name: str
    values: tuple[Value, ...]

    def neighbours(self, value: Value) -> tuple[Value, ...]:
        """The values one step away from `value`."""
        at = self.values.index(value)
        return self.values[max(0, at - 1) : at] + self.values[at + 1 : at + 2]


@dataclass(frozen=True)
class Scratch:
    """The scratch that a launch needs.

    floats    fp32 elements of the split-KV scratch, which holds the states of splits
    counters  int32 arrival counters, which are 0 before and after every launch
    """

    floats: int = 0
    counters: int = 0


class OpKind(Enum):
    """The kinds of ops, by what one of their programs owns. That decides what bounds their time.

    TILES  a tile of query rows or keys: bound by matmuls
    ROWS   query rows: bound by memory
    CACHE  the keys of a split of a KV cache: bound by memory
    """

    TILES = auto()
    ROWS = auto()
    CACHE = auto()


@dataclass(frozen=True)
class CostHints:
    """An op's constants in the cost model.

    reached         the fraction of the tensor cores' peak that the best configs reach
    spilled         how many bytes are spilled for each register that a thread lacks
    spill_bytes     how many spilled bytes per thread double the time
    merge_bytes_us  bytes of partial states that one program loads per microsecond
    """

    reached: float = 0.0
    spilled: float = 0.0
    spill_bytes: int = 1000
    merge_bytes_us: float = 0.0


class Op(ABC, Generic[C]):
    """One op. Each op has one instance, in `OPS_BY_NAME`.

    config                the dataclass of its configs
    knobs                 one for each field of the config, in the same order
    template              the template's file name
    uses_sibling_records  whether a call may use a record of a sibling card: measurements show that it beats the default
    per_sequence_lengths  whether a launch takes each sequence's length
    stats_in_error        whether a trial's recorded error covers the statistics too
    launch_names          the name in `launch` of a tensor, where it differs from the name in `inputs` and `written`
    """

    name: ClassVar[str]
    config: type[C]
    knobs: ClassVar[tuple[Knob, ...]]
    template: ClassVar[str]
    kind: ClassVar[OpKind]
    costs: ClassVar[CostHints]
    uses_sibling_records: ClassVar[bool] = True
    per_sequence_lengths: ClassVar[bool] = False
    stats_in_error: ClassVar[bool] = True
    launch_names: ClassVar[Mapping[str, str]] = MappingProxyType({})

    # -- the space of configs

    def usable(self, spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
        """The knob's values without those that no config of this spec can use."""
        return knob.values

    def coerce(self, spec: KernelSpec, choices: dict[str, Value]) -> dict[str, Value]:
        """The nearest choices that are consistent with each other."""
        return choices

    @abstractmethod
    def why_invalid(self, spec: KernelSpec, config: C, gpu: Gpu) -> str | None:
        """The op's own part of `space.why_invalid`. Each knob already has one of its values."""

    @abstractmethod
    def shared_bytes(self, spec: KernelSpec, config: C, gpu: Gpu) -> int:
        """The least shared memory that a kernel needs."""

    def extra_shared_bytes(self, spec: KernelSpec, config: C, gpu: Gpu) -> int:
        """The most shared memory that a compiled kernel takes beyond `shared_bytes`."""
        return 0

    @abstractmethod
    def defaults(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[C]:
        """Candidates for the default config, best first; some may be invalid."""

    def promising(self, spec: KernelSpec, defaults: list[C]) -> list[C]:
        """Other configs that were fast for some spec. defaults: the default config, then all candidates for it."""
        return []

    def floor_of(self, knob_name: str, size: int) -> int:
        """The knob's largest value that is at most `size`."""
        values = next(knob.values for knob in self.knobs if knob.name == knob_name)
        return max(v for v in values if isinstance(v, int) and 0 < v <= size)

    def score_and_output_chunks(self, head_dim: int, head_dim_layout: str) -> tuple[list[Chunk], list[Chunk]]:
        """The chunks of a head that a program computes scores with, and those whose outputs it accumulates.

        head_dim_layout  the config's HEAD_DIM_LAYOUT
        """
        chunks = chunks_of(head_dim, head_dim_layout)
        return chunks, chunks

    # -- what a launch takes, in this order: inputs, written, lengths, scratch, scales, sizes. The names are those of
    # `codegen.abi.Inputs`.

    @abstractmethod
    def inputs(self, spec: KernelSpec) -> tuple[str, ...]:
        """The tensors that the kernel reads."""

    @abstractmethod
    def written(self, spec: KernelSpec) -> tuple[str, ...]:
        """The tensors that the kernel writes."""

    def lengths(self, spec: KernelSpec) -> tuple[str, ...]:
        """The tensors with the lengths and offsets of sequences, page tables, and scales of 8-bit caches."""
        return ()

    def scales_taken(self, spec: KernelSpec) -> tuple[str, ...]:
        """Floats: the factor of q·k, and where scores are capped, the cap."""
        return ("softmax_scale", *("softcap",) * spec.softcap)

    def sizes(self, spec: KernelSpec) -> tuple[str, ...]:
        """The integers: the window, and the maximum length of the packed sequences that are tiled."""
        return ("window_size",) * spec.window + ("max_seqlen_q",) * spec.varlen

    def scratch(self, spec: KernelSpec, config: C, batch: int, kv_heads: int, seqlen_q: int = 1) -> Scratch:
        """The scratch for a launch of this size; none if every program finishes its own rows.

        seqlen_q  for decode with multi-token queries: the largest number of queries of a sequence
        """
        return Scratch()

    def signatures(self, spec: KernelSpec, config: C) -> dict[str, Signature]:
        """The signature of each kernel in the rendered file, by a short name."""
        return {}

    def form(self, spec: KernelSpec, config: C) -> object:
        """The values that the template derives from a spec and a config: a frozen dataclass of the op's own."""
        return None

    def tensors(self, spec: KernelSpec, config: C) -> tuple[str, ...]:
        """All tensors that `launch` takes, in order, by their names there."""
        needed = self.scratch(spec, config, 1, 1)
        scratch = ("scratch",) * (needed.floats > 0) + ("arrival_counters",) * (needed.counters > 0)
        tensors = (*self.inputs(spec), *self.written(spec), *self.lengths(spec), *scratch)
        return tuple(self.launch_names.get(tensor, tensor) for tensor in tensors)

    def parameters(self, spec: KernelSpec, config: C) -> tuple[str, ...]:
        """The declarations of all parameters of `launch`, in order."""
        tensors = [f"{tensor}: torch.Tensor" for tensor in self.tensors(spec, config)]
        scales = (f"{scale}: float" for scale in self.scales_taken(spec))
        return (*tensors, *scales, *(f"{size}: int" for size in self.sizes(spec)))

    # -- checks, timing and display

    @abstractmethod
    def awkward_shape(self, spec: KernelSpec, config: C, kv_heads: int = 3) -> Shape:
        """A small shape that no tile of `config` divides: it has partial tiles, a partial group of heads, empty splits.

        kv_heads  pass the timed shape's, so that strides agree and Triton does not compile again
        """

    def timed_lengths(self, spec: KernelSpec, shape: Shape) -> tuple[tuple[int, ...], ...]:
        """Each timed batch's numbers of keys per sequence: by default one batch, with the shape's seqlen_kv in each."""
        return ((shape.seqlen_kv,) * shape.batch,)

    def bucket_suffix(self, spec: KernelSpec, bucket: Bucket) -> str:
        """The part of an exported file's name that gives the bucket's lengths."""
        return f"_q{bucket.seqlen_q}_kv{bucket.seqlen_kv}"

    def instructions_factor(self, spec: KernelSpec, config: C) -> float:
        """For the cost model: the factor of the rate of a config with fewer non-matmul instructions."""
        return 1.0


# Filled when the package `ops` is imported: op name -> op.
OPS_BY_NAME: dict[str, Op[Any]] = {}


def register(op: Op[Any]) -> None:
    """Each op's file calls this. A missing or misnamed knob fails at import, not during a tune."""
    assert [knob.name for knob in op.knobs] == [f.name for f in fields(op.config)], op.name
    assert op.per_sequence_lengths == (op.name in PER_SEQUENCE_LENGTH_OPS), op.name
    assert (op.kind is OpKind.ROWS) == (op.name in QUERY_ROW_OPS), op.name
    OPS_BY_NAME[op.name] = op


def op_of(spec: KernelSpec) -> Op[Any]:
    """The op of a spec."""
    return OPS_BY_NAME[spec.op]


# -- configs to and from JSON


def config_to_dict(config: KernelConfig) -> dict[str, Any]:
    """The fields, without those at their default. Only fields that were added after the first records have one."""
    return {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != f.default}


def config_from_dict(op: str, data: Mapping[str, Any]) -> KernelConfig:
    """The inverse of `config_to_dict`. Raises ConfigError on a wrong field or type, or a value beyond the bounds.

    Values need not be among the knobs' values: `space.why_invalid` checks that.
    """
    config_class, public_op = OPS_BY_NAME[op].config, public_op_of(op)
    expected = {f.name: f.type for f in fields(config_class)}
    needed = {f.name for f in fields(config_class) if f.default is MISSING}
    if not needed <= set(data) <= set(expected):
        raise ConfigError(f"a {public_op} config has the fields {sorted(expected)}, not {sorted(data)}")
    for name, value in data.items():
        if type(value).__name__ != expected[name]:
            raise ConfigError(f"{public_op} config field {name} is {value!r:.80}; it must be of type {expected[name]}")
        if isinstance(value, int) and not 0 <= value <= MAX_NUMBER:
            raise ConfigError(f"{public_op} config field {name} is {value!r:.80}; it must be from 0 to {MAX_NUMBER}")
        if isinstance(value, str) and not (value.isprintable() and len(value) <= MAX_WORD_LENGTH):
            allowed = f"a word of at most {MAX_WORD_LENGTH} letters"
            raise ConfigError(f"{public_op} config field {name} is {value!r:.80}; it must be {allowed}")
    config: KernelConfig = config_class(**data)
    return config


@lru_cache(maxsize=4096)
def config_to_json(config: KernelConfig) -> str:
    """One line with sorted keys: equal configs give equal texts."""
    return json.dumps(config_to_dict(config), sort_keys=True)
