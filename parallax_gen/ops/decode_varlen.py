"""Decode where every sequence has its own length, read on the device: pages, packed queries, windows, 8-bit caches."""

from __future__ import annotations

from parallax_gen.ops.base import CostHints, Knob, Scratch, Value, register
from parallax_gen.ops.decode import CacheOp, DecodeConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Bucket, Shape, skewed_lengths, spread_lengths
from parallax_gen.problem.spec import KernelSpec


class DecodeVarlenOp(CacheOp):
    """Any number of queries a sequence; each sequence has its own splits, NUM_SPLITS of them on the average.

    spare  one program in so many sequences, or tiles, is there for long ones alone
    """

    name = "decode_varlen"
    template = "ragged.py.j2"
    costs = CostHints(spill_bytes=200, merge_bytes_us=30e3)  # its step is short, and spills each time
    own_lengths = True
    spare = 8

    def usable(self, spec: KernelSpec, knob: Knob) -> tuple[Value, ...]:
        if knob.name == "merge":
            return ("last",) if spec.many_queries else ("last", "kernel")
        return super().usable(spec, knob)

    def coerce(self, spec: KernelSpec, choices: dict[str, Value]) -> dict[str, Value]:
        return {**choices, "merge": "last"} if choices["merge"] == "none" or spec.many_queries else choices

    def why_not_merged(self, spec: KernelSpec, config: DecodeConfig) -> str | None:
        if config.merge == "none":
            return "merge 'none' does not go with sequences of their own lengths: each has its own splits"
        if spec.many_queries and config.merge == "kernel":
            return "merge 'kernel' does not go with many queries: there are too many rows for a program each"
        return None

    def splits_wanted(self, spec: KernelSpec, programs: int, gpu: Gpu) -> int:
        if spec.many_queries:
            return super().splits_wanted(spec, programs, gpu)
        # Few sequences have as many keys as the longest, and those are to be shared too.
        return max(4, 3 * gpu.sms // programs)

    def merge_of(self, spec: KernelSpec, splits: int, heads: int) -> str:
        # A long sequence among short ones gets most programs, whatever their average.
        return "kernel" if splits > 1 and not spec.many_queries else "last"

    def lengths(self, spec: KernelSpec) -> tuple[str, ...]:
        found = ("cu_seqlens_q",) * spec.varlen + ("cache_seqlens",) + ("cache_leftpad",) * spec.leftpad
        return found + ("page_table",) * (spec.page_size > 0) + ("k_scale", "v_scale") * (spec.cache_dtype != "")

    def scratch(self, spec: KernelSpec, config: DecodeConfig, batch: int, kv_heads: int, seqlen_q: int = 1) -> Scratch:
        """A slot, of a tile's rows, for every program: see ragged.py.j2."""
        rows = config.BLOCK_H if spec.many_queries else min(spec.group, config.BLOCK_H)
        tiles = -(-spec.group * seqlen_q // config.BLOCK_H)
        many, groups = (batch * tiles, 1) if spec.many_queries else (batch, tiles)
        slots = groups * (many * config.NUM_SPLITS + -(-many // self.spare)) * kv_heads
        return Scratch(slots * rows * (2 * spec.head_dim + 4), slots if config.merge == "last" else 0)

    def timed_lengths(self, spec: KernelSpec, shape: Shape) -> tuple[tuple[int, ...], ...]:
        """Of one query each, two batches: keys from all down to a 32nd, in even ratios; and one long among short ones.

        A cache has room for the longest, and a config that is fast for equal lengths alone may leave one program to
        join what many found of a long one. The first batch's lengths are nowhere shorter.
        """
        if spec.many_queries or shape.batch == 1:
            return super().timed_lengths(spec, shape)
        return spread_lengths(shape), skewed_lengths(shape)

    def bucket_words(self, spec: KernelSpec, bucket: Bucket) -> str:
        return super().bucket_words(spec, bucket) if spec.many_queries else f"_kv{bucket.seqlen_kv}"


register(DecodeVarlenOp())
