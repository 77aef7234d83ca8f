"""The kernels that ours are compared with: torch's softmax attention, and other Parallax kernels where installed."""

from __future__ import annotations

import importlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from parallax_gen.codegen.abi import Inputs
from parallax_gen.ops.base import op_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import default_scale
from parallax_gen.runtime.functional import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.runtime.kvcache import parallax_attn_with_kvcache
from parallax_gen.tuning.workers.measure import marks_us

Call = Callable[[], Tensor]  # -> like q

# How long Helion tunes each new shape: minutes with "full", its own default, not at all with "none", ours.
HELION_EFFORT = "HELION_AUTOTUNE_EFFORT"
HASTY_CALLS = 3


def ours(spec: KernelSpec, x: Inputs, q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, stats: bool = False) -> Call:
    """The public function on these tensors, with the lengths and the window of x."""
    window = x.window_size if spec.window else None

    def call() -> Tensor:
        if spec.varlen:
            assert x.cu_seqlens_q is not None
            assert x.cu_seqlens_k is not None
            packing = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
            found = parallax_attn_varlen_func(
                q, r, k, v, *packing, causal=spec.causal, window_size=window, return_stats=stats
            )
        else:
            found = parallax_attn_func(q, r, k, v, causal=spec.causal, window_size=window, return_stats=stats)
        return found if isinstance(found, Tensor) else found[0]

    return call


def ours_forward(spec: KernelSpec, x: Inputs) -> Call:
    return ours(spec, x, x.q, x.r, x.k, x.v, stats=spec.stats)


def ours_decode(spec: KernelSpec, x: Inputs) -> Call:
    out = torch.empty_like(x.q)
    return lambda: ours_cached(spec, x, out)


def ours_cached(spec: KernelSpec, x: Inputs, out: Tensor | None) -> Tensor:
    """The public function on the inputs of a decode kernel; into `out`, or one that it makes."""
    found = parallax_attn_with_kvcache(
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
        k_scale=x.k_scale,
        v_scale=x.v_scale,
        out=out,
        return_state=spec.stats,
    )
    return found if isinstance(found, Tensor) else found.out


def sdpa(backend: SDPBackend, spec: KernelSpec, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Softmax attention of torch's, of (batch, seqlen, heads, head_dim). Raises NotImplementedError."""
    if op_of(spec).own_lengths or spec.varlen:
        raise NotImplementedError("it has no lengths a sequence")
    if spec.window:
        raise NotImplementedError("it has no window")
    if spec.causal and q.shape[1] != k.shape[1]:
        raise NotImplementedError("its causal rows begin at the first key")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))

    def call() -> Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=spec.causal, enable_gqa=spec.group > 1)
        return out.transpose(1, 2)

    return call


def official_cutedsl_decode(spec: KernelSpec, x: Inputs) -> Call:
    official = importlib.import_module("parallax.cute")
    if spec.page_size:
        raise NotImplementedError("it has no pages")
    if spec.many_queries or spec.window:
        raise NotImplementedError("it has one query a sequence, which sees every key")
    if spec.leftpad or spec.cache_dtype or spec.stats:
        raise NotImplementedError("it has no left padding, cache in eight bits or statistics")
    out = torch.empty_like(x.q)
    lengths = x.cache_seqlens

    def call() -> Tensor:
        result: Tensor = official.parallax_attn_with_kvcache(x.q, x.r, x.k, x.v, seqused_k=lengths, out=out)
        return result

    return call


def forget_inputs() -> None:
    """Have the official CuTeDSL decode let go of the tensors that it was given: it keeps each one for good."""
    official = sys.modules.get("parallax.cute.parallax_decode")
    kept = getattr(official, "_cute_input_cache", None)
    if isinstance(kept, dict):
        kept.clear()


def official_triton_decode(spec: KernelSpec, x: Inputs) -> Call:
    official = importlib.import_module("parallax.triton")
    if op_of(spec).own_lengths:
        raise NotImplementedError("it has no lengths a sequence")
    return lambda: official.parallax_decode(x.q, x.r, x.k, x.v)


def official_triton_forward(spec: KernelSpec, x: Inputs) -> Call:
    official = importlib.import_module("parallax.triton")
    check_dense_causal(spec)
    batch = x.q.shape[0]
    # Its layout is (batch * heads, seqlen, head_dim): copied once, outside of what is timed.
    q, r, k, v = (in_heads(t) for t in (x.q, x.r, x.k, x.v))
    options = {"n_rep": spec.group, "window_size_left": x.window_size or -1}

    def call() -> Tensor:
        out: Tensor = official.parallax_fwd(q, r, k, v, default_scale(spec.head_dim), **options)[0]
        return from_heads(out, batch)

    return call


def official_helion() -> ModuleType:
    """Its kernels take the effort of tuning from the environment when they are imported."""
    os.environ.setdefault(HELION_EFFORT, "none")
    return importlib.import_module("parallax.helion")


def official_helion_decode(spec: KernelSpec, x: Inputs) -> Call:
    official = official_helion()
    if op_of(spec).own_lengths:
        raise NotImplementedError("it has no lengths a sequence")
    return lambda: official.parallax_decode(x.q, x.r, x.k, x.v)


def official_helion_forward(spec: KernelSpec, x: Inputs) -> Call:
    official = official_helion()
    check_dense_causal(spec)
    # Its layout is (batch, heads, seqlen, head_dim): copied once, outside of what is timed.
    q, r, k, v = (heads_first(t) for t in (x.q, x.r, x.k, x.v))

    def call() -> Tensor:
        out: Tensor = official.parallax_fwd(q, r, k, v, window_size_left=x.window_size or -1)[0]
        return out.transpose(1, 2)

    return call


def fla_forward(spec: KernelSpec, x: Inputs) -> Call:
    fla = importlib.import_module("fla.ops.parallax.parallel")
    check_dense_causal(spec)
    return lambda: fla.parallel_parallax(x.q, x.r, x.k, x.v, window_size=x.window_size or None)


def fla_decode(spec: KernelSpec, x: Inputs) -> Call:
    fla = importlib.import_module("fla.ops.parallax.decode")
    if op_of(spec).own_lengths:
        raise NotImplementedError("it has no lengths a sequence")
    return lambda: fla.parallax_decode_one_step(x.q, x.r, x.k, x.v)


def check_dense_causal(spec: KernelSpec) -> None:
    """What the peers' training kernels are compared at. Raises NotImplementedError."""
    if not spec.causal:
        raise NotImplementedError("it is causal only")
    if spec.varlen:
        raise NotImplementedError("its packed sequences are not compared")


def in_heads(x: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim) as (batch * heads, seqlen, head_dim), contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def heads_first(x: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim) as (batch, heads, seqlen, head_dim), contiguous."""
    return x.transpose(1, 2).contiguous()


def from_heads(x: Tensor, batch: int) -> Tensor:
    """What `in_heads` made, as it was."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)


@contextmanager
def hasty_autotuners() -> Iterator[None]:
    """In here Triton's autotuners try each config with a few calls, not for an eighth of a second."""
    from triton.runtime.autotuner import Autotuner

    before = vars(Autotuner)["do_bench"]
    Autotuner.do_bench = property(lambda self: _few_calls)
    try:
        yield
    finally:
        Autotuner.do_bench = before


def _few_calls(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """Milliseconds: the median, for every quantile that is asked for."""
    call()
    times = [us for _ in range(HASTY_CALLS) for us in marks_us(call, 1)]
    return [statistics.median(times) / 1000] * len(quantiles)
