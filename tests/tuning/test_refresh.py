"""A refresh times the best few configs of each place again, interleaved with today's default."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from simulated_machine import Machine, timed, timing

from parallax_gen.codegen.render import render
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Tier, best, default_of, evidence_of
from parallax_gen.memory.result import Evidence, Outcome, Result
from parallax_gen.memory.shipped import Memory, write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.space import every_config
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.job import MAX_REFRESHED, Job, Progress, refresh_configs, refresh_jobs
from parallax_gen.tuning.tuner import Tuner
from parallax_gen.tuning.workers.messages import Measure, MeasureInterleaved, Reply

GPU = GPUS["h200"]
SPEC = KernelSpec("decode", 64, "bf16")
JOB = Job(SPEC, Bucket(8, 1, 4096), GPU)
DEFAULT = default_of(JOB.place, GPU)
OTHERS = [config for config in every_config(SPEC, GPU) if config != DEFAULT][:10]
OLD = {"triton": "2.0.0", "cuda": "11.0"}
TEMPLATES = "255dd79780b8"  # older than fingerprints; decode is still the same program
OTHER_KERNEL = {"kernel": "f" * 32, "text": "e" * 32}  # a kernel that nothing renders


def record(config: KernelConfig, time_us: float, place: Place = JOB.place, **evidence: str) -> Result:
    result: Evidence = replace(evidence_of(render(place.spec, config, GPU)), **evidence)  # type: ignore[arg-type]
    return Result(place, result, config, "ok", time_us=time_us, created_at="2026-01-01T00:00:00+00:00")


def memory_of(store: Store, folder: Path, *records: Result) -> Memory:
    for result in records:
        store.save(result)
    return Memory(store, folder)


def refresh(memory: Memory, *jobs: Job, trials: int = 64) -> list[Progress]:
    class Watcher:
        def begin(self, job: Job) -> None: ...
        def update(self, progress: Progress) -> None: ...
        def end(self, progress: Progress) -> None: ...

    assert memory.store is not None
    with Tuner(memory.store, measure=True, compilers=2, refresh=memory) as tuner:
        return tuner.tune_all(jobs, trials=trials, time_budget_s=60.0, watcher=Watcher())


def test_the_best_of_every_kind_of_evidence_is_timed_again(store: Store, tmp_path: Path) -> None:
    near = replace(JOB.place, bucket=Bucket(8, 1, 8192))
    sibling = replace(JOB.place, gpu="h100")
    memory = memory_of(
        store,
        tmp_path,
        *(record(config, 10.0 + n) for n, config in enumerate(OTHERS[:3])),
        record(OTHERS[3], 1.0, sibling),
        record(OTHERS[4], 2.0, near),
        record(OTHERS[5], 0.5, **OTHER_KERNEL),
    )
    assert refresh_configs(JOB, memory) == [OTHERS[0], DEFAULT, OTHERS[1], OTHERS[3], OTHERS[5], OTHERS[4]]
    assert MAX_REFRESHED == 6


def test_without_records_only_the_default_is_timed(store: Store, tmp_path: Path) -> None:
    assert refresh_configs(JOB, memory_of(store, tmp_path)) == [DEFAULT]


def test_places_with_the_weakest_evidence_come_first(store: Store, tmp_path: Path) -> None:
    alive, older, lost = (replace(JOB.place, bucket=Bucket(rows, 1, 128)) for rows in (1, 64, 4096))
    other = replace(JOB.place, gpu="h100", bucket=Bucket(2, 1, 512))
    memory = memory_of(
        store,
        tmp_path,
        record(OTHERS[0], 1.0, alive),
        record(OTHERS[0], 1.0, older, **OLD),
        record(OTHERS[0], 1.0, lost, **OTHER_KERNEL),
        record(OTHERS[0], 1.0, other),
    )
    here = replace(other, gpu=GPU.name)
    assert [job.place for job in refresh_jobs(memory, GPU)] == [lost, here, older, alive]
    assert [job.place for job in refresh_jobs(memory, GPU, lambda place: place.bucket.kv_rows > 2)] == [lost, older]
    assert len(refresh_jobs(memory, GPUS["h100"])) == 4
    unknown = replace(GPU, name="a card alike")
    assert {job.bucket for job in refresh_jobs(memory, unknown)} == {p.bucket for p in (alive, older, lost, other)}
    assert refresh_jobs(memory, GPUS["rtx4090"]) == []
    assert refresh_jobs(memory, replace(GPU, memory_bytes=1000)) == []  # the sizes do not fit in its memory


def test_the_kernels_of_a_training_step_are_consecutive(store: Store, tmp_path: Path) -> None:
    def place(op: str, rows: int, **more: bool) -> Place:
        return Place(GPU.name, KernelSpec(op, 64, "bf16", causal=True, **more), Bucket(rows, 512, 512))

    small = [place("forward", 1), place("forward", 1, stats=True), place("dkdv", 1), place("dqdr", 1)]
    large = [place("forward", 64), place("dkdv", 64)]
    alive = [small[0], large[0], small[1], small[2], large[1]]
    records = [record(default_of(where, GPU), 1.0, where) for where in alive]
    lost = record(default_of(small[3], GPU), 1.0, small[3], **OTHER_KERNEL)
    memory = memory_of(store, tmp_path, *records, lost)
    order = [job.place for job in refresh_jobs(memory, GPU)]
    assert set(order[:4]) == set(small)
    assert set(order[4:]) == set(large)


def test_all_are_timed_again_and_close_ones_are_interleaved(store: Store, machine: Machine, tmp_path: Path) -> None:
    us = {DEFAULT: 20.0, OTHERS[0]: 10.0, OTHERS[1]: 10.4, OTHERS[2]: 10.6}
    machine.measure = lambda config, n: timed(us[config])
    machine.interleaved = lambda request: Reply(
        Outcome.OK, timings=tuple(timing(us[i.config] / 2) for i in request.instances)
    )
    memory = memory_of(
        store,
        tmp_path,
        record(OTHERS[0], 1.0),
        record(OTHERS[1], 1.0, **OLD),
        record(OTHERS[2], 1.0, replace(JOB.place, gpu="h100")),
    )
    (progress,) = refresh(memory, JOB)
    assert progress.outcomes == {"ok": 4}
    assert {request.instance.config for request in machine.measured} == set(us)
    (turns,) = machine.interleaved_requests
    assert [i.config for i in turns.instances] == [
        OTHERS[0],
        OTHERS[1],
        DEFAULT,
    ]  # 10.6 is not within 5 %
    result = {r.config: r.time_us for r in store.results(JOB.place) if r.evidence.triton != "2.0.0"}
    assert result == {OTHERS[0]: 5.0, OTHERS[1]: 5.2, DEFAULT: 10.0, OTHERS[2]: 10.6}
    assert len(store.results(JOB.place)) == 5  # the other Triton's records are still stored
    choice = best(JOB.place, GPU, memory)
    assert (choice.tier, choice.config) == (Tier.MEASURED_HERE, OTHERS[0])


def test_an_old_time_does_not_win_without_being_timed_again(store: Store, machine: Machine, tmp_path: Path) -> None:
    """Rows of an earlier long search remain: the best of them is timed, too, until the best config has a new time."""
    machine.measure = lambda config, n: timed(30.0)
    memory = memory_of(store, tmp_path, *(record(config, 20.0 + n) for n, config in enumerate(OTHERS[:4])))
    refresh(memory, JOB)
    remeasured = {request.instance.config for request in machine.measured}
    assert remeasured == {DEFAULT, *OTHERS[:4]}
    assert all(r.time_us == 30.0 for r in store.results(JOB.place))


def test_configs_that_fail_now_no_longer_count(store: Store, machine: Machine, tmp_path: Path) -> None:
    machine.measure = lambda config, n: timed(9.0) if config == DEFAULT else Reply(Outcome.WRONG, "NaN", error=1.0)
    refresh(memory_of(store, tmp_path, record(OTHERS[0], 1.0)), JOB)
    assert best(JOB.place, GPU, store).config == DEFAULT
    assert not machine.interleaved_requests


def test_many_places_at_once(store: Store, machine: Machine, tmp_path: Path) -> None:
    places = [replace(JOB.place, bucket=Bucket(rows, 1, keys)) for rows in (1, 8, 64) for keys in (256, 2048)]
    memory = memory_of(store, tmp_path, *(record(OTHERS[n], 5.0, place) for n, place in enumerate(places)))
    done = refresh(memory, *refresh_jobs(memory, GPU))
    assert {progress.job.place for progress in done} == set(places)
    for place in places:
        assert default_of(place, GPU) in {r.config for r in store.results(place)}


def test_the_default_is_always_timed_fully(store: Store, machine: Machine, tmp_path: Path) -> None:
    """Its time shows the gain of tuning, however slow it is. Other configs are abandoned at 1.5 times the best."""
    refresh(memory_of(store, tmp_path, record(OTHERS[0], 1.0)), JOB)
    limits = {r.instance.config: r.give_up_us for _, r in machine.on if isinstance(r, Measure)}
    assert limits[DEFAULT] == float("inf")
    assert not any(isinstance(r, MeasureInterleaved) and len(r.instances) < 2 for _, r in machine.on)


def test_with_one_trial_the_default_is_timed(store: Store, machine: Machine, tmp_path: Path) -> None:
    memory = memory_of(store, tmp_path, *(record(config, 1.0 + n) for n, config in enumerate(OTHERS[:3])))
    refresh(memory, JOB, trials=1)
    assert {DEFAULT, OTHERS[0]} <= {request.instance.config for request in machine.measured}


@pytest.mark.parametrize("op", ["forward", "dkdv"])
def test_near_buckets_are_tried_for_ops_that_do_not_borrow_them(op: str, store: Store, tmp_path: Path) -> None:
    spec = KernelSpec(op, 64, "bf16", causal=True)
    job = Job(spec, Bucket(8, 2048, 2048), GPU)
    config = next(c for c in every_config(spec, GPU) if c != default_of(job.place, GPU))
    memory = memory_of(store, tmp_path, record(config, 1.0, replace(job.place, bucket=Bucket(8, 1024, 1024))))
    assert refresh_configs(job, memory) == [default_of(job.place, GPU), config]


@pytest.mark.parametrize(
    "old", [{"triton": f"{Toolchain.here().triton}.9"}, {"kernel": "", "text": "", "templates": TEMPLATES}]
)
def test_a_new_outcome_replaces_an_old_row_of_the_same_kernel(
    old: dict[str, str], store: Store, machine: Machine, tmp_path: Path
) -> None:
    """The old row is of another patch release or older than fingerprints, but of the same kernel and toolchain."""
    memory = memory_of(store, tmp_path, record(OTHERS[0], 1.0, **old), record(OTHERS[1], 5.0))
    machine.measure = lambda config, n: Reply(Outcome.WRONG, "NaN") if config == OTHERS[0] else timed(9.0)
    machine.interleaved = lambda request: Reply(Outcome.OK, timings=tuple(timing(9.0) for _ in request.instances))
    (progress,) = refresh(memory, JOB)
    assert progress.best is not None
    assert (progress.best.config != OTHERS[0], progress.best.time_us) == (True, 9.0)
    assert best(JOB.place, GPU, memory).config != OTHERS[0]
    machine.measure = lambda config, n: timed(20.0 if config == OTHERS[0] else 9.0)
    (progress,) = refresh(memory, JOB)
    assert progress.best is not None
    assert progress.best.time_us == 9.0
    assert best(JOB.place, GPU, memory).config != OTHERS[0]


def test_an_untimed_shipped_record_does_not_win_after_a_refresh(store: Store, machine: Machine, tmp_path: Path) -> None:
    write_shipped([record(config, 5.0 + n / 10) for n, config in enumerate(OTHERS[:3])], GPU.name, tmp_path)
    machine.measure = lambda config, n: timed(6.0)
    machine.interleaved = lambda request: Reply(Outcome.OK, timings=tuple(timing(6.0) for _ in request.instances))
    memory = memory_of(store, tmp_path)
    refresh(memory, JOB)
    chosen = best(JOB.place, GPU, memory).record
    assert chosen is not None
    assert chosen.time_us == 6.0
