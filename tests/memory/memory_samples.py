"""Places and results for the tests of the memory subpackage and for the processes that they start."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

from parallax_gen.memory.place import Place
from parallax_gen.memory.result import Evidence, Result
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec

SPEC = KernelSpec("forward", 128, "bf16", group=4, causal=True)
PLACE = Place("h200", SPEC, Bucket(8, 4096, 4096))
EVIDENCE = Evidence(kernel="0123456789abcdef" * 2, text="fedcba9876543210" * 2, triton="3.5.1", cuda="12.8", protocol=1)
SHAPE = Shape(batch=1, heads=32, kv_heads=8, seqlen_q=4096, seqlen_kv=4096)

OTHER_BUCKET = dataclasses.replace(PLACE, bucket=Bucket(8, 8192, 8192))
OTHER_GPU = dataclasses.replace(PLACE, gpu="h100")
OTHER_TRITON = dataclasses.replace(EVIDENCE, triton="3.6.0")
OTHER_KERNEL = dataclasses.replace(EVIDENCE, kernel="f" * 32, text="e" * 32)

# Of child processes: it lets them import what the tests can.
CHILD_ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def config(block_n: int = 64) -> ForwardConfig:
    return ForwardConfig(BLOCK_M=128, BLOCK_N=block_n, GROUP_HEADS=0, num_warps=8, num_stages=3)


def result(
    outcome: str = "ok", time_us: float | None = 100.0, day: int = 1, block_n: int = 64, **fields: object
) -> Result:
    """A result of PLACE; give `place=` for another's. `day` says how new it is."""
    created_at = f"2026-01-{day:02}T00:00:00+00:00"
    timed = time_us if outcome in ("ok", "predicted") else None
    values: dict[str, object] = {"place": PLACE, "evidence": EVIDENCE, "config": config(block_n)}
    values |= {"time_us": timed, "created_at": created_at}
    return Result(outcome=outcome, **(values | fields))  # type: ignore[arg-type]


def best_of(memory: Any) -> Result | None:
    """The fastest measured result of PLACE in a Store or a Memory."""
    return next((r for r in memory.results(PLACE) if r.measured), None)
