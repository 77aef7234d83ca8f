"""Peaked rows in Triton's interpreter: configs, softmax attention with a kernel's roundings, and bounds of errors."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from parallax_gen.codegen.abi import Inputs
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.oracle import verify
from parallax_gen.oracle.accuracy import errors
from parallax_gen.oracle.inputs import attend, softmax_scale
from parallax_gen.oracle.kvcache import gather_pages
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.spec import KernelSpec

FORWARD = ForwardConfig(BLOCK_M=64, BLOCK_N=64, GROUP_HEADS=1, num_warps=4, num_stages=2)
FIXED = replace(FORWARD, SOFTMAX="fixed_reference")
DECODE = DecodeConfig(BLOCK_N=64, BLOCK_H=8, NUM_SPLITS=3, merge="last", num_warps=2, num_stages=3)


# The largest errors over those of softmax attention.
#
# A kernel rounds p, p (t - t_mean) and the output, each by about the same share, e. Softmax attention rounds p and the
# output. Where several keys share the weight, all of them count: sqrt(3) e over sqrt(2) e. Where one key has it, its p
# is 1 and its t - t_mean small. What is left is the output's rounding and that of the other keys' p (t - t_mean), at
# most as large: sqrt(2). With a fixed reference the largest p is not 1 and is rounded, too: sqrt(3) at most. Few rows
# have the largest errors of a forward, whose roundings are a draw: ONLINE adds 6 % to sqrt(2), OF_NORMAL_ROWS 6 % to
# sqrt(3/2). FIXED_REFERENCE is what four seeds have at most (1.55), rounded up. OF_DECODE is the sqrt(2) of one key:
# its p is that of a running maximum, and of four seeds of 32 rows it has up to 1.35.
OF_NORMAL_ROWS, ONLINE, FIXED_REFERENCE, OF_DECODE = 1.3, 1.5, 1.6, 1.4


def times_the_error_of_softmax(spec: KernelSpec, x: Inputs, out: Tensor) -> float:
    """The error of out over that of softmax attention, or over that of the exact output's rounding if that is larger.

    Rows of softmax attention that are one row of v almost exactly have no error at all, not even that of rounding it:
    v has 16 bits. Parallax attention is no row of v, so its output is rounded. Without this floor the ratio would
    depend on how many such rows a seed has.
    """
    expected = attend(spec, x).out
    exact, rounded = softmax_attention(spec, x)
    floor = errors(expected.to(out.dtype), expected).relative
    return errors(out, expected).relative / max(errors(rounded, exact).relative, floor)


def softmax_attention(spec: KernelSpec, x: Inputs) -> tuple[Tensor, Tensor]:
    """Softmax attention in float64, and with the roundings of a 16-bit kernel. 8-bit keys and values are exact."""
    if x.cu_seqlens_q is None:
        return _softmax_attention_of_dense(spec, x)
    exact, rounded = torch.zeros_like(x.q, dtype=torch.float64), torch.zeros_like(x.q)  # 0 in rows of no sequence
    assert x.cu_seqlens_k is not None
    of_q, of_k = ([slice(*ends) for ends in pairwise(y.tolist())] for y in (x.cu_seqlens_q, x.cu_seqlens_k))
    for rows, keys in zip(of_q, of_k, strict=True):
        sequence = replace(x, q=x.q[None, rows], k=x.k[None, keys], v=x.v[None, keys])
        exact[rows], rounded[rows] = (out[0] for out in _softmax_attention_of_dense(spec, sequence))
    return exact, rounded


def _softmax_attention_of_dense(spec: KernelSpec, x: Inputs) -> tuple[Tensor, Tensor]:
    k, v = (t if x.page_table is None else gather_pages(t, x.page_table) for t in (x.k, x.v))
    if spec.cache_dtype:
        assert x.k_scale is not None
        assert x.v_scale is not None
        k, v = k.double() * x.k_scale.double()[:, None], v.double() * x.v_scale.double()[:, None]
    if x.cache_seqlens is not None:
        length = int(x.cache_seqlens.max())  # that of all sequences
        k, v = k[:, :length], v[:, :length]
    q, k, v = (x.q.double(), *(t.double().repeat_interleave(spec.group, dim=2) for t in (k, v)))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale(spec)
    if spec.softcap:
        s = (s / x.softcap).tanh() * x.softcap
    positions, keys = torch.arange(s.shape[-2])[:, None] + s.shape[-1] - s.shape[-2], torch.arange(s.shape[-1])
    if spec.causal:
        s = s.masked_fill(keys > positions, -torch.inf)
    if spec.window:
        s = s.masked_fill(keys <= positions - x.window_size, -torch.inf)
    largest = s.amax(-1, keepdim=True).clamp(min=-1e30) if s.shape[-1] else 0.0  # finite for rows that see no key
    p = (s - largest).exp()
    exact, rounded = (torch.einsum("bhij,bjhd->bihd", w, v) for w in (p, p.to(x.q.dtype).double()))
    total = p.sum(-1).transpose(1, 2)[..., None].clamp(min=1e-30)
    return exact / total, (rounded / total).to(x.q.dtype)


def output(spec: KernelSpec, config: KernelConfig, x: Inputs) -> Tensor:
    call = verify.poisoned_call(spec, config, x)
    load(render(spec, config, GPUS["h200"])).launch(*call.arguments(softmax_scale(spec)))
    return call.written["out"]
