"""How often each kernel was called in each bucket, as JSON lines: `record` writes them, `tune --calls` reads them."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from parallax_gen.errors import ArgumentError, StoreError
from parallax_gen.files import replace_file
from parallax_gen.memory.bounds import check_flat, shown
from parallax_gen.memory.old import spec_from
from parallax_gen.memory.result import LONGEST_REASON, MALFORMED
from parallax_gen.problem.shapes import LARGEST_SIZE, Bucket, bucket_of, representative
from parallax_gen.problem.spec import KernelSpec

Kernel = tuple[KernelSpec, Bucket]
FIELDS = ("spec", "bucket", "calls")


def read_calls(path: Path) -> Counter[Kernel]:
    """The calls in a file. Raises StoreError, which names the file and the line, if it is not of `add_calls`.

    The file may come from anywhere: every line is checked as a record's place is. Lines of one kernel and bucket add
    up, so files of several machines may be joined.
    """
    counts: Counter[Kernel] = Counter()
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                kernel, calls = _from_line(line)
            except MALFORMED as error:
                reason = str(error)[:LONGEST_REASON]
                raise StoreError(f"{path}, line {number}: not a kernel and its calls: {reason}") from error
            counts[kernel] += calls
    return counts


def add_calls(path: Path, counts: Mapping[Kernel, int]) -> None:
    """Add calls to those in a file, which is created if it is missing, and is always whole.

    Several processes may add to one file: a lock, `.NAME.lock` beside it, lets one at a time replace it. Raises
    StoreError if the file cannot be written or has anything else in it, and then leaves it as it is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            total = read_calls(path) if path.exists() else Counter()
            total.update(counts)
            most_first = sorted(total.items(), key=lambda item: item[1], reverse=True)
            replace_file(path, "".join(_to_line(kernel, calls) for kernel, calls in most_first))
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, which is another file: the file itself is replaced."""
    with path.with_name(f".{path.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _to_line(kernel: Kernel, calls: int) -> str:
    spec, bucket = kernel
    return json.dumps({"spec": spec.to_dict(), "bucket": bucket.to_dict(), "calls": calls}) + "\n"


def _from_line(line: bytes) -> tuple[Kernel, int]:
    """The inverse of `_to_line`. Raises one of MALFORMED on anything else."""
    data = json.loads(line)
    if not isinstance(data, dict) or set(data) != set(FIELDS):
        raise ArgumentError("line", shown(data), f"an object with {', '.join(FIELDS)}")
    for name in ("spec", "bucket"):
        if not isinstance(data[name], dict):
            raise ArgumentError(name, shown(data[name]), "an object of its fields")
        check_flat(name, data[name])
    spec, bucket, calls = spec_from(data["spec"]), Bucket.from_dict(data["bucket"]), data["calls"]
    if type(calls) is not int or not 1 <= calls <= LARGEST_SIZE:
        raise ArgumentError("calls", shown(calls), f"an int from 1 to {LARGEST_SIZE}")
    if spec.window != (bucket.window > 0) or bucket_of(representative(bucket, spec.group)) != bucket:
        raise ArgumentError("bucket", bucket, "the bucket of a call of this kernel")
    return (spec, bucket), calls
