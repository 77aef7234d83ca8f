"""A lock: which kernel each place gets, as JSON lines that people review. Dispatch takes those and nothing else.

The first line is the header, then each place has a line: the place and the config as in records, the fingerprint of the
kernel that the config renders, and the toolchain that compiles it. Lines are in the order of places, so that two locks
can be compared. A lock may come from anywhere: each line is checked as an imported record is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import parallax_gen
from parallax_gen.codegen.render import render
from parallax_gen.environment import LOCK, LOCK_MISSING, STRICT, is_on
from parallax_gen.errors import ArgumentError, ConfigError, LockError, StoreError
from parallax_gen.files import replace_file
from parallax_gen.memory.bounds import check_flat, check_text, shown
from parallax_gen.memory.commands import lock_command
from parallax_gen.memory.old import config_of_record
from parallax_gen.memory.place import Place, kernels_of, place_of
from parallax_gen.memory.ranking import Candidate, Tier, default_of
from parallax_gen.memory.result import LONGEST_REASON, MALFORMED
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig, config_to_dict
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import bucket_of, representative

FORMAT = 1
HEADER = ("lock", "parallax_gen")  # the format, and the version that wrote the file
FIELDS = ("place", "config", "kernel", "triton", "cuda")
MISSING = ("error", "default")  # what a call gets that is not in the lock
NO_CHECK = "which decides: locked kernels are not checked for spills"


@dataclass(frozen=True)
class LockedKernel:
    """A line of a lock.

    kernel     the fingerprint of the rendered kernel: see codegen/fingerprint.py. If calls of the place may launch
               several, one for all of them: see `kernels_of`
    toolchain  its full versions: a lock allows no other
    """

    place: Place
    config: KernelConfig
    kernel: str
    toolchain: Toolchain

    @classmethod
    def here(cls, place: Place, config: KernelConfig, gpu: Gpu) -> LockedKernel:
        """A config's kernel as this process renders and compiles it. Raises ConfigError if the config is invalid."""
        return cls(place, config, _fingerprint(place, config, gpu), Toolchain.here())

    def to_dict(self) -> dict[str, Any]:
        return {
            "place": self.place.flat(),
            "config": config_to_dict(self.config),
            "kernel": self.kernel,
            "triton": self.toolchain.triton,
            "cuda": self.toolchain.cuda,
        }

    @classmethod
    def from_dict(cls, data: object) -> LockedKernel:
        """The inverse of `to_dict`. Raises ArgumentError or ConfigError on anything else."""
        if not isinstance(data, dict) or set(data) != set(FIELDS):
            raise ArgumentError("line", shown(data), f"an object with {', '.join(FIELDS)}")
        for name in ("place", "config"):
            if not isinstance(data[name], dict):
                raise ArgumentError(name, shown(data[name]), "an object of its fields")
            check_flat(name, data[name])
        place = Place.from_flat(data["place"])
        check_text("gpu", place.gpu)
        bucket = place.bucket
        if place.spec.window != (bucket.window > 0) or bucket_of(representative(bucket, place.spec.group)) != bucket:
            raise ArgumentError("bucket", bucket, "the bucket of a call of this kernel")
        if place != (shared := place_of(place.gpu, place.spec, bucket)):
            unused = dict(place.flat().items() - shared.flat().items())
            raise ArgumentError(
                "place", unused, "the place that batch-invariant calls share, since they look up no other"
            )
        for name in ("kernel", "triton", "cuda"):
            check_text(name, data[name])
        if not data["kernel"]:
            raise ArgumentError("kernel", "an empty text", "32 hex digits")
        config = config_of_record(place.spec.op, data["config"])
        return cls(place, config, data["kernel"], Toolchain(data["triton"], data["cuda"]))


@dataclass(frozen=True, repr=False)
class Lock:
    """The kernels of a lock, by place.

    missing  what a call gets that is not in the lock: "error", or its "default"
    """

    path: Path
    kernels: Mapping[Place, LockedKernel]
    missing: str = "error"

    def __post_init__(self) -> None:
        if self.missing not in MISSING:
            raise ArgumentError("missing", f"{self.missing!r:.80}", " or ".join(map(repr, MISSING)))

    def __repr__(self) -> str:
        return f"<{self.path}: {self.count}, missing={self.missing!r}>"

    @property
    def count(self) -> str:
        """How many kernels and buckets it has, for people."""
        s = "" if len(self.kernels) == 1 else "s"
        return f"{len(self.kernels)} kernel{s} and bucket{s}"

    @cached_property
    def identity(self) -> str:
        """Equal for locks that give equal kernels, whatever the order of their lines; for people, too."""
        digest = hashlib.sha256(_lines(self.kernels.values()).encode()).hexdigest()[:12]
        return f"{digest}, missing={self.missing}"

    @property
    def refuses_others(self) -> bool:
        """Whether a call is an error that is not in the lock."""
        return self.missing == "error" or is_on(STRICT)

    @property
    def others(self) -> str:
        """What calls get that are not in the lock, for people."""
        return "an error" if self.refuses_others else "their defaults"

    def candidate(self, place: Place, gpu: Gpu) -> Candidate:
        """What a call at a place gets. gpu: its card.

        Raises LockError if the lock lacks the place, unless missing is "default" and PARALLAX_GEN_STRICT is off; and if
        `problem` finds any.
        """
        locked = self.kernels.get(place)
        if locked is None:
            if self.refuses_others:
                allowed = f"{STRICT} is on" if self.missing != "error" else 'missing="default" allows its default'
                raise LockError(f"{self.lacks(place)}: run `{lock_command(place, self.path)}` to add it ({allowed})")
            return Candidate(Tier.DEFAULT, default_of(place, gpu), None)
        if problem := self.problem(locked, gpu):
            raise LockError(problem)
        return Candidate(Tier.DEFAULT, locked.config, None, locked=True)

    def lacks(self, place: Place) -> str:
        return f"{self.path} does not have {_text(place)}"

    def problem(self, locked: LockedKernel, gpu: Gpu) -> str:
        """Why this process cannot run a kernel of this lock, and the command that mends it; "" if it can."""
        here, place = Toolchain.here(), locked.place
        reason = ""
        if locked.toolchain != here:
            reason = f"with {_versions(locked.toolchain)}, but here is {_versions(here)}"
        else:
            try:
                kernel = _fingerprint(place, locked.config, gpu)
                if kernel != locked.kernel:
                    reason = f"as kernel {locked.kernel[:12]}, but its config now renders kernel {kernel[:12]}"
            except ConfigError as error:
                reason = f"with a config that is not valid any more ({error})"
        if not reason:
            return ""
        command = lock_command(place, self.path)
        return f"{self.path} has {_text(place)} {reason}: run `{command}` to lock what calls get here now"


def read_lock(path: Path, missing: str = "error") -> Lock:
    """The lock in a file. Raises StoreError, which names the file and the line, if it is no lock; ArgumentError."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise StoreError(f"cannot read the lock {path}: {error}") from error
    kernels: dict[Place, LockedKernel] = {}
    for number, line in enumerate(lines or [b""], start=1):
        try:
            data = json.loads(line) if number == 1 or line.strip() else None
            if number == 1:
                _check_header(data)
            elif data is not None:
                locked = LockedKernel.from_dict(data)
                if locked.place in kernels:
                    raise ArgumentError("place", _text(locked.place), "each place once")
                kernels[locked.place] = locked
        except MALFORMED as error:
            what = "not the header of a lock" if number == 1 else "not a locked kernel"
            raise StoreError(f"{path}, line {number}: {what}: {str(error)[:LONGEST_REASON]}") from error
    return Lock(path, kernels, missing)


def check_replaceable(path: Path) -> None:
    """Raises StoreError if a file is no lock, which `write_lock` must not replace. A lock may have any format."""
    try:
        first = path.read_bytes().partition(b"\n")[0]
        _check_names(json.loads(first or b"null"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"cannot read the lock {path}: {error}") from error
    except MALFORMED as error:
        raise StoreError(f"{path} is not a lock, so it is not replaced: name another file, or remove it") from error


def _fingerprint(place: Place, config: KernelConfig, gpu: Gpu) -> str:
    """The fingerprint of a place's kernel, or one for all that its calls may launch. Raises ConfigError."""
    kernels = [render(place.spec, config, gpu).kernel]
    for spec, config_there in kernels_of(place, config)[1:]:
        with suppress(ConfigError):  # such as a block that does not fit beside a page table: calls in pages will say so
            kernels.append(render(spec, config_there, gpu).kernel)
    return kernels[0] if len(kernels) == 1 else hashlib.sha256(" ".join(kernels).encode()).hexdigest()[:32]


def write_lock(path: Path, kernels: Iterable[LockedKernel]) -> None:
    """Replace a lock's file atomically. Raises StoreError."""
    header = json.dumps(dict(zip(HEADER, (FORMAT, parallax_gen.__version__), strict=True)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, f"{header}\n{_lines(kernels)}", durable=True)
    except OSError as error:
        raise StoreError(f"cannot write the lock {path}: {error}") from error


def lock_of_environment() -> Lock | None:
    """The lock that PARALLAX_GEN_LOCK names; None if it is not set. Raises StoreError and ArgumentError."""
    path = os.environ.get(LOCK)
    if not path:
        return None
    missing = os.environ.get(LOCK_MISSING) or "error"
    if missing not in MISSING:
        raise ArgumentError(LOCK_MISSING, repr(missing), " or ".join(MISSING))
    return read_lock(Path(path).expanduser().absolute(), missing)


def lock_text(lock: Lock | None) -> str:
    """Whether a lock is on, for people."""
    if lock is None:
        return f"no lock is on ({LOCK} is not set)"
    return f"{lock.path} is on: {lock.count}; others get {lock.others}"


def _check_names(data: object) -> dict[str, object]:
    """The header, if these are its fields."""
    if not isinstance(data, dict) or set(data) != set(HEADER):
        raise ArgumentError("line", shown(data), f"an object with {' and '.join(HEADER)}")
    return data


def _check_header(line: object) -> None:
    data = _check_names(line)
    if type(data["lock"]) is not int or data["lock"] != FORMAT:
        raise ArgumentError("lock", shown(data["lock"]), f"{FORMAT}, the format that this version reads")
    check_text("parallax_gen", data["parallax_gen"])


def _lines(kernels: Iterable[LockedKernel]) -> str:
    ordered = sorted(kernels, key=lambda locked: locked.place.order)
    return "".join(json.dumps(locked.to_dict()) + "\n" for locked in ordered)


def _text(place: Place) -> str:
    return f"{place.spec}; {place.bucket} on {place.gpu}"


def _versions(toolchain: Toolchain) -> str:
    return f"Triton {toolchain.triton}, ptxas {toolchain.cuda or 'unknown'}"
