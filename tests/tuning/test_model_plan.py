"""The plan of a model's tune: its jobs and their order, how long it takes, and the sums of a step."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from parallax_gen.codegen.render import render
from parallax_gen.describe import duration
from parallax_gen.memory.ranking import RecordTable, best, default_of, evidence_of
from parallax_gen.memory.result import Result
from parallax_gen.ops.space import promising_configs
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.models import Model
from parallax_gen.problem.steps import Serving, Training, steps_of
from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.plan import FINALS_S, Plan, TimeLeft, plan_of, times_after_tune, times_of_choices
from parallax_gen.tuning.progress import ProgressView

GPU = GPUS["h200"]
MODEL = Model("m", heads=8, kv_heads=2, head_dim=64, windows=((0, 4), (1024, 2)), max_len=4096)
STEPS = steps_of(MODEL, Training(2, 4096), Serving(max_len=4096, max_batch=2))


def plan(records: RecordTable | None = None) -> Plan:
    return plan_of(MODEL, STEPS, GPU, records or RecordTable([]))


def measured(job: Job, time_us: float, default: bool = True) -> Result:
    configs = promising_configs(job.spec, job.shape, GPU)
    config = default_of(job.place, GPU)
    config = config if default else next(other for other in configs if other != config)
    return Result(job.place, evidence_of(render(job.spec, config, GPU)), config, "ok", time_us=time_us)


def test_each_place_has_one_job() -> None:
    jobs = plan().jobs
    assert len({job.place for job in jobs}) == len(jobs)
    assert {job.place for job in jobs} == {plan().place(call) for step in STEPS for call in step.calls}


def test_kernels_without_a_measurement_come_first() -> None:
    first = plan().jobs
    known = next(job for job in first if job.spec.op == "decode_varlen")
    records = RecordTable([measured(known, 10.0)])
    jobs = plan(records).jobs
    assert known != first[-1]
    assert jobs[-1] == known
    assert jobs == sorted(first, key=lambda job: best(job.place, GPU, records).tier, reverse=True)
    assert plan(records).tiers["measured here"] == 1


def test_the_longest_time_is_that_of_all_budgets() -> None:
    count = len(plan().jobs)
    assert plan().most_seconds(45, 1) == count * (45 + FINALS_S)
    assert plan().most_seconds(45, count) == plan().most_seconds(45, count + 3) == 45 + FINALS_S


def test_the_time_left_follows_the_jobs_that_ended() -> None:
    left = TimeLeft(5, 40.0)
    left.begin()
    assert left.seconds([40.0]) == 200.0
    left.end(10.0)
    assert left.seconds() == 40.0
    left.begin()
    assert left.seconds([4.0]) == 34.0
    assert left.seconds([40.0]) == 40.0  # the running job, too, is expected to end as early as the first
    assert left.text() == "1 of 5 jobs done, about 30 s left"
    assert TimeLeft(4, 40.0, devices=2).seconds() == 80.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (90, "90 s"),
        (91, "2 min"),
        (598, "10 min"),
        (601, "11 min"),
        (3600, "1 h 0 min"),
        (7390, "2 h 4 min"),
    ],
)
def test_durations_are_rounded_up(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_sum_of_a_step_counts_its_calls() -> None:
    jobs = plan().jobs
    times = {job.place: 10.0 * (number + 1) for number, job in enumerate(jobs)}
    table = RecordTable([measured(job, 2 * times[job.place]) for job in jobs])
    done = [Progress(job, best=measured(job, times[job.place], default=False)) for job in jobs]
    for step in times_after_tune(plan(), done, table):
        expected = sum(call.count * times[plan().place(call)] for call in step.step.calls)
        assert step.time_us == pytest.approx(expected)
        assert step.gain == pytest.approx(2.0)
        assert [line.gain for line in step.lines] == pytest.approx([2.0] * len(step.lines))
    training = times_after_tune(plan(), done, table)[0]
    assert training.count == 6 * 4
    without_one = times_after_tune(plan(), [replace_best(progress, n) for n, progress in enumerate(done)], table)
    assert any(step.time_us is None and step.gain is None for step in without_one)


def replace_best(progress: Progress, number: int) -> Progress:
    return replace(progress, best=None) if number == 0 else progress


def test_the_choices_of_calls_have_the_times_of_their_records() -> None:
    jobs = plan().jobs
    table = RecordTable([measured(job, 20.0) for job in jobs] + [measured(job, 10.0, default=False) for job in jobs])
    steps = times_of_choices(plan(table), table)
    assert {(line.time_us, line.default_us, line.note) for step in steps for line in step.lines} == {
        (10.0, 20.0, "measured here")
    }
    unknown = times_of_choices(plan(), RecordTable([]))
    assert {(line.time_us, line.note, step.gain) for step in unknown for line in step.lines} == {
        (None, "the default", None)
    }
    assert all(line.config == default_of(plan().place(line.call), GPU) for step in unknown for line in step.lines)


def test_a_sibling_cards_time_is_compared_with_that_cards_default() -> None:
    jobs = plan().jobs
    records = [measured(job, 20.0) for job in jobs] + [measured(job, 10.0, default=False) for job in jobs]
    table = RecordTable([replace(record, place=replace(record.place, gpu="h100")) for record in records])
    training = times_of_choices(plan(table), table)[0]
    notes = {line.call.spec.op: (line.time_us, line.default_us, line.note) for line in training.lines}
    assert notes["forward"] == (10.0, 20.0, "a sibling card")
    assert notes["preprocess"] == (None, None, "the default")  # it borrows from no card


def test_one_bar_shows_all_jobs() -> None:
    jobs, screen = plan().jobs[:4], io.StringIO()
    with ProgressView(Console(file=screen, force_terminal=True, width=80, highlight=False), 4, 8, 45.0) as view:
        for job in jobs[:2]:
            view.begin(job)
            view.end(Progress(job, best=measured(job, 10.0)))
        view.begin(jobs[2])
        view.update(Progress(jobs[2]))
    text = screen.getvalue()
    assert "━" * 15 + "─" * 15 + " 2 of 4 jobs done, about " in text
    assert "━" * 16 not in text


def test_a_pipe_is_told_the_time_left_after_each_job() -> None:
    jobs, pipe = plan().jobs[:2], io.StringIO()
    with ProgressView(Console(file=pipe, width=80, highlight=False), 2, 8, 45.0) as view:
        for job in jobs:
            view.begin(job)
            view.end(Progress(job))
    assert [line for line in pipe.getvalue().splitlines() if "jobs done" in line] == [
        "1 of 2 jobs done, about 1 s left"
    ]


def test_each_layer_launches_each_kernel_of_a_step_once() -> None:
    """In plans of usual models, with tensor parallelism."""
    for heads, kv_heads, head_dim, ranks in ((16, 8, 128, 1), (64, 8, 128, 8), (28, 4, 128, 1), (14, 2, 64, 1)):
        model = Model("m", heads, kv_heads, head_dim, ((0, 3),)).split(ranks)
        for step in plan_of(model, steps_of(model, Training(), Serving(page_size=16)), GPU, RecordTable([])).steps:
            assert {call.count for call in step.calls} == {3}
