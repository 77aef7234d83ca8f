"""What `parallax_attn_with_kvcache` accepts: every argument looked at before anything is launched, and named."""

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
    length_of,
)
from parallax_gen.runtime.transforms import (
    differentiated,
    is_wrapped,
    needs_gradients,
    records_gradients,
    transforms_are_active,
)


def check_cached(asked: CacheRequest, out: Tensor | None, return_state: bool) -> None:
    """Whether it can be attended so. Raises ArgumentError at the first argument that won't do."""
    check_flag("return_state", return_state)
    check_numbers(asked.causal, asked.window_size, asked.softmax_scale)
    _check_tensors(asked)
    q, k = asked.q, asked.k_cache
    packed, paged = asked.cu_seqlens_q is not None, asked.page_table is not None
    max_seqlen_q = asked.max_seqlen_q
    if packed:
        _check_ints("cu_seqlens_q", asked.cu_seqlens_q, None, q)
        if not is_int(max_seqlen_q) or max_seqlen_q < 0:  # type: ignore[operator]
            raise ArgumentError("max_seqlen_q", repr(max_seqlen_q), "an int of 0 or more, with cu_seqlens_q")
        assert asked.cu_seqlens_q is not None
        batch = asked.cu_seqlens_q.shape[0] - 1  # an export keeps it open, which len does not
    else:
        if max_seqlen_q is not None:
            raise ArgumentError("max_seqlen_q", repr(max_seqlen_q), "None, but with cu_seqlens_q")
        batch = q.shape[0]
    if not paged and k.shape[0] != batch:
        raise ArgumentError("k_cache", f"{k.shape[0]} sequences", f"{batch}, as q has")
    length = length_of(asked)
    if length is not None and (paged or isinstance(length, bool) or not 0 <= length <= k.shape[1]):
        allowed = "a tensor of each one's length" if paged else f"0 to {k.shape[1]}, the keys in k_cache"
        raise ArgumentError("cache_seqlens", f"{length} with a page_table" if paged else length, allowed)
    if asked.cache_seqlens is not None and length is None:
        _check_ints("cache_seqlens", asked.cache_seqlens, batch, q)
    if asked.cache_leftpad is not None:
        _check_ints("cache_leftpad", asked.cache_leftpad, batch, q)
    if paged:
        _check_pages(asked, batch)
    for name, scale in (("k_scale", asked.k_scale), ("v_scale", asked.v_scale)):
        if scale is not None:
            _check_cache_scale(name, scale, asked)
    check_out(out, q)
    if out is not None:
        # Heads of many queries are counted within a group; those of one all together, where a kernel merges splits.
        many = packed or q.shape[1] > 1
        _check_heads(out, q.shape[-2] // k.shape[2] if many else q.shape[-2])


def check_fours(asked: CacheRequest) -> None:
    """Whether caches in eight bits can be taken four numbers at a time: in every call, for plans know no offsets.

    torch.compile traces no offsets either: the operator looks at them when it runs.
    """
    if torch.compiler.is_compiling():
        return
    for name, cache in (("k_cache", asked.k_cache), ("v_cache", asked.v_cache)):
        if cache.storage_offset() % 4 or any(stride % 4 for stride in _strides(cache)[:-1]):
            raise ArgumentError(
                name, f"strides {cache.stride()} from {cache.storage_offset()}", "multiples of 4, in 8 bits"
            )


def check_workspace(workspace: object, needed: int, q: Tensor) -> None:
    """Whether it can be a launch's scratch of so many bytes."""
    check_workspace_type(workspace, q, needed)
    assert isinstance(workspace, Tensor)
    if workspace.data_ptr() % 16:
        _refuse_workspace(workspace, needed, q)


def check_workspace_type(workspace: object, q: Tensor, needed: int = 0) -> None:
    """`check_workspace`, but for its address."""
    if not isinstance(workspace, Tensor):
        raise ArgumentError("workspace", type(workspace).__name__, _workspace_allowed(needed, q))
    right = workspace.dtype == torch.uint8 and workspace.is_contiguous() and workspace.device == q.device
    if not right or workspace.numel() < needed:
        _refuse_workspace(workspace, needed, q)


def _refuse_workspace(workspace: Tensor, needed: int, q: Tensor) -> NoReturn:
    got = f"{workspace.dtype} of shape {tuple(workspace.shape)} on {workspace.device}"
    raise ArgumentError("workspace", got, _workspace_allowed(needed, q))


def _workspace_allowed(needed: int, q: Tensor) -> str:
    return f"a contiguous uint8 tensor of {needed} bytes or more, zeros at first, on {q.device}"


def refuse_gradients(asked: CacheRequest) -> None:
    """Raises ArgumentError for a tensor that needs gradients: there is no backward."""
    for name, scale in (("k_scale", asked.k_scale), ("v_scale", asked.v_scale)):
        if isinstance(scale, Tensor) and torch.is_grad_enabled() and needs_gradients(scale):
            raise ArgumentError(
                name, "a tensor that needs gradients", "one without, or no_grad: it is not learned here"
            )
    inputs = cached_inputs_of(asked)
    transforms = not torch.compiler.is_compiling() and transforms_are_active() and torch.is_grad_enabled()
    if records_gradients(*inputs) or (transforms and any(map(differentiated, inputs))):
        named = zip(CACHED_INPUTS, inputs, strict=True)
        name = next(name for name, x in named if needs_gradients(x) or differentiated(x))
        allowed = "tensors without, or no_grad: decoding has no backward (parallax_attn_func has)"
        raise ArgumentError(name, "a tensor that needs gradients", allowed)


def refuse_tangents_of(asked: CacheRequest) -> None:
    """Raises ArgumentError for a tensor with a tangent: there are no derivatives, and an operator would drop it.

    A tracer shows no tangents. Where one is at work, every call inside of forward-mode AD is refused.
    """
    if forward_ad._current_level < 0:
        return
    allowed = "a tensor without: decoding has no derivatives (parallax_attn_func has)"
    if torch.compiler.is_compiling():
        raise ArgumentError("q", "a call inside of forward-mode AD, under torch.compile", allowed)
    for name in (*CACHED_INPUTS, "k_scale", "v_scale"):
        x = getattr(asked, name)
        if not isinstance(x, Tensor):
            continue
        # Of a transform's tensor the innermost level shows its own tangent alone.
        if differentiated(x) or (not is_wrapped(x) and forward_ad.unpack_dual(x).tangent is not None):
            raise ArgumentError(name, "a tensor with a tangent (forward-mode AD)", allowed)


def _check_tensors(asked: CacheRequest) -> None:
    q = asked.q
    packed, paged = asked.cu_seqlens_q is not None, asked.page_table is not None
    rows = ("total_q", "heads", "head_dim") if packed else ("batch", "seqlen_q", "heads", "head_dim")
    keys = ("pages", "page_size") if paged else ("batch", "seqlen")
    layouts = {"q": rows, "r": rows, "k_cache": (*keys, "kv_heads", "head_dim")}
    layouts["v_cache"] = layouts["k_cache"]
    for name, layout in layouts.items():
        tensor = getattr(asked, name)
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
    _check_dtypes(asked)
    heads, head_dim = q.shape[-2:]
    if head_dim % 8 or not 0 < head_dim <= LARGEST_HEAD_DIM:
        raise ArgumentError("q", f"head_dim {head_dim}", f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
    if asked.r.shape != q.shape:
        raise ArgumentError("r", f"shape {tuple(asked.r.shape)}", f"{tuple(q.shape)}, q's shape")
    k, v = asked.k_cache, asked.v_cache
    if k.shape[3] != head_dim:
        raise ArgumentError("k_cache", f"head_dim {k.shape[3]}", f"{head_dim}, as q has")
    if k.shape[2] == 0 or heads == 0 or heads % k.shape[2]:
        raise ArgumentError("k_cache", f"{k.shape[2]} kv heads", f"a divisor of q's {heads} heads")
    if v.shape != k.shape:
        raise ArgumentError("v_cache", f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, the shape of k_cache")
    if paged and _strides(v) != _strides(k):
        raise ArgumentError("v_cache", f"strides {v.stride()}", f"{k.stride()}, as k_cache has, with a page_table")
    if not torch.compiler.is_compiling():  # it traces no gcd of sizes, and the operator looks at them when it runs
        for name, cache in (("k_cache", k), ("v_cache", v)):
            _check_keys(name, cache, paged)


def _check_keys(name: str, cache: Tensor, paged: bool) -> None:
    """Whether keys lie near enough: kernels add up offsets within a block of them in 32 bits, all others in 64.

    A block lies in one page, or takes whole pages and counts within each; where it does neither, each key's has 64.
    """
    at_once = math.gcd(cache.shape[1], LARGEST_BLOCK) if paged else min(cache.shape[1], LARGEST_BLOCK)
    reach = 2**31 * (4 if cache.dtype in CACHE_DTYPE_NAMES else 1)  # eight bits are counted in fours
    head_dim = cache.shape[3]
    if at_once > 1 and (at_once - 1) * cache.stride(1) + head_dim > reach:
        furthest = (reach - head_dim) // (at_once - 1)
        raise ArgumentError(name, f"{cache.stride(1)} elements from key to key", f"at most {furthest}")


def _check_heads(out: Tensor, heads: int) -> None:
    """Whether its heads lie near enough: so many are counted in 32 bits. All rows, and q's and r's heads, have 64."""
    if heads > 1 and (heads - 1) * out.stride(-2) >= 2**31:
        furthest = (2**31 - 1) // (heads - 1)
        raise ArgumentError("out", f"{out.stride(-2)} elements from head to head", f"at most {furthest}")


def _strides(x: Tensor) -> list[int]:
    """Those that matter: where a dimension has one place, its stride may be anything."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _check_dtypes(asked: CacheRequest) -> None:
    q = asked.q
    if q.dtype not in DTYPE_NAMES:
        raise ArgumentError("q", q.dtype, ", ".join(DTYPE_NAMES.values()))
    if asked.r.dtype != q.dtype:
        raise ArgumentError("r", asked.r.dtype, f"{q.dtype}, as q has")
    eight_bits = asked.k_cache.dtype in CACHE_DTYPE_NAMES and q.dtype != torch.float32
    if asked.k_cache.dtype != q.dtype and not eight_bits:
        allowed = f"{q.dtype}, as q has" + (", or " * (q.dtype != torch.float32))
        allowed += " or ".join(map(str, CACHE_DTYPE_NAMES)) * (q.dtype != torch.float32)
        raise ArgumentError("k_cache", asked.k_cache.dtype, allowed)
    if asked.v_cache.dtype != asked.k_cache.dtype:
        raise ArgumentError("v_cache", asked.v_cache.dtype, f"{asked.k_cache.dtype}, as k_cache has")


def _check_cache_scale(name: str, scale: Tensor | float, asked: CacheRequest) -> None:
    kv_heads, device = asked.k_cache.shape[2], asked.q.device
    if asked.k_cache.dtype not in CACHE_DTYPE_NAMES:
        raise ArgumentError(name, repr(scale), f"None with a cache of {asked.k_cache.dtype}")
    allowed = f"a number greater than 0, or an fp32 tensor of shape (1,) or ({kv_heads},), contiguous, on {device}"
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ArgumentError(name, repr(scale), allowed)
        return
    right = scale.dtype == torch.float32 and tuple(scale.shape) in ((1,), (kv_heads,)) and scale.is_contiguous()
    if not right or scale.device != device:
        raise ArgumentError(name, f"{scale.dtype} of shape {tuple(scale.shape)} on {scale.device}", allowed)


# What is allowed is put into words where it is raised: torch.compile takes a size that stands in a text for a constant.


def _check_pages(asked: CacheRequest, batch: int) -> None:
    page_table, q = asked.page_table, asked.q
    if not isinstance(page_table, Tensor):
        raise ArgumentError("page_table", type(page_table).__name__, _allowed_pages(batch, q))
    right = page_table.dtype == torch.int32 and page_table.dim() == 2 and page_table.shape[0] == batch
    if not right or page_table.device != q.device or page_table.stride(1) != 1:
        got = f"{page_table.dtype} of shape {tuple(page_table.shape)}, strides {page_table.stride()}"
        raise ArgumentError("page_table", f"{got}, on {page_table.device}", _allowed_pages(batch, q))
    if asked.cache_seqlens is None:
        raise ArgumentError("cache_seqlens", "None with a page_table", "each sequence's length, a tensor")


def _allowed_pages(batch: int, q: Tensor) -> str:
    shape = f"({batch}, pages of a sequence at the most)"
    return f"an int32 tensor of shape {shape} on {q.device}, its rows contiguous"


def _check_ints(name: str, given: object, size: int | None, q: Tensor) -> None:
    if not isinstance(given, Tensor):
        raise ArgumentError(name, type(given).__name__, _allowed_ints(name, size, q))
    right = given.dtype == torch.int32 and given.dim() == 1
    right = right and (given.shape[0] > 0 if size is None else given.shape[0] == size)
    if not right or not given.is_contiguous() or given.device != q.device:
        got = f"{given.dtype} of shape {tuple(given.shape)} on {given.device}"
        raise ArgumentError(name, got, _allowed_ints(name, size, q))


def _allowed_ints(name: str, size: int | None, q: Tensor) -> str:
    shape = "(batch + 1,)" if size is None else f"({size},)"
    one = "an int, or " if name == "cache_seqlens" else ""
    return f"{one}an int32 tensor of shape {shape}, contiguous, on {q.device}"
