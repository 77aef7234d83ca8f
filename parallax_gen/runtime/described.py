"""Whether a kernel that loads blocks by tensor descriptors can be launched on a call's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor

from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.ops.base import KernelConfig, op_of
from parallax_gen.ops.descriptors import ALIGNED_TO, STRIDE_LIMIT
from parallax_gen.ops.tiles import TiledOp
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class DescribedTensors:
    """The tensors that a kernel loads by descriptors, and the kernel for tensors that these do not allow.

    positions    in `launch`
    stacked      whether the first two are q and r in one descriptor
    by_pointers  loads the module of the same config that loads by pointers
    """

    positions: tuple[int, ...]
    stacked: bool
    by_pointers: Callable[[], ModuleType]

    def allow(self, tensors: Sequence[Tensor]) -> bool:
        """Whether descriptors of these tensors can be made: see the limits of `ops/descriptors.py`."""
        described = [tensors[i] for i in self.positions]
        if not all(map(_can_be_described, described)):
            return False
        if not self.stacked:
            return True
        q, r = described[:2]
        return q.stride() == r.stride() and 0 < r.data_ptr() - q.data_ptr() < STRIDE_LIMIT


def described_tensors(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> DescribedTensors | None:
    """The tensors that the kernel of a config loads by descriptors; None if it loads all by pointers."""
    op = op_of(spec)
    descriptors = op.descriptors(spec, config) if isinstance(op, TiledOp) else ()
    if not descriptors:
        return None
    names = dict.fromkeys(tensor for descriptor in descriptors for tensor in descriptor.tensors)

    @cache
    def by_pointers() -> ModuleType:
        pointers: Any = replace(config, LOADS="pointers")
        return load(render(spec, pointers, gpu))

    stacked = any(descriptor.stacks_qr for descriptor in descriptors)
    return DescribedTensors(tuple(map(op.inputs(spec).index, names)), stacked, by_pointers)


def _can_be_described(tensor: Tensor) -> bool:
    """Whether the tensor starts at an aligned address and its strides are aligned, positive and below the limit."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()[:-1]]
    return tensor.data_ptr() % ALIGNED_TO == 0 and all(0 < s < STRIDE_LIMIT and s % ALIGNED_TO == 0 for s in strides)
