"""One row of what is known, checked like a user's input, and which of two rows counts. Pure data, no database."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, fields
from datetime import datetime, timedelta, timezone
from typing import Any

from parallax_gen.errors import ArgumentError, ParallaxGenError
from parallax_gen.machine import stored_of_machine
from parallax_gen.memory.keys import Environment, Key, Scalar
from parallax_gen.problem.config import (
    CONFIG_OF_OP,
    KernelConfig,
    config_from_dict,
    config_to_dict,
    config_to_json,
)
from parallax_gen.problem.shapes import Shape

OUTCOMES = ("ok", "invalid", "compile", "resources", "timeout", "crash", "wrong", "slow", "predicted")

# What `Result.from_dict(json.loads(text))` raises for a text that is no result, and how much is told of why.
NO_RESULT = (ParallaxGenError, ValueError, RecursionError)
LONGEST_REASON = 200

Diff = dict[str, tuple[Scalar | None, Scalar | None]]


def now() -> str:
    """The time of day in UTC, as `Result.created_at` holds it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Result:
    """What is known of one config under one key: measured, predicted or failed.

    outcome       one of OUTCOMES: "ok" was measured, "predicted" is a model's guess, the rest are failures
    shape         the sizes that were timed
    time_us       median; of a predicted row, the estimate; beside it the 20th and 80th percentiles
    error         relative error against the oracle; inf if the output was not finite
    registers, spills, shared_bytes   what the compiled kernel takes: a thread, bytes a thread, bytes a program
    compile_s     seconds it took to compile
    detail        why it failed; "" otherwise
    created_at    ISO 8601, UTC
    source        where it comes from, such as "measured on NVIDIA H200"

    Raises ArgumentError on values of another kind: rows that were read are checked like a user's input.
    """

    key: Key
    config: KernelConfig
    outcome: str
    shape: Shape | None = None
    time_us: float | None = None
    time_us_p20: float | None = None
    time_us_p80: float | None = None
    error: float | None = None
    registers: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None
    compile_s: float | None = None
    detail: str = ""
    created_at: str = field(default_factory=now)
    source: str = ""

    def __post_init__(self) -> None:
        environment = self.key.environment
        texts = {"gpu": self.key.gpu} | {n: getattr(environment, n) for n in ("templates", "triton", "cuda")}
        texts |= {name: getattr(self, name) for name in ("detail", "created_at", "source")}
        for name, value in texts.items():
            if not isinstance(value, str):
                raise ArgumentError(name, repr(value), "text")
        for name in ("protocol", "space"):
            if type(getattr(environment, name)) is not int:
                raise ArgumentError(name, repr(getattr(environment, name)), "an int")
        if type(self.config) is not CONFIG_OF_OP[self.key.spec.op]:
            raise ArgumentError("config", self.config, f"a config of op {self.key.spec.op!r}")
        if self.outcome not in OUTCOMES:
            raise ArgumentError("outcome", repr(self.outcome), ", ".join(OUTCOMES))
        for name in ("time_us", "time_us_p20", "time_us_p80", "compile_s", "error"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and (0 <= value < math.inf or (name, value) == ("error", math.inf))):
                raise ArgumentError(name, repr(value), "None or a number of 0 or more")
        for name in ("registers", "spills", "shared_bytes"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ArgumentError(name, repr(value), "None or an int of 0 or more")
        if self.outcome in ("ok", "predicted") and not self.time_us:
            raise ArgumentError("time_us", self.time_us, f"more than 0 when the outcome is {self.outcome!r}")
        if self.created.utcoffset() != timedelta(0):
            raise ArgumentError("created_at", self.created_at, "a time in UTC, such as 2026-01-31T12:00:00+00:00")

    @property
    def measured(self) -> bool:
        return self.outcome == "ok"

    @property
    def of_machine(self) -> bool:
        """Whether it is a fault of the machine that an earlier version stored as the config's own: it tells nothing."""
        return stored_of_machine(self.outcome, self.detail)

    @property
    def created(self) -> datetime:
        return datetime.fromisoformat(self.created_at)

    @property
    def identity(self) -> tuple[str, str]:
        """What there is one row of: the key's digest and the config's text."""
        return self.key.digest, config_to_json(self.config)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON can hold it."""
        parts = {
            "key": self.key.flat(),
            "config": config_to_dict(self.config),
            "shape": self.shape and self.shape.to_dict(),
        }
        return {f.name: parts[f.name] if f.name in parts else getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: object) -> Result:
        """The result that `to_dict` wrote. Raises ArgumentError, ConfigError or ValueError on anything else.

        The key may be one already.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(data, dict) or set(data) != set(names):
            raise ArgumentError("record", data, f"an object of exactly {names}")
        parts = {name: data[name] for name in ("key", "config", "shape")}
        for name, part in parts.items():
            known = isinstance(part, Key) if name == "key" else part is None and name == "shape"
            if not (known or isinstance(part, dict)):
                raise ArgumentError(name, repr(part), "an object of its fields")
        key = parts["key"] if isinstance(parts["key"], Key) else key_from_dict(parts["key"])
        config = config_from_dict(key.spec.op, parts["config"])
        shape = None if parts["shape"] is None else Shape.from_dict(parts["shape"])
        return cls(**(data | {"key": key, "config": config, "shape": shape}))


def key_from_dict(data: Mapping[str, Any]) -> Key:
    """The key that `Key.flat` wrote. Raises ArgumentError on anything else."""
    try:
        key = Key.from_flat(data)
    except KeyError as missing:
        raise ArgumentError("key", data, f"every field of a key, in clear ({missing})") from missing
    if key.flat() != data:
        raise ArgumentError("key", data, f"no fields beside {list(key.flat())}")
    return key


def supersedes(new: Result, old: Result) -> bool:
    """Whether `new` takes the place of `old`, a row of the same key and config.

    First by how much a row tells. One that the machine failed (`of_machine`) tells nothing. A prediction tells little:
    it never replaces anything that was tried. A "timeout" or a "crash" may be the machine's fault (a busy GPU), so it
    does not erase a verdict, above all not a measured time: nothing found is lost to a bad rerun. Of rows that tell as
    much the newer counts, so that the same row remains whichever process happens to write last.
    """

    def weight(result: Result) -> tuple[int, datetime]:
        tells = -1 if result.of_machine else {"predicted": 0, "timeout": 1, "crash": 1}.get(result.outcome, 2)
        return tells, result.created

    return weight(new) >= weight(old)


def reading_order(result: Result) -> tuple[Any, ...]:
    """Sorts by key field by field, then the measured from fast to slow, then the predicted, then the failed."""
    group = {"ok": 0, "predicted": 1}.get(result.outcome, 2)
    return (*result.key.order, group, result.time_us or 0.0, config_to_json(result.config))


def newest_environment_first(results: Iterable[Result]) -> list[Result]:
    """Environment by environment, that of the newest result first, and in each of them in reading order.

    Results of two environments never stand in each other's place, so there is nothing to choose between them: the
    order is for whoever reads, and begins with what most likely counts.
    """
    ordered = sorted(results, key=reading_order)
    newest: dict[Environment, datetime] = {}
    for result in ordered:
        environment = result.key.environment
        newest[environment] = max(result.created, newest.get(environment, result.created))
    rank = {e: n for n, e in enumerate(sorted(newest, key=lambda e: (newest[e], astuple(e)), reverse=True))}
    return sorted(ordered, key=lambda result: rank[result.key.environment])


def near_misses(key: Key, results: Iterable[Result]) -> list[tuple[Result, Diff]]:
    """The measured results that come nearest to `key` without being its own, each with the fields that differ.

    Those of the same GPU, spec and bucket in another environment; if there are none, those of the same GPU and
    spec in another bucket. Fewest differences first, then fastest.
    """
    near = [r for r in results if r.measured and (r.key.gpu, r.key.spec) == (key.gpu, key.spec) and r.key != key]
    same_bucket = [r for r in near if r.key.bucket == key.bucket]
    misses = [(r, key.diff(r.key)) for r in same_bucket or near]
    return sorted(misses, key=lambda miss: (len(miss[1]), miss[0].time_us))
