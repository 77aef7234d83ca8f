"""The kernels of a hub package, and which of them each call gets: the files that hub/package/records.py reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import parallax_gen
from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.hub.package.dispatch import toolchain_key
from parallax_gen.hub.package.records import ANY_OTHER, KERNELS_FILE
from parallax_gen.memory.guard import launch_candidates
from parallax_gen.memory.place import Place, config_at, place_of
from parallax_gen.memory.ranking import (
    Candidate,
    RecordTable,
    Tier,
    default_of,
    places_read,
    siblings,
)
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.ops.base import KernelConfig, OpKind, op_of
from parallax_gen.ops.tiles import TiledOp, programs_per_tile
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import SHORTEST, Bucket, Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec

# The buckets of a package. Calls beyond the largest sizes get the kernel of the largest.
MOST_KV_ROWS, LONGEST = 2**16, 2**20
_UNKNOWN = Toolchain("0.0", "")  # compiles like none


@dataclass
class _Kernels:
    """The kernels of one spec, numbered in the order in which cards first needed them."""

    spec: KernelSpec
    sources: dict[KernelConfig, KernelSource] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return next(iter(self.sources.values())).name

    def number(self, config: KernelConfig, gpu: Gpu) -> int:
        """The number of a config's kernel, which is rendered if it is new. Only its header is of the card."""
        config = config_at(self.spec, config)
        configs = [config]
        if getattr(config, "LOADS", "") == "descriptors":  # for tensors that descriptors do not allow
            changes: Any = {"LOADS": "pointers"}
            configs.append(replace(config, **changes))
        for needed in configs:
            if needed not in self.sources:
                self.sources[needed] = render(self.spec, needed, gpu)
        return [*self.sources].index(config)

    def file(self, config: KernelConfig) -> str:
        source = self.sources[config]
        return f"{source.name}_{source.text_hash[:8]}"

    def to_json(self) -> dict[str, Any]:
        spec, op = self.spec, op_of(self.spec)
        changed = {f.name: value for f in fields(spec) if (value := getattr(spec, f.name)) != f.default}
        return {
            "name": self.name,
            "spec": changed,
            "inputs": op.inputs(spec),
            "written": op.written(spec),
            "lengths": op.lengths(spec),
            "scales": op.scales_taken(spec),
            "sizes": op.sizes(spec),
            "owns_keys": isinstance(op, TiledOp) and op.owns_keys,
            "kernels": [self._kernel_to_json(config) for config in self.sources],
        }

    def _kernel_to_json(self, config: Any) -> dict[str, Any]:
        op: Any = op_of(self.spec)
        is_tiled = isinstance(op, TiledOp)
        form: Any = op.form(self.spec, config)
        numbers = ("floats_per_row", "state_rows" if op.per_sequence_lengths else "tiles_per_group")
        return {
            "file": self.file(config),
            "config": asdict(config),
            "tile": [op.owned_and_streamed(config)[0], programs_per_tile(config)] if is_tiled else None,
            "descriptors": [list(d.tensors) for d in op.descriptors(self.spec, config)] if is_tiled else [],
            "scratch": {n: getattr(form, n) for n in numbers} if op.scratch(self.spec, config, 1, 1).floats else {},
        }


class PackageRecords:
    """All kernels of a package, and its JSON files.

    specs  what it has kernels of
    files  name -> data, as hub/package/records.py reads them
    """

    def __init__(self, calls: Iterable[tuple[KernelSpec, Shape]], cards: Sequence[Gpu], memory: Memory):
        windows: dict[KernelSpec, dict[int, None]] = {}
        for spec, shape in calls:
            windows.setdefault(spec, {})[bucket_of(shape).window] = None
        self._kernels = {spec: _Kernels(spec) for spec in windows}
        card_files = {}
        for gpu in cards:
            records = _CardRecords(gpu, windows, memory)
            choices = {spec: records.choices(self._kernels[spec], tuple(sizes)) for spec, sizes in windows.items()}
            card_files[f"{gpu.name}.json"] = self._card_file(gpu, choices)
        self.specs = tuple(windows)
        specs = [kernels.to_json() for kernels in self._kernels.values()]
        names = [gpu.name for gpu in cards]
        self.files = {KERNELS_FILE: {"parallax_gen": parallax_gen.__version__, "cards": names, "specs": specs}}
        self.files |= card_files

    @property
    def rendered(self) -> dict[str, str]:
        """Module -> text of each kernel."""
        return {
            kernels.file(config): source.text
            for kernels in self._kernels.values()
            for config, source in kernels.sources.items()
        }

    def _card_file(self, gpu: Gpu, choices: dict[KernelSpec, dict[str, Any]]) -> dict[str, Any]:
        names = ("title", "capability", "sms", "shared_per_block")
        named = {self._kernels[spec].name: data for spec, data in choices.items()}
        return {name: getattr(gpu, name) for name in names} | {"choices": named}


class _CardRecords:
    """The records that the calls of a package may use on a card."""

    def __init__(self, gpu: Gpu, specs: Iterable[KernelSpec], memory: Memory):
        self._gpu = gpu
        wanted = {place_of(gpu.name, spec, Bucket(1, 1, SHORTEST)).spec for spec in specs}
        names = (gpu.name, *siblings(gpu))
        records = [record for name in names for record in memory.all(name) if record.place.spec in wanted]
        self._table = RecordTable(records)
        self._places = {record.place for record in records}
        known = {(minor(r.evidence.triton), r.evidence.cuda) for r in records if r.evidence.cuda}
        self._toolchains = [Toolchain(*versions) for versions in sorted(known)]

    def choices(self, kernels: _Kernels, windows: tuple[int, ...]) -> dict[str, Any]:
        """What calls of a spec get in each bucket."""
        spec, gpu = kernels.spec, self._gpu
        sizes = sizes_of_buckets(spec, windows)
        numbers, ranked = [], []
        for position, bucket in enumerate(_buckets(spec, sizes)):
            place = place_of(gpu.name, spec, bucket)
            numbers.append(kernels.number(default_of(place, gpu), gpu))
            if by_toolchain := self._ranked(place):
                rows = {
                    toolchain: [
                        (kernels.number(c.config, gpu), int(c.tier), c.record and c.record.time_us) for c in candidates
                    ]
                    for toolchain, candidates in by_toolchain.items()
                }
                ranked.append({"position": position, "choices": rows})
        runs = ((len([*run]), number) for number, run in itertools.groupby(numbers))
        return {**sizes, "defaults": [*itertools.chain(*runs)], "ranked": ranked}

    def _ranked(self, place: Place) -> dict[str, list[Candidate]]:
        """Toolchain -> what a call considers with it, without those whose candidates are any other toolchain's."""
        if self._places.isdisjoint(places_read(place, self._gpu)):
            return {}
        others = [*launch_candidates(place, self._gpu, self._table, _UNKNOWN)]
        found = {toolchain_key(t.triton, t.cuda): self._candidates(place, t) for t in self._toolchains}
        found = {toolchain: candidates for toolchain, candidates in found.items() if candidates != others}
        if not found and [candidate.tier for candidate in others] == [Tier.DEFAULT]:
            return {}
        return {**found, ANY_OTHER: others}

    def _candidates(self, place: Place, here: Toolchain) -> list[Candidate]:
        return [*launch_candidates(place, self._gpu, self._table, here)]


def sizes_of_buckets(spec: KernelSpec, windows: tuple[int, ...]) -> dict[str, list[int]]:
    """The sizes of a package's buckets of a spec.

    windows  the buckets of the windows that were asked for
    """
    if spec.batch_invariant:  # all calls get the kernel of one place
        return {"kv_rows": [1], "seqlen_q": [1], "seqlen_kv": [SHORTEST], "window": [windows[0]]}
    lengths = [2**n for n in range(int(math.log2(SHORTEST)), int(math.log2(LONGEST)) + 1)]
    one_query = spec.public_op == "decode" and not spec.multi_token
    return {
        "kv_rows": [2**n for n in range(int(math.log2(MOST_KV_ROWS)) + 1)],
        "seqlen_q": [1] if one_query else [1, *lengths],
        "seqlen_kv": [SHORTEST] if _reads_no_keys(spec) else lengths,
        "window": sorted(windows),
    }


def _buckets(spec: KernelSpec, sizes: dict[str, list[int]]) -> Iterator[Bucket]:
    """The buckets, in the order in which a package numbers them."""
    for rows, seqlen_q, seqlen_kv, window in itertools.product(*sizes.values()):
        if _reads_no_keys(spec):
            seqlen_kv = max(seqlen_q, SHORTEST)
        yield Bucket(rows, seqlen_q, seqlen_kv, window)


def _reads_no_keys(spec: KernelSpec) -> bool:
    return op_of(spec).kind is OpKind.ROWS
