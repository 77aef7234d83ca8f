"""The one place that knows what a rendered kernel's `launch` takes besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallax_gen.problem.config import DecodeConfig, KernelConfig
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scratch:
    """Numbers of scratch that a launch needs: fp32 `partials` and int32 `arrived` counters (0 before and after)."""

    partials: int = 0
    arrived: int = 0


def scratch_of(spec: KernelSpec, config: KernelConfig, batch: int, kv_heads: int) -> Scratch:
    """What a launch at this size needs; nothing where every program finishes its own rows."""
    if not isinstance(config, DecodeConfig) or config.NUM_SPLITS == 1:
        return Scratch()
    # Per query head and split: o1 and o2, and m, d1, d2 padded to four numbers.
    partials = batch * kv_heads * spec.group * config.NUM_SPLITS * (2 * spec.head_dim + 4)
    head_blocks = -(-spec.group // config.BLOCK_H)
    return Scratch(partials, batch * kv_heads * head_blocks if config.merge == "last" else 0)


@dataclass
class Inputs:
    """What one call is given, on any device ("meta" tensors hold sizes only)."""

    q: torch.Tensor
    r: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache_seqlens: torch.Tensor | None = None


@dataclass
class Call:
    """One call: its inputs, the tensors it writes, its scratch."""

    inputs: Inputs
    out: torch.Tensor
    stats: tuple[torch.Tensor, ...]  # lse, t_mean, v_mean, or none
    scratch: tuple[torch.Tensor, ...]  # partials, arrived: those that the config needs

    def arguments(self, softmax_scale: float) -> tuple[object, ...]:
        """In the order in which `launch` takes them."""
        given = self.inputs
        lengths = () if given.cache_seqlens is None else (given.cache_seqlens,)
        return (given.q, given.r, given.k, given.v, self.out, *self.stats, *lengths, *self.scratch, softmax_scale)


def empty_inputs(spec: KernelSpec, shape: Shape, device: str) -> Inputs:
    """Contiguous, uninitialised tensors of a shape."""
    import torch

    from parallax_gen.problem.reference import torch_dtype

    dtype = torch_dtype(spec.dtype)
    q_size = (shape.batch, shape.seqlen_q, shape.heads, spec.head_dim)
    kv_size = (shape.batch, shape.seqlen_kv, shape.kv_heads, spec.head_dim)
    q, r = (torch.empty(q_size, dtype=dtype, device=device) for _ in range(2))
    k, v = (torch.empty(kv_size, dtype=dtype, device=device) for _ in range(2))
    lengths = torch.empty(shape.batch, dtype=torch.int32, device=device) if spec.ragged else None
    return Inputs(q, r, k, v, lengths)


def prepare(spec: KernelSpec, config: KernelConfig, inputs: Inputs) -> Call:
    """The call on these inputs: outputs and scratch beside them, uninitialised but for the counters."""
    import torch

    q, device = inputs.q, inputs.q.device
    stats: tuple[torch.Tensor, ...] = ()
    if spec.stats:
        rows = (q.shape[0], q.shape[2], q.shape[1])
        lse, t_mean = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
        stats = (lse, t_mean, torch.empty_like(q))
    needed = scratch_of(spec, config, q.shape[0], inputs.k.shape[2])
    scratch: tuple[torch.Tensor, ...] = ()
    if needed.partials:
        scratch += (torch.empty(needed.partials, dtype=torch.float32, device=device),)
    if needed.arrived:
        scratch += (torch.zeros(needed.arrived, dtype=torch.int32, device=device),)
    return Call(inputs, torch.empty_like(q), stats, scratch)
