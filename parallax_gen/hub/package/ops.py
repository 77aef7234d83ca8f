"""What the launches of this package's kernels take: the interface of an op, read from configs/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parallax_gen.hub.package.records import PackagedSpec, packaged
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

KernelConfig = Any
PADDED_TO = LARGEST_BLOCK = 128
ALIGNED_TO, STRIDE_LIMIT = 16, 2**40
SPARE_SPLIT_EVERY = 8


@dataclass(frozen=True)
class Scratch:
    """The scratch that a launch needs.

    floats    fp32 elements of the split-KV scratch, which holds the states of splits
    counters  int32 arrival counters, which are 0 before and after every launch
    """

    floats: int = 0
    counters: int = 0


@dataclass(frozen=True)
class Descriptor:
    """The tensors of one tensor descriptor: one, or q and r."""

    tensors: tuple[str, ...]

    @property
    def stacks_qr(self) -> bool:
        return len(self.tensors) == 2


class Op:
    """The op of one spec."""

    def __init__(self, entry: PackagedSpec):
        self.entry = entry
        self.per_sequence_lengths = entry.spec.per_sequence_lengths

    def inputs(self, spec: KernelSpec) -> tuple[str, ...]:
        return self.entry.inputs

    def written(self, spec: KernelSpec) -> tuple[str, ...]:
        return self.entry.written

    def lengths(self, spec: KernelSpec) -> tuple[str, ...]:
        return self.entry.lengths

    def scales_taken(self, spec: KernelSpec) -> tuple[str, ...]:
        return self.entry.scales

    def sizes(self, spec: KernelSpec) -> tuple[str, ...]:
        return self.entry.sizes

    def scratch(self, spec: KernelSpec, config: Any, batch: int, kv_heads: int, seqlen_q: int = 1) -> Scratch:
        """The scratch for a launch of this size; none if every program finishes its own rows.

        seqlen_q  for decode with multi-token queries: the largest number of queries of a sequence
        """
        numbers = self.entry.kernel(config).scratch
        if not numbers:
            return Scratch()
        has_counters = config.merge == "last"
        if not spec.per_sequence_lengths:
            floats = batch * kv_heads * spec.group * config.NUM_SPLITS * numbers["floats_per_row"]
            return Scratch(floats, batch * kv_heads * numbers["tiles_per_group"] if has_counters else 0)
        tiles = -(-spec.group * seqlen_q // config.BLOCK_H)
        if spec.batch_invariant:
            items = batch * kv_heads * config.NUM_SPLITS * (1 if spec.multi_token else tiles)
        else:
            split_units, tiles_per_unit = (batch * tiles, 1) if spec.multi_token else (batch, tiles)
            splits = split_units * config.NUM_SPLITS + -(-split_units // SPARE_SPLIT_EVERY)
            items = tiles_per_unit * splits * kv_heads
        return Scratch(items * numbers["state_rows"] * numbers["floats_per_row"], items if has_counters else 0)


class TiledOp(Op):
    """The op of a spec whose programs own tiles."""

    def descriptors(self, spec: KernelSpec, config: Any) -> tuple[Descriptor, ...]:
        return tuple(map(Descriptor, self.entry.kernel(config).descriptors))


def op_of(spec: KernelSpec) -> Any:
    """The op of a spec. Raises ArgumentError if this package has no kernel of it."""
    entry = packaged(spec)
    return TiledOp(entry) if entry.kernels[0].tile else Op(entry)


def programs_of(op: TiledOp, config: Any, shape: Shape) -> int:
    """The number of programs of a launch."""
    heads, length = (shape.kv_heads, shape.seqlen_kv) if op.entry.owns_keys else (shape.heads, shape.seqlen_q)
    tile = op.entry.kernel(config).tile
    assert tile is not None
    rows, programs_per_tile = tile
    return programs_per_tile * -(-length // rows) * shape.batch * heads
