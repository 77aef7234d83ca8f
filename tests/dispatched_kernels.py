"""The kernels that calls on CPU tensors would launch on a GPU: specs and buckets, recorded where plans are made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from parallax_gen.problem.shapes import Bucket, Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.steps import Step
from parallax_gen.runtime import attention, kvcache
from parallax_gen.runtime.plan import HostPlan, PlanCache

Kernel = tuple[KernelSpec, Bucket]


class CountingCache(PlanCache[Any]):
    """A plan cache that forgets: each call is planned, and so recorded."""

    def remember(self, key: object, plan: Any) -> None:
        pass


class PlannedKernel(HostPlan):
    """In place of a kernel's plan."""

    programs_per_sm = math.inf


@contextmanager
def recorded_kernels() -> Iterator[Counter[Kernel]]:
    """Counts the launches of each kernel. The results of calls are those of the CPU reference."""
    launched: Counter[Kernel] = Counter()

    def plan_launch(spec: KernelSpec, shape: Shape, *_: object) -> HostPlan:
        launched[spec, bucket_of(shape)] += 1
        return PlannedKernel(is_empty=False)

    def plan_backward(*arguments: Any) -> HostPlan:
        plan = original(*arguments)
        return plan if isinstance(plan, HostPlan) else HostPlan(is_empty=False)

    def host_plan(q: Tensor, k: Tensor) -> HostPlan | None:
        return None if q.numel() and k.numel() else HostPlan(is_empty=True)

    original = attention._plan_backward
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, kvcache):
            patch.setattr(module, "plan_launch", plan_launch)
            patch.setattr(module, "host_plan", host_plan)
        patch.setattr(attention, "_plan_backward", plan_backward)
        for module, name in ((attention, "_forwards"), (attention, "_backwards"), (kvcache, "_plans")):
            patch.setattr(module, name, CountingCache())
        yield launched


def kernels_of(steps: Iterable[Step]) -> Counter[Kernel]:
    """How often one run of each step launches each kernel."""
    counts: Counter[Kernel] = Counter()
    for step in steps:
        for call in step.calls:
            counts[call.spec, bucket_of(call.shape)] += call.count
    return counts
