"""What is asked of the public functions: put together once in each of them, and from then on named, never counted.

With torch.autocast its tensors are cast here. All of it is traced by torch.compile, and that of torch 2.9 traces no
property of a NamedTuple: hence functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallax_gen.codegen.abi import torch_dtype
from parallax_gen.problem.spec import CACHE_DTYPES, DTYPES

DTYPE_NAMES = {torch_dtype(name): name for name in DTYPES if name != "tf32"}  # see `dtype_name`
CACHE_DTYPE_NAMES = {torch_dtype(name): name for name in CACHE_DTYPES if name}

# Elements from row to row, at most: so that LARGEST_BLOCK of them are within 32 bits.
FURTHEST_ROW = 2**24 - 1

# A Request's fields, in its order.
INPUTS = ("q", "r", "k", "v")
TENSORS = (*INPUTS, "cu_seqlens_q", "cu_seqlens_k")
NUMBERS = ("max_seqlen_q", "max_seqlen_k", "causal", "window_size", "softmax_scale")

CACHED_INPUTS = ("q", "r", "k_cache", "v_cache")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Request(NamedTuple):
    """Attention of whole sequences, as a caller asks for it: in this order the arguments of the operators, too.

    Dense: q, r (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_kv, kv_heads, head_dim), no cu_seqlens.
    Packed: (total_q, heads, head_dim) and (total_k, kv_heads, head_dim), and where each sequence begins.
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


class CacheRequest(NamedTuple):
    """Attention against a cache, as a caller asks for it: arguments of `parallax_attn_with_kvcache`.

    Its operators take them in this order, and lengths and scales as tensors alone.
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


def rounds_to_tf32(q: Tensor) -> bool:
    """Whether torch lets fp32 matmuls on q's device round to TF32.

    Of torch's switches this reads the newest, which the older ones set too: to read those raises once it was set.
    """
    return q.dtype == torch.float32 and q.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"


def dtype_name(q: Tensor) -> str:
    """A spec's dtype: of fp32 whether its matmuls round to TF32, too."""
    return "tf32" if rounds_to_tf32(q) else DTYPE_NAMES[q.dtype]


def window_of(window_size: int | None, seqlen_k: int) -> int:
    """A shape's window, 0 for none: one that holds the longest sequence's keys is none, with no kernel of its own."""
    return 0 if window_size is None or window_size >= seqlen_k else window_size


def wanted(dqdr: bool, dkdv: bool) -> tuple[str, ...]:
    """Of INPUTS those whose gradients a backward finds, in its results' order: of q and r, of k and v, or of all."""
    return ("q", "r") * dqdr + ("k", "v") * dkdv


def inputs_of(asked: Request) -> Inputs:
    return asked.q, asked.r, asked.k, asked.v


def starts_of(asked: Request) -> tuple[Tensor, ...]:
    """cu_seqlens_q and cu_seqlens_k of packed sequences."""
    return () if asked.cu_seqlens_q is None or asked.cu_seqlens_k is None else (asked.cu_seqlens_q, asked.cu_seqlens_k)


def tensors_of(asked: Request) -> tuple[Tensor | None, ...]:
    """Those that TENSORS names."""
    return asked.q, asked.r, asked.k, asked.v, asked.cu_seqlens_q, asked.cu_seqlens_k


def numbers_of(asked: Request) -> tuple[float | None, ...]:
    """Those that NUMBERS names."""
    return asked.max_seqlen_q, asked.max_seqlen_k, asked.causal, asked.window_size, asked.softmax_scale


def parted(given: Sequence[Any]) -> tuple[Request, Sequence[Any]]:
    """An operator's arguments: the request that they begin with, and those of its own."""
    count = len(Request._fields)
    return Request(*given[:count]), given[count:]


def cached_inputs_of(asked: CacheRequest) -> Inputs:
    return asked.q, asked.r, asked.k_cache, asked.v_cache


def length_of(asked: CacheRequest) -> int | None:
    """cache_seqlens where it is one number for all sequences, be it a symbol that torch traces one by."""
    given = asked.cache_seqlens
    return given if isinstance(given, (int, torch.SymInt)) else None


def cast_inputs(asked: Request, out: Tensor | None = None) -> Request:
    """With q, r, k and v in autocast's dtype, as torch's own attention casts; as it is where autocast is off.

    With `out` they are cast to its dtype: torch leaves calls with out= to the dtype of out.
    """
    dtype = _autocast_dtype(asked.q)
    if dtype is None:
        return asked
    q, r, k, v = _cast(_dtype_of(out) or dtype, inputs_of(asked))
    return asked._replace(q=q, r=r, k=k, v=v)


def cast_to_cache(asked: CacheRequest, out: Tensor | None = None) -> CacheRequest:
    """`cast_inputs` for caches: q and r are cast to a 16-bit cache's dtype, since casting a cache copies all of it.

    A cache in fp32 is cast, and copied; one in eight bits never is.
    """
    dtype = _autocast_dtype(asked.q)
    if dtype is None:
        return asked
    cached = _dtype_of(asked.k_cache)
    if cached is not None and cached != torch.float32:
        dtype = cached
    q, r, k_cache, v_cache = _cast(_dtype_of(out) or dtype, cached_inputs_of(asked))
    return asked._replace(q=q, r=r, k_cache=k_cache, v_cache=v_cache)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What torch.autocast casts to on x's device; None where it is off, or x is no CUDA or CPU tensor."""
    if not isinstance(x, Tensor) or not (x.is_cuda or x.is_cpu):
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _dtype_of(x: Tensor | None) -> torch.dtype | None:
    """One that the functions compute in, or None."""
    return x.dtype if isinstance(x, Tensor) and x.dtype in DTYPE_NAMES else None


def _cast(dtype: torch.dtype, inputs: Inputs) -> Inputs:
    """What is no tensor, or of a dtype that the functions do not take, stays as it is: their checks name it."""
    q, r, k, v = (x if _dtype_of(x) is None else x.to(dtype) for x in inputs)
    return q, r, k, v
