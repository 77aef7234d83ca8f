"""The report's data: entries, the states of buckets, failure reasons, times relative to ours."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from cli_samples import OTHER_KERNEL, OTHER_TOOLCHAIN, PLACE, SPEC, dkdv_record, make_record

from parallax_gen.bench import rows as rows_module
from parallax_gen.bench.results_csv import ResultsCsv
from parallax_gen.bench.rows import FULL_EFFORT, Conditions, Provenance, Row, read_rows
from parallax_gen.bench.summary import means, times_ours
from parallax_gen.errors import ParallaxGenError, UnknownGpuError
from parallax_gen.memory.lines import read_file, write_lines
from parallax_gen.memory.shipped import Memory, write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.ops.space import default_config
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.report.charts import Scale, history, rooflines
from parallax_gen.report.data import Report, collect, to_json
from parallax_gen.report.failures import reasons
from parallax_gen.report.matrices import coverage, speed_ups

HERE = Toolchain.here()
OTHER_GPU = dataclasses.replace(PLACE, gpu="h100")
OTHER_BUCKET = dataclasses.replace(PLACE, bucket=Bucket(256, 1, 16384))


def report(store: Store, *gpus: str, all_environments: bool = False, timings: tuple[Row, ...] = ()) -> Report:
    return collect(Memory(store), gpus, list(timings), all_environments=all_environments)


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
    differences = (f"triton 3.5 (here {minor(HERE.triton)})", f"cuda 12.8 (here {HERE.cuda})")
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


# bench files

ROW: dict[str, Any] = {
    "op": "decode",
    "head_dim": 128,
    "dtype": "bf16",
    "batch": 2,
    "heads": 32,
    "kv_heads": 8,
    "seqlen_q": 1,
    "seqlen_kv": 4096,
    "contender": "parallax_gen",
    "part": "decode",
    "time_us": 10.0,
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_bench_file_may_have_the_earlier_name_of_a_baseline(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path / "a.csv", ROW | {"contender": "official Triton"}))
    assert row.baseline == "parallax-kernel Triton"


def test_optional_and_extra_columns_of_a_bench_file(tmp_path: Path) -> None:
    peer = ROW | {
        "contender": "other",
        "time_us": 15.0,
        "gpu": "NVIDIA H200",
        "p80_us": 16,
        "error": 0.002,
        "peaked_error": 0.02,
    }
    absent = ROW | {"contender": "absent", "time_us": "", "note": "not installed"}
    ours, other, nobody = read_rows(write(tmp_path / "a.csv", ROW, peer, absent))
    assert (ours.provenance.file, ours.provenance.gpu, ours.spec, ours.shape) == (
        "a.csv",
        "",
        SPEC,
        Shape(2, 32, 8, 1, 4096),
    )
    assert (other.provenance.gpu, other.error, other.peaked_error) == ("h200", 0.002, 0.02)
    assert (ours.error, ours.peaked_error) == (None, None)
    assert (nobody.time_us, nobody.error, nobody.note) == (None, None, "not installed")


def test_files_of_bench_are_read(tmp_path: Path) -> None:
    """Rows of decode and of a training step (with a window, and the forward's spec), written by bench."""
    step = KernelSpec("forward", 96, "bf16", 2, causal=True, stats=True, window=True)
    paged = KernelSpec("decode_varlen", 128, "fp16", 4, page_size=16, cache_dtype="e4m3")
    how = Conditions("h200", "NVIDIA H200 SXM", "0.1", "2.11", "3.6", "13.0", FULL_EFFORT, "parallax-gen bench")
    rows = [
        Row("parallax_gen", "training", "step", step, Shape(2, 8, 4, 512, 512, 128), 10.0, 1.0, 0.002, conditions=how),
        Row("fla", "training", "step", step, Shape(2, 8, 4, 512, 512, 128), note="not installed", conditions=how),
        Row("parallax_gen", "decode", "decode", paged, Shape(2, 32, 8, 1, 4096), 5.0, 2.0, math.inf, conditions=how),
    ]
    rows.append(dataclasses.replace(rows[-1], lengths=(4096, 128)))
    ResultsCsv(tmp_path / "a.csv").add(rows)
    document = {"gpu": "h200", "torch": "2.11", "rows": [{**rows_module.to_json(row), "error": None} for row in rows]}
    (tmp_path / "a.json").write_text(json.dumps(document), encoding="utf-8")
    for name, gpu in (("a.csv", "h200"), ("a.json", "h200")):
        result = read_rows(tmp_path / name)
        assert [(t.baseline, t.op, t.part, t.spec, t.shape, t.time_us, t.note) for t in result] == [
            (r.baseline, r.op, r.part, r.spec, r.shape, r.time_us, r.note) for r in rows
        ]
        assert [t.lengths for t in result] == [(), (), (), (4096, 128)]
        assert {t.provenance.gpu for t in result} == {gpu}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.csv, line 1: got no columns; allowed: a CSV file of parallax-gen bench, with op, part, .*seqlen_kv$"),
        ("op,part\ndecode,decode\n", r"line 1: got the columns op, part; allowed: .* with contender, head_dim"),
        ("{", r"a\.csv: not JSON: "),
        ('{"rows": 3}', r"a\.csv, rows: got 3; allowed: a list"),
        (f'{{"rows": {"[" * 900}{"]" * 900}}}', r"a\.csv, row 1: got .*; allowed: an object with a spec and a shape"),
        ('{"rows": [{"spec": {}}]}', r"a\.csv, row 1: got .*; allowed: an object with a spec and a shape"),
        ('{"rows": [{"spec": {}, "shape": {}}]}', r"a\.csv, row 1: got an object without op, part"),
    ],
)
def test_an_invalid_bench_file_is_an_error_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ParallaxGenError, match=message):
        read_rows(tmp_path / "a.csv")


BASE = {"causal": False, "lengths": ""}  # optional columns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_us": "fast"}, "line 3: time_us: got 'fast'; allowed: a number from 0.001 to 1e\\+12, or an empty cell"),
        ({"time_us": -1}, "line 3: time_us: got '-1'; allowed"),
        *(({"time_us": text}, f"line 3: time_us: got '{text}'; allowed") for text in ("1e-320", "1e308", "inf", "nan")),
        ({"batch": "9" * 5000}, "line 3: batch: got '999.*'; allowed: an int of 0 or more, of at most"),
        ({"batch": 2**62 + 1}, "line 3: batch: got 4611686018427387905; allowed: at most"),
        ({"lengths": "99999999999x4096"}, "line 3: lengths: got '99999999999x4096'; allowed: the number of keys"),
        ({"lengths": f"4x{'9' * 5000}"}, "line 3: lengths: got '4x9.*'; allowed: the number of keys"),
        ({"batch": "2.5"}, "line 3: batch: got '2.5'; allowed: an int"),
        ({"batch": 0}, "line 3: batch: got 0; allowed: an int of 1 or more"),
        ({"kv_heads": 5}, "line 3: heads: got 32; allowed: a multiple of kv_heads"),
        ({"head_dim": 100}, "line 3: head_dim: got 100; allowed: a multiple of 8"),
        ({"op": "sort"}, "line 3: op: got 'sort'; allowed"),
        (
            {"lengths": "4096 128"},
            "line 3: lengths: got '4096 128'; allowed: the number of keys of each sequence, such as",
        ),
        ({"causal": "maybe"}, "line 3: causal: got 'maybe'; allowed: True or False"),
    ],
)
def test_an_invalid_cell_is_an_error_with_its_line_and_column(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParallaxGenError, match=rf"a\.csv, {message}"):
        read_rows(write(tmp_path / "a.csv", BASE | ROW, BASE | ROW | change))


def test_a_line_with_too_few_cells_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ROW)
    path.write_text(path.read_text(encoding="utf-8") + "decode,128\n", encoding="utf-8")
    with pytest.raises(ParallaxGenError, match=r"a\.csv, line 3: got too many or too few cells; allowed: 11"):
        read_rows(path)


# speed-ups


def timing(baseline: str, time_us: float | None, file: str = "a.csv", gpu: str = "h200", **fields: Any) -> Row:
    values: dict[str, Any] = {"op": "decode", "part": "decode", "spec": SPEC, "shape": ONE}
    return Row(baseline=baseline, time_us=time_us, provenance=Provenance(file, gpu), **(values | fields))


ONE, TWO, LONG = (
    Shape(1, 32, 8, 1, 1024),
    Shape(2, 16, 4, 1, 1024),
    Shape(1, 32, 8, 1, 4096),
)  # the first two have the same size


def test_baselines_are_compared_within_a_file_and_the_lowest_ratio_is_shown() -> None:
    ratios = times_ours(
        [
            *(timing("parallax_gen", 10.0, shape=shape) for shape in (ONE, TWO, LONG)),
            timing("parallax_gen", 20.0, "b.csv"),
            timing("other", 20.0),
            timing("other", 15.0, shape=TWO),
            timing("other", 60.0, "b.csv"),
            timing("other", None, shape=LONG, note="not supported: long"),
            timing("other", 99.0, "c.csv"),  # without a time of ours
        ]
    )
    assert [ratio for _, ratio in ratios] == [2.0, 1.5, 3.0, None, None]
    ((matrix,),) = speed_ups(ratios)["h200", "decode"].values()
    assert matrix.columns == ("1024", "4096")
    ((label, cells),) = matrix.rows
    assert label == "8"
    assert [cell and cell.text for cell in cells] == ["1.50", "–"]
    assert "not supported: long" in cells[1].tip  # type: ignore[union-attr]
    mean, least, count = means(ratios, key=lambda row: row.baseline)["other"]
    assert (mean, least, count) == (pytest.approx(9 ** (1 / 3)), 1.5, 3)


def test_baselines_are_compared_at_the_same_lengths() -> None:
    two = Shape(2, 32, 8, 1, 1024)
    ratios = times_ours(
        [
            timing("parallax_gen", 10.0, shape=two),
            timing("parallax_gen", 8.0, shape=two, lengths=(1024, 32)),
            timing("other", 16.0, shape=two, lengths=(1024, 32)),
        ]
    )
    assert [ratio for _, ratio in ratios] == [2.0]
    ((matrix,),) = speed_ups(ratios)["h200", "decode"].values()
    assert "seqlen 1x1024, lengths 1024,32: 16.00 µs, 8.000 ours" in matrix.rows[0][1][0].tip  # type: ignore[union-attr]


def test_only_rows_of_equal_conditions_are_compared_and_the_last_counts(tmp_path: Path) -> None:
    rows = [
        ROW | {"torch": "2.11", "command": "parallax-gen bench"},
        ROW | {"torch": "2.11", "contender": "other", "time_us": 99.0},
        ROW | {"torch": "2.11", "contender": "other", "time_us": 15.0},
        ROW | {"torch": "2.12", "contender": "other", "time_us": 20.0},
    ]
    timings = read_rows(write(tmp_path / "a.csv", *rows))
    assert [timing.provenance.conditions for timing in timings] == ["torch 2.11"] * 3 + ["torch 2.12"]
    assert timings[0].provenance.command == "parallax-gen bench"
    assert [ratio for _, ratio in times_ours(timings)] == [1.5, None]


@pytest.mark.parametrize(
    ("ratio", "kind"), [(0.5, 0), (0.9, 1), (0.96, 2), (1.04, 2), (1.1, 3), (1.3, 4), (1.6, 5), (3.0, 6), (30.0, 7)]
)
def test_colours_are_grey_for_equal_times(ratio: float, kind: int) -> None:
    ratios = times_ours([timing("parallax_gen", 10.0), timing("other", 10.0 * ratio)])
    ((matrix,),) = speed_ups(ratios)["h200", "decode"].values()
    assert matrix.rows[0][1][0].kind == f"ratio{kind}"  # type: ignore[union-attr]


def test_parts_of_a_training_step_link_to_their_kernels(store: Store) -> None:
    spec = KernelSpec("forward", 128, "bf16", causal=True, stats=True)
    shape = Shape(4, 16, 16, 4096, 4096)
    fields = {"op": "training", "spec": spec, "shape": shape}
    timings = [
        timing(name, 10.0, part=part, **fields) for name in ("parallax_gen", "fla") for part in ("forward", "step")
    ]
    result = speed_ups(times_ours(timings))["h200", "training"]
    assert result["forward", "fla"][0].ops == ("forward",)
    assert result["step", "fla"][0].ops == ("forward", "preprocess", "dkdv", "dqdr")


def test_timings_of_other_cards_are_omitted_for_a_given_card(store: Store) -> None:
    write_shipped([dkdv_record(900.0)], "h200")
    timings = tuple(timing("other", 10.0, gpu=gpu) for gpu in ("h200", "h100", ""))
    assert [t.provenance.gpu for t, _ in report(store, "h200", timings=timings).ratios] == ["", "h200"]
    assert [t.provenance.gpu for t, _ in report(store, timings=timings).ratios] == ["", "h100", "h200"]
