"""Times ours and its peers on the same inputs in the same process, and says how far from the oracle each is."""

from __future__ import annotations

import errno
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace

import torch

from parallax_gen.bench.baselines import BASELINES, OURS, baselines_of
from parallax_gen.bench.baselines.base import Baseline, Prepared, hasty_autotuners
from parallax_gen.bench.cases import Case, bytes_needed
from parallax_gen.bench.conditions import our_kernels
from parallax_gen.bench.judge import Judge, random_case
from parallax_gen.bench.parts import PARTS, Part
from parallax_gen.bench.rows import WITH_CARE, Conditions, Effort, Ledger, Row
from parallax_gen.bench.summary import title
from parallax_gen.errors import MeasureError, MemoryTakenError, machine_error
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import bound_by_matmuls, rate
from parallax_gen.tuning.workers.measure import time_call, time_eagerly
from parallax_gen.tuning.workers.messages import Timing

DEVICE = "cuda"
EAGER_CALLS, HASTY_CALLS = 20, 5  # of what no CUDA graph can capture
MOST_SAID = 200  # characters of why someone does not run
SLOW = 3.0  # times as long as ours: in haste, timed no more than needed


def sweep(
    cases: list[Case],
    names: Sequence[str],
    card: Gpu,
    how: Conditions,
    ledger: Ledger,
    memory: Memory,
    under_way: Callable[[str], AbstractContextManager[object]],
) -> Iterator[list[Row]]:
    """A shape's rows at a time: those that the ledger has, and those that are timed now.

    memory     what calls of ours choose from
    under_way  tells in words what is being timed while it is
    """
    started, timed = time.monotonic(), 0
    for i, case in enumerate(cases):
        asked = _asked(case, names, card, memory, how)
        unknown = {row.contender for row in asked if ledger.known(row) is None}  # who lacks a part is timed whole
        rows = [row for row in map(ledger.known, asked) if row is not None and row.contender not in unknown]
        if unknown:
            left = f", {(time.monotonic() - started) / timed * (len(cases) - i):.0f} s left" if timed else ""
            with under_way(f"[{i + 1}/{len(cases)}{left}] {title(*case)}"):
                new = _measured(case, [row for row in asked if row.contender in unknown], card, how)
            ledger.add(new)
            rows += new
            timed += 1
        yield sorted(rows, key=lambda row: list(BASELINES).index(row.contender))  # stable: parts stay in order


def _asked(case: Case, names: Sequence[str], card: Gpu, memory: Memory, how: Conditions) -> list[Row]:
    """The rows of a shape, without figures."""
    op, spec, shape, lengths = case
    found = []
    for baseline in baselines_of(op):
        if baseline.name in names:
            ours = baseline.name == OURS
            package = our_kernels(op, spec, shape, card, memory) if ours else baseline.package()
            row = Row(baseline.name, op, "", spec, shape, package=package, conditions=how, lengths=lengths)
            found += [replace(row, part=part) for part in PARTS[op]]
    return found


def _measured(case: Case, asked: list[Row], card: Gpu, how: Conditions) -> list[Row]:
    """The rows that are asked for, with figures, or with what keeps them from any."""
    op, spec, shape, lengths = case
    needed, there = bytes_needed(op, spec, shape), card.memory_bytes
    if needed > there:
        note = f"skipped: inputs and results take {needed / 1e9:.0f} GB, and the card has {there / 1e9:.0f}"
        return [replace(row, note=note) for row in asked]
    packages = {row.contender: row.package for row in asked}
    found = compare(op, spec, shape, tuple(packages), how.effort, lengths)
    return [replace(row, package=packages[row.contender], conditions=how) for row in found]


def compare(
    op: str,
    spec: KernelSpec,
    shape: Shape,
    only: Sequence[str] = (),
    effort: Effort = WITH_CARE,
    lengths: tuple[int, ...] = (),
) -> list[Row]:
    """Every baseline, or those in `only`, on fresh random inputs of a shape; ours first. spec, lengths: as of Row.

    Where the card's memory does not hold the inputs or what ours needs, that is every row's note. Raises MeasureError
    where a peer leaves the device so that nothing runs any more, and MachineError where the disk is full or another
    process holds the memory: that is nobody's result.
    """
    chosen = [baseline for baseline in baselines_of(op) if not only or baseline.name in only]
    asked = [Row(baseline.name, op, part, spec, shape, lengths=lengths) for baseline in chosen for part in PARTS[op]]
    try:
        with _precision(spec), hasty_autotuners() if effort.hasty else nullcontext():
            return _compare(asked, chosen, effort)
    except torch.OutOfMemoryError as failure:
        _check_machine(failure)
        return [replace(row, note="skipped: out of memory") for row in asked]
    finally:
        for baseline in chosen:
            baseline.release()
        gc.collect()  # of peers whose objects refer to each other, and hold a cache of many GB
        with suppress(RuntimeError):  # of a device that a peer left unusable, which is told of as that
            torch.cuda.empty_cache()


def _compare(asked: list[Row], chosen: list[Baseline], effort: Effort) -> list[Row]:
    op, spec, shape = asked[0].op, asked[0].spec, asked[0].shape
    inputs = random_case(op, spec, shape, DEVICE, asked[0].lengths)
    judge = Judge(op, spec, shape, inputs, effort.oracle)
    ready: dict[str, Prepared] = {}
    found: list[Row] = []
    for baseline in chosen:
        rows = [row for row in asked if row.contender == baseline.name]
        try:
            prepared = baseline.prepare(op, spec, inputs)
            results = prepared.results()  # also of softmax, whose errors are no matter: does it run?
            torch.cuda.synchronize()
            wrong = {} if baseline.softmax else judge.errors(results)
        except Exception as failure:  # a peer's failure, of whatever type, is a result of the comparison
            if baseline.name == OURS:
                raise
            _check_machine(failure)
            _check_device(baseline.name, failure)
            found += [replace(row, note=_why_not(failure)) for row in rows]
        else:
            ready[baseline.name] = prepared
            checked = 0 if baseline.softmax else judge.rows
            found += [replace(row, error=_error(PARTS[op][row.part], wrong), checked=checked) for row in rows]
    times = _times(ready, effort, in_bursts=bound_by_matmuls(spec.op))
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


# By baseline and part: its time, None where it has none, and a note on how it was timed.
Times = dict[tuple[str, str], tuple[Timing | None, str]]


def _times(ready: dict[str, Prepared], effort: Effort, *, in_bursts: bool) -> Times:
    calls = {(name, part): call for name, prepared in ready.items() for part, call in prepared.parts.items()}
    limits: dict[str, float] = {}  # by part: a peer that takes longer is timed once
    rounds: list[Times] = []
    for _ in range(effort.rounds):
        this: Times = {}
        for (name, part), call in calls.items():
            limit = math.inf if name == OURS else limits.get(part, math.inf)
            if rounds and _beyond(limit, rounds[0][name, part][0]):
                continue
            timing, note = _time(call, effort, limit, in_bursts)
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


def _time(call: Callable[[], object], effort: Effort, give_up_us: float, in_bursts: bool) -> tuple[Timing | None, str]:
    try:
        return time_call(call, timed_ms=effort.timed_ms, give_up_us=give_up_us, in_bursts=in_bursts), ""
    except torch.OutOfMemoryError as failure:
        _check_machine(failure)
        return None, "out of memory"
    except RuntimeError:  # it ran before: a CUDA graph cannot capture it
        torch.cuda.synchronize()
        return time_eagerly(call, HASTY_CALLS if effort.hasty else EAGER_CALLS), "without a CUDA graph"


def _timed(row: Row, chosen: list[Baseline], times: Times) -> Row:
    timing, note = times.get((row.contender, row.part), (None, row.note))
    if timing is None:
        return replace(row, note=note)
    softmax = next(baseline.softmax for baseline in chosen if baseline.name == row.contender)
    part = PARTS[row.op][row.part]
    work = part.softmax if softmax else part.parallax
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
