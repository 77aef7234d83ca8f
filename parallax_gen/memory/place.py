"""The key under which calls look up records: GPU, kernel spec and size bucket."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from parallax_gen.errors import ArgumentError
from parallax_gen.memory.bounds import shown
from parallax_gen.memory.old import spec_from
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.problem.shapes import Bucket, Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec, batch_invariant_spec

Scalar = str | int | bool


@dataclass(frozen=True)
class Place:
    """One kernel spec in one size bucket on one GPU. The measurements of a place decide which config its calls get.

    gpu  its name in records, such as h200
    """

    gpu: str
    spec: KernelSpec
    bucket: Bucket

    def flat(self) -> dict[str, Scalar]:
        """All fields by dotted name: `gpu`, `spec.op`, `bucket.seqlen_kv`, ...

        Fields that were added after the first records are left out at their default value, so that the text of
        older records stays the same.
        """
        return self._flat(self.spec.to_dict(), self.bucket.to_dict())

    @cached_property
    def text(self) -> str:
        """`flat` as JSON: equal places have equal texts."""
        return json.dumps(self.flat(), separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """32 hex digits of the SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @cached_property
    def order(self) -> tuple[Scalar, ...]:
        """The values of all fields, defaults included: the sort key of places."""
        return tuple(self._flat(self.spec.flat(), vars(self.bucket)).values())

    def _flat(self, spec: Mapping[str, Any], bucket: Mapping[str, Any]) -> dict[str, Scalar]:
        flat: dict[str, Scalar] = {"gpu": self.gpu}
        flat |= {f"spec.{name}": value for name, value in spec.items()}
        return flat | {f"bucket.{name}": value for name, value in bucket.items()}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Place:
        """The inverse of `flat`. Raises ArgumentError on anything else."""
        parts: dict[str, dict[str, Any]] = {"spec": {}, "bucket": {}}
        for name, value in flat.items():
            part, dot, field = name.partition(".")
            if dot and part in parts:
                parts[part][field] = value
        if not isinstance(flat.get("gpu"), str):
            raise ArgumentError("gpu", shown(flat.get("gpu")), "text")
        place = cls(flat["gpu"], spec_from(parts["spec"]), Bucket.from_dict(parts["bucket"]))
        if place.flat() != flat:
            raise ArgumentError("place", shown(flat), f"only the fields {list(place.flat())}")
        return place


# The sizes whose records choose the config of batch-invariant calls of any size: a training step of 64 (sequence, kv
# head) pairs, a decode step of 8 sequences with 8 kv heads, and a chunk of their prompts.
_INVARIANT_KV_ROWS, _INVARIANT_SEQLEN, _INVARIANT_CHUNK, _INVARIANT_WINDOW = 64, 4096, 512, 1024


def place_of(gpu: str, spec: KernelSpec, sizes: Shape | Bucket) -> Place:
    """The place whose records choose the config of a call.

    Batch-invariant calls share one place for each head_dim, dtype, group, mask and softcap: their config may not depend
    on the batch, on lengths, on how sequences lie in memory, or on which results are asked for. In training it is a
    place of calls that are not batch-invariant, since their kernels are the same.
    """
    bucket = bucket_of(sizes) if isinstance(sizes, Shape) else sizes
    if not spec.batch_invariant:
        return Place(gpu, spec, bucket)
    window = _INVARIANT_WINDOW * spec.window
    if spec.per_sequence_lengths:
        seqlen_q = _INVARIANT_CHUNK if spec.multi_token else 1
        spec = replace(spec, varlen=False, page_size=0, leftpad=False, stats=False)
    else:
        seqlen_q = _INVARIANT_SEQLEN
        spec = replace(spec.for_op(spec.op), varlen=False, batch_invariant=False)
    return Place(gpu, spec, Bucket(_INVARIANT_KV_ROWS, seqlen_q, _INVARIANT_SEQLEN, window))


def kernels_of(place: Place, config: KernelConfig) -> list[tuple[KernelSpec, KernelConfig]]:
    """The kernels that calls with a place's config may launch: the place's own first, and one of each form.

    The place of batch-invariant calls serves all layouts, dense and packed, with and without statistics. Unaligned
    tensors get the config that loads by pointers. config: valid for the place
    """
    kernels: dict[object, tuple[KernelSpec, Any]] = {}
    for spec in _layouts_of(place, config):
        config_there = config_at(spec, config)
        block_layout = getattr(op_of(spec).form(spec, config_there), "block_layout", "")
        kernels.setdefault((block_layout, replace(spec, page_size=0)), (spec, config_there))
    described = [(spec, one) for spec, one in kernels.values() if getattr(one, "LOADS", "") == "descriptors"]
    return [*kernels.values(), *((spec, replace(one, LOADS="pointers")) for spec, one in described)]


def _layouts_of(place: Place, config: KernelConfig) -> list[KernelSpec]:
    """The specs of the calls that get a place's config, with some page sizes for each way that blocks lie in pages."""
    spec, both = place.spec, (False, True)
    values: dict[str, tuple[Any, ...]] = {}
    if spec.batch_invariant:
        block = vars(config)["BLOCK_N"]
        # Pages of one key, several pages a block (the most that are kept in scalars), and a page of a block.
        values = {"page_size": (0, 1, block // 8, block), "leftpad": both, "stats": both}
        values |= {"varlen": both} if spec.multi_token else {}
    elif place == place_of(place.gpu, batch_invariant_spec(spec), place.bucket):  # in training
        values = {"varlen": both} | ({"stats": (True, False)} if spec.stats else {})
    return [replace(spec, **dict(zip(values, chosen, strict=True))) for chosen in product(*values.values())]


def config_at(spec: KernelSpec, config: KernelConfig) -> KernelConfig:
    """The config of a place as a call of this kernel gets it: packed sequences cannot be loaded by descriptors.

    Loads by pointers give the same values, which are computed with in the same order.
    """
    changes: Any = {"LOADS": "pointers"} if spec.varlen and getattr(config, "LOADS", "") == "descriptors" else {}
    return replace(config, **changes)
