"""The first screen: what calls get by tier with the command that mends it, bars against other kernels."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path

import pytest
from cli_samples import OTHER_KERNEL, OTHER_TOOLCHAIN, PLACE, SPEC, make_record, run, run_json
from report_samples import write_page

from parallax_gen.bench.rows import Provenance, Row
from parallax_gen.bench.summary import Mean
from parallax_gen.files import data_dir
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, Tier
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.store import Store
from parallax_gen.ops.space import default_config
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.work import work_of
from parallax_gen.report.charts import rooflines
from parallax_gen.report.data import Report, collect
from parallax_gen.report.published import published
from parallax_gen.report.tiers import MAX_COMMANDS, tiers_of
from parallax_gen.tuning.job import worklist

H200 = gpu_by_name("h200")
ON_H100 = dataclasses.replace(PLACE, gpu="h100")


def report(store: Store, *gpus: str, rows: tuple[Row, ...] = ()) -> Report:
    return collect(Memory(store), gpus, list(rows), all_environments=False)


# tiers


def counts(places: list[Place], *results: object) -> list[tuple[str, Tier, int, int, tuple[str, ...]]]:
    found = tiers_of(places, RecordTable(results))  # type: ignore[arg-type]
    return [(gpu, c.tier, c.places, c.unchecked, c.commands) for gpu, of in found.items() for c in of]


def test_each_tier_has_the_command_that_measures_it_here() -> None:
    refresh = ("parallax-gen tune --refresh",)
    assert counts([PLACE], make_record(100.0)) == [("h200", Tier.MEASURED_HERE, 1, 0, ())]
    elsewhere = make_record(100.0, evidence_changes=OTHER_TOOLCHAIN)
    assert counts([PLACE], elsewhere) == [("h200", Tier.OTHER_TOOLCHAIN, 1, 1, refresh)]
    assert counts([ON_H100], make_record(100.0)) == [("h100", Tier.SIBLING_CARD, 1, 1, refresh)]
    both = counts([PLACE, ON_H100], make_record(100.0))
    assert [line[:2] for line in both] == [("h200", Tier.MEASURED_HERE), ("h100", Tier.SIBLING_CARD)]


def test_a_record_of_an_earlier_kernel_does_not_count() -> None:
    ((_, tier, *_),) = counts([PLACE], make_record(100.0, evidence_changes=OTHER_KERNEL))
    assert tier == Tier.DEFAULT


def test_default_jobs_are_measured_by_their_op() -> None:
    decode = [job.place for job in worklist(H200, ops=("decode",))]
    everything = [job.place for job in worklist(H200)]
    assert counts(decode) == [("h200", Tier.DEFAULT, len(decode), 0, ("parallax-gen tune --op decode",))]
    assert counts(everything) == [("h200", Tier.DEFAULT, len(everything), 0, ("parallax-gen tune",))]
    backward = next(place for place in everything if place.spec.op == "dkdv")
    assert counts([backward]) == [("h200", Tier.DEFAULT, 1, 0, ("parallax-gen tune --op training",))]


def test_other_places_have_a_command_each_up_to_a_few() -> None:
    places = [dataclasses.replace(PLACE, bucket=Bucket(256, 1, 2**n)) for n in range(15, 20)]
    (line,) = tiers_of(places, RecordTable([]))["h200"]
    assert len(line.commands) == MAX_COMMANDS
    assert line.left_out == len(places) - MAX_COMMANDS
    assert shlex.split(line.commands[0])[:4] == ["parallax-gen", "tune", "--op", "decode"]


def test_a_card_outside_the_table_has_tiers() -> None:
    place = dataclasses.replace(PLACE, gpu="nvidia-rtx-a6000-84sm")
    ((gpu, tier, count, _, commands),) = counts([place])
    assert (gpu, tier, count) == ("nvidia-rtx-a6000-84sm", Tier.DEFAULT, 1)
    assert commands[0].startswith("parallax-gen tune --op decode --head-dim 128")


def test_a_report_of_one_card_counts_what_it_borrows(store: Store) -> None:
    """As a report of all cards does, which shows the sibling's places, too."""
    place = dataclasses.replace(PLACE, bucket=Bucket(256, 1, 2**19))  # not of a default job
    assert place not in {job.place for job in worklist(H200)}
    store.save(make_record(100.0, place=place))
    alone, with_all = (report(store, *gpus).tiers["h100"] for gpus in (("h100",), ("h100", "h200")))
    assert {count.tier: count.places for count in alone}[Tier.SIBLING_CARD] == 1
    assert alone == with_all


def test_a_cards_speed_is_that_of_todays_kernels(store: Store) -> None:
    default = default_config(SPEC, Shape(32, 32, 8, 1, 8192), H200)
    store.save(make_record(240.0))
    store.save(make_record(300.0, config=default))
    store.save(make_record(1000.0, place=ON_H100, evidence_changes=OTHER_KERNEL))
    result = report(store)
    card = result.cards["h200"]
    assert (card.gain, card.gains) == (pytest.approx(1.25), 1)
    assert card.fraction == next(e for e in result.shown if e.place == PLACE).fraction_of_bound
    assert (result.cards["h100"].fraction, result.cards["h100"].gain) == (None, None)


# comparisons


def test_published_means_are_those_of_the_figures() -> None:
    """docs/figures.md has 1.89 for 105 shapes, 1.60 for 102 and 1.62 for 80, and 1.30 as the least."""
    found = {(p.op, p.baseline): p for p in published(["h200"])}
    of_training = {p.conditions.split(", ")[1] for p in published(["h200"]) if p.op == "training"}
    assert of_training == {"Triton 3.6.0", "Triton 3.9.0"}
    decode = found["decode", "parallax-kernel CuTeDSL"]
    logs = 105 * math.log(1.89) + 102 * math.log(1.60) + 80 * math.log(1.62)
    assert decode.ratio.mean == pytest.approx(math.exp(logs / 287), abs=0.005)
    assert (round(decode.ratio.least, 2), decode.ratio.shapes) == (1.30, 287)
    assert "Triton 3.9.0" in decode.conditions
    assert found["training", "SDPA cuDNN (softmax)"].ratio.mean < 1  # half the matmuls
    assert list(published(["no-such-card", "../figures/decode_h200"])) == []


def test_published_times_of_changed_kernels_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column without times is left out."""
    head = '"batch, heads","parallax_gen, µs","fla, µs","SDPA, µs",note,card,torch,Triton,date\n'
    monkeypatch.setattr("parallax_gen.report.published.data_dir", lambda name: tmp_path)
    for notes, expected in (
        (("", ""), ""),
        (("no longer rendered", ""), "some"),
        (("is no longer rendered: x",) * 2, "all"),
    ):
        lines = [f'"1, {n}",2.0,{4.0 + 4 * n},,{note},H200,,3.6,2026-01-01\n' for n, note in enumerate(notes)]
        (tmp_path / "decode_h200.csv").write_text(head + "".join(lines), encoding="utf-8")
        (found,) = published(["h200"])
        assert found.changed == expected
        assert found.ratio == Mean(pytest.approx(math.sqrt(8)), 2.0, 2)
        assert found.conditions == "Triton 3.6, 2026-01-01"


def test_a_bench_file_replaces_the_published_times_of_its_op(store: Store) -> None:
    store.save(make_record(240.0))
    here = Provenance("a.csv", "h200")
    shape = Shape(2, 32, 8, 1, 4096)
    rows = tuple(
        Row(name, "decode", "decode", SPEC, shape, us, provenance=here)
        for name, us in (("parallax_gen", 10.0), ("fla", 30.0))
    )
    groups = {(group.gpu, group.op): group for group in report(store, rows=rows).comparisons}
    assert [(bar.baseline, bar.ratio) for bar in groups["h200", "decode"].bars] == [
        ("fla", Mean(pytest.approx(3.0), 3.0, 1))
    ]
    assert groups["h200", "decode"].conditions == ""
    assert groups["h200", "training"].conditions
    assert ("h100", "decode") not in groups  # a card without a record is not on the page


def test_the_package_ships_the_published_figures() -> None:
    assert (data_dir("figures") / "decode_h200.csv").is_file()


# above the bound


@pytest.mark.parametrize(("kv_rows", "in_l2"), [(8, True), (512, False)])
def test_a_point_above_the_bound_is_explained_if_its_data_fit_the_l2(store: Store, kv_rows: int, in_l2: bool) -> None:
    shape = Shape(kv_rows // 8, 32, 8, 1, 8192)
    work = work_of(SPEC, shape)
    assert (work.bytes <= H200.l2_bytes) == in_l2
    time_us = 0.8e6 * work.bytes / H200.bandwidth
    store.save(make_record(time_us, place=dataclasses.replace(PLACE, bucket=Bucket(kv_rows, 1, 8192)), shape=shape))
    store.save(make_record(1000.0))
    result = report(store)
    entry = next(e for e in result.shown if e.is_above_bound)
    assert ("fit the L2 of 60 MiB" in entry.above_bound_note) == in_l2
    assert ("does not explain" in entry.above_bound_note) == (not in_l2)
    (chart,) = rooflines(result.shown)
    assert (chart.above, chart.in_l2) == (1, int(in_l2))
    assert any(entry.above_bound_note in point.tip for point in chart.points)


# the page


def test_the_first_section_says_what_calls_get_and_how_fast(store: Store, tmp_path: Path) -> None:
    from test_report_page import Page

    store.save(make_record(240.0))
    store.save(make_record(240.0, place=ON_H100, evidence_changes=OTHER_TOOLCHAIN))
    run("report", "--out", tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    text = " ".join(page.texts["overview"].split())
    for part in ("1 of ", "measured on this card with this toolchain", "parallax-gen tune", "not yet checked", "1.71×"):
        assert part in text, part
    assert page.of_class("tier1")
    assert page.of_class("slower")
    assert page.all("section")[0]["id"] == "overview"


def test_the_first_section_names_the_knobs_that_matter_most(store: Store, tmp_path: Path) -> None:
    from test_report_page import Page

    page = Page(write_page(store, tmp_path))
    result = run_json("report", "--gpu", "h200")
    importances = next(kernel["importances"] for kernel in result["kernels"] if kernel["importances"])
    text = page.texts["overview"]
    assert next(iter(importances)) == max(importances, key=importances.__getitem__)
    assert [knob in text for knob in importances] == [True] * 3 + [False] * (len(importances) - 3)


def test_json_has_the_tiers_and_the_published_times(store: Store) -> None:
    store.save(make_record(240.0))
    result = run_json("report", "--gpu", "h200")
    assert {line["gpu"] for line in result["tiers"]} == {"h200"}
    assert result["tiers"][0]["tier"] == "measured here"
    assert sum(line["places"] for line in result["tiers"]) == 1 + len(result["untuned"])
    assert {row["op"] for row in result["published"]} == {"training", "decode"}
