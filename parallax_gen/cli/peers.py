"""The kernels that ours are compared with: torch's softmax attention, and other Parallax kernels where installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from parallax_gen.codegen.calling import Inputs
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.functional import parallax_attn_func, parallax_attn_with_kvcache

Call = Callable[[], torch.Tensor]  # -> (batch, seqlen_q, heads, head_dim)


@dataclass(frozen=True)
class Contender:
    """One implementation. `parallax` is False for plain softmax attention: less work, so no error to compare.

    prepare  the call on given inputs; raises ImportError where it is not installed, and anything where it cannot
    """

    name: str
    parallax: bool
    prepare: Callable[[KernelSpec, Inputs], Call]


def contenders(op: str) -> list[Contender]:
    """Ours first."""
    softmax = [
        Contender("SDPA flash", False, lambda spec, x: _sdpa(SDPBackend.FLASH_ATTENTION, spec, x)),
        Contender("SDPA cuDNN", False, lambda spec, x: _sdpa(SDPBackend.CUDNN_ATTENTION, spec, x)),
    ]
    if op == "decode":
        return [
            Contender("parallax_gen", True, _ours_decode),
            *softmax,
            Contender("official CuTeDSL", True, _official_cutedsl_decode),
            Contender("official Triton", True, _official_triton_decode),
            Contender("fla", True, _fla_decode),
        ]
    return [
        Contender("parallax_gen", True, _ours_forward),
        *softmax,
        Contender("official Triton", True, _official_triton_forward),
        Contender("fla", True, _fla_forward),
    ]


def _ours_forward(spec: KernelSpec, x: Inputs) -> Call:
    def call() -> torch.Tensor:
        found = parallax_attn_func(x.q, x.r, x.k, x.v, causal=spec.causal, return_stats=spec.stats)
        return found if isinstance(found, torch.Tensor) else found[0]

    return call


def _ours_decode(spec: KernelSpec, x: Inputs) -> Call:
    out = torch.empty_like(x.q)
    return lambda: parallax_attn_with_kvcache(x.q, x.r, x.k, x.v, cache_seqlens=x.cache_seqlens, out=out)


def _sdpa(backend: SDPBackend, spec: KernelSpec, x: Inputs) -> Call:
    if spec.ragged:
        raise NotImplementedError("it has no lengths a sequence")
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=spec.causal, enable_gqa=spec.group > 1)
        return out.transpose(1, 2)

    return call


def _official_cutedsl_decode(spec: KernelSpec, x: Inputs) -> Call:
    official = importlib.import_module("parallax.cute")
    out = torch.empty_like(x.q)
    lengths = x.cache_seqlens

    def call() -> torch.Tensor:
        result: torch.Tensor = official.parallax_attn_with_kvcache(x.q, x.r, x.k, x.v, seqused_k=lengths, out=out)
        return result

    return call


def _official_triton_decode(spec: KernelSpec, x: Inputs) -> Call:
    official = importlib.import_module("parallax.triton")
    if spec.ragged:
        raise NotImplementedError("it has no lengths a sequence")
    return lambda: official.parallax_decode(x.q, x.r, x.k, x.v)


def _official_triton_forward(spec: KernelSpec, x: Inputs) -> Call:
    official = importlib.import_module("parallax.triton")
    if not spec.causal:
        raise NotImplementedError("it is causal only")
    batch, seqlen_q, heads, head_dim = x.q.shape
    # Its layout is (batch * heads, seqlen, head_dim): copied once, outside of what is timed.
    q, r, k, v = (t.transpose(1, 2).reshape(-1, t.shape[1], head_dim) for t in (x.q, x.r, x.k, x.v))

    def call() -> torch.Tensor:
        out: torch.Tensor = official.parallax_fwd(q, r, k, v, head_dim**-0.5, n_rep=spec.group)[0]
        return out.view(batch, heads, seqlen_q, head_dim).transpose(1, 2)

    return call


def _fla_forward(spec: KernelSpec, x: Inputs) -> Call:
    fla = importlib.import_module("fla.ops.parallax.parallel")
    if not spec.causal:
        raise NotImplementedError("it is causal only")
    return lambda: fla.parallel_parallax(x.q, x.r, x.k, x.v)


def _fla_decode(spec: KernelSpec, x: Inputs) -> Call:
    fla = importlib.import_module("fla.ops.parallax.decode")
    if spec.ragged:
        raise NotImplementedError("it has no lengths a sequence")
    return lambda: fla.parallax_decode_one_step(x.q, x.r, x.k, x.v)
