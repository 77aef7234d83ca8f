"""Times all baselines on the same inputs in one process, and compares each with the oracle."""

from __future__ import annotations

import errno
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import NamedTuple

import torch

from parallax_gen.bench.baselines import BASELINES, BATCH_INVARIANT, OURS, baselines_of
from parallax_gen.bench.baselines.base import Baseline, Prepared, autotuning_with_few_calls
from parallax_gen.bench.cases import Case, bytes_needed
from parallax_gen.bench.conditions import our_kernels
from parallax_gen.bench.oracle_check import OracleCheck, peaked_inputs, random_inputs_for_case
from parallax_gen.bench.parts import PARTS, Part
from parallax_gen.bench.results_csv import ResultsCsv
from parallax_gen.bench.rows import FULL_EFFORT, Conditions, Effort, Row
from parallax_gen.bench.summary import title
from parallax_gen.codegen.abi import Inputs
from parallax_gen.errors import MeasureError, MemoryTakenError, machine_error
from parallax_gen.memory.shipped import Memory
from parallax_gen.oracle.peaked import FEWEST_KEYS
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec, batch_invariant_spec
from parallax_gen.problem.work import bound_by_matmuls, rate
from parallax_gen.problem.workloads import TRAINING
from parallax_gen.tuning.workers.measure import time_call, time_eagerly
from parallax_gen.tuning.workers.messages import Timing

DEVICE = "cuda"
EAGER_CALLS, FEW_EAGER_CALLS = 20, 5  # for calls that no CUDA graph can capture
MAX_NOTE_LENGTH = 200  # characters of the reason why a baseline does not run
SLOW_RATIO = 3.0  # with Effort.few_calls, a baseline that takes this many times ours is timed only once


def time_cases(
    cases: list[Case],
    names: Sequence[str],
    card: Gpu,
    conditions: Conditions,
    results: ResultsCsv,
    memory: Memory,
    status: Callable[[str], AbstractContextManager[object]],
) -> Iterator[list[Row]]:
    """Yield the rows of one case at a time: stored ones from `results`, and newly timed ones.

    memory  the records that our calls choose from
    status  shows a text while a case is timed
    """
    started, timed_cases = time.monotonic(), 0
    for i, case in enumerate(cases):
        requested = _untimed_rows(case, names, card, memory, conditions)
        # If only some parts of a baseline are stored, all of its parts are timed again.
        missing = {row.baseline for row in requested if results.stored(row) is None}
        rows = [row for row in map(results.stored, requested) if row is not None and row.baseline not in missing]
        if missing:
            seconds_left = (time.monotonic() - started) / timed_cases * (len(cases) - i) if timed_cases else None
            time_left = "" if seconds_left is None else f", {seconds_left:.0f} s left"
            with status(f"[{i + 1}/{len(cases)}{time_left}] {title(*case)}"):
                new = _time_case(case, [row for row in requested if row.baseline in missing], card, conditions)
            results.add(new)
            rows += new
            timed_cases += 1
        yield sorted(rows, key=lambda row: list(BASELINES).index(row.baseline))  # stable: parts stay in order


def _untimed_rows(case: Case, names: Sequence[str], card: Gpu, memory: Memory, conditions: Conditions) -> list[Row]:
    """The rows of a case, without times."""
    op, spec, shape, lengths = case
    rows = []
    for baseline in baselines_of(op):
        if baseline.name in names:
            package = baseline.package()
            if baseline.name in (OURS, BATCH_INVARIANT):
                ours = batch_invariant_spec(spec) if baseline.name == BATCH_INVARIANT else spec
                package = our_kernels(op, ours, shape, card, memory)
            row = Row(baseline.name, op, "", spec, shape, package=package, conditions=conditions, lengths=lengths)
            rows += [replace(row, part=part) for part in PARTS[op]]
    return rows


def _time_case(case: Case, requested: list[Row], card: Gpu, conditions: Conditions) -> list[Row]:
    """The requested rows, each with a time or with a note that says why there is none."""
    op, spec, shape, lengths = case
    needed, available = bytes_needed(op, spec, shape), card.memory_bytes
    if needed > available:
        note = f"skipped: inputs and results take {needed / 1e9:.0f} GB, and the card has {available / 1e9:.0f}"
        return [replace(row, note=note) for row in requested]
    packages = {row.baseline: row.package for row in requested}
    rows = compare(op, spec, shape, tuple(packages), conditions.effort, lengths)
    return [replace(row, package=packages[row.baseline], conditions=conditions) for row in rows]


def compare(
    op: str,
    spec: KernelSpec,
    shape: Shape,
    only: Sequence[str] = (),
    effort: Effort = FULL_EFFORT,
    lengths: tuple[int, ...] = (),
) -> list[Row]:
    """Time every baseline, or those in `only`, on fresh random inputs; ours first. spec, lengths: see Row.

    If the inputs or our own kernel run out of the card's memory, every row gets a note. Raises MeasureError if a
    baseline leaves the device unusable. Raises MachineError if the disk is full or another process holds the memory,
    because that says nothing about a baseline.
    """
    chosen = [baseline for baseline in baselines_of(op) if not only or baseline.name in only]
    requested = [
        Row(baseline.name, op, part, spec, shape, lengths=lengths) for baseline in chosen for part in PARTS[op]
    ]
    try:
        with _matmul_precision(spec), autotuning_with_few_calls() if effort.few_calls else nullcontext():
            rows = _compare(requested, chosen, effort)
            _release(chosen)  # frees the timed inputs before others are made
            return _with_peaked_errors(rows, chosen, effort)
    except torch.OutOfMemoryError as failure:
        _check_machine(failure)
        return [replace(row, note="skipped: out of memory") for row in requested]
    finally:
        _release(chosen)


def _release(chosen: list[Baseline]) -> None:
    for baseline in chosen:
        baseline.release()
    gc.collect()  # some baselines' objects form reference cycles and hold caches of many GB
    with suppress(RuntimeError):  # from a device that a baseline left unusable; that error is already raised
        torch.cuda.empty_cache()


def _compare(requested: list[Row], chosen: list[Baseline], effort: Effort) -> list[Row]:
    op, spec, shape = requested[0].op, requested[0].spec, requested[0].shape
    inputs = random_inputs_for_case(op, spec, shape, DEVICE, requested[0].lengths)
    oracle_check = OracleCheck(op, spec, shape, inputs, effort.oracle)
    runnable: dict[str, Prepared] = {}
    untimed: list[Row] = []
    for baseline in chosen:
        rows = [row for row in requested if row.baseline == baseline.name]
        prepared, relative_errors, note = _check(baseline, op, spec, inputs, oracle_check)
        if prepared is not None:
            runnable[baseline.name] = prepared
        checked = 0 if prepared is None or baseline.softmax else oracle_check.pairs
        untimed += [
            replace(row, error=_error(PARTS[op][row.part], relative_errors), checked=checked, note=note) for row in rows
        ]
    times = _times(runnable, effort, in_bursts=bound_by_matmuls(spec.op))
    return [_with_time(row, chosen, times) for row in untimed]


class _Checked(NamedTuple):
    """A baseline bound to inputs, and the errors of its results by name; or None, no errors and why it failed."""

    prepared: Prepared | None
    errors: dict[str, float]
    note: str = ""


def _check(baseline: Baseline, op: str, spec: KernelSpec, inputs: Inputs, oracle_check: OracleCheck) -> _Checked:
    """Call a baseline and compare its results with the oracle's. Raises errors that are not the baseline's failures."""
    try:
        prepared = baseline.prepare(op, spec, inputs)
        results = prepared.results()  # also for softmax, which has no error, to see whether it runs
        torch.cuda.synchronize()
        return _Checked(prepared, {} if baseline.softmax else oracle_check.errors(results))
    except Exception as failure:  # any failure of a baseline is a result of the comparison
        if baseline.name in (OURS, BATCH_INVARIANT):
            raise
        _check_machine(failure)
        _check_device(baseline.name, failure)
        return _Checked(None, {}, _failure_note(failure))


def _with_peaked_errors(rows: list[Row], chosen: list[Baseline], effort: Effort) -> list[Row]:
    """The rows; those that have an error of the output also get its error on peaked inputs.

    Gradients on peaked inputs are not compared: they are small differences, as inexact in softmax attention. A baseline
    that fails, or memory that does not suffice, leaves the rows as they are.
    """
    op, spec, shape, lengths = rows[0].op, rows[0].spec, rows[0].shape, rows[0].lengths
    names = {row.baseline for row in rows if row.error is not None}
    if not names or shape.seqlen_kv < FEWEST_KEYS:
        return rows
    peaked_errors: dict[str, float | None] = {}
    try:
        inputs = peaked_inputs(op, spec, shape, DEVICE, lengths)
        oracle_check = OracleCheck("forward" if op == TRAINING else op, spec, shape, inputs, effort.oracle)
        for baseline in chosen:
            if baseline.name in names:
                errors = _check(baseline, op, spec, inputs, oracle_check).errors
                peaked_errors[baseline.name] = errors.get("out")
    except torch.OutOfMemoryError as failure:  # in making the inputs, in the oracle or in our own kernel
        _check_machine(failure)
    return [
        replace(row, peaked_error=peaked_errors.get(row.baseline)) if "out" in PARTS[op][row.part].results else row
        for row in rows
    ]


def _check_machine(failure: Exception) -> None:
    """Raise MachineError if the machine is at fault. A missing package or tool is the baseline's own failure."""
    fault = machine_error(failure)
    is_baselines_own = not isinstance(failure, OSError) or failure.errno == errno.ENOENT
    if fault is not None and (isinstance(fault, MemoryTakenError) or not is_baselines_own):
        raise fault from failure


def _check_device(name: str, failure: Exception) -> None:
    """Raise MeasureError if the device faulted: then every later call of any baseline fails too."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise MeasureError(
            f"{name} left the device unusable ({_failure_note(failure)}): run again with --skip {name!r}"
        ) from failure


def _error(part: Part, relative_errors: dict[str, float]) -> float | None:
    return max((relative_errors[name] for name in part.results), default=None) if relative_errors else None


def _failure_note(failure: Exception) -> str:
    if isinstance(failure, ImportError):
        return "not installed"
    if isinstance(failure, torch.OutOfMemoryError):
        return "out of memory"
    kind = "not supported" if isinstance(failure, NotImplementedError) else type(failure).__name__
    return f"{kind}: {failure}".splitlines()[0][:MAX_NOTE_LENGTH]


# (baseline, part) -> its timing (None if it has none), and a note on how it was timed.
Times = dict[tuple[str, str], tuple[Timing | None, str]]


def _times(runnable: dict[str, Prepared], effort: Effort, *, in_bursts: bool) -> Times:
    calls = {(name, part): call for name, prepared in runnable.items() for part, call in prepared.parts.items()}
    limits: dict[str, float] = {}  # microseconds by part: a slower baseline is timed once
    rounds: list[Times] = []
    for _ in range(effort.rounds):
        timed: Times = {}
        for (name, part), call in calls.items():
            limit = math.inf if name == OURS else limits.get(part, math.inf)
            if rounds and _slower_than(limit, rounds[0][name, part][0]):
                continue
            timing, note = _time(call, effort, limit, in_bursts)
            if timing is not None and timing.median_us > limit:
                note = "; ".join(filter(None, (note, "slow: few calls timed")))
            if effort.few_calls and name == OURS and timing is not None:
                limits.setdefault(part, SLOW_RATIO * timing.median_us)
            timed[name, part] = timing, note
        rounds.append(timed)
    return {key: _combine_rounds([timed[key] for timed in rounds if key in timed]) for key in calls}


def _slower_than(limit: float, timing: Timing | None) -> bool:
    return timing is None or timing.median_us > limit


def _combine_rounds(rounds: list[tuple[Timing | None, str]]) -> tuple[Timing | None, str]:
    """The median over the rounds, of the medians and of each percentile."""
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
    except RuntimeError:  # the call ran before, so this is a failed capture of a CUDA graph
        torch.cuda.synchronize()
        return time_eagerly(call, FEW_EAGER_CALLS if effort.few_calls else EAGER_CALLS), "without a CUDA graph"


def _with_time(row: Row, chosen: list[Baseline], times: Times) -> Row:
    timing, note = times.get((row.baseline, row.part), (None, row.note))
    if timing is None:
        return replace(row, note=note)
    softmax = next(baseline.softmax for baseline in chosen if baseline.name == row.baseline)
    part = PARTS[row.op][row.part]
    work = part.softmax_work if softmax else part.parallax_work
    return replace(
        row,
        time_us=timing.median_us,
        p20_us=timing.p20_us,
        p80_us=timing.p80_us,
        rate=work * rate(row.spec, row.shape, timing.median_us, row.lengths),
        note=note,
    )


@contextmanager
def _matmul_precision(spec: KernelSpec) -> Iterator[None]:
    """Allow TF32 in fp32 matmuls inside this context if and only if the spec's dtype is "tf32"."""
    matmul = torch.backends.cuda.matmul
    original = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if spec.dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = original
