"""Whether a call records gradients, or is under torch.func, forward-mode AD or a dispatch mode; and vmap's rule.

The checks cost an eager call of plain tensors a few look-ups in C. They use names that torch keeps to itself, which
torch 2.9 to 2.13 were seen to have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.requests import FURTHEST_ROW, INPUTS, Request, inputs_of, parted, starts_of

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


def nothing_intervenes() -> bool:
    """Whether a call is eager and nothing else: no tracer, dispatch mode, transform, forward-mode AD or autocast.

    One answer for all that seldom is there: a decode step's host time is some ten microseconds.
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
    """Whether autograd is to see what is done to a tensor. One that vmap batches does not say so itself."""
    if x.requires_grad or torch.compiler.is_compiling() or not transforms_are_active():
        return x.requires_grad
    while is_wrapped(x) and not x.requires_grad:
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func (grad, vjp, vmap, jvp) or forward-mode AD is to see what is done to these."""
    if transforms_are_active() and any(isinstance(x, Tensor) and is_wrapped(x) for x in tensors):
        return True
    return forward_ad._current_level >= 0 and _any_tangent(tensors)


def breaks_graph(q: Tensor) -> bool:
    """Whether torch.compile, which is tracing, cannot take q's transforms into its graph: it can vmap alone."""
    return transforms_are_active() and not _is_batched(q)


def functionalized(*tensors: Tensor | None) -> bool:
    """Whether torch.func.functionalize is to see what is done to these: operators, it knows no autograd Functions."""
    return any(isinstance(x, Tensor) and _is_functional(x) for x in tensors)


def refuse_batched(x: Tensor) -> None:
    """For what autograd batches by a way of its own, which has no rules for Functions. Raises ArgumentError."""
    if _is_batched_by_autograd(x):
        allowed = "False, or torch.func.jacrev, jacfwd, or vmap of torch.func.vjp's function"
        raise ArgumentError("is_grads_batched, or jacobian's vectorize", True, allowed)


def differentiated(x: Tensor) -> bool:
    """Whether grad, vjp or jvp of torch.func, at any depth, differentiates by a tensor, or by what it came of."""
    while is_wrapped(x):
        if _is_differentiated(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def under_a_transform() -> bool:
    """Whether any transform of torch.func is active, or forward-mode AD entered: seldom, and cheap to know."""
    return transforms_are_active() or forward_ad._current_level >= 0


def transforms_see(do: Tensor) -> bool:
    """`under_a_transform`, in a backward: do, the gradient of out, may be batched by autograd. Raises ArgumentError."""
    if not torch.compiler.is_compiling():
        refuse_batched(do)
    return transforms_are_active() or forward_ad._current_level >= 0


def under_a_mode() -> bool:
    """Whether a TorchDispatchMode, such as FlopCounterMode, is to see each operator."""
    return _len_of_mode_stack() > 0


def refuse_transforms(function: str, **inputs: Tensor | None) -> None:
    """For functions that would drop a tangent, or fail in a kernel's launch. Raises ArgumentError.

    inputs  by the names that the caller has for them
    """
    for name, x in inputs.items():
        if transformed(x):
            got = "a tensor under a transform of torch.func, or with a tangent (forward-mode AD)"
            allowed = f"a plain tensor: {function} supports neither (parallax_attn_func does)"
            raise ArgumentError(name, got, allowed)


def refuse_tangents() -> None:
    """For operators, which are run below autograd, where no tangent can be seen: they would drop it, that is give 0.

    Raises ArgumentError where forward-mode AD is entered, and not seen to by a Function.
    """
    if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
        got = "under torch.compile, a dispatch mode, or as an operator"
        raise ArgumentError("forward-mode AD", got, "in eager calls of parallax_attn_func or parallax_attn_varlen_func")


def primal_of(x: Tensor | None) -> Tensor | None:
    """Without its tangent at the innermost level."""
    return None if x is None else forward_ad.unpack_dual(x).primal


def without_odd_strides(asked: Request) -> Request:
    """With copies of tensors whose strides our functions do not take: under vmap a caller does not choose them."""
    q, r, k, v = (_laid_out(x) if isinstance(x, Tensor) else x for x in inputs_of(asked))
    starts_q, starts_k = (
        x.contiguous() if isinstance(x, Tensor) else x for x in (asked.cu_seqlens_q, asked.cu_seqlens_k)
    )
    return asked._replace(q=q, r=r, k=k, v=v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)


def over_samples(
    apply: Callable[..., Outputs], size: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Outputs, tuple[int, ...]]:
    """The vmap rule of a function whose arguments begin with a Request's: its outputs for all samples, and their dims.

    Samples of dense sequences are one larger batch. Packed sequences may leave rows to none of them, so that samples of
    theirs cannot be packed once more: they are attended one after the other.
    """
    given = list(zip(args, in_dims, strict=True))
    if not starts_of(parted(args)[0]):
        batch = args[0].shape[1 if in_dims[0] == 0 else 0]  # of one sample
        every = [_laid_out(folded(x, dim, size)) if isinstance(x, Tensor) else x for x, dim in given]
        # Kernels read inputs of many strides, and what a forward left for a backward of one.
        every = [x.contiguous() if isinstance(x, Tensor) and i >= len(INPUTS) else x for i, x in enumerate(every)]
        found = tuple(x.unflatten(0, (size, batch)) for x in apply(*every))
        return found, (0,) * len(found)
    # Of no samples one that is empty tells the outputs' sizes.
    each = [apply(*(_sample(x, dim, i) for x, dim in given)) for i in range(size) or (None,)]
    found = tuple(torch.stack(parts)[:size] for parts in zip(*each, strict=True))
    return found, (0,) * len(found)


def folded(x: Tensor, dim: int | None, size: int) -> Tensor:
    """(batch, ...) of all samples: (size * batch, ...), copied where it has to be. dim: the samples', None for one."""
    every = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return every.flatten(0, 1)


def _sample(x: Any, dim: int | None, i: int | None) -> Any:
    if dim is None:
        return x
    return x.sum(dim, dtype=x.dtype) if i is None else x.select(dim, i).contiguous()


def _laid_out(x: Tensor) -> Tensor:
    fits = x.dim() < 3 or (x.stride(-1) == 1 and x.stride(-3) <= FURTHEST_ROW)
    return x if fits else x.contiguous()


def _any_tangent(tensors: Sequence[Tensor | None]) -> bool:
    """Of a level of forward-mode AD that is entered, and not switched off: for a Function's forward, say."""
    if torch.is_inference_mode_enabled() or not torch._C._is_fwd_grad_enabled():
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
