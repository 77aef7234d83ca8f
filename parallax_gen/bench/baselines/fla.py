"""Parallax attention of flash-linear-attention."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from parallax_gen.bench.baselines.base import (
    NO_LENGTHS,
    AttentionCall,
    Baseline,
    Step,
    gradient_of_output,
    leaves,
    refuse_unsupported,
    require_causal,
)
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from parallax_gen.codegen.abi import Inputs


def forward(spec: KernelSpec, x: Inputs) -> AttentionCall:
    return _attention(spec, x, x.q, x.r, x.k, x.v)


def decode(spec: KernelSpec, x: Inputs) -> AttentionCall:
    fla = importlib.import_module("fla.ops.parallax.decode")
    refuse_unsupported(spec, lengths=NO_LENGTHS)
    return lambda: fla.parallax_decode_one_step(x.q, x.r, x.k, x.v)


def step(spec: KernelSpec, x: Inputs) -> Step:
    q, r, k, v = leaves(x.q, x.r, x.k, x.v)
    return Step(_attention(spec, x, q, r, k, v), (q, r, k, v), gradient_of_output(x))


def _attention(spec: KernelSpec, x: Inputs, *qrkv: Tensor) -> AttentionCall:
    fla = importlib.import_module("fla.ops.parallax.parallel")
    require_causal(spec)
    window = x.window_size or None
    if not spec.varlen:
        return lambda: fla.parallel_parallax(*qrkv, window_size=window)
    assert x.cu_seqlens_q is not None
    assert x.cu_seqlens_k is not None
    if not x.cu_seqlens_q.equal(x.cu_seqlens_k):
        raise NotImplementedError("as many queries as keys in every packed sequence")
    cu_seqlens = x.cu_seqlens_q.long()

    def call() -> Tensor:
        # Views of each call's own, because autograd runs their backward on the stream on which they were made.
        out: Tensor = fla.parallel_parallax(*(t[None] for t in qrkv), window_size=window, cu_seqlens=cu_seqlens)
        return out[0]

    return call


BASELINES = (Baseline("fla", forward, decode, step, packages=("fla-core",)),)
