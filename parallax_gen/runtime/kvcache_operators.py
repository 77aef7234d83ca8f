"""Attention over a KV cache as torch operators: what torch.compile, torch.export, dispatch modes and vmap see.

    parallax_gen::attention_with_kvcache        only out
    parallax_gen::attention_with_kvcache_state  out, lse, t_mean and v_mean

Their arguments are the fields of `CacheRequest`. They write to no argument, and each call allocates its own scratch.
Eager calls on plain tensors bypass them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from parallax_gen.problem.work import MATMULS, visible_pairs
from parallax_gen.runtime.attention import stats_shape
from parallax_gen.runtime.autograd import are_plain_tensors
from parallax_gen.runtime.cache_checks import refuse_cache_tangents
from parallax_gen.runtime.operators import NAMESPACE, operator_name
from parallax_gen.runtime.requests import CacheRequest, cached_inputs_of
from parallax_gen.runtime.transforms import dispatch_mode_is_active, fold_samples, is_wrapped, transforms_are_active

_ARGUMENTS = (
    "(Tensor q, Tensor r, Tensor k_cache, Tensor v_cache, Tensor? cache_seqlens, Tensor? page_table, "
    "Tensor? cache_leftpad, Tensor? cu_seqlens_q, Tensor? k_scale, Tensor? v_scale, SymInt? max_seqlen_q, "
    "bool causal, SymInt? window_size, float? softmax_scale, float? softcap, "
    "bool batch_invariant)"
)


def needs_operator(request: CacheRequest) -> bool:
    """Whether the call must be an operator: under a tracer, a dispatch mode or vmap, or with a tensor subclass.

    Raises ArgumentError for a tensor with a tangent of forward-mode AD.
    """
    if torch.compiler.is_compiling() or dispatch_mode_is_active():
        return True
    if not are_plain_tensors(*cached_inputs_of(request)):
        return True
    if forward_ad._current_level >= 0:
        refuse_cache_tangents(request)
    return transforms_are_active() and any(isinstance(x, Tensor) and is_wrapped(x) for x in request)


def with_contiguous_heads(request: CacheRequest) -> CacheRequest:
    """Under vmap make the last dimensions contiguous: there the caller does not choose the strides of one sample."""
    if torch.compiler.is_compiling() or not transforms_are_active():
        return request
    return CacheRequest(*(_contiguous(x) for x in request))


def define_operators(run: Callable[..., tuple[Tensor, ...]]) -> tuple[Any, Any]:
    """Define and return attention_with_kvcache and attention_with_kvcache_state.

    run  their implementation: takes their arguments and `state`, whether to return all of a State
    """

    def run_only_out(*arguments: Any) -> Tensor:
        return run(*arguments, state=False)[0]

    def run_with_state(*arguments: Any) -> tuple[Tensor, ...]:
        return run(*arguments, state=True)

    only_out = torch.library.custom_op(
        operator_name("attention_with_kvcache"), run_only_out, mutates_args=(), schema=f"{_ARGUMENTS} -> Tensor"
    )
    with_state = torch.library.custom_op(
        operator_name("attention_with_kvcache_state"),
        run_with_state,
        mutates_args=(),
        schema=f"{_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor)",
    )
    only_out.register_fake(_fake)
    with_state.register_fake(_fake_with_state)
    for operator in (only_out, with_state):
        operator.register_vmap(_vmap_rule(operator))
    ours = getattr(torch.ops, NAMESPACE)
    packets = [ours.attention_with_kvcache, ours.attention_with_kvcache_state]
    register_flop_formula(packets, get_raw=True)(flops)
    return only_out, with_state


def _fake(*arguments: Any) -> Tensor:
    q = CacheRequest(*arguments).q
    return q.new_empty(q.shape)


def _fake_with_state(*arguments: Any) -> tuple[Tensor, ...]:
    q = CacheRequest(*arguments).q
    lse, t_mean = (q.new_empty(stats_shape(q), dtype=torch.float32) for _ in range(2))
    return q.new_empty(q.shape), lse, t_mean, q.new_empty(q.shape)


def _vmap_rule(operator: Any) -> Callable[..., Any]:
    def attend(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        outputs, out_dims = _vmap_samples(operator, info.batch_size, in_dims, arguments)
        return (outputs, out_dims) if len(outputs) > 1 else (outputs[0], out_dims[0])

    return attend


def _vmap_samples(
    operator: Any, size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The operator's outputs for all samples of vmap, and the dimension of the samples in each.

    Samples with their own caches, neither packed nor paged, become one larger batch. Others run one after the other:
    folding them into one batch would copy a cache that they share.
    """
    request, dims = CacheRequest(*arguments), CacheRequest(*in_dims)  # type: ignore[arg-type]
    own_caches = dims.k_cache is not None and dims.v_cache is not None
    shared_scales = dims.k_scale is None and dims.v_scale is None
    if own_caches and shared_scales and request.page_table is None and request.cu_seqlens_q is None:
        scales = ("k_scale", "v_scale")
        folded = [
            _contiguous(fold_samples(x, dim, size)) if isinstance(x, Tensor) and name not in scales else x
            for name, x, dim in zip(request._fields, arguments, in_dims, strict=True)
        ]
        batch = folded[0].shape[0] // size
        outputs = _tuple(operator(*folded))
        return tuple(x.unflatten(0, (size, batch)) for x in outputs), (0,) * len(outputs)
    if size == 0:  # the outputs of one sample of zeros give the sizes
        zeros = (
            x if dim is None else x.new_zeros(_without(x.shape, dim)) for x, dim in zip(arguments, in_dims, strict=True)
        )
        empty = tuple(x[None][:0] for x in _tuple(operator(*zeros)))
        return empty, (0,) * len(empty)
    per_sample = []
    for i in range(size):
        sample = (
            x if dim is None else _contiguous(x.select(dim, i)) for x, dim in zip(arguments, in_dims, strict=True)
        )
        per_sample.append(_tuple(operator(*sample)))
    return tuple(torch.stack(parts) for parts in zip(*per_sample, strict=True)), (0,) * len(per_sample[0])


def _without(shape: torch.Size, dim: int) -> list[int]:
    sizes = list(shape)
    del sizes[dim]
    return sizes


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) and x.dim() > 0 and x.stride(-1) != 1 else x


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def flops(*arguments: Any, out_val: Any = None) -> int:
    """For FlopCounterMode: 2 FLOP for each multiply-add of the 4 matmuls, over the visible (query, key) pairs.

    Reads the lengths, which waits for the device. For fake tensors, and while a CUDA graph is captured, every sequence
    counts as having max_seqlen_q queries and a full cache.
    """
    request = CacheRequest(*arguments)
    heads, head_dim = request.q.shape[-2:]
    window = request.window_size or 0
    pairs = 0.0
    for queries, keys in zip(*_lengths(request), strict=True):
        if queries == 1:  # a single query sees all keys of its window, causal or not
            pairs += min(keys, window or keys)
        else:
            pairs += visible_pairs(queries, keys, request.causal, window)
    return int(2 * MATMULS["decode"] * heads * head_dim * pairs)


def _lengths(request: CacheRequest) -> tuple[list[int], list[int]]:
    """The numbers of queries and of keys of each sequence."""
    starts = request.cu_seqlens_q
    if starts is None:
        queries = [request.q.shape[1]] * request.q.shape[0]
    else:
        ends = _numbers_of(starts) or [(request.max_seqlen_q or 0) * b for b in range(len(starts))]
        queries = [max(0, ends[b + 1] - ends[b]) for b in range(len(ends) - 1)]
    table = request.page_table
    capacity = request.k_cache.shape[1] * (1 if table is None else table.shape[1])
    lengths = _numbers_of(request.cache_seqlens) or [capacity] * len(queries)
    pads = _numbers_of(request.cache_leftpad) or [0] * len(queries)
    return queries, [max(0, min(end, capacity) - max(0, pad)) for end, pad in zip(lengths, pads, strict=True)]


def _numbers_of(x: Tensor | int | None) -> list[int] | None:
    """The values of x; None if they cannot be read."""
    if x is None or type(x) is not Tensor or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return [int(number) for number in x.tolist()]
