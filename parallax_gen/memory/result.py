"""The result of a config, checked like user input, and the rule for which of two results supersedes the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from parallax_gen.errors import ArgumentError, ParallaxGenError, is_stored_machine_error
from parallax_gen.memory.bounds import INTS, NUMBERS, check_flat, check_int, check_number, check_text, shown
from parallax_gen.memory.old import config_of_record, upgrade_record
from parallax_gen.memory.place import Place, Scalar
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig, config_to_dict, config_to_json, op_of
from parallax_gen.problem.shapes import Shape

# Version of the timing protocol, see tuning/workers/measure.py: times of different protocols are not compared.
PROTOCOL = 1

# What `Result.from_dict(json.loads(text))` raises on a malformed text, and how many characters of the reason are shown.
MALFORMED = (ParallaxGenError, ValueError, RecursionError)
LONGEST_REASON = 200


def now() -> str:
    """The current time in UTC, in the format of `Result.created_at`."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Outcome(str, Enum):
    """How the trial of a config ended. Records, JSON and messages contain its text."""

    OK = "ok"
    INVALID = "invalid"
    COMPILE = "compile"
    RESOURCES = "resources"
    TIMEOUT = "timeout"
    CRASH = "crash"
    WRONG = "wrong"
    SLOW = "slow"
    PREDICTED = "predicted"

    # Without these an f-string gives "Outcome.OK", and a lookup by outcome fails in a dict keyed by its text.
    __str__ = str.__str__
    __hash__ = str.__hash__

    @property
    def timed(self) -> bool:
        """Whether calls were timed. SLOW has the median of only a few replays of the CUDA graph."""
        return self in (Outcome.OK, Outcome.SLOW)

    @property
    def failed(self) -> bool:
        """Whether the config can never be chosen. A SLOW one was already slower than the best."""
        return self not in (Outcome.OK, Outcome.PREDICTED)

    @property
    def tried(self) -> bool:
        """Whether a trial ended so; a prediction compiles a config, and never runs it."""
        return self is not Outcome.PREDICTED

    @property
    def has_time(self) -> bool:
        """Whether there is a time, measured or predicted."""
        return self.timed or self is Outcome.PREDICTED

    @property
    def inconclusive(self) -> bool:
        """Whether the machine may be at fault, such as a busy GPU, so that the next trial may end differently."""
        return self in (Outcome.TIMEOUT, Outcome.CRASH)

    @property
    def may_be_machine_fault(self) -> bool:
        """Whether earlier versions stored faults of the machine under this outcome."""
        return self in (Outcome.COMPILE, Outcome.RESOURCES, Outcome.CRASH)

    @property
    def meaning(self) -> str:
        """The outcome in words, for people."""
        return _MEANINGS[self]


_MEANINGS = {
    Outcome.OK: "timed to the end",
    Outcome.INVALID: "not a config of this kernel",
    Outcome.COMPILE: "did not compile",
    Outcome.RESOURCES: "needs more registers, shared memory or card memory than there are",
    Outcome.TIMEOUT: "took too long",
    Outcome.CRASH: "killed its process",
    Outcome.WRONG: "gave wrong results",
    Outcome.SLOW: "timed only briefly: far slower than the best",
    Outcome.PREDICTED: "predicted by a model",
}


@dataclass(frozen=True)
class Evidence:
    """What was measured, and how: identifies the rendered program, not the templates that rendered it.

    kernel     fingerprint of the rendered kernel (codegen/fingerprint.py); "" if it is unknown
    text       hash of the kernel's text below its header: equal texts have equal fingerprints. "" if it is unknown
    triton     its full version
    cuda       releases of Triton's ptxas: see `toolchain.cuda_version`; "" if it is unknown
    protocol   version of the timing protocol
    templates  hash of the templates that rendered the kernel, in records from before fingerprints; else ""
    """

    kernel: str
    text: str
    triton: str
    cuda: str
    protocol: int
    templates: str = ""

    @classmethod
    def here(cls, kernel: str, text: str) -> Evidence:
        """The evidence for a kernel that this process measures."""
        here = Toolchain.here()
        return cls(kernel, text, here.triton, here.cuda, PROTOCOL)

    @property
    def toolchain(self) -> Toolchain:
        return Toolchain(self.triton, self.cuda)

    @property
    def measured_with(self) -> str:
        """The toolchain, and the timing protocol if it is not today's, for people."""
        protocol_note = (
            "" if self.protocol == PROTOCOL else f" by timing protocol {self.protocol} (today's is {PROTOCOL})"
        )
        return f"{self.toolchain}{protocol_note}"

    @property
    def identity(self) -> tuple[Scalar, ...]:
        """Measurements of a config with equal identity replace each other."""
        return self.kernel, self.templates, self.triton, self.cuda, self.protocol

    def to_dict(self) -> dict[str, Scalar]:
        """All fields; `templates` only if it is set."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "templates" or self.templates}


@dataclass(frozen=True)
class Result:
    """The result of one config at one place: measured, predicted or failed.

    evidence      the kernel and what compiled it
    outcome       OK was measured, PREDICTED is a model's estimate, the others are failures; may be given as its text
    shape         the sizes that were timed
    time_us       the median, with the 20th and 80th percentiles in the next two fields; for PREDICTED the estimate
    error         relative error against the oracle; inf if the output was not finite
    registers, spills, shared_bytes   of the compiled kernel: per thread, bytes per thread, bytes per block
    compile_s     seconds it took to compile
    detail        why it failed; "" otherwise
    created_at    ISO 8601, UTC
    source        what the time is, such as "measured on NVIDIA H200"
    trial         which of its place's trials this was, from 1 in the order in which they ended; None if it is not
                  known, as in older records. `Store.save_trial` numbers them. Equality ignores it

    Raises ArgumentError on values of a wrong type or beyond the bounds of memory/bounds.py: records of a file are
    checked like user input.
    """

    place: Place
    evidence: Evidence
    config: KernelConfig
    outcome: Outcome
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
    trial: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        evidence = self.evidence
        texts = {name: getattr(evidence, name) for name in ("kernel", "text", "triton", "cuda", "templates")}
        texts |= {name: getattr(self, name) for name in ("detail", "created_at", "source")} | {"gpu": self.place.gpu}
        for name, text in texts.items():
            check_text(name, text)
        check_int("protocol", evidence.protocol)
        if type(self.config) is not op_of(self.place.spec).config:
            raise ArgumentError("config", self.config, f"a config of op {self.place.spec.public_op!r}")
        try:
            object.__setattr__(self, "outcome", Outcome(self.outcome))
        except ValueError as error:
            raise ArgumentError("outcome", shown(self.outcome), ", ".join(Outcome)) from error
        for names, check in ((NUMBERS, check_number), (INTS, check_int)):
            for name in names:
                if (value := getattr(self, name)) is not None:
                    check(name, value)
        if self.time_us is None and not self.outcome.failed:
            raise ArgumentError("time_us", self.time_us, f"a number when the outcome is {self.outcome.value!r}")
        if self.trial is not None:
            check_int("trial", self.trial, minimum=1)
        try:
            self.created  # noqa: B018 - well-formed, but the day may not exist
        except ValueError as error:
            raise ArgumentError("created_at", shown(self.created_at), f"a time that exists ({error})") from error

    @property
    def measured(self) -> bool:
        return self.outcome is Outcome.OK

    @property
    def is_machine_fault(self) -> bool:
        """Whether an earlier version stored a machine's fault as the config's failure. Such a record is ignored."""
        return self.outcome.may_be_machine_fault and is_stored_machine_error(self.detail)

    @property
    def informative(self) -> bool:
        """Whether the config was tried, and no fault of the machine ended the trial."""
        return self.outcome.tried and not self.is_machine_fault

    @property
    def created(self) -> datetime:
        return datetime.fromisoformat(self.created_at)

    @property
    def identity(self) -> tuple[Scalar, ...]:
        """The unique key of a record: the place, the config, and the evidence's identity."""
        return self.place.text, config_to_json(self.config), *self.evidence.identity

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `trial` only if it is set."""
        parts = {
            "place": self.place.flat(),
            "config": config_to_dict(self.config),
            "evidence": self.evidence.to_dict(),
            "outcome": self.outcome.value,
            "shape": self.shape and self.shape.to_dict(),
        }
        values = {f.name: parts[f.name] if f.name in parts else getattr(self, f.name) for f in fields(self)}
        if self.trial is None:
            del values["trial"]
        return values

    @classmethod
    def from_dict(cls, data: object) -> Result:
        """The inverse of `to_dict`, of this version or from before fingerprints.

        Raises ArgumentError, ConfigError or ValueError on anything else. The value of "place" may be a Place.
        """
        names = [f.name for f in fields(cls) if f.name != "trial"]
        if isinstance(data, dict) and "key" in data and "place" not in data:
            data = upgrade_record(data)
        if not isinstance(data, dict) or set(data) - {"trial"} != set(names):
            raise ArgumentError("record", shown(data), f"an object of exactly {names}, and optionally trial")
        parts = {name: data[name] for name in ("place", "evidence", "config", "shape")}
        for name, part in parts.items():
            valid = isinstance(part, Place) if name == "place" else part is None and name == "shape"
            if not (valid or isinstance(part, dict)):
                raise ArgumentError(name, shown(part), "an object of its fields")
            check_flat(name, {} if part is None or isinstance(part, Place) else part)
        check_flat("record", {name: value for name, value in data.items() if name not in parts})
        place = parts["place"] if isinstance(parts["place"], Place) else Place.from_flat(parts["place"])
        config = config_of_record(place.spec.op, parts["config"])
        shape = None if parts["shape"] is None else Shape.from_dict(parts["shape"])
        evidence = _evidence_from(parts["evidence"])
        return cls(**(data | {"place": place, "evidence": evidence, "config": config, "shape": shape}))


def _evidence_from(data: Mapping[str, Any]) -> Evidence:
    names = [f.name for f in fields(Evidence)]
    if not set(names) - {"templates"} <= set(data) <= set(names) or data.get("templates") == "":
        raise ArgumentError("evidence", shown(data), f"an object of {names}, templates only if not empty")
    return Evidence(**data)


def supersedes(new: Result, old: Result) -> bool:
    """Whether `new` replaces `old`, a record of the same identity.

    The more informative result wins. A fault of the machine (`is_machine_fault`) is the least informative, then comes a
    prediction, then an inconclusive outcome, which may be the machine's fault (a busy GPU), and last a conclusive one.
    So a bad rerun loses no measured time. Of two equally informative results the newer one wins: the same record
    remains, whichever process writes last.
    """

    def weight(result: Result) -> tuple[int, datetime]:
        if not result.informative:
            return -1 if result.is_machine_fault else 0, result.created
        return 1 if result.outcome.inconclusive else 2, result.created

    return weight(new) >= weight(old)


def reading_order(result: Result) -> tuple[Any, ...]:
    """The sort key of results: place field by field, then measured from fast to slow, then predicted, then failed."""
    group = 0 if result.measured else 2 if result.outcome.failed else 1
    return *result.place.order, group, result.time_us or 0.0, config_to_json(result.config), result.evidence.identity


def newest_toolchain_first(results: Iterable[Result]) -> list[Result]:
    """Results grouped by toolchain: the one with the newest result first, each toolchain's in `reading_order`.

    The order is for display only: results of different toolchains never replace each other.
    """
    ordered = sorted(results, key=reading_order)
    newest: dict[Toolchain, datetime] = {}
    for result in ordered:
        toolchain = result.evidence.toolchain
        newest[toolchain] = max(result.created, newest.get(toolchain, result.created))
    rank = {t: n for n, t in enumerate(sorted(newest, key=lambda t: (newest[t], t.triton, t.cuda), reverse=True))}
    return sorted(ordered, key=lambda result: rank[result.evidence.toolchain])
