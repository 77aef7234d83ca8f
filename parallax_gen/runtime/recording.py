"""Counts the launches of each kernel in each bucket, and writes them to a file: `parallax_gen.record`."""

from __future__ import annotations

import atexit
import os
import threading
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

from parallax_gen.environment import RECORD
from parallax_gen.errors import ArgumentError, StoreError
from parallax_gen.memory.calls import Kernel, add_calls
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec

WRITE_EVERY_S = 60.0


class CallCount:
    """How often the plans of one kernel and bucket launched. Plans add to it directly: that is the cheapest."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class CallCounts:
    """The launches of this process. They are always counted, which takes less time than to ask whether to count."""

    def __init__(self) -> None:
        self._counts: dict[Kernel, CallCount] = {}

    def of(self, spec: KernelSpec, shape: Shape) -> CallCount:
        return self._counts.setdefault((spec, bucket_of(shape)), CallCount())

    def totals(self) -> Counter[Kernel]:
        return Counter({kernel: count.calls for kernel, count in self._counts.copy().items()})


class Recording:
    """The calls from its creation to `stop`, as a context to its end. `record` creates it.

    path  where they are written: once a minute, at `stop`, and when the process ends. None to only count
    """

    def __init__(self, counts: CallCounts, path: Path | None):
        self._counts, self._path, self._pid = counts, path, os.getpid()
        self._before = counts.totals()
        self._at_stop: Counter[Kernel] | None = None
        self._written: Counter[Kernel] = Counter()
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        if path is not None:
            add_calls(path, {})  # raises now rather than at the end
            atexit.register(self._write_or_warn)
            threading.Thread(target=self._write_now_and_then, name="parallax_gen.record", daemon=True).start()

    @property
    def calls(self) -> Counter[Kernel]:
        """(spec, bucket) -> calls, so far or until `stop`."""
        return (self._counts.totals() if self._at_stop is None else self._at_stop) - self._before

    def stop(self) -> None:
        """Count no more, and write what is not written yet. Raises StoreError if that fails."""
        if self._at_stop is None:
            self._at_stop = self._counts.totals()
            self._stopped.set()
            atexit.unregister(self._write_or_warn)
            self.write()

    def write(self) -> None:
        """Add the calls since the last write to the file, if there is one. Raises StoreError if that fails."""
        with self._lock:
            calls = self.calls
            if self._path is not None and calls != self._written:
                add_calls(self._path, calls - self._written)
                self._written = calls

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        calls = self.calls
        where = f", in {self._path}" if self._path else ""
        return f"<{calls.total()} calls of {len(calls)} kernels and buckets{where}>"

    def _write_now_and_then(self) -> None:
        while not self._stopped.wait(WRITE_EVERY_S):
            self._write_or_warn()

    def _write_or_warn(self) -> None:
        if os.getpid() != self._pid:  # in a forked child: these calls are its parent's
            return
        try:
            self.write()
        except StoreError as error:
            warnings.warn(f"calls are not recorded: {error}", stacklevel=2)


def record(path: str | Path | None = None) -> Recording:
    """Count the calls of each kernel and bucket of sizes from now on, for `parallax-gen tune --calls`.

        with parallax_gen.record("calls.jsonl"):
            train()

    As a function it counts until `stop` is called on the result, or to the end of the process. `calls` of the result
    has the counts so far.

    path  a file of JSON lines, to which the counts are added, also by several processes at a time; None for none. It
          is written once a minute, and at the end

    Each launch of a kernel counts once, in the forward and in the backward. Calls on CPU tensors launch nothing. Under
    torch.compile every run of the compiled code counts. A CUDA graph counts its calls once, when it is captured, not
    when it is replayed. Raises ArgumentError for another type of path, and StoreError if the file cannot be written, or
    has anything else in it.
    """
    if path is not None and not isinstance(path, str | os.PathLike):
        raise ArgumentError("path", f"{path!r:.80}", "a file's path, or None")
    return Recording(call_counts(), None if path is None else Path(path).expanduser().absolute())


@cache
def call_counts() -> CallCounts:
    """The counts of this process. If PARALLAX_GEN_RECORD names a file, they are written to it."""
    counts = CallCounts()
    if path := os.environ.get(RECORD):
        try:
            Recording(counts, Path(path).expanduser().absolute())
        except StoreError as error:  # must not stop training or serving
            warnings.warn(f"{RECORD}: calls are not recorded: {error}", stacklevel=2)
    return counts
