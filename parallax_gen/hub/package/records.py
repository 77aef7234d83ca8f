"""The kernels of this package, and which of them each card launches: reads the JSON files in configs/."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec

ROOT = __name__.rpartition(".")[0]  # the package, whatever name it was imported under
CONFIGS = Path(__file__).parent / "configs"
KERNELS_FILE = "kernels.json"
ANY_OTHER = "any other"  # the toolchains that no record of a bucket was measured with

Row = tuple[int, int, "float | None"]


@dataclass(frozen=True)
class PackagedKernel:
    """A rendered file, and what its launch needs besides tensors.

    config       a frozen dataclass: see docs of `launch` in the file
    file         a module of rendered/
    tile         rows or keys that a program owns, and programs for each tile; None for kernels without tiles
    descriptors  the tensors that each tensor descriptor describes
    scratch      the numbers that `ops.Op.scratch` computes with; empty if no launch needs scratch
    """

    config: Any
    file: str
    tile: tuple[int, int] | None
    descriptors: tuple[tuple[str, ...], ...]
    scratch: dict[str, int]


@dataclass(frozen=True)
class PackagedSpec:
    """All kernels of a spec, and the arguments of their launches: see the rendered files."""

    name: str
    spec: KernelSpec
    inputs: tuple[str, ...]
    written: tuple[str, ...]
    lengths: tuple[str, ...]
    scales: tuple[str, ...]
    sizes: tuple[str, ...]
    owns_keys: bool
    kernels: tuple[PackagedKernel, ...]

    def kernel(self, config: Any) -> PackagedKernel:
        """The kernel of a config."""
        return next(kernel for kernel in self.kernels if kernel.config == config)


@dataclass(frozen=True)
class Choices:
    """The kernels of a spec on a card, by bucket.

    sizes     the buckets' sizes: kv_rows, seqlen_q, seqlen_kv, window. One seqlen_kv stands for that of seqlen_q if
              the spec has no keys
    defaults  the default kernel of each bucket, in the order of `sizes`
    ranked    index of a bucket with records -> toolchain -> (kernel, tier, microseconds or None), best first
    """

    sizes: tuple[tuple[int, ...], ...]
    defaults: tuple[int, ...]
    ranked: dict[int, dict[str, tuple[Row, ...]]]

    def position(self, bucket: Bucket) -> int:
        """The index of the nearest bucket."""
        index = 0
        for sizes, size in zip(
            self.sizes, (bucket.kv_rows, bucket.seqlen_q, bucket.seqlen_kv, bucket.window), strict=True
        ):
            nearest = min(range(len(sizes)), key=lambda i: _distance(sizes[i], size))
            index = index * len(sizes) + nearest
        return index

    def at(self, bucket: Bucket, toolchain: str) -> tuple[Row, ...]:
        """The ranked (kernel, tier, microseconds) of a call, best first; none where only the default is known."""
        by_toolchain = self.ranked.get(self.position(bucket), {})
        return by_toolchain.get(toolchain) or by_toolchain.get(ANY_OTHER, ())


def _distance(a: int, b: int) -> float:
    return abs(math.log2(max(a, 1) / max(b, 1)))


@cache
def specs() -> dict[KernelSpec, PackagedSpec]:
    """The specs of this package."""
    return {entry.spec: entry for entry in map(_packaged_spec, _read(KERNELS_FILE)["specs"])}


@cache
def cards() -> dict[str, dict[str, Any]]:
    """Name of each card of this package -> what is known of it, the first one first."""
    return {name: _read(f"{name}.json") for name in _read(KERNELS_FILE)["cards"]}


def packaged(spec: KernelSpec) -> PackagedSpec:
    """The kernels of a spec. Raises ArgumentError, which names what there is."""
    entry = specs().get(spec)
    if entry is None:
        raise ArgumentError("this call", f"the kernel ({spec})", f"one of this package: {_listed(list(specs()))}")
    return entry


@cache
def choices(card: str, spec: KernelSpec) -> Choices:
    """The kernels of a spec on a card."""
    data = cards()[card]["choices"][packaged(spec).name]
    runs = zip(data["defaults"][::2], data["defaults"][1::2], strict=True)
    defaults = tuple(kernel for count, kernel in runs for _ in range(count))
    sizes = tuple(tuple(data[name]) for name in ("kv_rows", "seqlen_q", "seqlen_kv", "window"))
    ranked = {
        place["position"]: {
            toolchain: tuple((row[0], row[1], row[2]) for row in rows) for toolchain, rows in place["choices"].items()
        }
        for place in data["ranked"]
    }
    return Choices(sizes, defaults, ranked)


def _listed(given: Sequence[KernelSpec]) -> str:
    return "; ".join(f"({spec})" for spec in given)


def _packaged_spec(data: dict[str, Any]) -> PackagedSpec:
    spec = KernelSpec(**data["spec"])
    # One class for all configs, so that equal ones are equal and dataclasses.replace works.
    config_class = make_dataclass("Config", list(data["kernels"][0]["config"]), frozen=True)
    kernels = tuple(
        PackagedKernel(
            config_class(**kernel["config"]),
            kernel["file"],
            tuple(kernel["tile"]) if kernel["tile"] else None,
            tuple(map(tuple, kernel["descriptors"])),
            kernel["scratch"],
        )
        for kernel in data["kernels"]
    )
    arguments = {name: tuple(data[name]) for name in ("inputs", "written", "lengths", "scales", "sizes")}
    return PackagedSpec(data["name"], spec, owns_keys=data["owns_keys"], kernels=kernels, **arguments)


def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((CONFIGS / name).read_text(encoding="utf-8"))
    return data
