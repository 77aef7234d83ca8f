"""Our own public functions, by default and with batch_invariant=True."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parallax_gen.bench.baselines.base import AttentionCall, Baseline, Step, gradient_of_output, leaves
from parallax_gen.problem.spec import KernelSpec, batch_invariant_spec

if TYPE_CHECKING:
    from torch import Tensor

    from parallax_gen.codegen.abi import Inputs


def attention(
    spec: KernelSpec, x: Inputs, q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, stats: bool = False
) -> AttentionCall:
    """The public function on these tensors, with the lengths and the window of x."""
    from parallax_gen.runtime.functional import parallax_attn_func, parallax_attn_varlen_func

    options: dict[str, Any] = {"causal": spec.causal, "window_size": x.window_size if spec.window else None}
    options |= {"softcap": x.softcap if spec.softcap else None, "return_stats": stats}
    options |= {"batch_invariant": spec.batch_invariant}

    def call() -> Tensor:
        if spec.varlen:
            assert x.cu_seqlens_q is not None
            assert x.cu_seqlens_k is not None
            packing = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
            result: Tensor | tuple[Tensor, ...] = parallax_attn_varlen_func(q, r, k, v, *packing, **options)
        else:
            result = parallax_attn_func(q, r, k, v, **options)
        return result[0] if isinstance(result, tuple) else result

    return call


def cached_attention(spec: KernelSpec, x: Inputs, out: Tensor | None) -> AttentionCall:
    """The public function on the inputs of a decode kernel; writes to `out`, or allocates an output."""
    from parallax_gen.runtime.kvcache import parallax_attn_with_kvcache

    def call() -> Tensor:
        result = parallax_attn_with_kvcache(
            x.q,
            x.r,
            x.k,
            x.v,
            cache_seqlens=x.cache_seqlens,
            page_table=x.page_table,
            cache_leftpad=x.cache_leftpad,
            cu_seqlens_q=x.cu_seqlens_q,
            max_seqlen_q=x.max_seqlen_q if spec.varlen else None,
            causal=spec.causal,
            window_size=x.window_size if spec.window else None,
            softcap=x.softcap if spec.softcap else None,
            batch_invariant=spec.batch_invariant,
            k_scale=x.k_scale,
            v_scale=x.v_scale,
            out=out,
            return_state=spec.stats,
        )
        return result.out if isinstance(result, tuple) else result

    return call


def forward(spec: KernelSpec, x: Inputs) -> AttentionCall:
    return attention(spec, x, x.q, x.r, x.k, x.v, stats=spec.stats)


def decode(spec: KernelSpec, x: Inputs) -> AttentionCall:
    import torch

    return cached_attention(spec, x, torch.empty_like(x.q))


def step(spec: KernelSpec, x: Inputs) -> Step:
    q, r, k, v = leaves(x.q, x.r, x.k, x.v)
    return Step(attention(spec, x, q, r, k, v), (q, r, k, v), gradient_of_output(x))


BASELINES = (
    Baseline("parallax_gen", forward, decode, step, softcap=True),
    Baseline(
        "batch-invariant",
        lambda spec, x: forward(batch_invariant_spec(spec), x),
        lambda spec, x: decode(batch_invariant_spec(spec), x),
        lambda spec, x: step(batch_invariant_spec(spec), x),
        softcap=True,
    ),
)
