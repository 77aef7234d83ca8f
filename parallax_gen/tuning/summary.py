"""A plan, and the outcome of a tune: as tables for people, and as a JSON document."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from parallax_gen.describe import brief, format_counts, gain_text, number, seqlen_text
from parallax_gen.memory.descriptions import shape_of
from parallax_gen.memory.result import Outcome
from parallax_gen.ops.base import config_to_dict
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import rate, rate_unit
from parallax_gen.tables import Table
from parallax_gen.tuning.calls import CallsPlan
from parallax_gen.tuning.job import Progress
from parallax_gen.tuning.plan import CallTimes, Plan, StepTimes


def plan_table(plan: Plan) -> Table:
    """The kernels of each step, and where their configs come from now; of recorded calls also their share of time."""
    lines: list[tuple[str, ...]] = []
    for step in plan.steps:
        for call in step.calls:
            place = plan.place(call)
            source = plan.choices[place].candidate.source
            sizes = str(place.bucket.kv_rows), seqlen_text(place.bucket), str(call.count)
            last = f"{100 * plan.shares[place]:.1f} %" if isinstance(plan, CallsPlan) else step.name
            lines.append((call.spec.public_op, *sizes, source, last))
    columns = ("kernel", "BxH", "seqlen", "calls", "config from")
    if isinstance(plan, CallsPlan):
        return Table("", (*columns, "of the time"), lines, (*columns[1:4], "of the time"))
    return Table("", (*columns, "step"), lines, columns[1:4])


def times_tables(times: Iterable[StepTimes], time_name: str) -> list[Table]:
    """For each step, each kernel's time and its default's, and the sum of all calls of the step."""
    columns = ("kernel", "seqlen", "calls", "default us", time_name, "gain", "config")
    tables = []
    for step in times:
        lines = [(*_kernel_cells(line), brief(line.config) if line.config else line.note) for line in step.lines]
        lines.append(("sum", "", *_cells(step.count, step.default_us, step.time_us, step.gain), ""))
        tables.append(Table(f"{step.step.name}: {step.step.detail}", columns, lines, columns[1:6]))
    return tables


CHOICES_LEGEND = (
    "us: of one launch at the bucket's sizes, - if no record has it; bound: the least that the card's peak FLOP/s and "
    "bandwidth allow; from: measured here, by another toolchain (Triton or ptxas), on a sibling card of the same "
    "compute capability, at a near bucket, or the default, for which there is no record;"
)


def choices_tables(times: Iterable[StepTimes]) -> list[Table]:
    """For each step, the config that each kernel gets now and where it comes from, its time, its default's and its
    bound, and the sums of all calls of the step."""
    columns = ("kernel", "seqlen", "calls", "default us", "us", "gain", "bound us", "from", "config")
    tables = []
    for step in times:
        lines = [
            (*_kernel_cells(line), number(line.bound_us), line.note, brief(line.config) if line.config else "")
            for line in step.lines
        ]
        total = _cells(step.count, step.default_us, step.time_us, step.gain)
        lines.append(("sum", "", *total, number(step.bound_us), "", ""))
        tables.append(Table(f"{step.step.name}: {step.step.detail}", columns, lines, columns[1:7]))
    return tables


def _kernel_cells(line: CallTimes) -> tuple[str, ...]:
    times = _cells(line.call.count, line.default_us, line.time_us, line.gain)
    return line.call.spec.public_op, seqlen_text(line.call.shape), *times


def _cells(count: int, default_us: float | None, time_us: float | None, gain: float | None) -> tuple[str, ...]:
    return str(count), *("-" if us is None else number(us) for us in (default_us, time_us)), gain_text(gain)


def job_tables(done: Iterable[Progress]) -> list[Table]:
    """For each spec, the best config of each job."""
    by_spec: dict[KernelSpec, list[Progress]] = {}
    for progress in done:
        by_spec.setdefault(progress.job.spec, []).append(progress)
    tables = []
    for spec, jobs in by_spec.items():
        columns = ("BxH", "seqlen", "time us", rate_unit(spec.op), "config", "trials", "failures")
        title = f"{jobs[0].job.gpu.name}: {spec}"
        tables.append(Table(title, columns, [_job_line(progress) for progress in jobs], (*columns[:4], "trials")))
    return tables


def _job_line(progress: Progress) -> tuple[str, ...]:
    job, best = progress.job, progress.best
    result = ("-", "-", "-")
    if best is not None and best.time_us is not None:
        result = number(best.time_us), number(rate(job.spec, shape_of(best), best.time_us)), brief(best.config)
    failed = format_counts(failures(progress)) or "none"
    return str(job.bucket.kv_rows), seqlen_text(job.bucket), *result, str(progress.done), failed


def failures(progress: Progress) -> dict[Outcome, int]:
    """How many trials of a job ended with each kind of failure."""
    return {outcome: count for outcome, count in progress.outcomes.items() if outcome.failed}


def to_json(done: Iterable[Progress], gpu: Gpu, measured: bool, database: Path) -> dict[str, Any]:
    return {
        "gpu": gpu.name,
        "measured": measured,
        "database": str(database),
        "jobs": [_job_to_json(progress) for progress in done],
    }


def _job_to_json(progress: Progress) -> dict[str, Any]:
    job, best = progress.job, progress.best
    time_us = best.time_us if best else None
    return {
        "spec": job.spec.to_dict(),
        "bucket": job.bucket.to_dict(),
        "shape": job.shape.to_dict(),
        "outcome": best.outcome.value if best else None,
        "config": config_to_dict(best.config) if best else None,
        "time_us": time_us,
        "rate": rate(job.spec, shape_of(best), time_us) if best and time_us else None,
        "rate_unit": rate_unit(job.spec.op),
        "trials": progress.done,
        "known": progress.known,
        "elsewhere": progress.other_tuners,
        "failures": failures(progress),
        "seconds": progress.seconds,
    }
