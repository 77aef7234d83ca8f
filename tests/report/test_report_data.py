"""The report's data: entries, the states of buckets, failure reasons, charts, costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from cli_samples import OTHER_KERNEL, OTHER_TOOLCHAIN, PLACE, SPEC, dkdv_record, make_record

from parallax_gen.errors import UnknownGpuError
from parallax_gen.memory.lines import read_file, write_lines
from parallax_gen.memory.shipped import Memory, write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.ops.space import default_config
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.report.charts import Scale, history, rooflines
from parallax_gen.report.data import Report, collect, to_json
from parallax_gen.report.failures import reasons
from parallax_gen.report.matrices import coverage

HERE = Toolchain.here()
OTHER_GPU = dataclasses.replace(PLACE, gpu="h100")
OTHER_BUCKET = dataclasses.replace(PLACE, bucket=Bucket(256, 1, 16384))


def report(store: Store, *gpus: str, all_environments: bool = False) -> Report:
    return collect(Memory(store), gpus, [], all_environments=all_environments)


# entries


def test_a_study_is_a_place_with_its_trials_in_the_order_they_were_tried(store: Store) -> None:
    for time_us, splits in ((240.0, 3), (250.0, 1), (230.0, 2)):
        store.save(make_record(time_us, splits=splits))
    store.save(
        make_record(235.0, splits=3, created_at="2026-01-02T00:00:00+00:00")
    )  # timed again: it keeps its position
    write_shipped([make_record(260.0, splits=4)], "h200")
    (entry,) = report(store).shown
    assert [trial.time_us for trial in entry.trials] == [235.0, 250.0, 230.0]
    assert [result.time_us for result in entry.results] == [230.0, 235.0, 250.0, 260.0]
    assert entry.status == "measured"
    assert entry.state == "measured"
    # 256 caches of 8192 keys and values, 128 wide in bf16, and 1024 rows of q, r and o; 4.8 TB/s.
    assert entry.fraction_of_bound == pytest.approx((2 * 256 * 8192 + 3 * 1024) * 128 * 2 / 4.8e12 / 230e-6)


def test_a_study_has_its_gain_over_the_default(store: Store) -> None:
    default = default_config(SPEC, Shape(32, 32, 8, 1, 8192), gpu_by_name("h200"))
    store.save(make_record(100.0))
    store.save(make_record(125.0, config=default))
    store.save(make_record(100.0, place=OTHER_BUCKET))
    store.save(make_record(100.0, place=OTHER_GPU, evidence_changes=OTHER_KERNEL))
    store.save(make_record(125.0, place=OTHER_GPU, evidence_changes=OTHER_KERNEL, config=default))
    result = report(store)
    gains = {entry.place: entry.gain for entry in result.shown}
    assert gains == {PLACE: 1.25, OTHER_BUCKET: None, OTHER_GPU: None}
    gains = {
        tuple(s["place"].values()): (s["default_us"], s["gain"]) for s in to_json(result, Memory(store))["entries"]
    }
    assert gains[tuple(PLACE.flat().values())] == (125.0, 1.25)


def test_another_toolchains_study_is_shown_if_this_one_has_none(store: Store) -> None:
    store.save(make_record(100.0, evidence_changes=OTHER_TOOLCHAIN))
    store.save(make_record(90.0, evidence_changes={"triton": "3.3"}, created_at="2025-01-01T00:00:00+00:00"))
    result = report(store)
    differences = (f"triton 3.4 (here {minor(HERE.triton)})", f"cuda 12.4 (here {HERE.cuda})")
    assert [(s.state, s.differences) for s in result.shown] == [("elsewhere", differences)]
    assert result.left_out == 1
    both = report(store, all_environments=True)
    assert len(both.shown) == 2
    assert both.by_place[PLACE] == result.shown[0]
    store.save(make_record(None, "wrong"))
    assert sorted(s.state for s in report(store).shown) == ["elsewhere", "failed"]
    assert report(store).by_place[PLACE].state == "elsewhere"  # type: ignore[union-attr]
    store.save(make_record(200.0, splits=1))
    result = report(store)
    assert [s.state for s in result.shown] == ["measured"]
    assert result.left_out == 2
    assert len(report(store, all_environments=True).shown) == 3
    assert report(store, all_environments=True).by_place[PLACE].state == "measured"  # type: ignore[union-attr]


def test_a_changed_kernel_is_another_study(store: Store) -> None:
    store.save(make_record(100.0, evidence_changes=OTHER_KERNEL))
    store.save(make_record(90.0, splits=3, evidence_changes=OTHER_KERNEL))
    (entry,) = report(store).shown
    assert (entry.state, entry.differences) == ("elsewhere", ("another kernel than today's",))
    assert [trial.time_us for trial in entry.trials] == [100.0, 90.0]
    store.save(make_record(240.0))
    result = report(store)
    assert [(s.state, s.differences) for s in result.shown] == [("measured", ())]
    assert result.left_out == 1


def test_every_usual_bucket_has_a_standing(store: Store) -> None:
    store.save(make_record(90.0, "predicted"))
    store.save(make_record(None, "compile", place=OTHER_BUCKET))
    store.save(make_record(240.0, place=OTHER_GPU))
    result = report(store)
    assert result.gpus == ("h100", "h200")
    states = {place: entry and entry.state for place, entry in result.by_place.items()}
    assert states[PLACE] == "predicted"
    assert states[OTHER_BUCKET] == "failed"
    assert states[OTHER_GPU] == "measured"
    assert states[dataclasses.replace(OTHER_BUCKET, gpu="h100")] is None  # tuned on the other card only
    assert {place.spec.op for place in states} == {"forward", "preprocess", "dkdv", "dqdr", "decode"}  # the usual ops
    counts, fraction = result.summary()["decode"]["h100"]
    assert counts["measured"] == 1
    assert counts.total() == sum((place.gpu, place.spec.op) == ("h100", "decode") for place in states)
    assert fraction == result.shown[0].fraction_of_bound
    only = report(store, "H200 SXM")
    assert only.gpus == ("h200",)
    assert {place.gpu for place in only.by_place} == {"h200"}


def test_a_gpu_without_records_is_untuned_and_an_unknown_one_an_error(store: Store) -> None:
    result = report(store, "b200")
    assert result.by_place
    assert not any(result.by_place.values())
    with pytest.raises(UnknownGpuError, match="unknown GPU 'b400'"):
        report(store, "b400")


def test_a_card_outside_the_table_has_times_but_no_roofline(store: Store) -> None:
    store.save(make_record(240.0, place=dataclasses.replace(PLACE, gpu="nvidia-rtx-a6000-84sm")))
    (entry,) = report(store).shown
    assert entry.fraction_of_bound is None
    assert entry.rate == pytest.approx(4477, rel=0.01)
    assert rooflines([entry]) == []
    ((cell,),) = [row for _, row in coverage(report(store).by_place)["decode"]["nvidia-rtx-a6000-84sm"][0].rows]
    assert cell is not None
    assert (cell.text, cell.kind) == ("✓", "known")


# reasons


def test_reasons_that_differ_only_in_numbers_are_merged() -> None:
    failed = [
        make_record(None, "resources", splits=1, detail="spills 900 bytes a thread, over 512"),
        make_record(None, "resources", splits=2, detail="spills 1024 bytes a thread, over 512"),
        make_record(None, "resources", splits=3, detail="needs 9 bytes of shared memory"),
        make_record(None, "wrong", splits=4, detail="row 7 is NaN"),
        make_record(900.0, "slow", splits=6),
        make_record(None, "crash", splits=8),
        make_record(100.0),
        make_record(100.0, "predicted"),
    ]
    assert [(r.outcome, r.count, r.text) for r in reasons(failed)] == [
        ("slow", 1, "far slower than the best so far"),
        ("resources", 2, "spills 900 to 1024 bytes a thread, over 512"),
        ("resources", 1, "needs 9 bytes of shared memory"),
        ("crash", 1, "no reason was recorded"),
        ("wrong", 1, "row 7 is NaN"),
    ]
    assert reasons(failed)[1].examples == ("N32 H8 S1 w1 s4", "N32 H8 S2 last w1 s4")


# figures


def test_a_scale_is_logarithmic_between_its_ends() -> None:
    scale = Scale(1.0, 100.0, 50.0, 250.0)
    assert [scale(value) for value in (1.0, 10.0, 100.0, 1000.0, 0.1)] == [50.0, 150.0, 250.0, 250.0, 50.0]
    assert scale.ticks((0.5, 1, 10, 200)) == [(50.0, "1"), (150.0, "10")]


def test_a_roofline_has_a_point_per_measured_study(store: Store) -> None:
    store.save(make_record(240.0))
    store.save(dkdv_record(900.0))
    store.save(make_record(None, "wrong", place=OTHER_BUCKET))
    (chart,) = rooflines(report(store).shown)
    assert [point.op for point in chart.points] == ["decode", "dkdv"]
    decode = chart.points[0]
    intensity = 8 * 4 * 256 * 8192 * 128 / ((2 * 256 * 8192 + 3 * 1024) * 128 * 2)  # FLOP per byte
    assert decode.x == chart.x(intensity)
    assert decode.y > chart.y(4.8 * intensity)  # y grows downwards: the point is below the bandwidth roof
    assert chart.roofs[0].flat == "989.4 TFLOP/s, bf16"
    assert "240.0 µs" in decode.tip


def test_a_history_shows_every_trial_and_the_best_so_far(store: Store) -> None:
    for splits, time_us, outcome in ((1, 300.0, "ok"), (2, 400.0, "ok"), (3, 900.0, "slow"), (4, 200.0, "ok")):
        store.save(make_record(time_us, outcome, splits=splits))
    store.save(make_record(None, "wrong", splits=6))
    (entry,) = report(store).shown
    drawn = history(entry)
    assert drawn is not None
    assert (drawn.trials, drawn.best) == (5, "200.0 µs")
    assert (drawn.timed.count("M"), drawn.slow.count("M"), drawn.failed.count("M")) == (3, 1, 1)
    assert [point.tip.partition("\n")[0] for point in drawn.improvements] == [
        "trial 1: 300.0 µs, 1.50 times the best",
        "trial 4: 200.0 µs, 1.00 times the best",
    ]
    assert drawn.improvements[1].y == drawn.y(1.0)


def test_an_imported_study_shows_its_true_course(store: Store, tmp_path: Path) -> None:
    """An export lists the fastest first; the trial numbers restore the order."""
    for splits, time_us in ((1, 300.0), (2, 250.0), (3, 400.0), (4, 200.0)):
        store.save_trial(make_record(time_us, splits=splits))
    write_lines(tmp_path / "mine.jsonl", store.all())
    with Store(tmp_path / "other.db") as other:
        other.merge(read_file(tmp_path / "mine.jsonl").results)
        (entry,) = report(other).shown
        assert [trial.time_us for trial in entry.trials] == [300.0, 250.0, 400.0, 200.0]
        drawn = history(entry)
        assert drawn is not None
        assert (len(drawn.improvements), drawn.unnumbered) == (3, 0)
        other.merge([make_record(500.0, splits=6)])
        (entry,) = report(other).shown
        assert [trial.time_us for trial in entry.trials] == [500.0, 300.0, 250.0, 400.0, 200.0]
        drawn = history(entry)
        assert drawn is not None
        assert drawn.unnumbered == 1


def test_shipped_records_have_no_history(store: Store) -> None:
    write_shipped([make_record(250.0)], "h200")
    (entry,) = report(store).shown
    assert entry.status == "shipped"
    assert history(entry) is None


def test_costs_are_relative_to_the_best_of_their_bucket(store: Store) -> None:
    for splits, time_us in ((1, 200.0), (2, 300.0)):
        store.save(make_record(time_us, splits=splits))
        store.save(make_record(10 * time_us, splits=splits, place=OTHER_BUCKET))
    store.save(make_record(90.0, "predicted", splits=3))
    (kernel,) = report(store).kernels
    assert sorted(cost for _, cost in kernel.costs) == [1.0, 1.0, 1.5, 1.5]
    assert kernel.importances == {}  # four trials are too few
