"""Detects recorded gradients, torch.func transforms, forward-mode AD and dispatch modes; implements vmap.

These checks cost an eager call of plain tensors a few look-ups in C. They use private names of torch, which exist in
torch 2.9 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.requests import INPUTS, MAX_ROW_STRIDE, Request, cu_seqlens_of, inputs_of, split_request

Outputs = tuple[Tensor, ...]

transforms_are_active = torch._C._are_functorch_transforms_active
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_differentiated = torch._C._functorch.is_gradtrackingtensor
_is_batched = torch._C._functorch.is_batchedtensor
_is_functional = torch._C._functorch.is_functionaltensor
_is_batched_by_autograd = torch._C._functorch.is_legacy_batchedtensor
_is_compiling = torch.compiler.is_compiling
_len_of_mode_stack = torch._C._len_torch_dispatch_stack
_autocasts = torch._C._is_any_autocast_enabled


def is_plain_eager_call() -> bool:
    """Whether a call is eager with no tracer, dispatch mode, transform, forward-mode AD or autocast active.

    One check for all these rare cases, because the host time of a decode step is about ten microseconds.
    """
    return not (
        _is_compiling()
        or _len_of_mode_stack()
        or transforms_are_active()
        or forward_ad._current_level >= 0
        or _autocasts()
    )


def records_gradients(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    if q.requires_grad or r.requires_grad or k.requires_grad or v.requires_grad:
        return True
    return transforms_are_active() and any(map(needs_gradients, (q, r, k, v)))


def needs_gradients(x: Tensor) -> bool:
    """Whether autograd tracks a tensor. A tensor that vmap batches does not report it; its unwrapped tensor does."""
    if x.requires_grad or torch.compiler.is_compiling() or not transforms_are_active():
        return x.requires_grad
    while is_wrapped(x) and not x.requires_grad:
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def any_transformed(*tensors: Tensor | None) -> bool:
    """Whether a torch.func transform (grad, vjp, vmap, jvp) wraps any of these, or any has a forward-mode tangent."""
    if transforms_are_active() and any(isinstance(x, Tensor) and is_wrapped(x) for x in tensors):
        return True
    return forward_ad._current_level >= 0 and _any_tangent(tensors)


def must_break_graph(q: Tensor) -> bool:
    """Whether torch.compile, while tracing, must break the graph for q's transforms: it can only trace vmap."""
    return transforms_are_active() and not _is_batched(q)


def any_functionalized(*tensors: Tensor | None) -> bool:
    """Whether torch.func.functionalize wraps any of these. It handles operators, but no autograd Functions."""
    return any(isinstance(x, Tensor) and _is_functional(x) for x in tensors)


def refuse_batched(x: Tensor) -> None:
    """Raise ArgumentError in autograd's own batching (is_grads_batched), which has no rules for Functions."""
    if _is_batched_by_autograd(x):
        allowed = "False, or torch.func.jacrev, jacfwd, or vmap of torch.func.vjp's function"
        raise ArgumentError("is_grads_batched, or jacobian's vectorize", True, allowed)


def is_differentiated(x: Tensor) -> bool:
    """Whether torch.func's grad, vjp or jvp, at any depth, differentiates with respect to x or what x depends on."""
    while is_wrapped(x):
        if _is_differentiated(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def transform_is_active() -> bool:
    """Whether any torch.func transform or forward-mode AD level is active. This is cheap to check."""
    return transforms_are_active() or forward_ad._current_level >= 0


def transforms_backward(do: Tensor) -> bool:
    """`transform_is_active` in a backward. Raises ArgumentError if autograd batches do, the gradient of out."""
    if not torch.compiler.is_compiling():
        refuse_batched(do)
    return transforms_are_active() or forward_ad._current_level >= 0


def dispatch_mode_is_active() -> bool:
    """Whether a TorchDispatchMode, such as FlopCounterMode, is active and must see each operator."""
    return _len_of_mode_stack() > 0


def refuse_transforms(function: str, **inputs: Tensor | None) -> None:
    """Raise ArgumentError for inputs under a transform, in functions that would drop a tangent or fail at the launch.

    inputs  by the caller's argument names
    """
    for name, x in inputs.items():
        if any_transformed(x):
            got = "a tensor under a transform of torch.func, or with a tangent (forward-mode AD)"
            allowed = f"a plain tensor: {function} supports neither (parallax_attn_func does)"
            raise ArgumentError(name, got, allowed)


def refuse_tangents() -> None:
    """Raise ArgumentError in an operator inside forward-mode AD, unless an autograd Function handles the tangents.

    Operators run below autograd, where tangents are invisible: the result would silently have a tangent of 0.
    """
    if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
        got = "under torch.compile, a dispatch mode, or as an operator"
        raise ArgumentError("forward-mode AD", got, "in eager calls of parallax_attn_func or parallax_attn_varlen_func")


def primal(x: Tensor | None) -> Tensor | None:
    """x without its tangent at the innermost level of forward-mode AD."""
    return None if x is None else forward_ad.unpack_dual(x).primal


def with_supported_strides(request: Request) -> Request:
    """Copy tensors whose strides our functions do not support: under vmap the caller does not choose strides."""
    q, r, k, v = (_with_supported_strides(x) if isinstance(x, Tensor) else x for x in inputs_of(request))
    starts_q, starts_k = (
        x.contiguous() if isinstance(x, Tensor) else x for x in (request.cu_seqlens_q, request.cu_seqlens_k)
    )
    return request._replace(q=q, r=r, k=k, v=v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)


def map_samples(
    apply: Callable[..., Outputs], size: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Outputs, tuple[int, ...]]:
    """The vmap rule of a function whose arguments begin with a Request: all samples' outputs, and their batch dims.

    Samples of dense sequences become one larger batch. Packed samples run one after the other: rows may belong to no
    sequence, so packed samples cannot be packed together.
    """
    args_and_dims = list(zip(args, in_dims, strict=True))
    if not cu_seqlens_of(split_request(args)[0]):
        sample_batch = args[0].shape[1 if in_dims[0] == 0 else 0]
        folded = [
            _with_supported_strides(fold_samples(x, dim, size)) if isinstance(x, Tensor) else x
            for x, dim in args_and_dims
        ]
        # Kernels accept many strides for q, r, k and v, but only contiguous tensors saved by the forward.
        folded = [x.contiguous() if isinstance(x, Tensor) and i >= len(INPUTS) else x for i, x in enumerate(folded)]
        outputs = tuple(x.unflatten(0, (size, sample_batch)) for x in apply(*folded))
        return outputs, (0,) * len(outputs)
    # With no samples, one run on an empty sample gives the outputs' sizes.
    per_sample = [apply(*(_sample(x, dim, i) for x, dim in args_and_dims)) for i in range(size) or (None,)]
    outputs = tuple(torch.stack(parts)[:size] for parts in zip(*per_sample, strict=True))
    return outputs, (0,) * len(outputs)


def fold_samples(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Fold vmap's dimension `dim` (None: x is shared) into the batch: (size * batch, ...), copied if necessary."""
    folded = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return folded.flatten(0, 1)


def _sample(x: Any, dim: int | None, i: int | None) -> Any:
    """Sample i of an argument; for None the sum over no samples, which is zeros of a sample's size."""
    if dim is None:
        return x
    return x.sum(dim, dtype=x.dtype) if i is None else x.select(dim, i).contiguous()


def _with_supported_strides(x: Tensor) -> Tensor:
    fits = x.dim() < 3 or (x.stride(-1) == 1 and x.stride(-3) <= MAX_ROW_STRIDE)
    return x if fits else x.contiguous()


def _any_tangent(tensors: Sequence[Tensor | None]) -> bool:
    """Whether any has a tangent at the active forward-mode level; False if that is disabled, as in Function.forward."""
    if torch.is_inference_mode_enabled() or not torch._C._is_fwd_grad_enabled():
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
