"""A store and bench rows with entries for every section of the report."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

from cli_samples import OTHER_TOOLCHAIN, PLACE, SPEC, dkdv_record, make_record, run

from parallax_gen.memory.shipped import write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.space import every_config
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Bucket

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&"


def fill(store: Store) -> None:
    """Forty trials of one bucket, failures of each kind, a prediction, another card, another toolchain, and shipped
    records."""
    configs = [c for c in every_config(SPEC, gpu_by_name("h200")) if isinstance(c, DecodeConfig)]
    for i, config in enumerate(sorted(configs, key=str)[:: len(configs) // 40]):
        time_us = 200.0 + 40 * config.num_warps + i
        store.save(make_record(time_us, config=config))
    failures = ("slow", "resources", "compile", "timeout", "crash", "wrong", "invalid")
    for splits, outcome in zip((1, 2, 3, 4, 6, 8, 12), failures, strict=True):
        time_us = 900.0 if outcome == "slow" else None
        place = dataclasses.replace(PLACE, bucket=Bucket(512, 1, 8192))
        store.save(
            make_record(time_us, outcome, splits=splits, place=place, detail=HOSTILE if outcome == "wrong" else "")
        )
    store.save(make_record(90.0, "predicted", place=dataclasses.replace(PLACE, bucket=Bucket(1024, 1, 8192))))
    place = dataclasses.replace(PLACE, bucket=Bucket(64, 1, 8192))
    store.save(make_record(70.0, place=place, evidence_changes=OTHER_TOOLCHAIN, source=HOSTILE))
    store.save(make_record(280.0, place=dataclasses.replace(PLACE, gpu=f"a {HOSTILE}".replace("/", ""))))
    store.save(dkdv_record(900.0))
    write_shipped([make_record(300.0, place=dataclasses.replace(PLACE, gpu="h100"))], "h100")


def write_bench(path: Path) -> None:
    """A bench CSV with three baselines at two shapes, one of which does not run."""
    row = {"gpu": "h200", "op": "decode", "head_dim": 128, "dtype": "bf16", "batch": 32, "heads": 32, "kv_heads": 8}
    times = {"parallax_gen": 10.0, "parallax-kernel CuTeDSL": 14.8, HOSTILE: 9.0, "fla": ""}
    errors = {"parallax_gen": {"error": 2.2e-3, "peaked_error": 1.6e-3}, "parallax-kernel CuTeDSL": {"error": 2.3e-3}}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, [*row, "seqlen_q", "seqlen_kv", "contender", "part", "time_us", "note", "error", "peaked_error"]
        )
        writer.writeheader()
        for keys in (1024, 8192):
            for baseline, time_us in times.items():
                sizes = {"seqlen_q": 1, "seqlen_kv": keys, "part": "decode"}
                values = {"time_us": time_us, "note": HOSTILE, **errors.get(baseline, {})}
                writer.writerow({**row, **sizes, "contender": baseline, **values})


def write_page(store: Store, folder: Path, *arguments: object) -> Path:
    """Write the report's page of the store and the bench rows."""
    fill(store)
    write_bench(folder / "bench.csv")
    result = run("report", "--bench", folder / "bench.csv", "--out", folder / "report.html", *arguments)
    assert result.exit_code == 0, result.output
    return folder / "report.html"
