"""The evaluation of borrowing, on small sets of records with known slowdowns."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from sweep_samples import RECORDED, synthetic_results

from parallax_gen.codegen.render import render
from parallax_gen.errors import StoreError
from parallax_gen.memory.lines import write_lines
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import default_of, evidence_of
from parallax_gen.memory.result import Result
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.borrowing import (
    CHOICES,
    NEAREST,
    Borrowed,
    borrowed,
    comparable_times,
    kind_of,
    read_results,
    summarise,
)
from parallax_gen.tuning.search.recorded_sweep import read_sweep

GPU = GPUS["h200"]
SPEC = KernelSpec("forward", 128, "bf16", causal=True)
PLACE = Place(GPU.name, SPEC, Bucket(8, 4096, 4096))
DEFAULT = default_of(PLACE, GPU)
OURS, OTHERS, SIBLINGS, NEARS = (dataclasses.replace(DEFAULT, GROUP_HEADS=n) for n in (1, 2, 4, 16))
NEW = {"triton": "3.9.0", "cuda": "13.4"}
OLD = {"triton": "3.6.0", "cuda": "12.8/12.9"}
FIRST, DEFAULTS = "measured here", "the default"


def record(time_us: float, config: KernelConfig, place: Place = PLACE, day: int = 1, **evidence: str) -> Result:
    """A result of today's kernel, by NEW except for the fields in `evidence`."""
    result = dataclasses.replace(evidence_of(render(place.spec, config, GPU)), **(NEW | evidence))
    return Result(place, result, config, "ok", time_us=time_us, created_at=f"2026-01-{day:02}T00:00:00+00:00")


def at(gpu: str = "h200", rows: int = 8, keys: int = 4096) -> Place:
    return Place(gpu, SPEC, Bucket(rows, keys, keys))


TRUTH = [record(10.0, OURS), record(11.0, OTHERS), record(12.0, SIBLINGS), record(13.0, NEARS), record(15.0, DEFAULT)]
MEMORY = [
    record(10.0, OURS),
    record(1.0, OTHERS, **OLD),
    record(1.0, SIBLINGS, at("h100")),
    record(1.0, NEARS, at(keys=8192)),
    record(1.0, OURS, at(rows=16)),  # equally near, but along rows
    record(1.0, OTHERS, at(keys=16384)),
]


def judged(memory: list[Result], truth: list[Result] = TRUTH) -> list[Borrowed]:
    (measured,) = comparable_times(truth)
    return list(borrowed(measured, memory))


def test_choices_and_losses_as_records_are_left_out() -> None:
    result = [(choice.left_out, choice.choice, choice.config, choice.slowdown) for choice in judged(MEMORY)]
    assert result.pop(3)[0] == "this bucket"  # what the ranking would then choose
    assert result == [
        ("nothing", FIRST, OURS, 1.0),
        ("this toolchain", "another toolchain", OTHERS, pytest.approx(1.1)),
        ("this card", "a sibling card", SIBLINGS, pytest.approx(1.2)),
        ("this bucket", NEAREST, NEARS, pytest.approx(1.3)),
    ]
    assert {choice.default_slowdown for choice in judged(MEMORY)} == {1.5}
    assert [choice.choice for choice in judged([])] == [DEFAULTS] * 4


def test_the_toolchain_is_that_of_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toolchain, "here", classmethod(lambda cls: pytest.fail("asked what is installed")))
    assert judged(MEMORY)[0].config == OURS
    old = [dataclasses.replace(r, evidence=dataclasses.replace(r.evidence, **OLD)) for r in TRUTH]
    assert judged(MEMORY, old)[0].config == OTHERS
    assert judged(MEMORY, old)[1].choice == "another toolchain"  # the other toolchain is now NEW


def test_the_nearest_bucket_has_equal_rows_and_a_usable_record() -> None:
    gone = {"kernel": "f" * 32, "text": "f" * 32}
    nearer = record(1.0, SIBLINGS, at(keys=2048), **gone)  # of a kernel that is no longer rendered
    assert judged([*MEMORY, nearer])[-1].config == NEARS
    by_rows = [result for result in MEMORY if result.place.bucket.seqlen_kv == 4096]
    assert judged(by_rows)[-1].config == OURS
    assert judged([record(1.0, NEARS, at("a100", keys=8192))])[-1].choice == DEFAULTS


def test_a_choice_without_a_time_has_no_loss() -> None:
    choices = judged(MEMORY, [record(10.0, OURS), record(15.0, DEFAULT)])
    assert choices[1].slowdown is None
    lines = {line.choice: line for line in summarise(choices)}
    line = lines["another toolchain"]
    assert (line.places, line.unmeasured, line.mean, line.default_worst) == (0, 1, None, None)
    assert lines[FIRST].places == 1


def test_a_summary_compares_choice_and_default_at_the_same_places() -> None:
    wide = at(rows=64)
    assert default_of(wide, GPU) == DEFAULT
    truth = [*TRUTH, record(30.0, OURS, wide), record(20.0, DEFAULT, wide)]
    memory = [*MEMORY, record(30.0, OURS, wide)]
    lines = {line.choice: line for line in summarise(c for m in comparable_times(truth) for c in borrowed(m, memory))}
    line = lines[FIRST]
    assert (line.kind, line.places, line.unmeasured, line.worst, line.default_worst) == ("forward", 2, 0, 1.5, 1.5)
    assert line.mean == pytest.approx(math.sqrt(1.5))
    assert line.default_mean == pytest.approx(math.sqrt(1.5))
    assert [*lines] == [choice for choice in CHOICES if choice in lines]
    assert {FIRST, "another toolchain", "a sibling card", NEAREST} <= {*lines}


def test_the_newest_time_of_a_config_counts_and_single_configs_are_skipped() -> None:
    (measured,) = comparable_times([*TRUTH, record(20.0, OURS, day=2), record(1.0, OURS, **OLD)])
    assert measured.slowdown(OURS) == pytest.approx(20 / 11)
    failed = dataclasses.replace(record(1.0, OTHERS), outcome="wrong")
    elsewhere = record(1.0, OURS, at("a card of nobody's"))
    for few in ([], TRUTH[:1], [TRUTH[0], failed], [elsewhere, dataclasses.replace(elsewhere, config=OTHERS)]):
        with pytest.raises(StoreError, match="no times can be compared"):
            comparable_times(few)


def test_decode_is_split_by_lengths_and_pages() -> None:
    spec = KernelSpec("decode", 128, "bf16")
    paged = dataclasses.replace(spec, op="decode_varlen", page_size=16)
    kinds = [kind_of(kind_spec) for kind_spec in (spec, dataclasses.replace(spec, op="decode_varlen"), paged, SPEC)]
    assert kinds == ["decode", "decode, per-sequence lengths", "decode, per-sequence lengths, paged", "forward"]


def test_sweeps_records_and_databases_are_read(tmp_path: Path) -> None:
    path = next(path for path in RECORDED if path.suffix != ".gz")
    assert read_results(path) == list(read_sweep(path).results)
    write_lines(tmp_path / "lines.jsonl", TRUTH)
    assert read_results(tmp_path / "lines.jsonl") == TRUTH
    with Store(tmp_path / "store.db") as store:
        for result in TRUTH:
            store.save(result)
    assert {result.config for result in read_results(tmp_path / "store.db")} == {result.config for result in TRUTH}


@pytest.mark.parametrize(
    "text", ["[]\n", "no JSON\n", json.dumps(synthetic_results()[0].to_dict() | {"outcome": "good"}) + "\n"]
)
def test_an_invalid_record_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "spoilt.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StoreError, match=r"spoilt\.jsonl, line 1: not a record"):
        read_results(path)


EVIDENCE = sorted((Path(__file__).parents[1] / "data" / "borrowing").glob("*.jsonl"))


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.stem)
def test_the_evidence_has_62_places_with_the_defaults_time(path: Path) -> None:
    records = read_results(path)
    assert len({record.place for record in records}) == 62
    for measured in comparable_times(records):
        assert measured.slowdown(default_of(measured.place, GPU)) is not None


def test_near_buckets_lose_as_little_as_the_default_with_per_sequence_lengths() -> None:
    """Why near buckets only support the default: it is as fast, and no search of a few configs misleads it."""
    measured = read_results(Path(__file__).parents[1] / "data" / "near_buckets" / "h200_triton39.jsonl")
    choices = [choice for comparable in comparable_times(measured) for choice in borrowed(comparable, measured)]
    seen = set()
    for summary in summarise(choices):
        if summary.choice == NEAREST:
            assert summary.mean is not None
            assert summary.default_mean is not None
            assert abs(summary.mean - summary.default_mean) < 0.005
            assert summary.default_mean < 1.015
            assert summary.places >= 8
            seen.add(summary.kind)
    assert len(seen) == 4
