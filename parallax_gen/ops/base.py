"""What an op is to the rest of the package: one object that says how its kernels are configured, launched, checked."""

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
from parallax_gen.ops.pieces import Piece, pieces_of
from parallax_gen.ops.signature import Signature
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import PER_SEQUENCE_LENGTHS, QUERY_ROW_OPS, KernelSpec, family_of

Value = int | str

MAX_REGISTERS_PER_THREAD = 255  # a thread
LARGEST_BLOCK = 128  # rows or keys at a time: kernels add up offsets in 32 bits in a block, in 64 from block to block
# Rows of a sequence are padded to a multiple of this where kernels step over what preprocess left: every block of them
# is whole, and begins where wide loads may.
PADDED_TO = LARGEST_BLOCK
LARGEST = 2**31 - 1  # of a number in a config, and
LONGEST = 64  # characters of a word: far beyond any knob's values


class KernelConfig:
    """How a kernel is done: the choices that change its speed and never its result. Every op's is a frozen dataclass.

    num_warps  warps a program
    """

    num_warps: int
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


C = TypeVar("C", bound=KernelConfig)


@dataclass(frozen=True)
class Knob:
    """One field of a config: the values it may take, in the order in which they are neighbours."""

    name: str
    values: tuple[Value, ...]

    def neighbours(self, value: Value) -> tuple[Value, ...]:
        """The values one step away from `value`."""
        at = self.values.index(value)
        return self.values[max(0, at - 1) : at] + self.values[at + 1 : at + 2]


@dataclass(frozen=True)
class Scratch:
    """Numbers of scratch that a launch needs: fp32 `partials` and int32 `arrived` counters (0 before and after)."""

    partials: int = 0
    arrived: int = 0


class Layout(Enum):
    """What a program of an op owns, and with that what bounds its time: matmuls those of TILES, memory the others."""

    TILES = auto()
    ROWS = auto()
    CACHE = auto()


@dataclass(frozen=True)
class CostHints:
    """What the cost model knows of an op.

    reached         of the tensor cores' peak, what the best configs reach
    spilled         bytes spilled for each register that a thread lacks
    spill_bytes     of stack a thread that double the time
    merge_bytes_us  bytes of partial states that one program loads a microsecond
    """

    reached: float = 0.0
    spilled: float = 0.0
    spill_bytes: int = 1000
    merge_bytes_us: float = 0.0


class Op(ABC, Generic[C]):
    """One op. There is one instance of each, in `OPS_BY_NAME`.

    config          its frozen dataclass
    knobs           of the config's fields, in their order
    template        the file that renders it
    sibling_counts  whether what is fast on cards alike is ahead of the default, by evidence
    near_counts     whether what is fast at near sizes is, by evidence
    per_sequence_lengths     whether a launch takes each sequence's length
    stats_in_error  whether the error that a trial is recorded with is of statistics too
    """

    name: ClassVar[str]
    config: type[C]
    knobs: ClassVar[tuple[Knob, ...]]
    template: ClassVar[str]
    layout: ClassVar[Layout]
    costs: ClassVar[CostHints]
    sibling_counts: ClassVar[bool] = True
    near_counts: ClassVar[bool] = False
    per_sequence_lengths: ClassVar[bool] = False
    stats_in_error: ClassVar[bool] = True
    launch_names: ClassVar[Mapping[str, str]] = MappingProxyType({"row_stats": "rows"})

    # -- which configs there are

    def usable(self, spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
        """The knob's values without those that no config of this spec can use."""
        return knob.values

    def coerce(self, spec: KernelSpec, choices: dict[str, Value]) -> dict[str, Value]:
        """The choices nearest to these that agree with each other."""
        return choices

    @abstractmethod
    def why_invalid(self, spec: KernelSpec, config: C, gpu: Gpu) -> str | None:
        """What `space.why_invalid` says of a config whose knobs each have one of their values, and which fits."""

    @abstractmethod
    def shared_bytes(self, spec: KernelSpec, config: C, gpu: Gpu) -> int:
        """Shared memory that a kernel needs, at the least."""

    def room_bytes(self, spec: KernelSpec, config: C, gpu: Gpu) -> int:
        """How much more shared memory it may turn out to take."""
        return 0

    @abstractmethod
    def defaults(self, spec: KernelSpec, shape: Shape, gpu: Gpu) -> list[C]:
        """Candidates for the default config, the best first; some may be invalid."""

    def promising(self, spec: KernelSpec, found: list[C]) -> list[C]:
        """What else was fast somewhere, beside `found`: the default, then all candidates for it."""
        return []

    def floor_of(self, knob_name: str, size: int) -> int:
        """The knob's largest value that is at most `size`."""
        values = next(knob.values for knob in self.knobs if knob.name == knob_name)
        return max(v for v in values if isinstance(v, int) and 0 < v <= size)

    def scored_and_summed(self, head_dim: int, form: str) -> tuple[list[Piece], list[Piece]]:
        """The pieces of a head that a program computes scores with, and those that it sums, by HEAD_DIM_LAYOUT."""
        pieces = pieces_of(head_dim, form)
        return pieces, pieces

    # -- what a launch takes, in this order: given, written, lengths, scratch, the softmax scale, sizes. The names are
    # those of `codegen.abi.Inputs`.

    @abstractmethod
    def given(self, spec: KernelSpec) -> tuple[str, ...]:
        """Tensors that are read."""

    @abstractmethod
    def written(self, spec: KernelSpec) -> tuple[str, ...]:
        """Tensors that are written."""

    def lengths(self, spec: KernelSpec) -> tuple[str, ...]:
        """Tensors that say where sequences begin and end, where their keys are, and what those are scaled by."""
        return ()

    def sizes(self, spec: KernelSpec) -> tuple[str, ...]:
        """Numbers: the window, and the longest sequence of those that are tiled."""
        return ("window_size",) * spec.window + ("max_seqlen_q",) * spec.varlen

    def scratch(self, spec: KernelSpec, config: C, batch: int, kv_heads: int, seqlen_q: int = 1) -> Scratch:
        """What a launch at this size needs; nothing where every program finishes its own rows.

        seqlen_q  of decode with many queries: the longest sequence's
        """
        return Scratch()

    def signatures(self, spec: KernelSpec, config: C) -> dict[str, Signature]:
        """Of each kernel in the op's file, by a short name: what `launch` passes it."""
        return {}

    def form(self, spec: KernelSpec, config: C) -> object:
        """Sizes and facts that a template needs of a spec and a config together: a frozen dataclass of the op's own."""
        return None

    def tensors(self, spec: KernelSpec, config: C) -> tuple[str, ...]:
        """All tensors that `launch` takes, in order, by the names that it has for them."""
        needed = self.scratch(spec, config, 1, 1)
        scratch = ("partials",) * (needed.partials > 0) + ("arrived",) * (needed.arrived > 0)
        tensors = (*self.given(spec), *self.written(spec), *self.lengths(spec), *scratch)
        return tuple(self.launch_names.get(tensor, tensor) for tensor in tensors)

    def parameters(self, spec: KernelSpec, config: C) -> tuple[str, ...]:
        """All that `launch` takes, in order, as it declares them."""
        tensors = [f"{tensor}: torch.Tensor" for tensor in self.tensors(spec, config)]
        return (*tensors, "softmax_scale: float", *(f"{size}: int" for size in self.sizes(spec)))

    # -- how it is checked, timed and shown

    @abstractmethod
    def awkward_shape(self, spec: KernelSpec, config: C, kv_heads: int = 3) -> Shape:
        """A small shape that no tile of `config` divides: tails, a last group of heads, splits without keys.

        kv_heads  as many as elsewhere, where the kernel should not be compiled once more for other strides
        """

    def timed_lengths(self, spec: KernelSpec, shape: Shape) -> tuple[tuple[int, ...], ...]:
        """The keys of each sequence in the batches that a kernel is timed at: in one, as many as the shape says."""
        return ((shape.seqlen_kv,) * shape.batch,)

    def bucket_words(self, spec: KernelSpec, bucket: Bucket) -> str:
        """What an exported file's name says of a bucket's lengths."""
        return f"_q{bucket.seqlen_q}_kv{bucket.seqlen_kv}"

    def instructions_factor(self, spec: KernelSpec, config: C) -> float:
        """What fewer instructions beside the matmuls are worth."""
        return 1.0


# Filled when the package `ops` is imported.
OPS_BY_NAME: dict[str, Op[Any]] = {}


def register(op: Op[Any]) -> None:
    """Each op's file calls it: a knob that is missing or misnamed shows at import, not in a tune."""
    assert [knob.name for knob in op.knobs] == [f.name for f in fields(op.config)], op.name
    assert op.per_sequence_lengths == (op.name in PER_SEQUENCE_LENGTHS), op.name
    assert (op.layout is Layout.ROWS) == (op.name in QUERY_ROW_OPS), op.name
    OPS_BY_NAME[op.name] = op


def op_of(spec: KernelSpec) -> Op[Any]:
    """The op of a spec."""
    return OPS_BY_NAME[spec.op]


# -- configs as JSON, both ways


def config_to_dict(config: KernelConfig) -> dict[str, Any]:
    """Every field but those at a default: fields have one that came after records were first written."""
    return {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != f.default}


def config_from_dict(op: str, data: Mapping[str, Any]) -> KernelConfig:
    """The config of `op` that `config_to_dict` wrote. Raises ConfigError on a wrong field or type.

    Values need not be those of today's knobs, which `space.why_invalid` knows; numbers and words are bounded.
    """
    kind, family = OPS_BY_NAME[op].config, family_of(op)
    expected = {f.name: f.type for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING}
    if not needed <= set(data) <= set(expected):
        raise ConfigError(f"a {family} config has the fields {sorted(expected)}, not {sorted(data)}")
    for name, value in data.items():
        if type(value).__name__ != expected[name]:
            raise ConfigError(f"{family} config field {name} is {value!r:.80}; it must be of type {expected[name]}")
        if isinstance(value, int) and not 0 <= value <= LARGEST:
            raise ConfigError(f"{family} config field {name} is {value!r:.80}; it must be from 0 to {LARGEST}")
        if isinstance(value, str) and not (value.isprintable() and len(value) <= LONGEST):
            raise ConfigError(
                f"{family} config field {name} is {value!r:.80}; it must be a word of at most {LONGEST} letters"
            )
    config: KernelConfig = kind(**data)
    return config


@lru_cache(maxsize=4096)
def config_to_json(config: KernelConfig) -> str:
    """One line, keys sorted: the same config always gives the same text."""
    return json.dumps(config_to_dict(config), sort_keys=True)
