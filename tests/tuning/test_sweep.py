"""Recorded sweeps round-trip through files, and malformed files are refused with the line number."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_samples import CARD, PLACE, RECORDED, SHAPE, synthetic_results

from parallax_gen.errors import ArgumentError, StoreError
from parallax_gen.memory.result import Evidence, Result
from parallax_gen.memory.store import Store
from parallax_gen.ops.base import OPS_BY_NAME, config_to_dict
from parallax_gen.ops.space import every_config, why_invalid
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.tuning.search.recorded_sweep import COLUMNS, FORMAT, read_sweep, sweep_of, write_sweep


@pytest.mark.parametrize("name", ["sweep.jsonl", "sweep.jsonl.gz"])
def test_a_sweep_round_trips_through_its_file(name: str, tmp_path: Path) -> None:
    sweep = sweep_of(synthetic_results(), CARD)
    write_sweep(sweep, tmp_path / name)
    reread = read_sweep(tmp_path / name)
    assert (reread.place, reread.shape, reread.whole) == (PLACE, SHAPE, True)
    assert {r.evidence for r in reread.results} == {
        Evidence("", "", "3.6.0", "12.8/12.9", 1)
    }  # the kernel is not stored
    assert {r.config: (r.outcome, r.registers, r.spills, r.compile_s) for r in reread.results} == {
        r.config: (r.outcome, r.registers, r.spills, r.compile_s) for r in synthetic_results()
    }
    assert {config for config, cost in reread.costs.items() if cost is None} == {
        config for config, cost in sweep.costs.items() if cost is None
    }
    for config, cost in reread.costs.items():
        if cost is not None:
            assert cost == pytest.approx(sweep.costs[config], rel=1e-4)  # costs are stored with five digits
    assert reread.best_us == pytest.approx(min(r.time_us for r in synthetic_results() if r.time_us), rel=1e-4)


def test_the_same_sweep_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, results in (("a.jsonl.gz", synthetic_results()), ("b.jsonl.gz", synthetic_results()[::-1])):
        write_sweep(sweep_of(results, CARD), tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_a_complete_sweep_of_the_largest_space_is_a_small_file(tmp_path: Path) -> None:
    spec, gpu = dataclasses.replace(PLACE.spec, head_dim=256, dtype="bf16", causal=True), GPUS["h200"]
    place = dataclasses.replace(PLACE, spec=spec, gpu=gpu.name)
    first = synthetic_results()[0]
    results = [
        dataclasses.replace(first, place=place, config=config, time_us=1000.0 + 0.37 * n, registers=n % 255)
        for n, config in enumerate(every_config(spec, gpu))
    ]
    write_sweep(sweep_of(results, gpu), tmp_path / "sweep.jsonl.gz")
    assert len(results) > 3000
    assert (tmp_path / "sweep.jsonl.gz").stat().st_size < 20 * len(results)


def test_a_sweep_is_complete_if_every_config_was_tried() -> None:
    assert sweep_of(synthetic_results(), CARD).whole
    assert not sweep_of(synthetic_results()[1:], CARD).whole
    predicted = dataclasses.replace(synthetic_results()[0], outcome="predicted", time_us=1.0)
    sweep = sweep_of([predicted, *synthetic_results()[1:]], CARD)  # a prediction does not count as a trial
    assert not sweep.whole
    assert predicted.config not in sweep.costs


def test_a_sweep_is_made_from_a_stores_results(tmp_path: Path) -> None:
    with Store(tmp_path / "tuning.db") as store:
        for result in synthetic_results():
            store.save(result)
        assert sweep_of(store.results(PLACE), CARD) == sweep_of(synthetic_results(), CARD)


def test_the_newest_row_counts_if_a_configs_kernel_has_changed() -> None:
    first = synthetic_results()[0]
    later = changed(evidence=dataclasses.replace(first.evidence, kernel="f" * 32), time_us=1.0)
    earlier = dataclasses.replace(later, created_at="2025-01-01T00:00:00+00:00")
    later = dataclasses.replace(later, created_at="2027-01-01T00:00:00+00:00")
    for results, time_us in (([later, *synthetic_results()], 1.0), ([*synthetic_results(), earlier], first.time_us)):
        sweep = sweep_of(results, CARD)
        assert (sweep.whole, sweep.costs[first.config]) == (True, time_us)


def test_rows_without_a_shape_get_the_buckets_representative_shape() -> None:
    assert sweep_of([dataclasses.replace(r, shape=None) for r in synthetic_results()], CARD).shape == SHAPE


def test_failures_have_no_cost_but_slow_results_do() -> None:
    costs = sweep_of(synthetic_results(), CARD).costs
    for result in synthetic_results():
        assert (costs[result.config] is None) == (result.outcome == "resources")


def changed(**fields: Any) -> Result:
    """The first synthetic result, with some values replaced."""
    return dataclasses.replace(synthetic_results()[0], **fields)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "none of them timed"),
        ([r for r in synthetic_results() if r.outcome == "resources"], "none of them timed"),
        ([*synthetic_results(), changed(place=dataclasses.replace(PLACE, gpu="h100"))], "2 values of place"),
        ([changed(place=dataclasses.replace(PLACE, gpu="h100")), *synthetic_results()], "2 values of place"),
        ([*synthetic_results(), changed(evidence=Evidence("", "", "3.9.0", "12.8/12.9", 1))], "2 values of toolchain"),
        ([*synthetic_results(), changed(evidence=Evidence("", "", "3.6.0", "13.0", 1))], "2 values of toolchain"),
        ([changed(shape=Shape(2, 8, 8, 4096, 4096)), *synthetic_results()[1:]], "2 values of shape"),
    ],
)
def test_results_that_are_no_sweep_are_refused(results: list[Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        sweep_of(results, CARD)


DEEP = json.loads("[" * 900 + "]" * 900)


def _header(**fields: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda lines: [lines[0] | fields, *lines[1:]]


def _column(name: str, value: Any) -> Callable[[list[Any]], list[Any]]:
    knobs = [knob.name for knob in OPS_BY_NAME[PLACE.spec.op].knobs]
    place = knobs.index(name) if name.isupper() or name not in COLUMNS else len(knobs) + COLUMNS.index(name)

    def corrupt(lines: list[Any]) -> list[Any]:
        lines[2][place] = value
        return lines

    return corrupt


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda lines: [], "line 1: not a line of a sweep"),
        (lambda lines: lines[1:], "line 1: not a line of a sweep"),
        (_header(format=3), "line 1: .*format"),
        (_header(format=1), "line 1: .*key"),
        (_header(key={}), "line 1: .*exactly"),
        (_header(whole=1), "line 1: .*whole"),
        (_header(columns=["time_us"]), "line 1: .*columns"),
        (_header(place={"gpu": "h200"}), "line 1: .*spec: got"),
        (_header(place={**PLACE.flat(), "environment.triton": "3.6"}), "line 1: .*place: got"),
        (_header(triton=3.6), "line 1: .*triton"),
        (_header(protocol="1"), "line 1: .*protocol"),
        (_header(shape={"batch": 1}), "line 1: .*shape"),
        (_header(configs=20), f"{len(synthetic_results())} configs.*line 1 says 20"),
        (lambda lines: [*lines[:-1], lines[-2]], "possibly with duplicates"),
        (lambda lines: [*lines[:4], "x", *lines[5:]], "line 5: not a line of a sweep"),
        (lambda lines: [*lines[:4], lines[4][:-1], *lines[5:]], "line 5: .*a list of"),
        (_column("BLOCK_M", "__import__('os')"), "line 3: .*BLOCK_M"),
        (_column("outcome", "fast"), "line 3: .*outcome"),
        (_column("time_us", -1.0), "line 3: .*time_us"),
        (_column("time_us", "1"), "line 3: .*time_us"),
        (_column("time_us", 1e-320), "line 3: .*time_us"),
        (_column("registers", 2**70), "line 3: .*registers"),
        (_column("BLOCK_M", 2**2000), "line 3: .*BLOCK_M"),
        *((_column(name, 0), f"line 3: .*{name}: got 0") for name in ("BLOCK_M", "num_warps", "num_stages")),
        (_header(source="\ud800"), "line 2: .*source"),
        (_header(columns=DEEP), "line 1: .*columns"),
        (_header(place={**PLACE.flat(), "x": DEEP}), "line 1: .*place"),
        (lambda lines: [*lines[:4], DEEP, *lines[5:]], "line 5: .*a list of"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(
    corrupt: Callable[[list[Any]], list[Any]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "sweep.jsonl"
    write_sweep(sweep_of(synthetic_results(), CARD), path)
    lines = corrupt([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(StoreError, match=message) as refused:
        read_sweep(path)
    assert str(path) in str(refused.value)


def test_an_unreadable_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b"x" * 1000)[:-9])
    for path in (tmp_path / "missing.jsonl", tmp_path, torn):
        with pytest.raises(StoreError, match=str(path)):
            read_sweep(path)
    with pytest.raises(StoreError, match="cannot write"):
        write_sweep(sweep_of(synthetic_results(), CARD), tmp_path / "no" / "such" / "folder.jsonl")


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_recorded_sweeps_have_valid_headers_and_configs(path: Path) -> None:
    sweep = read_sweep(path)
    spec, gpu = sweep.place.spec, GPUS[sweep.place.gpu]
    later = {
        "MASK",
        "SOFTMAX",
        "ROW_STATS",
        "QR_TILE",
        "LOADS",
    }  # knobs newer than these files, which are at their defaults there
    all_configs = {config for config in every_config(spec, gpu) if not later & set(config_to_dict(config))}
    assert sweep.whole == (all_configs <= set(sweep.costs))
    for result in sweep.results:
        assert why_invalid(spec, result.config, gpu) is None, config_to_dict(result.config)
    assert path.stat().st_size < 100_000


def test_recorded_sweeps_exist() -> None:
    assert len(RECORDED) >= 3


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_a_format_1_file_round_trips_through_the_current_format(path: Path, tmp_path: Path) -> None:
    """Its key was the place and the environment. Knobs that were added later get their defaults."""
    old = header_of(path)
    assert old["format"] == 1
    sweep = read_sweep(path)
    prefix = "environment."
    assert {name: value for name, value in old["key"].items() if not name.startswith(prefix)} == sweep.place.flat()
    triton, cuda, protocol = (old["key"].get(f"{prefix}{name}", "") for name in ("triton", "cuda", "protocol"))
    assert {r.evidence for r in sweep.results} == {Evidence("", "", triton, cuda, protocol)}
    assert (sweep.shape.to_dict(), sweep.whole, len(sweep.results)) == (old["shape"], old["whole"], old["configs"])
    assert {(r.source, r.created_at) for r in sweep.results} == {(old["source"], old["created_at"])}
    write_sweep(sweep, tmp_path / path.name)
    assert header_of(tmp_path / path.name)["format"] == FORMAT == 2
    assert read_sweep(tmp_path / path.name) == sweep


def test_a_sweep_that_was_read_is_written_byte_for_byte(tmp_path: Path) -> None:
    write_sweep(sweep_of(synthetic_results(), CARD), tmp_path / "first.jsonl")
    write_sweep(read_sweep(tmp_path / "first.jsonl"), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"environment.templates": ""}, "templates"),
        ({"environment.space": 2}, "key"),
        ({"environment.python": "3.12"}, "key"),
        ({"environment.triton": 3}, "triton"),
        ({"environment.protocol": True}, "protocol"),
        ({"spec.op": "backward"}, "op"),
        ({"bucket.depth": 3}, "depth"),
    ],
)
def test_a_malformed_format_1_key_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    plain = next(path for path in RECORDED if path.suffix == ".jsonl")
    first, *lines = plain.read_text(encoding="utf-8").splitlines(keepends=True)
    header = json.loads(first)
    header["key"] |= fields
    (tmp_path / "sweep.jsonl").write_text("".join([json.dumps(header) + "\n", *lines]), encoding="utf-8")
    with pytest.raises(StoreError, match=f"line 1: .*{message}"):
        read_sweep(tmp_path / "sweep.jsonl")


def header_of(path: Path) -> Any:
    data = path.read_bytes()
    return json.loads((gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()[0])
