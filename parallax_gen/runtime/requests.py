"""The arguments of the public functions as one named tuple, so that other code need not know their positions.

This file also casts the tensors for torch.autocast. torch.compile traces all of it. torch 2.9 cannot trace properties
of a NamedTuple, so they are functions here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallax_gen.codegen.abi import torch_dtype
from parallax_gen.codegen.device import gpu_of_device
from parallax_gen.problem.spec import CACHE_DTYPES, DTYPES

DTYPE_NAMES = {torch_dtype(name): name for name in DTYPES if name != "tf32"}  # see `dtype_name`
CACHE_DTYPE_NAMES = {torch_dtype(name): name for name in CACHE_DTYPES if name}

# The largest stride between rows, in elements: offsets within LARGEST_BLOCK rows then fit in 32 bits.
MAX_ROW_STRIDE = 2**24 - 1

# The fields of a Request, in its order.
INPUTS = ("q", "r", "k", "v")
TENSORS = (*INPUTS, "cu_seqlens_q", "cu_seqlens_k")
OPTIONS = ("causal", "window_size", "softmax_scale", "softcap")  # all that the result depends on, but for rounding
SCALARS = ("max_seqlen_q", "max_seqlen_k", *OPTIONS, "batch_invariant")

CACHED_INPUTS = ("q", "r", "k_cache", "v_cache")

Qrkv = tuple[Tensor, Tensor, Tensor, Tensor]


class Request(NamedTuple):
    """One call of attention over whole sequences. The torch operators take these fields in this order.

    Dense: q, r (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_kv, kv_heads, head_dim), no cu_seqlens.
    Packed: (total_q, heads, head_dim) and (total_k, kv_heads, head_dim); cu_seqlens say where each sequence begins.
    """

    q: Tensor
    r: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    causal: bool = False
    window_size: int | None = None
    softmax_scale: float | None = None
    softcap: float | None = None
    batch_invariant: bool = False


class CacheRequest(NamedTuple):
    """One call of attention over a KV cache: the arguments of `parallax_attn_with_kvcache`.

    The torch operators take these fields in this order, and take lengths and scales as tensors only.
    """

    q: Tensor
    r: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor | int | None
    page_table: Tensor | None
    cache_leftpad: Tensor | None
    cu_seqlens_q: Tensor | None
    k_scale: Tensor | float | None
    v_scale: Tensor | float | None
    max_seqlen_q: int | None
    causal: bool
    window_size: int | None
    softmax_scale: float | None
    softcap: float | None = None
    batch_invariant: bool = False


def rounds_to_tf32(q: Tensor) -> bool:
    """Whether torch lets fp32 matmuls on q's device round to TF32, and the device has such matmuls.

    Reads torch's newest switch: the older switches set it too, and reading them raises once the newest was set.
    """
    allowed = q.dtype == torch.float32 and q.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return allowed and (not torch.version.hip or gpu_of_device(q.device.index).has_tf32)


def dtype_name(q: Tensor) -> str:
    """The spec's dtype for q: "tf32" for fp32 tensors whose matmuls may round to TF32."""
    return "tf32" if rounds_to_tf32(q) else DTYPE_NAMES[q.dtype]


def window_of(window_size: int | None, seqlen_k: int, *, batch_invariant: bool) -> int:
    """The window of a shape, 0 for none.

    A window that covers the longest sequence counts as none, except in batch-invariant calls: for them the batch may
    not choose between kernels with and without a window.
    """
    if window_size is None:
        return 0
    if window_size < seqlen_k:
        return window_size
    return seqlen_k if batch_invariant else 0


def gradients_of(dqdr: bool, dkdv: bool) -> tuple[str, ...]:
    """The INPUTS whose gradients a backward computes, in the order of its results: q and r, k and v, or all four."""
    return ("q", "r") * dqdr + ("k", "v") * dkdv


def inputs_of(request: Request) -> Qrkv:
    return request.q, request.r, request.k, request.v


def cu_seqlens_of(request: Request) -> tuple[Tensor, ...]:
    """cu_seqlens_q and cu_seqlens_k of packed sequences, () of dense ones."""
    return (
        ()
        if request.cu_seqlens_q is None or request.cu_seqlens_k is None
        else (request.cu_seqlens_q, request.cu_seqlens_k)
    )


def tensor_fields(request: Request) -> tuple[Tensor | None, ...]:
    """The fields that TENSORS names."""
    return request.q, request.r, request.k, request.v, request.cu_seqlens_q, request.cu_seqlens_k


def scalar_fields(request: Request) -> tuple[float | None, ...]:
    """The fields that SCALARS names."""
    return tuple([getattr(request, name) for name in SCALARS])


def options_of(request: Request) -> dict[str, Any]:
    """The fields that OPTIONS names, as keyword arguments of the reference functions."""
    return {name: getattr(request, name) for name in OPTIONS}


def split_request(arguments: Sequence[Any]) -> tuple[Request, Sequence[Any]]:
    """Split an operator's arguments: the Request that they begin with, and the arguments after it."""
    count = len(Request._fields)
    return Request(*arguments[:count]), arguments[count:]


def cached_inputs_of(request: CacheRequest) -> Qrkv:
    return request.q, request.r, request.k_cache, request.v_cache


def uniform_length(request: CacheRequest) -> int | None:
    """cache_seqlens if it is one int (or traced symbol) for all sequences, else None."""
    lengths = request.cache_seqlens
    return lengths if isinstance(lengths, (int, torch.SymInt)) else None


def cast_inputs(request: Request, out: Tensor | None = None) -> Request:
    """Cast q, r, k and v to autocast's dtype, as torch's own attention does. Unchanged if autocast is off.

    With `out` the target is out's dtype, because torch's autocast does not cast calls with out=.
    """
    dtype = _autocast_dtype(request.q)
    if dtype is None:
        return request
    q, r, k, v = _cast(_dtype_of(out) or dtype, inputs_of(request))
    return request._replace(q=q, r=r, k=k, v=v)


def cast_to_cache(request: CacheRequest, out: Tensor | None = None) -> CacheRequest:
    """`cast_inputs` for caches: casts q and r to a 16-bit cache's dtype, since casting the cache would copy all of it.

    An fp32 cache is cast, which copies it. An 8-bit cache is never cast.
    """
    dtype = _autocast_dtype(request.q)
    if dtype is None:
        return request
    cached = _dtype_of(request.k_cache)
    if cached is not None and cached != torch.float32:
        dtype = cached
    q, r, k_cache, v_cache = _cast(_dtype_of(out) or dtype, cached_inputs_of(request))
    return request._replace(q=q, r=r, k_cache=k_cache, v_cache=v_cache)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of torch.autocast on x's device; None if autocast is off or x is neither a CUDA nor a CPU tensor."""
    if not isinstance(x, Tensor) or not (x.is_cuda or x.is_cpu):
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _dtype_of(x: Tensor | None) -> torch.dtype | None:
    """The dtype of x if kernels compute in it, else None."""
    return x.dtype if isinstance(x, Tensor) and x.dtype in DTYPE_NAMES else None


def _cast(dtype: torch.dtype, inputs: Qrkv) -> Qrkv:
    """Cast tensors of a supported dtype. Everything else is left for the checks to reject by name."""
    q, r, k, v = (x if _dtype_of(x) is None else x.to(dtype) for x in inputs)
    return q, r, k, v
