"""ship, on hand-made records: the shipped files, and what --check reports."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from cli_samples import (
    DKDV_PLACE,
    H200,
    OTHER_KERNEL,
    OTHER_TOOLCHAIN,
    PLACE,
    SPEC,
    dkdv_record,
    make_record,
    run,
)

from parallax_gen.memory.shipped import load_shipped, write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.ops.space import default_config
from parallax_gen.problem.shapes import Bucket, Shape

TRITON_HERE = minor(Toolchain.here().triton)
OTHER_BUCKET = dataclasses.replace(PLACE, bucket=Bucket(256, 1, 16384))
SIBLING = dataclasses.replace(PLACE, gpu="h100")
DEFAULT = default_config(SPEC, Shape(32, 32, 8, 1, 8192), H200)


def test_ship_merges_what_was_measured_here(store: Store, tmp_path: Path) -> None:
    for splits in (1, 2, 3, 4):
        store.save(make_record(200.0 + splits, splits=splits))
    store.save(make_record(100.0, evidence_changes=OTHER_TOOLCHAIN))
    store.save(make_record(110.0, evidence_changes=OTHER_KERNEL))
    store.save(make_record(90.0, "predicted", splits=6))
    result = run("ship", "--gpu", "h200", "--to", tmp_path / "db")
    assert result.exit_code == 0, result.output
    assert [r.time_us for r in load_shipped("h200", tmp_path / "db")] == [201.0, 202.0, 203.0]
    assert "3 records of 1 kernels and buckets; 3 new or changed" in result.stdout
    store.save(make_record(None, "wrong", splits=1, created_at="2026-02-01T00:00:00+00:00"))
    run("ship", "--gpu", "h200", "--to", tmp_path / "db")
    assert [r.time_us for r in load_shipped("h200", tmp_path / "db")] == [202.0, 203.0, 204.0]


def test_ship_takes_every_op(store: Store, tmp_path: Path) -> None:
    for result in (
        make_record(),
        dkdv_record(),
        dkdv_record(place=dataclasses.replace(DKDV_PLACE, bucket=Bucket(16, 512, 512))),
    ):
        store.save(result)
    assert run("ship", "--gpu", "h200", "--to", tmp_path / "db").exit_code == 0
    assert {r.place for r in load_shipped("h200", tmp_path / "db")} == {r.place for r in store.all()}


def test_ship_without_records_is_an_error(store: Store, tmp_path: Path) -> None:
    store.save(make_record(100.0, evidence_changes=OTHER_TOOLCHAIN))
    store.save(make_record(110.0, evidence_changes=OTHER_KERNEL))
    result = run("ship", "--gpu", "h200", "--to", tmp_path / "db")
    assert result.exit_code == 1
    assert "no measurement of today's kernels with this toolchain on h200" in result.stderr
    assert not (tmp_path / "db").exists()


# --check


def test_check_lists_shipped_places_without_the_defaults_time(store: Store, shipped_folder: Path) -> None:
    write_shipped(
        [make_record(100.0), make_record(130.0, config=DEFAULT), make_record(200.0, place=OTHER_BUCKET)], "h200"
    )
    write_shipped([make_record(90.0, place=SIBLING, evidence_changes=OTHER_KERNEL)], "h100")
    before = {path: path.read_bytes() for path in shipped_folder.iterdir()}
    result = run("ship", "--check")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "h100: 1 kernels and sizes, 0 of them with records of today's kernels: "
        "0 no time of the default, 0 slower than the default",
        "best us  default us  gain  measured with  h200",
        f"  200.0           -     -  {'Triton ' + TRITON_HERE:<13}  {SPEC}; batch x kv_heads 256, seqlen 1x16384",
        "h200: 2 kernels and sizes, 2 of them with records of today's kernels: "
        "1 no time of the default, 0 slower than the default",
    ]
    assert run("ship", "--check", "--gpu", "H100").exit_code == 0
    result = run("ship", "--check", "--gpu", "h200", "--json")
    assert result.exit_code == 1
    (card,) = json.loads(result.stdout)["cards"]
    (actual,) = card.pop("findings")
    assert card == {
        "gpu": "h200",
        "places": 2,
        "of_todays_kernels": 2,
        "no_time_of_the_default": 1,
        "slower_than_the_default": 0,
    }
    assert (actual["finding"], actual["default_us"], actual["gain"]) == ("no time of the default", None, None)
    assert actual["best"]["place"] == OTHER_BUCKET.flat()
    assert {path: path.read_bytes() for path in shipped_folder.iterdir()} == before
    assert not store.all()


def test_check_lists_records_slower_than_the_default(tmp_path: Path) -> None:
    earlier = {"triton": f"{TRITON_HERE}.99"}  # compiles the same programs, so its times are comparable
    new, old = (
        make_record(110.0, created_at="2026-02-01T00:00:00+00:00"),
        make_record(100.0, config=DEFAULT, evidence_changes=earlier),
    )
    write_shipped([new, old], "h200", tmp_path / "db")
    result = run("ship", "--check", "--to", tmp_path / "db")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1].split()[:3] == ["110.0", "100.0", "0.91x"]
    assert "0 no time of the default, 1 slower than the default" in result.stdout
    write_shipped([make_record(120.0, config=DEFAULT, created_at="2026-02-01T00:00:00+00:00")], "h200", tmp_path / "db")
    assert run("ship", "--check", "--to", tmp_path / "db").exit_code == 0


def test_check_of_a_card_without_shipped_records_is_an_error() -> None:
    result = run("ship", "--check", "--gpu", "h200")
    assert result.exit_code == 1
    assert "there are no shipped records for h200" in result.stderr
    assert run("ship", "--check").exit_code == 1
    assert run("ship").exit_code == 2
    assert "--gpu NAME" in run("ship").stderr
