"""Times ours and its peers on the same inputs in the same process, and says how far from the oracle each is."""

from __future__ import annotations

import errno
import gc
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace

import torch

from parallax_gen.bench.baselines.contenders import Contender, Prepared, contenders
from parallax_gen.bench.baselines.peers import forget_inputs, hasty_autotuners
from parallax_gen.bench.judge import Judge, random_case
from parallax_gen.bench.rows import OURS, WITH_CARE, Effort, Row
from parallax_gen.errors import MeasureError, MemoryTakenError, machine_error
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import bound_by_matmuls, rate
from parallax_gen.problem.workloads import TRAINING
from parallax_gen.tuning.workers.measure import time_call
from parallax_gen.tuning.workers.worker import Timing

DEVICE = "cuda"
EAGER_CALLS, HASTY_CALLS = 20, 5  # of what no CUDA graph can capture
MOST_SAID = 200  # characters of why someone does not run
SLOW = 3.0  # times as long as ours: in haste, timed no more than needed

GRADIENTS = ("dq", "dr", "dk", "dv")


@dataclass(frozen=True)
class Part:
    """What is timed of an op: which results it gives, and its matmuls beside those of Parallax's forward.

    Of Parallax and of softmax. A backward is counted with the 8 matmuls that one kernel for all gradients would do (5
    of softmax), however many kernels do it.
    """

    results: tuple[str, ...]
    parallax: float
    softmax: float


PARTS: dict[str, dict[str, Part]] = {
    "forward": {"forward": Part(("out",), 1.0, 0.5)},
    "decode": {"decode": Part(("out",), 1.0, 1.0)},  # counted in bytes: the same cache is read
    TRAINING: {
        "forward": Part(("out",), 1.0, 0.5),
        "backward": Part(GRADIENTS, 2.0, 1.25),
        "step": Part(("out", *GRADIENTS), 3.0, 1.75),
    },
}


def compare(
    op: str,
    spec: KernelSpec,
    shape: Shape,
    only: Sequence[str] = (),
    effort: Effort = WITH_CARE,
    lengths: tuple[int, ...] = (),
) -> list[Row]:
    """Every contender, or those in `only`, on fresh random inputs of a shape; ours first. spec, lengths: as of Row.

    Where the card's memory does not hold the inputs or what ours needs, that is every row's note. Raises MeasureError
    where a peer leaves the device so that nothing runs any more, and MachineError where the disk is full or another
    process holds the memory: that is nobody's result.
    """
    chosen = [contender for contender in contenders(op) if not only or contender.name in only]
    asked = [Row(contender.name, op, part, spec, shape, lengths=lengths) for contender in chosen for part in PARTS[op]]
    try:
        with _precision(spec), hasty_autotuners() if effort.hasty else nullcontext():
            return _compare(asked, chosen, effort)
    except torch.OutOfMemoryError as failure:
        _check_machine(failure)
        return [replace(row, note="skipped: out of memory") for row in asked]
    finally:
        forget_inputs()
        gc.collect()  # of peers whose objects refer to each other, and hold a cache of many GB
        with suppress(RuntimeError):  # of a device that a peer left unusable, which is told of as that
            torch.cuda.empty_cache()


def _compare(asked: list[Row], chosen: list[Contender], effort: Effort) -> list[Row]:
    op, spec, shape = asked[0].op, asked[0].spec, asked[0].shape
    inputs = random_case(op, spec, shape, DEVICE, asked[0].lengths)
    judge = Judge(op, spec, shape, inputs, effort.oracle)
    ready: dict[str, Prepared] = {}
    found: list[Row] = []
    for contender in chosen:
        rows = [row for row in asked if row.contender == contender.name]
        try:
            prepared = contender.prepare(spec, inputs)
            results = prepared.results()  # also of softmax, whose errors are no matter: does it run?
            torch.cuda.synchronize()
            wrong = judge.errors(results) if contender.parallax else {}
        except Exception as failure:  # a peer's failure, of whatever type, is a result of the comparison
            if contender.name == OURS:
                raise
            _check_machine(failure)
            _check_device(contender.name, failure)
            found += [replace(row, note=_why_not(failure)) for row in rows]
        else:
            ready[contender.name] = prepared
            checked = judge.rows if contender.parallax else 0
            found += [replace(row, error=_error(PARTS[op][row.part], wrong), checked=checked) for row in rows]
    times = _times(ready, effort, from_rest=bound_by_matmuls(spec.op))
    return [_timed(row, chosen, times) for row in found]


def _check_machine(failure: Exception) -> None:
    """Raise MachineError where the machine failed. A package or a tool that is not there is the peer's own affair."""
    fault, its_own = machine_error(failure), not isinstance(failure, OSError) or failure.errno == errno.ENOENT
    if fault is not None and (isinstance(fault, MemoryTakenError) or not its_own):
        raise fault from failure


def _check_device(name: str, failure: Exception) -> None:
    """After a fault on the device every later call fails, whoever makes it. Raises MeasureError."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise MeasureError(
            f"{name} left the device unusable ({_why_not(failure)}): run again with --skip {name!r}"
        ) from failure


def _error(part: Part, wrong: dict[str, float]) -> float | None:
    return max((wrong[name] for name in part.results), default=None) if wrong else None


def _why_not(failure: Exception) -> str:
    if isinstance(failure, ImportError):
        return "not installed"
    if isinstance(failure, torch.OutOfMemoryError):
        return "out of memory"
    kind = "not supported" if isinstance(failure, NotImplementedError) else type(failure).__name__
    return f"{kind}: {failure}".splitlines()[0][:MOST_SAID]


# By contender and part: its time, None where it has none, and a note on how it was timed.
Times = dict[tuple[str, str], tuple[Timing | None, str]]


def _times(ready: dict[str, Prepared], effort: Effort, *, from_rest: bool) -> Times:
    calls = {(name, part): call for name, prepared in ready.items() for part, call in prepared.parts.items()}
    limits: dict[str, float] = {}  # by part: a peer that takes longer is timed once
    rounds: list[Times] = []
    for _ in range(effort.rounds):
        this: Times = {}
        for (name, part), call in calls.items():
            limit = math.inf if name == OURS else limits.get(part, math.inf)
            if rounds and _beyond(limit, rounds[0][name, part][0]):
                continue
            timing, note = _time(call, effort, limit, from_rest)
            if timing is not None and timing.median_us > limit:
                note = "; ".join(filter(None, (note, "slow: few calls timed")))
            if effort.hasty and name == OURS and timing is not None:
                limits.setdefault(part, SLOW * timing.median_us)
            this[name, part] = timing, note
        rounds.append(this)
    return {which: _over_rounds([each[which] for each in rounds if which in each]) for which in calls}


def _beyond(limit: float, timing: Timing | None) -> bool:
    return timing is None or timing.median_us > limit


def _over_rounds(rounds: list[tuple[Timing | None, str]]) -> tuple[Timing | None, str]:
    """Medians of medians and of percentiles."""
    timings = [timing for timing, _ in rounds if timing is not None]
    if not timings:
        return None, rounds[0][1]
    median, p20, p80 = (statistics.median(getattr(t, f) for t in timings) for f in ("median_us", "p20_us", "p80_us"))
    return replace(timings[-1], median_us=median, p20_us=p20, p80_us=p80), rounds[-1][1]


def _time(call: Callable[[], object], effort: Effort, give_up_us: float, from_rest: bool) -> tuple[Timing | None, str]:
    try:
        return time_call(call, timed_ms=effort.timed_ms, give_up_us=give_up_us, from_rest=from_rest), ""
    except torch.OutOfMemoryError as failure:
        _check_machine(failure)
        return None, "out of memory"
    except RuntimeError:  # it ran before: a CUDA graph cannot capture it
        torch.cuda.synchronize()
        return _time_eagerly(call, HASTY_CALLS if effort.hasty else EAGER_CALLS), "without a CUDA graph"


def _time_eagerly(call: Callable[[], object], calls: int) -> Timing:
    """A call as Python makes it, the host's time in it where that is longer."""
    call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    times: list[float] = [1000 * a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3], 1, calls)


def _timed(row: Row, chosen: list[Contender], times: Times) -> Row:
    timing, note = times.get((row.contender, row.part), (None, row.note))
    if timing is None:
        return replace(row, note=note)
    parallax = next(contender.parallax for contender in chosen if contender.name == row.contender)
    part = PARTS[row.op][row.part]
    work = part.parallax if parallax else part.softmax
    return replace(
        row,
        time_us=timing.median_us,
        p20_us=timing.p20_us,
        p80_us=timing.p80_us,
        rate=work * rate(row.spec, row.shape, timing.median_us, row.lengths),
        note=note,
    )


@contextmanager
def _precision(spec: KernelSpec) -> Iterator[None]:
    """fp32 matmuls round to TF32 in here if the spec is of "tf32", and do not if it is not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if spec.dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
