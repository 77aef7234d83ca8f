"""Argument checks of `parallax_attn_with_kvcache`: run before any launch; each error names its argument."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from parallax_gen.errors import ArgumentError
from parallax_gen.ops.base import LARGEST_BLOCK
from parallax_gen.problem.spec import LARGEST_HEAD_DIM
from parallax_gen.runtime.checks import check_flag, check_numbers, check_out, is_int
from parallax_gen.runtime.requests import (
    CACHE_DTYPE_NAMES,
    CACHED_INPUTS,
    DTYPE_NAMES,
    CacheRequest,
    cached_inputs_of,
    uniform_length,
)
from parallax_gen.runtime.transforms import (
    is_differentiated,
    is_wrapped,
    needs_gradients,
    records_gradients,
    transforms_are_active,
)


def check_cached(request: CacheRequest, out: Tensor | None, return_state: bool) -> None:
    """Check a whole request. Raises ArgumentError for the first unusable argument."""
    check_flag("return_state", return_state)
    check_numbers(request.causal, request.window_size, request.softmax_scale, request.softcap)
    _check_tensors(request)
    q, k = request.q, request.k_cache
    packed, paged = request.cu_seqlens_q is not None, request.page_table is not None
    max_seqlen_q = request.max_seqlen_q
    if packed:
        _check_ints("cu_seqlens_q", request.cu_seqlens_q, None, q)
        if not is_int(max_seqlen_q) or max_seqlen_q < 0:  # type: ignore[operator]
            raise ArgumentError("max_seqlen_q", repr(max_seqlen_q), "an int of 0 or more, with cu_seqlens_q")
        assert request.cu_seqlens_q is not None
        batch = request.cu_seqlens_q.shape[0] - 1  # torch.export keeps shape[0] dynamic, but not len()
    else:
        if max_seqlen_q is not None:
            raise ArgumentError("max_seqlen_q", repr(max_seqlen_q), "None without cu_seqlens_q")
        batch = q.shape[0]
    if not paged and k.shape[0] != batch:
        raise ArgumentError("k_cache", f"{k.shape[0]} sequences", f"{batch}, as q has")
    length = uniform_length(request)
    if length is not None and (paged or isinstance(length, bool) or not 0 <= length <= k.shape[1]):
        allowed = "an int32 tensor of each sequence's length" if paged else f"0 to {k.shape[1]}, the keys in k_cache"
        raise ArgumentError("cache_seqlens", f"{length} with a page_table" if paged else length, allowed)
    if request.cache_seqlens is not None and length is None:
        _check_ints("cache_seqlens", request.cache_seqlens, batch, q)
    if request.cache_leftpad is not None:
        _check_ints("cache_leftpad", request.cache_leftpad, batch, q)
    if paged:
        _check_pages(request, batch)
    for name, scale in (("k_scale", request.k_scale), ("v_scale", request.v_scale)):
        if scale is not None:
            _check_cache_scale(name, scale, request)
    check_out(out, q)
    if out is not None:
        # Kernels for multi-token queries compute head offsets within a group; the split merge for one query does so
        # over all heads.
        multi_token = packed or q.shape[1] > 1
        _check_head_stride(out, q.shape[-2] // k.shape[2] if multi_token else q.shape[-2])


def check_four_byte_alignment(request: CacheRequest) -> None:
    """Check that 8-bit caches can be read four elements at a time.

    Runs in every call, because the key of a plan lacks storage offsets. torch.compile cannot trace these: there the
    operator checks them when it runs.
    """
    if torch.compiler.is_compiling():
        return
    for name, cache in (("k_cache", request.k_cache), ("v_cache", request.v_cache)):
        if cache.storage_offset() % 4 or any(stride % 4 for stride in _strides(cache)[:-1]):
            raise ArgumentError(
                name, f"strides {cache.stride()} from {cache.storage_offset()}", "multiples of 4, for a cache of 8 bits"
            )


def check_workspace(workspace: object, needed: int, q: Tensor) -> None:
    """Check that the workspace can serve a launch that needs `needed` bytes."""
    check_workspace_type(workspace, q, needed)
    assert isinstance(workspace, Tensor)
    if workspace.data_ptr() % 16:
        _refuse_workspace(workspace, needed, q)


def check_workspace_type(workspace: object, q: Tensor, needed: int = 0) -> None:
    """`check_workspace` without the check of its address."""
    if not isinstance(workspace, Tensor):
        raise ArgumentError("workspace", type(workspace).__name__, _workspace_allowed(needed, q))
    valid = workspace.dtype == torch.uint8 and workspace.is_contiguous() and workspace.device == q.device
    if not valid or workspace.numel() < needed:
        _refuse_workspace(workspace, needed, q)


def _refuse_workspace(workspace: Tensor, needed: int, q: Tensor) -> NoReturn:
    got = f"{workspace.dtype} of shape {tuple(workspace.shape)} on {workspace.device}"
    raise ArgumentError("workspace", got, _workspace_allowed(needed, q))


def _workspace_allowed(needed: int, q: Tensor) -> str:
    return f"a contiguous uint8 tensor of {needed} bytes or more, zeroed before its first use, on {q.device}"


def refuse_gradients(request: CacheRequest) -> None:
    """Raise ArgumentError for a tensor that needs gradients: there is no backward."""
    for name, scale in (("k_scale", request.k_scale), ("v_scale", request.v_scale)):
        if isinstance(scale, Tensor) and torch.is_grad_enabled() and needs_gradients(scale):
            raise ArgumentError(
                name,
                "a tensor that needs gradients",
                "one without gradients, or torch.no_grad(): the scales of a cache have none",
            )
    inputs = cached_inputs_of(request)
    transforms = not torch.compiler.is_compiling() and transforms_are_active() and torch.is_grad_enabled()
    if records_gradients(*inputs) or (transforms and any(map(is_differentiated, inputs))):
        inputs_by_name = zip(CACHED_INPUTS, inputs, strict=True)
        name = next(name for name, x in inputs_by_name if needs_gradients(x) or is_differentiated(x))
        allowed = "tensors without gradients, or torch.no_grad(): decoding has no backward (parallax_attn_func has)"
        raise ArgumentError(name, "a tensor that needs gradients", allowed)


def refuse_cache_tangents(request: CacheRequest) -> None:
    """Raise ArgumentError for a tensor with a tangent: decoding has no derivatives; an operator would drop the tangent.

    A tracer hides tangents, so under torch.compile every call inside forward-mode AD is refused.
    """
    if forward_ad._current_level < 0:
        return
    allowed = "a tensor without a tangent: decoding has no derivatives (parallax_attn_func has)"
    if torch.compiler.is_compiling():
        raise ArgumentError("q", "a call inside forward-mode AD, under torch.compile", allowed)
    for name in (*CACHED_INPUTS, "k_scale", "v_scale"):
        x = getattr(request, name)
        if not isinstance(x, Tensor):
            continue
        # unpack_dual of a wrapped tensor sees only the tangent of the innermost level.
        if is_differentiated(x) or (not is_wrapped(x) and forward_ad.unpack_dual(x).tangent is not None):
            raise ArgumentError(name, "a tensor with a tangent (forward-mode AD)", allowed)


def _check_tensors(request: CacheRequest) -> None:
    q = request.q
    packed, paged = request.cu_seqlens_q is not None, request.page_table is not None
    query_dims = ("total_q", "heads", "head_dim") if packed else ("batch", "seqlen_q", "heads", "head_dim")
    cache_dims = (*(("pages", "page_size") if paged else ("batch", "seqlen")), "kv_heads", "head_dim")
    layouts = {"q": query_dims, "r": query_dims, "k_cache": cache_dims, "v_cache": cache_dims}
    for name, layout in layouts.items():
        tensor = getattr(request, name)
        if not isinstance(tensor, Tensor):
            raise ArgumentError(name, type(tensor).__name__, "a tensor")
        if tensor.dim() != len(layout):
            allowed = f"{len(layout)} dimensions: ({', '.join(layout)})"
            raise ArgumentError(name, f"shape {tuple(tensor.shape)}", allowed)
        if tensor.device != q.device:
            raise ArgumentError(name, f"on {tensor.device}", f"on {q.device}, where q is")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ArgumentError(name, f"strides {tensor.stride()}", "a contiguous last dimension (stride 1)")
    if q.device.type not in ("cuda", "cpu"):
        raise ArgumentError("q", f"on {q.device}", "a CUDA or CPU tensor")
    _check_dtypes(request)
    heads, head_dim = q.shape[-2:]
    if head_dim % 8 or not 0 < head_dim <= LARGEST_HEAD_DIM:
        raise ArgumentError("q", f"head_dim {head_dim}", f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
    if request.r.shape != q.shape:
        raise ArgumentError("r", f"shape {tuple(request.r.shape)}", f"{tuple(q.shape)}, q's shape")
    k, v = request.k_cache, request.v_cache
    if k.shape[3] != head_dim:
        raise ArgumentError("k_cache", f"head_dim {k.shape[3]}", f"{head_dim}, as q has")
    if k.shape[2] == 0 or heads == 0 or heads % k.shape[2]:
        raise ArgumentError(
            "k_cache", f"{k.shape[2]} kv heads", f"a divisor of q's {heads} heads, in the dimension before head_dim"
        )
    if v.shape != k.shape:
        raise ArgumentError("v_cache", f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, the shape of k_cache")
    if paged and _strides(v) != _strides(k):
        raise ArgumentError("v_cache", f"strides {v.stride()}", f"{k.stride()}, as k_cache has, with a page_table")
    if not torch.compiler.is_compiling():  # it cannot trace a gcd of sizes; the operator checks strides when it runs
        for name, cache in (("k_cache", k), ("v_cache", v)):
            _check_key_stride(name, cache, paged)


def _check_key_stride(name: str, cache: Tensor, paged: bool) -> None:
    """Check the stride between keys: kernels compute offsets within a block of keys in 32 bits, all others in 64.

    A block lies in one page, or covers whole pages, with 32-bit offsets within each page. For other page sizes each
    key's offset has 64 bits.
    """
    block = math.gcd(cache.shape[1], LARGEST_BLOCK) if paged else min(cache.shape[1], LARGEST_BLOCK)
    limit = 2**31 * (4 if cache.dtype in CACHE_DTYPE_NAMES else 1)  # 8-bit caches are addressed in units of 4 elements
    head_dim = cache.shape[3]
    if block > 1 and (block - 1) * cache.stride(1) + head_dim > limit:
        largest_stride = (limit - head_dim) // (block - 1)
        raise ArgumentError(name, f"{cache.stride(1)} elements from key to key", f"at most {largest_stride}")


def _check_head_stride(out: Tensor, heads: int) -> None:
    """Check the stride between out's heads: their offsets have 32 bits; those of rows, and of q's and r's heads, 64."""
    if heads > 1 and (heads - 1) * out.stride(-2) >= 2**31:
        largest_stride = (2**31 - 1) // (heads - 1)
        raise ArgumentError("out", f"{out.stride(-2)} elements from head to head", f"at most {largest_stride}")


def _strides(x: Tensor) -> list[int]:
    """The strides of dimensions larger than 1; the others may be anything."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _check_dtypes(request: CacheRequest) -> None:
    q = request.q
    if q.dtype not in DTYPE_NAMES:
        raise ArgumentError("q", q.dtype, ", ".join(DTYPE_NAMES.values()))
    if request.r.dtype != q.dtype:
        raise ArgumentError("r", request.r.dtype, f"{q.dtype}, as q has")
    is_8_bit = request.k_cache.dtype in CACHE_DTYPE_NAMES and q.dtype != torch.float32
    if request.k_cache.dtype != q.dtype and not is_8_bit:
        allowed = f"{q.dtype}, as q has" + (", or " * (q.dtype != torch.float32))
        allowed += " or ".join(map(str, CACHE_DTYPE_NAMES)) * (q.dtype != torch.float32)
        raise ArgumentError("k_cache", request.k_cache.dtype, allowed)
    if request.v_cache.dtype != request.k_cache.dtype:
        raise ArgumentError("v_cache", request.v_cache.dtype, f"{request.k_cache.dtype}, as k_cache has")


def _check_cache_scale(name: str, scale: Tensor | float, request: CacheRequest) -> None:
    kv_heads, device = request.k_cache.shape[2], request.q.device
    if request.k_cache.dtype not in CACHE_DTYPE_NAMES:
        raise ArgumentError(name, repr(scale), f"None with a cache of {request.k_cache.dtype}")
    allowed = f"a number greater than 0, or an fp32 tensor of shape (1,) or ({kv_heads},), contiguous, on {device}"
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ArgumentError(name, repr(scale), allowed)
        return
    valid = scale.dtype == torch.float32 and tuple(scale.shape) in ((1,), (kv_heads,)) and scale.is_contiguous()
    if not valid or scale.device != device:
        raise ArgumentError(name, f"{scale.dtype} of shape {tuple(scale.shape)} on {scale.device}", allowed)


# The `allowed` texts are built only when an error is raised: torch.compile turns a size used in a string into a
# constant.


def _check_pages(request: CacheRequest, batch: int) -> None:
    page_table, q = request.page_table, request.q
    if not isinstance(page_table, Tensor):
        raise ArgumentError("page_table", type(page_table).__name__, _allowed_pages(batch, q))
    valid = page_table.dtype == torch.int32 and page_table.dim() == 2 and page_table.shape[0] == batch
    if not valid or page_table.device != q.device or page_table.stride(1) != 1:
        got = f"{page_table.dtype} of shape {tuple(page_table.shape)}, strides {page_table.stride()}"
        raise ArgumentError("page_table", f"{got}, on {page_table.device}", _allowed_pages(batch, q))
    if request.cache_seqlens is None:
        raise ArgumentError("cache_seqlens", "None with a page_table", "an int32 tensor of each sequence's length")


def _allowed_pages(batch: int, q: Tensor) -> str:
    shape = f"({batch}, most pages of a sequence)"
    return f"an int32 tensor of shape {shape} on {q.device}, its rows contiguous"


def _check_ints(name: str, values: object, size: int | None, q: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise ArgumentError(name, type(values).__name__, _allowed_ints(name, size, q))
    valid = values.dtype == torch.int32 and values.dim() == 1
    valid = valid and (values.shape[0] > 0 if size is None else values.shape[0] == size)
    if not valid or not values.is_contiguous() or values.device != q.device:
        got = f"{values.dtype} of shape {tuple(values.shape)} on {values.device}"
        raise ArgumentError(name, got, _allowed_ints(name, size, q))


def _allowed_ints(name: str, size: int | None, q: Tensor) -> str:
    shape = "(batch + 1,)" if size is None else f"({size},)"
    or_int = "an int, or " if name == "cache_seqlens" else ""
    return f"{or_int}an int32 tensor of shape {shape}, contiguous, on {q.device}"
