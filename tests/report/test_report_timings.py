"""The timings of the report: files of bench, read, and times relative to ours."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from cli_samples import SPEC, dkdv_record

from parallax_gen.bench import rows as rows_module
from parallax_gen.bench.results_csv import ResultsCsv
from parallax_gen.bench.rows import FULL_EFFORT, Conditions, Provenance, Row, read_rows
from parallax_gen.bench.summary import means, times_ours
from parallax_gen.errors import ParallaxGenError
from parallax_gen.memory.shipped import Memory, write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.report.data import collect
from parallax_gen.report.matrices import speed_ups

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
    timings = [timing("other", 10.0, gpu=gpu) for gpu in ("h200", "h100", "")]
    for gpus, shown in ((("h200",), ["", "h200"]), ((), ["", "h100", "h200"])):
        result = collect(Memory(store), gpus, timings, all_environments=False)
        assert [t.provenance.gpu for t, _ in result.ratios] == shown
