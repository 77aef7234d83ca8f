"""The gain of tuning over the default, and the rule that no shipped record is slower than the default."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from parallax_gen.codegen.render import render
from parallax_gen.files import data_dir
from parallax_gen.memory.gains import comparisons, comparisons_of, gain
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, comparable_default, default_of, evidence_of
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import load_shipped
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec

GPU = GPUS["h200"]
PLACE = Place(GPU.name, KernelSpec("forward", 128, "bf16", causal=True), Bucket(8, 4096, 4096))
DEFAULT = default_of(PLACE, GPU)
OTHER_KERNEL = {"kernel": "f" * 32, "text": "f" * 32}


def other_config(together: int = 2) -> KernelConfig:
    assert isinstance(DEFAULT, ForwardConfig)
    return dataclasses.replace(DEFAULT, GROUP_HEADS=together)


def timed(time_us: float, config: KernelConfig, place: Place = PLACE, day: int = 1, **evidence: Any) -> Result:
    """A result of today's kernel by Triton 3.6, except for the fields in `evidence`."""
    result = evidence_of(render(place.spec, config, GPU))
    result = dataclasses.replace(result, **({"triton": "3.6.0", "cuda": "12.8/12.9"} | evidence))
    return Result(place, result, config, "ok", time_us=time_us, created_at=f"2026-01-{day:02}T00:00:00+00:00")


def gained(record: Result, *others: Result) -> float | None:
    return gain(record, comparable_default(record, DEFAULT, GPU, RecordTable([record, *others])))


def test_the_gain_is_the_defaults_time_over_the_records() -> None:
    best, default = timed(80.0, other_config()), timed(100.0, DEFAULT)
    assert gained(best, default, timed(90.0, other_config(4))) == 1.25
    assert gained(default) == 1.0
    assert gained(best) is None
    on_sibling = dataclasses.replace(PLACE, gpu="h100")
    assert gained(timed(50.0, other_config(), on_sibling), default) is None  # the time of another card does not count
    assert gained(timed(50.0, other_config(), on_sibling), timed(60.0, DEFAULT, on_sibling)) == 1.2


@pytest.mark.parametrize(
    ("evidence", "comparable"),
    [
        ({"triton": "3.6.2"}, True),  # compiles the same programs
        ({"triton": "3.9.0"}, False),
        ({"cuda": "13.0"}, False),
        ({"protocol": 0}, False),
        (OTHER_KERNEL, False),  # the default's kernel has changed
        ({"text": "e" * 32}, True),  # another text of the same kernel
    ],
)
def test_times_of_one_toolchain_are_compared(evidence: dict[str, Any], comparable: bool) -> None:
    assert gained(timed(80.0, other_config()), timed(100.0, DEFAULT, **evidence)) == (1.25 if comparable else None)


def test_the_default_of_the_same_search_is_preferred_then_the_newest() -> None:
    best = timed(80.0, other_config())
    like = [timed(120.0, DEFAULT, day=2, triton="3.6.1"), timed(160.0, DEFAULT, day=3, triton="3.6.2")]
    assert gained(best, *like) == 2.0
    assert gained(best, timed(100.0, DEFAULT), *like) == 1.25


def test_only_measured_results_have_a_gain() -> None:
    failed = dataclasses.replace(timed(100.0, DEFAULT), outcome="wrong")
    assert gained(timed(80.0, other_config()), failed) is None
    assert gain(dataclasses.replace(failed, time_us=None), timed(100.0, DEFAULT)) is None


def test_each_toolchain_is_judged_separately() -> None:
    old = {"triton": "3.5.1", "cuda": "12.8"}
    records = [
        timed(80.0, other_config()),
        timed(100.0, DEFAULT),
        timed(70.0, other_config(), **old),
        timed(75.0, other_config(4), **old),
        timed(60.0, DEFAULT, **old, **OTHER_KERNEL),
    ]
    result = comparisons(PLACE, GPU, records)
    assert [(s.chosen, s.default, s.gain) for s in result] == [(records[0], records[1], 1.25), (records[2], None, None)]
    assert not any(s.is_slower_than_default for s in result)
    assert comparisons(PLACE, GPU, [timed(80.0, other_config(), **OTHER_KERNEL)]) == []


def test_equivalent_toolchains_are_judged_together() -> None:
    """The newest record is compared with the default of its own search, or else with the other's."""
    old, new = timed(90.0, DEFAULT, triton="3.6"), timed(100.0, other_config(), day=2)
    (result,) = comparisons(PLACE, GPU, [old, new])
    assert (result.chosen, result.default, result.is_slower_than_default) == (new, old, True)
    (result,) = comparisons(PLACE, GPU, [old, new, timed(110.0, DEFAULT, day=2)])
    assert (result.gain, result.is_slower_than_default) == (1.1, False)


def test_standings_of_many_places() -> None:
    longer = dataclasses.replace(PLACE, bucket=Bucket(8, 8192, 8192))
    records = [timed(80.0, other_config()), timed(100.0, DEFAULT), timed(300.0, other_config(), longer)]
    assert [(s.place, s.gain) for s in comparisons_of(records, GPU)] == [(PLACE, 1.25), (longer, None)]


@pytest.mark.parametrize("path", sorted(data_dir("tuning_db").glob("*.jsonl")), ids=lambda path: path.stem)
def test_no_shipped_record_is_slower_than_the_default(path: Path) -> None:
    """`parallax-gen ship --check` lists the places that are counted here."""
    result = comparisons_of(load_shipped(path.stem), GPUS[path.stem])
    assert [(s.place, s.chosen.config, s.gain) for s in result if s.is_slower_than_default] == []
    timed_default = {s.place for s in result if s.default is not None}
    assert {s.place for s in result} - timed_default == set(), "ship the default's time beside the best"
