"""A machine fault ends a tune with one error and is not stored; any worker may try the config again."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from simulated_machine import FINE, Machine, timed

from parallax_gen.codegen.render import render
from parallax_gen.errors import MachineError, MemoryTakenError
from parallax_gen.memory.ranking import best, evidence_of
from parallax_gen.memory.result import Outcome, Result, supersedes
from parallax_gen.memory.shipped import Memory, load_shipped, write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.space import default_config, every_config
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.claims import Storage
from parallax_gen.tuning.job import Job, Progress, program_key
from parallax_gen.tuning.search.recorded_sweep import sweep_of
from parallax_gen.tuning.tuner import Tuner
from parallax_gen.tuning.workers import pool, worker
from parallax_gen.tuning.workers.messages import Compile, KernelInstance, Reply
from parallax_gen.tuning.workers.worker import Worker

GPU = GPUS["h200"]
JOBS = [Job(KernelSpec("decode", 128, "bf16"), Bucket(8, 1, 1024 << n), GPU) for n in range(3)]
JOB = JOBS[0]
CONFIGS = list(every_config(JOB.spec, GPU))
FULL = "OSError: [Errno 28] No space left on device"


class SilentWatcher:
    def begin(self, job: Job) -> None: ...

    def update(self, progress: Progress) -> None: ...

    def end(self, progress: Progress) -> None: ...


def tune(store: Store, jobs: list[Job], storage: Storage | None = None, trials: int = 4) -> list[Progress]:
    with Tuner(store, measure=True, compilers=1, storage=storage) as tuner:
        return tuner.tune_all(jobs, trials=trials, time_budget_s=60.0, watcher=SilentWatcher())


def failing(config: KernelConfig, n: int) -> Reply:
    if n == 1:
        raise MachineError(FULL)
    return Reply(Outcome.OK, resources=FINE)


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return f"journal:{tmp_path / 'journal'}"


@pytest.mark.parametrize("where", ["compile", "measure"])
def test_a_fault_of_the_machine_ends_the_tune_and_is_not_stored(store: Store, machine: Machine, where: str) -> None:
    def measure(config: KernelConfig, n: int) -> Reply:
        failing(config, n)
        return timed(100.0)

    if where == "compile":
        machine.compile = failing
    else:
        machine.measure = measure
    with pytest.raises(MachineError, match="No space left"):
        tune(store, JOBS)
    assert machine.open_workers == 0
    faulty = machine.compiled[1] if where == "compile" else machine.measured[1].instance.config
    stored = store.results(JOB.place)
    assert faulty not in {r.config for r in stored}
    assert all(r.measured for r in stored)
    machine.compile, machine.measure = (
        (lambda config, n: Reply(Outcome.OK, resources=FINE)),
        (lambda c, n: timed(100.0 + n)),
    )
    tune(store, [JOB], trials=8)
    assert faulty in {r.config for r in store.results(JOB.place)}  # tried early again


def test_a_machine_fault_is_not_shared_and_frees_the_claim(store: Store, machine: Machine, journal: str) -> None:
    """Also claims of jobs that no device had started."""
    machine.compile = failing
    with pytest.raises(MachineError):
        tune(store, JOBS, Storage(journal))
    other = Storage(journal)
    for job in JOBS:
        claims = other.claims(job.place, program_key(job))
        assert not claims.others_have_claims()
        done = {r.config for r in store.results(job.place)}
        assert {r.config for r in claims.new_results()} <= done
        free = [config for config in machine.compiled if config not in done]
        assert claims.claim(free[0])


def test_the_tuner_waits_for_memory_of_other_processes(
    store: Store, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MEMORY_WAITS_S", (0.01, 0.01))
    requests: list[KernelConfig] = []

    def measure(config: KernelConfig, n: int) -> Reply:
        requests.append(config)
        if requests.count(config) < 3 and config == requests[0]:
            raise MemoryTakenError("CUDA out of memory")
        return timed(100.0 + n)

    machine.measure = measure
    (progress,) = tune(store, [JOB])
    assert progress.outcomes == {"ok": 4}
    assert requests[:3] == [requests[0]] * 3

    def never(config: KernelConfig, n: int) -> Reply:
        raise MemoryTakenError("CUDA out of memory")

    machine.measure = never
    with pytest.raises(MemoryTakenError):
        tune(store, JOBS[1:])
    assert store.results(JOBS[1].place) == []


def test_a_bug_in_a_worker_does_not_hang_the_tune(store: Store, machine: Machine) -> None:
    machine.compile = lambda config, n: {}[config]  # a programming error
    with pytest.raises(KeyError):
        tune(store, [JOB])


# -- machine faults in old databases


def row(config: KernelConfig, outcome: str = "compile", detail: str = FULL, hours: int = 0) -> Result:
    evidence = evidence_of(render(JOB.spec, config, GPU))
    time_us = 9.0 if outcome in ("ok", "predicted") else None
    result = Result(JOB.place, evidence, config, outcome, detail=detail, time_us=time_us)
    return replace(result, created_at=(result.created + timedelta(hours=hours)).isoformat())


def test_a_stored_machine_fault_is_tried_again(store: Store, machine: Machine) -> None:
    default = default_config(JOB.spec, JOB.shape, GPU)
    wrong = next(config for config in CONFIGS if config != default)
    store.save(row(default))
    store.save(row(wrong, "compile", "CompilationError: at 3:4"))
    (progress,) = tune(store, [JOB])
    assert progress.known == 1
    assert default in machine.compiled
    assert wrong not in machine.compiled
    assert {r.config: r.outcome for r in store.results(JOB.place)}[default] == "ok"


@pytest.mark.parametrize("outcome", ["ok", "wrong", "crash", "timeout", "predicted"])
def test_a_stored_machine_fault_is_replaced_by_any_other_row(store: Store, outcome: str) -> None:
    fault, better = (
        row(CONFIGS[0], hours=1),
        row(CONFIGS[0], outcome, "" if outcome in ("ok", "predicted") else "told"),
    )
    assert fault.is_machine_fault
    assert not better.is_machine_fault
    assert supersedes(better, fault)
    assert not supersedes(fault, better)
    store.save(fault)
    assert store.results(JOB.place) == [fault]  # the row is kept
    assert store.merge([better]).replaced == 1
    assert store.merge([fault]).kept == 1
    assert store.results(JOB.place) == [better]


def test_a_stored_machine_fault_hides_no_shipped_record(store: Store, tmp_path: Path) -> None:
    shipped = row(CONFIGS[0], "ok", "", hours=-1)
    folder = tmp_path / "shipped"
    write_shipped([shipped], "h200", folder)
    store.save(row(CONFIGS[0]))
    store.save(row(CONFIGS[1]))
    memory = Memory(store, folder)
    assert [r.outcome for r in memory.results(JOB.place)] == ["ok", "compile"]
    assert best(JOB.place, GPU, memory).config == CONFIGS[0]
    write_shipped(store.all(), "h200", folder)
    assert [r.config for r in load_shipped("h200", folder)] == [CONFIGS[0]]
    sweep = sweep_of([shipped, row(CONFIGS[1]), row(CONFIGS[2], "wrong", "row 3")], GPU)
    assert [r.outcome for r in sweep.results if r.config != CONFIGS[0]] == ["wrong"]


def test_a_shared_machine_fault_of_an_old_version_is_ignored(journal: str) -> None:
    first, second = (Storage(journal).claims(JOB.place, program_key(JOB)) for _ in range(2))
    assert first.claim(CONFIGS[0])
    assert first.claim(CONFIGS[1])
    first.finish(row(CONFIGS[0]))
    first.finish(row(CONFIGS[1], "wrong", "row 3"))
    assert [r.config for r in second.new_results()] == [CONFIGS[1]]
    assert not second.claim(CONFIGS[1])
    assert second.claim(CONFIGS[0])


# -- child processes

INSTANCE = KernelInstance(
    KernelSpec("decode", 64, "bf16"), DecodeConfig(32, 8, 1, "none", 1, 2), Shape(1, 1, 1, 1, 128), GPU
)


def test_a_child_reports_machine_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example a folder that cannot be created. The same child answers the next request."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    with closing(Worker(device=None)) as child:
        for _ in range(2):
            with pytest.raises(MachineError, match=r"NotADirectoryError: .*file/triton.*TRITON_CACHE_DIR"):
                child.ask(Compile(INSTANCE), timeout_s=60.0)


def test_a_child_that_does_not_start_is_a_machine_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with closing(Worker(device=None)) as child, pytest.raises(MachineError, match="does not start: exit status 1"):
        child.ask(Compile(INSTANCE), timeout_s=60.0)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with closing(Worker(device=None)) as child, pytest.raises(MachineError, match="FileNotFoundError"):
        child.ask(Compile(INSTANCE), timeout_s=60.0)


# The first child dies at its first request; the second one may find no device.
DIES = """#!{python}
import os, pickle, sys
sys.path.insert(0, {top!r})
from parallax_gen.tuning.workers.messages import Ready
first = not os.path.exists({marker!r})
open({marker!r}, "w").close()
pickle.dump(Ready(first or {stays}), sys.stdout.buffer)
sys.stdout.buffer.flush()
pickle.load(sys.stdin.buffer)
sys.exit("an illegal memory access")
"""


@pytest.mark.parametrize("stays", [True, False])
def test_a_crash_is_the_configs_fault_if_the_device_still_works(
    stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, top = tmp_path / "python", str(Path(worker.__file__).parents[2])
    text = DIES.format(python=sys.executable, top=top, marker=str(tmp_path / "marker"), stays=stays)
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with closing(Worker(device=0)) as child:
        if stays:
            reply = child.ask(Compile(INSTANCE), timeout_s=60.0)
            assert (reply.outcome, reply.detail) == ("crash", "exit status 1: an illegal memory access")
        else:
            with pytest.raises(MachineError, match="device 0 is lost"):
                child.ask(Compile(INSTANCE), timeout_s=60.0)
