"""The conditions of a measurement: the card, and the versions of our package, torch, Triton and CUDA."""

from __future__ import annotations

import hashlib

import torch
import triton

import parallax_gen
from parallax_gen.bench.rows import Conditions, Effort
from parallax_gen.codegen.render import render
from parallax_gen.memory.lock import lock_of_environment
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import NO_FLAGS, STEP, TRAINING, sizes_for
from parallax_gen.runtime.dispatch import choose


def current_conditions(card: Gpu, effort: Effort, command: str) -> Conditions:
    return Conditions(card.name, card.title, **versions(), effort=effort, command=command)


def versions() -> dict[str, str]:
    return {
        "parallax_gen": parallax_gen.__version__,
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "cuda": torch.version.cuda or "none",
    }


def our_kernels(op: str, spec: KernelSpec, shape: Shape, gpu: Gpu, memory: Memory) -> str:
    """A hash of the sources that a call runs, as `kernels 1a2b3c4d`: tuning may change them. spec: see rows.Row."""
    kernels = [(spec, shape)]
    if op == TRAINING:
        kernels = [(spec.for_op(kernel), sizes_for(kernel, shape, NO_FLAGS)) for kernel in STEP]
    lock = lock_of_environment()
    configs = [choose(kernel, sizes, gpu, memory, lock=lock).config for kernel, sizes in kernels]
    sources = [render(kernel, config, gpu).sha256 for (kernel, _), config in zip(kernels, configs, strict=True)]
    return f"kernels {hashlib.sha256(''.join(sources).encode()).hexdigest()[:8]}"
