"""Launch plans, also for Triton's interpreter: with TRITON_INTERPRET=1 kernels run on CPU tensors, slowly.

Without it CPU tensors run through the fp64 reference. The interpreter's bf16 matmuls are wrong: use fp16 or fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import triton
from torch import Tensor

from parallax_gen.hub.package.ops import Scratch, op_of
from parallax_gen.hub.package.records import cards
from parallax_gen.problem.hardware import GPUS, STAND_IN
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime import plan
from parallax_gen.runtime.dispatch import default_dispatcher
from parallax_gen.runtime.plan import HostPlan, LaunchPlan, PlanCache, plan_key

__all__ = ["HostPlan", "LaunchPlan", "PlanCache", "host_plan", "plan_key", "plan_launch"]


class InterpretedPlan(LaunchPlan):
    """Launches on CPU tensors, and allocates scratch for each launch."""

    needed = Scratch()

    def launch(self, request: object, written: tuple[Tensor, ...], workspace: Tensor | None = None) -> None:
        tensors = self.launch_tensors(request, written)
        if self.needed.floats:
            tensors = (*tensors, torch.empty(self.needed.floats))
        if self.needed.counters:
            tensors = (*tensors, torch.zeros(self.needed.counters, dtype=torch.int32))
        self._module.launch(*tensors, *self._scalars)


def host_plan(q: Tensor, k: Tensor) -> HostPlan | None:
    """The plan of a call that launches no kernel; None if the call launches one."""
    is_empty = q.numel() == 0 or k.numel() == 0
    if triton.knobs.runtime.interpret and not q.is_cuda and not is_empty:
        return None
    return plan.host_plan(q, k)


def plan_launch(
    spec: KernelSpec,
    shape: Shape,
    scalars: tuple[float, ...],
    device: int | None,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> LaunchPlan:
    """The plan to launch the best known kernel for `spec` at `shape`.

    device  None for CPU tensors: then it is the kernel of the package's first card
    """
    if device is not None:
        return plan.plan_launch(spec, shape, scalars, device, renamed)
    card = replace(GPUS[STAND_IN], name=next(iter(cards())))  # only its name matters: nothing is compiled
    choice, module = default_dispatcher().kernel(spec, shape, card)
    no_scratch: Any = Scratch()
    interpreted = InterpretedPlan(module, spec, scalars, -1, no_scratch, renamed)
    interpreted.needed = op_of(spec).scratch(spec, choice.config, shape.batch, shape.kv_heads, shape.seqlen_q)
    return interpreted
