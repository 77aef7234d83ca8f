"""`parallax-gen list`: which places a user asks for, a summary of them by tier, and a table of each kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from parallax_gen.describe import brief, gain_text, number, seqlen_text
from parallax_gen.memory.descriptions import ListLine, Origins, shape_of
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Tier
from parallax_gen.ops.base import config_to_dict
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import rate, rate_unit
from parallax_gen.problem.workloads import NO_FLAGS, Flags, Sizes, flag_concerns, has_kernel, sizes_for
from parallax_gen.tables import Table

# Tier -> its word in the summary's titles and in --tier.
TIER_WORDS = {
    Tier.MEASURED_HERE: "here",
    Tier.OTHER_TOOLCHAIN: "toolchain",
    Tier.SIBLING_CARD: "sibling",
    Tier.NEAR_BUCKET: "near",
    Tier.DEFAULT: "default",
}
SUMMARY_LEGEND = (
    "places: pairs of a kernel and a bucket of sizes; here: the config was measured on this card with this Triton;\n"
    "toolchain: with another Triton or ptxas; sibling: on another card of the same compute capability;\n"
    "near: at a near bucket; default: no record can be used"
)
LEGEND = (
    "us: microseconds; gain: the default config's time divided by this time, if both are of one Triton;\n"
    "status: measured (by you), shipped (measured elsewhere), predicted (calls never use it), or how it failed;\n"
    "evidence: the Triton that it was measured with, and the card if it was another of the same capability;\n"
    "not yet checked: a first call compiles it, and drops it if it spills far more than the default;\n"
    "parallax-gen explain says why calls get this config"
)


BOOLEANS = ("stats", "varlen", "leftpad", "softcap", "batch_invariant")  # fields of Flags and of a spec


@dataclass(frozen=True)
class Filter:
    """The places that a user asks for. What is not given, "" or None, matches all.

    op     or TRAINING
    flags  those that are set must be the kernel's
    sizes  of the place's bucket
    """

    op: str = ""
    head_dim: int | None = None
    dtype: str | None = None
    flags: Flags = NO_FLAGS
    sizes: Sizes | None = None

    def matches(self, place: Place) -> bool:
        spec = place.spec
        return (
            (not self.op or has_kernel(self.op, spec))
            and self.head_dim in (None, spec.head_dim)
            and self.dtype in (None, spec.dtype)
            and self._has_flags(place)
            and (self.sizes is None or self._has_sizes(place, self.sizes))
        )

    def _has_flags(self, place: Place) -> bool:
        flags, flat = self.flags, place.spec.flat()
        wanted: dict[str, Any] = {name: getattr(flags, name) for name in BOOLEANS}
        wanted |= {"ragged": flags.per_sequence_lengths, "page_size": flags.page_size, "cache_dtype": flags.cache_dtype}
        checked = {name: value for name, value in wanted.items() if value}
        checked |= {} if flags.causal is None else {"causal": flags.causal}
        window = bucket_of(Shape(1, 1, 1, 1, 1, flags.window)).window if flags.window else None
        # preprocess, a kernel of a training step, reads no keys, so it has few of the flags.
        checked = {name: value for name, value in checked.items() if flag_concerns(name, self.op, place.spec)}
        window = window if flag_concerns("window", self.op, place.spec) else None
        return window in (None, place.bucket.window) and all(flat[name] == value for name, value in checked.items())

    def _has_sizes(self, place: Place, sizes: Sizes) -> bool:
        shape = sizes_for(place.spec.op, sizes.for_op(place.spec.public_op), NO_FLAGS)
        wanted, bucket = bucket_of(shape), place.bucket
        same_lengths = (wanted.seqlen_q, wanted.seqlen_kv) == (bucket.seqlen_q, bucket.seqlen_kv)
        return same_lengths and wanted.kv_rows == bucket.kv_rows and shape.group == place.spec.group


def summary_tables(lines: Iterable[ListLine]) -> list[Table]:
    """For each GPU, the number of places of each kernel by tier. lines: sorted by place."""
    tables = []
    for gpu, of_gpu in groupby(lines, key=lambda line: line.place.gpu):
        tiers: dict[KernelSpec, Counter[Tier | None]] = {}
        for line in of_gpu:
            tiers.setdefault(line.place.spec, Counter())[line.tier] += 1
        total = sum(tiers.values(), Counter[Tier | None]())
        shown = [tier for tier in Tier if total[tier]]
        rows = [(*_counts(counts, shown), str(spec)) for spec, counts in tiers.items()]
        if len(rows) > 1:
            rows.append((*_counts(total, shown), "all kernels"))
        numbers = ("places", *(TIER_WORDS[tier] for tier in shown))
        tables.append(Table(f"{gpu}, places by where their config comes from", (*numbers, "kernel"), rows, numbers))
    return tables


def _counts(counts: Counter[Tier | None], shown: list[Tier]) -> tuple[str, ...]:
    return str(counts.total()), *(str(counts[tier] or "-") for tier in shown)


def kernel_tables(lines: Iterable[ListLine], origins: Origins) -> list[Table]:
    """A table of each kernel on each GPU. lines: sorted by place."""
    tables = []
    for (gpu, spec), group in groupby(lines, key=lambda line: (line.place.gpu, line.place.spec)):
        numbers = ("BxH", "seqlen", "us", rate_unit(spec.public_op), "gain")
        columns = (*numbers, "config", "status", "evidence")
        tables.append(Table(f"{gpu}: {spec}", columns, [_cells(line, origins) for line in group], numbers))
    return tables


def _cells(line: ListLine, origins: Origins) -> tuple[str, ...]:
    result, timing = line.result, ("-", "-")
    if result is not None and result.time_us:
        timing = number(result.time_us), number(rate(result.place.spec, shape_of(result), result.time_us))
    sizes = str(line.place.bucket.kv_rows), seqlen_text(line.place.bucket)
    status = "default" if result is None else origins.status(result)
    return *sizes, *timing, gain_text(line.gain), brief(line.config), status, line.evidence_with_mark


def to_json(line: ListLine, origins: Origins) -> dict[str, Any]:
    record = {"config": config_to_dict(line.config)} if line.result is None else origins.to_json(line.result)
    return record | {
        "of_place": line.place.flat(),
        "tier": line.tier and line.tier.text,
        "counts_as": line.evidence,
        "checked": line.checked,
        "default_us": line.default and line.default.time_us,
        "gain": line.gain,
    }
