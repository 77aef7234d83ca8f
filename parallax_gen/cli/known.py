"""What the commands that look things up share: the memory, where a result comes from, whether it counts here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from parallax_gen.cli.text import rate, rate_unit
from parallax_gen.codegen.render import templates_hash
from parallax_gen.errors import UnknownGpuError
from parallax_gen.memory.keys import Key, Scalar
from parallax_gen.memory.results import Diff, Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape, representative


def open_memory() -> Memory:
    """The user's database, only to be read, over what ships. Raises StoreError if it cannot be used."""
    return Memory(Store(read_only=True))


class Origins:
    """Says of results whose they are: "yours" or "shipped"."""

    def __init__(self, memory: Memory, gpu: str | None = None):
        self._own = frozenset(memory.store.all(gpu)) if memory.store else frozenset()

    def of(self, result: Result) -> str:
        return "yours" if result in self._own else "shipped"

    def status(self, result: Result) -> str:
        """One word: measured (by the user), shipped, predicted, or how it failed."""
        if not result.measured:
            return result.outcome
        return "measured" if result in self._own else "shipped"

    def to_json(self, result: Result) -> dict[str, Any]:
        """Every field of a result, and what is worked out from them."""
        spec, time_us = result.key.spec, result.time_us
        return {
            **result.to_dict(),
            "origin": self.of(result),
            "used": not unlike_here(result.key),
            "unlike_here": differences(unlike_here(result.key)),
            "rate": rate(spec, shape_of(result), time_us) if time_us else None,
            "rate_unit": rate_unit(spec.op),
        }


def shape_of(result: Result) -> Shape:
    """The sizes its time is of."""
    return result.shape or representative(result.key.bucket, result.key.spec.group)


def unlike_here(key: Key) -> Diff:
    """What keeps records of a key from being used in this environment: field -> (here, there). Empty if nothing."""
    return Key.here(key.gpu, key.spec, key.bucket, templates_hash(key.spec)).diff(key)


def differences(diff: Diff) -> list[str]:
    """For people: `triton 3.8 (here 3.9)`, field by field; none is what one side lacks, unknown what no one wrote."""
    words: dict[Scalar | None, str] = {None: "none", "": "unknown"}
    told = {name: [words.get(value, value) for value in values] for name, values in diff.items()}
    return [f"{name.rpartition('.')[2]} {there} (here {here})" for name, (here, there) in told.items()]


def name_in_records(gpu: str, results: Iterable[Result]) -> str:
    """The name under which records of a GPU go. Raises UnknownGpuError for one that nothing is known by."""
    try:
        return gpu_by_name(gpu).name
    except UnknownGpuError:
        if any(result.key.gpu == gpu for result in results):
            return gpu
        raise
