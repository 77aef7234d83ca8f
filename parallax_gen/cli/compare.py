"""Times ours and its peers on the same inputs in the same process, and says how far from the oracle each is."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parallax_gen.cli.peers import Call, contenders
from parallax_gen.cli.text import rate
from parallax_gen.problem.reference import errors
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.measure import time_call
from parallax_gen.tuning.verify import oracle, random_inputs_of

ROUNDS = 3  # each contender is timed so often, in turn: what drifts, drifts for all
TIMED_MS = 60.0


@dataclass(frozen=True)
class Row:
    """One contender at one shape.

    time_us   median of the rounds' medians, by tuning/measure.py's protocol; None where it does not run
    rate      TFLOP/s for forward, GB/s for decode, of the work of Parallax (of softmax for a softmax peer)
    error     ||out - oracle|| / ||oracle||; None for softmax peers
    why_not   why there is no time; "" where there is one
    """

    contender: str
    spec: KernelSpec
    shape: Shape
    time_us: float | None = None
    rate: float | None = None
    error: float | None = None
    why_not: str = ""


def compare(spec: KernelSpec, shape: Shape, only: Sequence[str] = ()) -> list[Row]:
    """Every contender, or those in `only`, on fresh random inputs of a shape; ours first."""
    inputs = random_inputs_of(spec, shape, seed=random.randrange(2**31), device="cuda", full=True)
    expected = oracle(spec, inputs).out
    calls: dict[str, Call] = {}
    found: dict[str, Row] = {}
    for contender in contenders(spec.op):
        if only and contender.name not in only:
            continue
        name = contender.name
        try:
            call = contender.prepare(spec, inputs)
            error = errors(call(), expected).relative if contender.parallax else None
        except ImportError:
            found[name] = Row(name, spec, shape, why_not="not installed")
        except Exception as failure:  # a peer's failure, of whatever type, is a result of the comparison
            if name == "parallax_gen":
                raise
            found[name] = Row(name, spec, shape, why_not=f"{type(failure).__name__}: {failure}".splitlines()[0][:200])
        else:
            calls[name] = call
            found[name] = Row(name, spec, shape, error=error)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(time_call(call, timed_ms=TIMED_MS, from_rest=spec.op == "forward").median_us)
    parallax = {contender.name: contender.parallax for contender in contenders(spec.op)}
    rows = []
    for name, row in found.items():
        if name in times:
            time_us = statistics.median(times[name])
            row = Row(name, spec, shape, time_us, _rate(spec, shape, time_us, parallax[name]), row.error)
        rows.append(row)
    torch.cuda.empty_cache()
    return rows


def _rate(spec: KernelSpec, shape: Shape, time_us: float, parallax: bool) -> float:
    """Softmax needs two of the four matmuls, and the same bytes."""
    return rate(spec, shape, time_us) / (2 if spec.op == "forward" and not parallax else 1)
