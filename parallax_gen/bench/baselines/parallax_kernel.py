"""The package parallax-kernel, the Parallax authors' kernels in CuTeDSL, Triton and Helion."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from parallax_gen.bench.baselines.base import (
    NO_LENGTHS,
    AttentionCall,
    Baseline,
    Step,
    gradient_of_output,
    leaves,
    refuse_unsupported,
    require_dense_causal,
)
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import default_scale

if TYPE_CHECKING:
    from torch import Tensor

    from parallax_gen.codegen.abi import Inputs

# The environment variable that sets how long Helion tunes each new shape: "full", Helion's default, takes minutes;
# "none", the default here, does not tune.
HELION_EFFORT = "HELION_AUTOTUNE_EFFORT"


def cutedsl_decode(spec: KernelSpec, x: Inputs) -> AttentionCall:
    import torch

    package = importlib.import_module("parallax.cute")
    refuse_unsupported(spec, page_size="no pages")
    one_query = "it has one query per sequence, which sees every key"
    refuse_unsupported(spec, multi_token=one_query, window=one_query)
    unsupported = "no left padding, 8-bit cache or statistics"
    refuse_unsupported(spec, leftpad=unsupported, cache_dtype=unsupported, stats=unsupported)
    out = torch.empty_like(x.q)
    lengths = x.cache_seqlens

    def call() -> Tensor:
        result: Tensor = package.parallax_attn_with_kvcache(x.q, x.r, x.k, x.v, seqused_k=lengths, out=out)
        return result

    return call


def _clear_input_cache() -> None:
    """Clear the cache in which the CuTeDSL decode keeps every input tensor until the process ends."""
    module = sys.modules.get("parallax.cute.parallax_decode")
    cache = getattr(module, "_cute_input_cache", None)
    if isinstance(cache, dict):
        cache.clear()


def triton_decode(spec: KernelSpec, x: Inputs) -> AttentionCall:
    package = importlib.import_module("parallax.triton")
    refuse_unsupported(spec, lengths=NO_LENGTHS)
    return lambda: package.parallax_decode(x.q, x.r, x.k, x.v)


def triton_forward(spec: KernelSpec, x: Inputs) -> AttentionCall:
    package = importlib.import_module("parallax.triton")
    require_dense_causal(spec)
    batch = x.q.shape[0]
    # Its layout is (batch * heads, seqlen, head_dim): inputs are copied once, and the copy is not timed.
    q, r, k, v = (fold_heads(t) for t in (x.q, x.r, x.k, x.v))
    options = {"n_rep": spec.group, "window_size_left": x.window_size or -1}

    def call() -> Tensor:
        out: Tensor = package.parallax_fwd(q, r, k, v, default_scale(spec.head_dim), **options)[0]
        return unfold_heads(out, batch)

    return call


def import_helion() -> ModuleType:
    """Import parallax.helion. Its kernels read the tuning effort from the environment at import."""
    os.environ.setdefault(HELION_EFFORT, "none")
    return importlib.import_module("parallax.helion")


def helion_decode(spec: KernelSpec, x: Inputs) -> AttentionCall:
    package = import_helion()
    refuse_unsupported(spec, lengths=NO_LENGTHS)
    return lambda: package.parallax_decode(x.q, x.r, x.k, x.v)


def helion_forward(spec: KernelSpec, x: Inputs) -> AttentionCall:
    package = import_helion()
    require_dense_causal(spec)
    # Its layout is (batch, heads, seqlen, head_dim): inputs are copied once, and the copy is not timed.
    q, r, k, v = (heads_first(t) for t in (x.q, x.r, x.k, x.v))

    def call() -> Tensor:
        out: Tensor = package.parallax_fwd(q, r, k, v, window_size_left=x.window_size or -1)[0]
        return out.transpose(1, 2)

    return call


def fold_heads(x: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim) as (batch * heads, seqlen, head_dim), contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def heads_first(x: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim) as (batch, heads, seqlen, head_dim), contiguous."""
    return x.transpose(1, 2).contiguous()


def unfold_heads(x: Tensor, batch: int) -> Tensor:
    """The inverse of `fold_heads`."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)


def triton_step(spec: KernelSpec, x: Inputs) -> Step:
    """Its layout is (batch * heads, seqlen, head_dim): inputs are copied once, and the copy is not timed."""
    package = importlib.import_module("parallax.triton")
    require_dense_causal(spec)
    batch, scale, window = x.q.shape[0], default_scale(spec.head_dim), x.window_size or -1
    q, r, k, v = leaves(*(fold_heads(t) for t in (x.q, x.r, x.k, x.v)))

    def attend() -> Tensor:
        out: Tensor = package.ParallaxFunction.apply(q, r, k, v, scale, spec.group, window)
        return out

    return Step(attend, (q, r, k, v), fold_heads(gradient_of_output(x)), lambda t: unfold_heads(t, batch))


def helion_step(spec: KernelSpec, x: Inputs) -> Step:
    """Its layout is (batch, heads, seqlen, head_dim): inputs are copied once, and the copy is not timed."""
    package = import_helion()
    require_dense_causal(spec)
    q, r, k, v = leaves(*(heads_first(t) for t in (x.q, x.r, x.k, x.v)))

    def attend() -> Tensor:
        out: Tensor = package.parallax_func(q, r, k, v, window_size_left=x.window_size or -1)
        return out

    return Step(attend, (q, r, k, v), heads_first(gradient_of_output(x)), lambda t: t.transpose(1, 2))


def _helion_setting() -> str:
    return f"{HELION_EFFORT}={os.environ.get(HELION_EFFORT, 'none')}"


BASELINES = (
    Baseline(
        "parallax-kernel CuTeDSL",
        decode=cutedsl_decode,
        packages=("parallax-kernel", "nvidia-cutlass-dsl"),
        release=_clear_input_cache,
    ),
    Baseline("parallax-kernel Triton", triton_forward, triton_decode, triton_step, packages=("parallax-kernel",)),
    Baseline(
        "parallax-kernel Helion",
        helion_forward,
        helion_decode,
        helion_step,
        packages=("parallax-kernel", "helion"),
        setting=_helion_setting,
    ),
)
