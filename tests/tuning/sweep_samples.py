"""Recorded sweeps for tests: partial real ones, and a complete synthetic one."""

from __future__ import annotations

from pathlib import Path

from parallax_gen.memory.place import Place
from parallax_gen.memory.result import Evidence, Result
from parallax_gen.ops.space import every_config
from parallax_gen.ops.tiles import TileConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec

RECORDED = sorted((Path(__file__).parents[1] / "data" / "sweeps").glob("*.jsonl*"))

# Some 140 configs.
CARD = GPUS["rtx4090"]
SPEC = KernelSpec("dqdr", 256, "fp32")
PLACE = Place(CARD.name, SPEC, Bucket(8, 4096, 4096))
TEXT = "fedcba9876543210" * 2
SHAPE = Shape(1, 8, 8, 4096, 4096)


def synthetic_results() -> list[Result]:
    """A synthetic result for every config: some fail, some are slow, and the time is a function of the config."""
    results = []
    for number, config in enumerate(every_config(SPEC, CARD)):
        assert isinstance(config, TileConfig)
        common = {
            "place": PLACE,
            "evidence": Evidence(f"{number:032x}", TEXT, "3.6.0", "12.8/12.9", 1),
            "config": config,
            "shape": SHAPE,
            "created_at": f"2026-01-01T{number // 60:02}:{number % 60:02}:00+00:00",
        }
        if number % 5 == 4:
            results.append(Result(outcome="resources", spills=600, **common))
            continue
        time_us = 1234.56789 * 32 / config.BLOCK_M + 10 * number
        outcome = "slow" if number % 5 == 3 else "ok"
        results.append(Result(outcome=outcome, time_us=time_us, registers=168, spills=0, compile_s=1.0, **common))
    return results
