"""The tuning loop: with real compilers and no GPU, or with simulated compilers and GPU."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated_machine import FINE, Machine, timed

from parallax_gen.codegen.render import render
from parallax_gen.codegen.resources import Resources
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import best, evidence_of
from parallax_gen.memory.result import Evidence, Outcome, Result
from parallax_gen.memory.shipped import load_same_capability, write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.ops.space import default_config, every_config, why_invalid
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.finals import FINALIST_MS, MAX_FINALISTS
from parallax_gen.tuning.job import Job, Progress
from parallax_gen.tuning.job_run import MAX_SPILLS, JobRun
from parallax_gen.tuning.seeds import nearby_seeds, shipped_seeds
from parallax_gen.tuning.tuner import Tuner
from parallax_gen.tuning.workers.messages import Reply

GPU = GPUS["h200"]
JOB = Job(KernelSpec("decode", 128, "bf16"), Bucket(8, 1, 1024), GPU)
SMALL = Job(KernelSpec("preprocess", 64, "fp32"), Bucket(8, 128, 128), GPUS["rtx4090"])  # 21 configs
OLD = Evidence("0123456789abcdef" * 2, "fedcba9876543210" * 2, "3.5.0", "12.8", 1)  # a kernel that nothing renders


def ignore(_: Progress) -> None:
    pass


def tune(store: Store, job: Job = JOB, *, measure: bool = True, trials: int = 8, **others: Any) -> Progress:
    arguments: dict[str, Any] = {"time_budget_s": 60.0, "on_progress": ignore} | others
    with Tuner(store, measure=measure, compilers=1) as tuner:
        return tuner.tune(job, trials=trials, **arguments)


# -- without a GPU, with real compilers


def test_compiling_and_ranking_for_an_absent_gpu(store: Store) -> None:
    progress = tune(store, measure=False, trials=2)
    assert progress.outcomes == {"predicted": 2}
    results = store.results(JOB.place)
    assert len(results) == 2
    for result in results:
        assert result.outcome == "predicted"
        assert result.time_us is not None
        assert result.registers
        assert result.shared_bytes
        assert result.compile_s
        assert result.source == "compiled for NVIDIA H200 SXM"
        assert result.evidence == evidence_of(render(JOB.spec, result.config, GPU))
    assert progress.best is not None
    assert progress.best.time_us == results[0].time_us  # any of the configs with this prediction
    assert best(JOB.place, GPU, store).record is None
    assert default_config(JOB.spec, JOB.shape, GPU) in [r.config for r in results]


def test_compiling_and_ranking_a_backward_kernel(store: Store) -> None:
    spec = KernelSpec("dkdv", 96, "fp16", group=2, causal=True, window=True)
    job = Job(spec, Bucket(4, 512, 512, 256), GPU)
    progress = tune(store, job, measure=False, trials=2)
    assert progress.outcomes == {"predicted": 2}
    results = store.results(job.place)
    assert default_config(spec, job.shape, GPU) in [r.config for r in results]
    assert all(r.place.bucket.window == r.shape.window == 256 for r in results if r.shape)
    assert all(r.registers and r.shared_bytes and r.time_us for r in results)


# -- outcomes


def test_every_outcome_is_stored_with_its_kind(store: Store, machine: Machine) -> None:
    compiles = {
        0: Reply(Outcome.COMPILE, "no such instruction", seconds=2.0),
        1: Reply(Outcome.TIMEOUT, "no answer in 120 s"),
        2: Reply(Outcome.CRASH, "exit status -11: no message"),
        3: Reply(Outcome.INVALID, "cannot be"),
        4: Reply(Outcome.OK, resources=Resources(255, MAX_SPILLS + 1, 1000)),
        5: Reply(Outcome.OK, resources=Resources(255, 0, GPU.shared_per_block + 1)),
    }
    measures = {
        0: timed(100.0),
        1: Reply(Outcome.WRONG, "row 3 is NaN", error=float("inf")),
        2: timed(900.0, Outcome.SLOW),
        3: Reply(Outcome.TIMEOUT, "no answer in 120 s"),
        4: Reply(Outcome.CRASH, "an illegal memory access"),
        5: Reply(Outcome.RESOURCES, "out of memory"),
    }
    machine.compile = lambda config, n: compiles.get(n, Reply(Outcome.OK, resources=FINE))
    machine.measure = lambda config, n: measures.get(n, timed(50.0))
    progress = tune(store, trials=13)
    assert progress.outcomes == {
        "compile": 1,
        "timeout": 2,
        "crash": 2,
        "invalid": 1,
        "resources": 3,
        "ok": 2,
        "wrong": 1,
        "slow": 1,
    }
    results = store.results(JOB.place)
    assert len(results) == progress.done == 13
    of = {config: next(r for r in results if r.config == config) for config in machine.compiled}
    kinds = [of[config].outcome for config in machine.compiled]
    assert kinds[:6] == ["compile", "timeout", "crash", "invalid", "resources", "resources"]
    assert kinds[6:] == ["ok", "wrong", "slow", "timeout", "crash", "resources", "ok"]
    details = [of[config].detail for config in machine.compiled]
    assert details[0] == "no such instruction"
    assert details[4] == f"spills {MAX_SPILLS + 1} bytes a thread, over {MAX_SPILLS}"
    assert "bytes of shared memory" in details[5]
    assert of[machine.compiled[0]].compile_s == 2.0
    assert of[machine.compiled[4]].spills == MAX_SPILLS + 1
    assert of[machine.compiled[7]].error == float("inf")
    assert of[machine.compiled[6]].source == "measured on NVIDIA H200 SXM"


def test_trials_are_numbered_in_the_order_in_which_they_end(store: Store, machine: Machine) -> None:
    """Over several runs, and whichever configs are timed again in the finals."""
    machine.measure = lambda config, n: timed(200.0 - n)
    tune(store, trials=6)
    tune(store, trials=4)
    results = store.in_trial_order()
    assert [r.trial for r in results] == list(range(1, 11))
    first = list(dict.fromkeys(machine.compiled))
    assert {r.config for r in results[:6]} == set(first[:6])


def test_the_best_is_the_fastest_finalist(store: Store, machine: Machine) -> None:
    short, long = [100.0, 60.0, 80.0, 50.0, 70.0, 90.0], {3: 65.0, 1: 61.0}  # the fourth had a lucky short timing

    def measure(config: KernelConfig, n: int) -> Reply:
        return timed(short[n] if n < 6 else long[machine.compiled.index(config)])

    machine.measure = measure
    seen: list[float] = []
    progress = tune(store, trials=6, on_progress=lambda p: seen.append(p.best.time_us if p.best else 0.0))
    assert seen == [100.0, 60.0, 60.0, 50.0, 50.0, 50.0, 61.0]
    remeasured = machine.measured[6:]
    assert [machine.compiled.index(request.instance.config) for request in remeasured] == [3, 1]
    assert {request.timed_ms for request in remeasured} == {FINALIST_MS}
    assert progress.best == best(JOB.place, GPU, store).record
    assert progress.best is not None
    assert (progress.best.config, progress.best.time_us) == (machine.compiled[1], 61.0)
    assert [r.time_us for r in store.results(JOB.place)] == [61.0, 65.0, 70.0, 80.0, 90.0, 100.0]


@pytest.mark.parametrize(
    ("spec", "rests"),
    [
        (KernelSpec("forward", 128, "bf16"), True),
        (KernelSpec("dkdv", 128, "bf16"), True),
        (KernelSpec("dqdr", 128, "bf16"), True),
        (KernelSpec("preprocess", 128, "bf16"), False),
        (KernelSpec("decode", 128, "bf16"), False),
    ],
    ids=str,
)
def test_compute_bound_finalists_use_burst_timing(
    store: Store, machine: Machine, spec: KernelSpec, rests: bool
) -> None:
    tune(store, Job(spec, Bucket(8, 1 if spec.public_op == "decode" else 1024, 1024), GPU), trials=1)
    assert [(request.timed_ms == FINALIST_MS, request.in_bursts) for request in machine.measured] == [
        (False, False),
        (True, rests),
    ]


def test_the_number_of_finalists_is_limited(store: Store, machine: Machine) -> None:
    machine.measure = lambda config, n: timed(100.0 + n if n < 20 else 1000.0 + n)
    tune(store, trials=20)
    assert len(machine.measured) == 20 + MAX_FINALISTS


def test_slow_configs_are_abandoned(store: Store, machine: Machine) -> None:
    machine.measure = lambda config, n: timed(100.0 if n < 4 else 90.0)
    tune(store, trials=4)
    assert [request.give_up_us for request in machine.measured[:4]] == [float("inf"), 150.0, 150.0, 150.0]


def test_a_wrong_finalist_is_not_the_best(store: Store, machine: Machine) -> None:
    machine.measure = lambda config, n: timed(100.0 + n) if n != 3 else Reply(Outcome.WRONG, "this time")
    progress = tune(store, trials=3)
    assert progress.best is not None
    assert progress.best.config == machine.compiled[1]


def test_a_finalist_that_crashes_keeps_its_time(store: Store, machine: Machine) -> None:
    machine.measure = lambda config, n: timed(100.0 + n) if n < 3 else Reply(Outcome.CRASH, "the GPU fell off")
    progress = tune(store, trials=3)
    assert progress.best is not None
    assert progress.best.time_us == 100.0


def test_without_a_working_config_there_is_no_best(store: Store, machine: Machine) -> None:
    machine.compile = lambda config, n: Reply(Outcome.CRASH, "out of luck")
    progress = tune(store, trials=5)
    assert progress.best is None
    assert progress.outcomes == {"crash": 5}
    assert not machine.measured


def test_a_prediction_never_beats_a_measurement(store: Store, machine: Machine) -> None:
    predicted = tune(store, measure=False, trials=6)
    assert predicted.best is not None
    assert predicted.best.outcome == "predicted"
    assert not machine.measured
    machine.measure = lambda config, n: timed(1e6 + n)
    measured = tune(store, trials=6)
    assert measured.known == 0  # predicted configs are tried
    assert measured.best is not None
    assert measured.best == best(JOB.place, GPU, store).record
    assert measured.best.outcome == "ok"
    config = measured.best.config
    tune(store, measure=False, trials=6)
    kept = next(r for r in store.results(JOB.place) if r.config == config)
    assert kept.outcome == "ok"
    assert best(JOB.place, GPU, store).record == measured.best


# -- running again, budgets, interrupts


def test_running_again_skips_known_configs(store: Store, machine: Machine) -> None:
    machine.compile = lambda config, n: Reply(Outcome.OK, resources=FINE) if n % 3 else Reply(Outcome.COMPILE, "no")
    first = tune(store, trials=10)
    second = tune(store, trials=10)
    assert (first.known, second.known) == (0, 10)
    assert len(set(machine.compiled)) == len(machine.compiled) == 20
    assert second.best is not None
    assert second.best.time_us == min(r.time_us for r in store.results(JOB.place) if r.time_us)


def test_an_exhausted_space_ends_the_job(store: Store, machine: Machine) -> None:
    config_count = len(list(every_config(SMALL.spec, SMALL.gpu)))
    assert tune(store, SMALL, trials=1000).done == config_count
    second = tune(store, SMALL, trials=1000)
    assert (second.done, second.known) == (0, config_count)
    assert second.best == best(SMALL.place, SMALL.gpu, store).record


def test_results_of_todays_kernels_and_toolchain_count_as_known(store: Store, machine: Machine) -> None:
    configs = list(every_config(SMALL.spec, SMALL.gpu))
    today = [evidence_of(render(SMALL.spec, config, SMALL.gpu)) for config in configs[:7]]
    evidence = [
        today[0],
        replace(today[1], text="e" * 32),  # another text of the same kernel
        Evidence.here("", ""),  # no kernel was rendered, although it can be
        replace(today[3], kernel="", text="", templates="abc"),  # older than fingerprints
        replace(today[4], kernel="f" * 32, text="e" * 32),
        replace(today[5], triton="2.0.0"),
        replace(today[6], protocol=0),
    ]
    for config, config_evidence in zip(configs, evidence, strict=False):
        store.save(Result(SMALL.place, config_evidence, config, "wrong", detail="told"))
    invalid = PreprocessConfig(BLOCK_M=3, num_warps=4)
    assert why_invalid(SMALL.spec, invalid, SMALL.gpu)
    store.save(Result(SMALL.place, Evidence.here("", ""), invalid, "invalid"))
    assert tune(store, SMALL, trials=1000).known == 3
    assert set(machine.compiled) == set(configs[2:])


def test_results_of_another_job_do_not_count_as_known(store: Store, machine: Machine) -> None:
    tune(store, trials=4)
    assert tune(store, SMALL, trials=4).known == 0


@pytest.mark.parametrize("trials", [1, 2, 7])
def test_the_trial_limit(store: Store, machine: Machine, trials: int) -> None:
    assert tune(store, trials=trials).done == trials == len(machine.compiled)


def test_the_time_limit(store: Store, machine: Machine) -> None:
    def slowly(config: KernelConfig, n: int) -> Reply:
        time.sleep(0.05)
        return timed(100.0)

    machine.measure = slowly
    start = time.monotonic()
    progress = tune(store, trials=1000, time_budget_s=0.6)
    assert time.monotonic() - start < 5.0  # includes the finalists, and slack for a busy machine
    assert 0 < progress.done < 20
    assert progress.best is not None


def test_the_time_budget_starts_with_the_first_measurement(store: Store) -> None:
    """Compilers take seconds to start, which once used up a short budget before the second trial."""
    run = JobRun(JOB, store, measure=True, trials=3)
    run.begin(0.2)
    requests = [run.next_compile() for _ in range(2)]
    time.sleep(0.3)
    assert run.searching
    before = time.monotonic()
    for source in requests:
        assert source is not None
        run.on_compiled(source[1].instance.config, Reply(Outcome.OK, resources=FINE))
    assert before + 0.2 <= run.progress.deadline <= time.monotonic() + 0.2
    time.sleep(0.3)
    assert not run.searching


def test_an_interrupt_keeps_finished_trials(store: Store, machine: Machine) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(store, trials=50, on_progress=interrupt)
    assert len(store.results(JOB.place)) == 5
    assert machine.open_workers == 0
    second = tune(store, trials=3)
    assert (second.known, second.done) == (5, 3)


def test_workers_are_closed_at_the_end(store: Store, machine: Machine) -> None:
    with Tuner(store, measure=True, compilers=3) as tuner:
        for job in (JOB, SMALL):
            tuner.tune(job, trials=5, time_budget_s=60.0, on_progress=ignore)
        assert machine.open_workers == 4
    assert machine.open_workers == 0


# -- seed configs from elsewhere


def test_seed_configs_of_a_sibling_card(tmp_path: Path) -> None:
    """First the configs of its own bucket, fast to slow, then the best of each other bucket; no others."""
    spec = KernelSpec("dqdr", 128, "bf16", causal=True)
    first, second, third, fourth = list(every_config(spec, GPU))[:4]

    def shipped(of: KernelSpec, bucket: Bucket, config: KernelConfig, time_us: float) -> Result:
        return Result(Place("h200", of, bucket), OLD, config, "ok", time_us=time_us)

    here, other = Bucket(64, 4096, 4096), Bucket(16, 8192, 8192)
    records = [shipped(spec, here, first, 20.0), shipped(spec, here, second, 10.0)]
    records += [shipped(spec, other, third, 5.0), shipped(spec, other, first, 6.0)]
    records += [shipped(spec.for_op("dqdr"), Bucket(16, 4096, 4096), second, 7.0)]
    records += [shipped(KernelSpec("dqdr", 64, "bf16", causal=True), here, fourth, 1.0)]
    write_shipped(records, "h200", tmp_path)
    assert shipped_seeds(Place("h100", spec, here), load_same_capability(GPUS["h100"], tmp_path))[:2] == [second, first]
    assert set(shipped_seeds(Place("h100", spec, here), load_same_capability(GPUS["h100"], tmp_path))) == {
        second,
        first,
        third,
    }
    assert shipped_seeds(Place("rtx4090", spec, here), load_same_capability(GPUS["rtx4090"], tmp_path)) == []


def test_seed_configs_of_the_nearest_buckets(store: Store, machine: Machine) -> None:
    """From the two nearest buckets with measurements of the spec, of any kernel and toolchain."""
    spec = KernelSpec("forward", 40, "fp16")
    configs = list(every_config(spec, GPU))[:6]
    job = Job(spec, Bucket(64, 4096, 4096), GPU)
    actual = [
        (Bucket(64, 8192, 8192), configs[0], "ok", 5.0),
        (Bucket(64, 8192, 8192), configs[1], "ok", 4.0),
        (Bucket(128, 4096, 4096), configs[2], "ok", 9.0),
        (Bucket(64, 1024, 1024), configs[3], "ok", 1.0),
        (Bucket(32, 4096, 4096), configs[4], "predicted", 1.0),
        (Bucket(64, 4096, 4096), configs[5], "ok", 1.0),
    ]
    results = [
        Result(Place("h200", spec, bucket), OLD, config, kind, time_us=us) for bucket, config, kind, us in actual
    ]
    assert nearby_seeds(job.place, results) == [configs[2], configs[1]]
    odd = replace(
        results[1], place=Place("h200", spec, Bucket(64, 8192, 8192, 512))
    )  # a window, which the spec does not have
    assert nearby_seeds(job.place, [odd, *results]) == [configs[2], configs[1]]
    for result in results:
        store.save(result)
    tune(store, job, trials=3)
    assert machine.compiled == [default_config(spec, job.shape, GPU), configs[2], configs[1]]


def test_seed_configs_of_the_kernel_without_a_softcap(tmp_path: Path) -> None:
    """And the other way round: what is fast with a cap is fast without one."""
    plain, here = KernelSpec("dqdr", 128, "bf16", causal=True), Bucket(64, 4096, 4096)
    capped = replace(plain, softcap=True)
    first, second = list(every_config(plain, GPU))[:2]
    places = [Place("h200", spec, here) for spec in (plain, capped)]
    records = [
        Result(place, OLD, config, "ok", time_us=10.0) for place, config in zip(places, (first, second), strict=True)
    ]
    write_shipped(records, "h200", tmp_path)
    for place, of_other in zip(places, (second, first), strict=True):
        assert of_other in shipped_seeds(place, load_same_capability(GPUS["h200"], tmp_path))
        assert nearby_seeds(place, records) == [of_other]


def test_seed_configs_of_the_same_kernel_with_another_cache_layout(tmp_path: Path) -> None:
    """They come after the configs of the same spec, and before those of other buckets."""
    dense = KernelSpec("decode_varlen", 128, "bf16", group=4)
    paged, bucket = replace(dense, page_size=64), Bucket(64, 1, 4096)
    specs = (dense, paged, replace(paged, cache_dtype="e4m3"), replace(dense, group=8))
    configs = [DecodeConfig(32, 8, splits, "kernel", 1, 3) for splits in (2, 3, 4, 6, 8)]
    places = [*(Place("h100", spec, bucket) for spec in specs), Place("h100", paged, Bucket(8, 1, 4096))]
    results = [Result(place, OLD, config, "ok", time_us=10.0) for place, config in zip(places, configs, strict=True)]
    write_shipped(results, "h100", tmp_path)
    first, *kin, elsewhere = shipped_seeds(Place("h200", paged, bucket), load_same_capability(GPUS["h200"], tmp_path))
    assert first == configs[1]
    assert set(kin) == {configs[0], configs[2]}
    assert elsewhere == configs[4]
    # Also from the user's own database: the fastest of each cache layout.
    slower = Result(places[0], OLD, configs[3], "ok", time_us=11.0)
    assert nearby_seeds(Place("h200", paged, bucket), [slower, *results]) == [configs[0], configs[2], configs[4]]


def test_seed_configs_are_tried_right_after_the_default(store: Store, machine: Machine) -> None:
    job = Job(KernelSpec("dkdv", 128, "bf16", causal=True), Bucket(32, 8192, 8192), GPUS["h100"])
    seed_configs = [
        config
        for config in shipped_seeds(job.place, load_same_capability(job.gpu))
        if config != default_config(job.spec, job.shape, job.gpu)
    ]
    assert seed_configs  # the H200's records ship
    tune(store, job, trials=len(seed_configs) + 1)
    assert machine.compiled == [default_config(job.spec, job.shape, job.gpu), *seed_configs]
