"""The plan of recorded calls: what each kernel costs, and which are worth a tune."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from parallax_gen.codegen.render import render
from parallax_gen.errors import ArgumentError
from parallax_gen.memory.calls import Kernel
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, default_of, evidence_of
from parallax_gen.memory.result import Result
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import bound_us
from parallax_gen.tuning.calls import CallsPlan, plan_of_calls
from parallax_gen.tuning.job import Job

GPU = GPUS["h200"]
FORWARD = KernelSpec("forward", 64, "bf16", causal=True), Bucket(8, 2048, 2048)
DECODE = KernelSpec("decode", 128, "bf16", group=4), Bucket(64, 1, 8192)
LONGER = DECODE[0], Bucket(64, 1, 16384)


def measured(kernel: Kernel, time_us: float, gpu: str = "h200", config: KernelConfig | None = None) -> Result:
    place = Place(gpu, *kernel)
    config = config or default_of(place, GPUS[gpu])
    return Result(place, evidence_of(render(place.spec, config, GPUS[gpu])), config, "ok", time_us=time_us)


def plan(counts: dict[Kernel, int], *records: Result) -> CallsPlan:
    return plan_of_calls(Counter(counts), GPU, RecordTable(records))


def kernels(plan: CallsPlan) -> list[Kernel]:
    return [(job.spec, job.bucket) for job in plan.jobs]


def test_measured_times_count() -> None:
    times = measured(FORWARD, 30.0), measured(DECODE, 10.0)
    assert list(plan({FORWARD: 1, DECODE: 2}, *times).shares.values()) == [0.6, 0.4]
    assert kernels(plan({FORWARD: 1, DECODE: 2}, *times)) == [FORWARD, DECODE]
    assert kernels(plan({FORWARD: 1, DECODE: 4}, *times)) == [DECODE, FORWARD]


def test_a_sibling_cards_time_counts_and_another_buckets_does_not() -> None:
    counts = {FORWARD: 1, DECODE: 1}
    shares = plan(counts, measured(FORWARD, 30.0, "h100"), measured(DECODE, 10.0)).shares
    assert shares[Place("h200", *FORWARD)] == 0.75
    default: Any = default_of(Place("h200", *DECODE), GPUS["h200"])
    others = [replace(default, num_stages=stages) for stages in (2, 3, 5) if stages != default.num_stages][:2]
    near = [measured(LONGER, 1e6 + n, config=config) for n, config in enumerate((default, *others))]
    supported = plan(counts, measured(FORWARD, 30.0), *near)
    assert supported.choices[Place("h200", *DECODE)].candidate.record == near[0]
    assert supported.shares == plan(counts, measured(FORWARD, 30.0)).shares


@pytest.mark.parametrize("kernel", [FORWARD, DECODE, LONGER])
def test_a_predicted_time_is_near_the_roofline(kernel: Kernel) -> None:
    """Above it, and by less than a factor of three: these kernels fill the card."""
    job = Job(*kernel, GPU)
    rival = FORWARD if kernel != FORWARD else DECODE
    (share,) = (share for place, share in plan({kernel: 1, rival: 1}, measured(rival, 100.0)).shares.items()
                if place.bucket == kernel[1])  # fmt: skip
    predicted_us = 100.0 * share / (1 - share)
    bound = bound_us(job.spec, job.timed_shape, GPU)
    assert bound < predicted_us < 3 * bound


def test_the_kernels_left_out_take_less_than_a_hundredth() -> None:
    times = measured(FORWARD, 10.0), measured(DECODE, 10.0), measured(LONGER, 10.0)
    assert kernels(plan({FORWARD: 1000, DECODE: 5, LONGER: 4}, *times)) == [FORWARD]
    some = plan({FORWARD: 1000, DECODE: 20, LONGER: 10}, *times)
    assert kernels(some) == [FORWARD, DECODE]
    assert some.steps[0].detail == "1 other takes less than 1 % of the time"
    assert [call.count for call in some.steps[0].calls] == [1000, 20]
    assert set(some.choices) == {some.place(call) for call in some.steps[0].calls}
    assert len(plan({FORWARD: 1}).jobs) == 1


def test_no_calls_are_refused() -> None:
    with pytest.raises(ArgumentError, match="calls: got a recording of no calls"):
        plan({})
