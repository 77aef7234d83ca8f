"""Forward and backward of whole sequences, dense or packed: on CUDA by kernels, on the CPU by the fp64 reference.

What is asked is checked once for its sizes, strides and types, when its plan is made. Nothing here records gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from parallax_gen.codegen.abi import rows_like, sizes_of
from parallax_gen.oracle.partial import partial_backward
from parallax_gen.oracle.reference import (
    Gradients,
    Reference,
    reference_backward,
    reference_forward,
    reference_varlen_backward,
    reference_varlen_forward,
)
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import scale_or_default
from parallax_gen.runtime.checks import check_request
from parallax_gen.runtime.plan import HostPlan, LaunchPlan, Plans, host_plan, key_of, plan_launch
from parallax_gen.runtime.requests import (
    FURTHEST_ROW,
    TENSORS,
    Request,
    dtype_name,
    inputs_of,
    rounds_to_tf32,
    starts_of,
    tensors_of,
    wanted,
    window_of,
)


def forward(asked: Request, *, packed: bool, out: Tensor | None = None, stats: bool = False) -> tuple[Tensor, ...]:
    """out, and with stats also lse, t̄ and v̄. Raises ArgumentError.

    packed  whether the sequences are; asked shows it too, once it has been checked
    """
    key = key_of(*asked, out, packed, stats, rounds_to_tf32(asked.q))
    plan = _forwards.get(key)
    if plan is None:
        check_request(asked, packed, out)
        plan = _plan_forward(asked, stats)
        _forwards.remember(key, plan)
    found = room_for(asked.q, out, stats)
    if isinstance(plan, LaunchPlan):
        plan.launch(asked, found)
    elif plan.nothing_seen:
        fill_unseen(found)
    else:
        copy_into(found, _reference_forward(asked))
    return found


@dataclass(frozen=True)
class Saved:
    """What the forward left for the backward, all contiguous. v_mean: None to find it again."""

    out: Tensor
    lse: Tensor
    t_mean: Tensor
    v_mean: Tensor | None


def backward(
    do: Tensor, asked: Request, saved: Saved, *, dqdr: bool, dkdv: bool, some_keys: bool = False
) -> tuple[Tensor, ...]:
    """The gradients of q and r if dqdr, then those of k and v if dkdv: contiguous, in the inputs' dtype.

    do         the gradient of out, of any strides
    some_keys  `saved` is of attention over more keys than asked has: found is what these keys add
    """
    if do.stride(-1) != 1 or do.stride(-3) > FURTHEST_ROW:  # as the gradient of a sum is, one number everywhere
        do = do.contiguous()
    key = key_of(*asked, do, dqdr, dkdv, rounds_to_tf32(asked.q))
    plan = _backwards.get(key)
    if plan is None:
        check_request(asked, packed=bool(starts_of(asked)))
        plan = _plan_backward(asked, dqdr, dkdv)
        _backwards.remember(key, plan)
    names = wanted(dqdr, dkdv)
    like = [getattr(asked, name) for name in names]
    grads = tuple([torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like])
    if isinstance(plan, BackwardPlan):
        plan.launch(do, asked, saved, grads)
    elif plan.nothing_seen:
        for grad in grads:
            grad.zero_()
    else:
        found = _partial_backward(do, asked, saved) if some_keys else _reference_backward(do, asked)
        copy_into(grads, [getattr(found, f"d{name}") for name in names])
    return grads


@dataclass(frozen=True)
class BackwardPlan:
    """The backward's kernels in their order; None for gradients that are not wanted."""

    preprocess: LaunchPlan
    dkdv: LaunchPlan | None
    dqdr: LaunchPlan | None

    def launch(self, do: Tensor, asked: Request, saved: Saved, grads: tuple[Tensor, ...]) -> None:
        v_mean = saved.v_mean
        if v_mean is None:
            v_mean = forward(asked, packed=bool(starts_of(asked)), stats=True)[3]
        sequences = 0 if asked.cu_seqlens_q is None else asked.cu_seqlens_q.shape[0] - 1
        rows = rows_like(saved.lse, sequences)
        tensors = dict(zip(TENSORS, tensors_of(asked), strict=True))
        left = {"out": saved.out, "lse": saved.lse, "t_mean": saved.t_mean, "v_mean": v_mean}
        given = SimpleNamespace(do=do, rows=rows, **tensors, **left)
        self.preprocess.launch(given, (rows,))
        if self.dkdv is not None:
            self.dkdv.launch(given, grads[-2:])
        if self.dqdr is not None:
            self.dqdr.launch(given, grads[:2])


_forwards: Plans[LaunchPlan | HostPlan] = Plans()
_backwards: Plans[BackwardPlan | HostPlan] = Plans()


def room_for(q: Tensor, out: Tensor | None, stats: bool) -> tuple[Tensor, ...]:
    """What is to be written: out, made if not given, and with stats also lse, t̄ and v̄."""
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # half the time of torch.empty
    if not stats:
        return (out,)
    lse, t_mean = (torch.empty(stats_shape(q), dtype=torch.float32, device=q.device) for _ in range(2))
    return out, lse, t_mean, torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)


def stats_shape(q: Tensor) -> tuple[int, ...]:
    """Of lse and t̄: (batch, heads, seqlen_q), or (heads, total_q) of packed sequences."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def fill_unseen(found: Sequence[Tensor]) -> None:
    """Into out, and lse, t̄ and v̄ if they are there, what rows without keys have."""
    for tensor in found:
        tensor.zero_()
    if len(found) > 1:
        found[1].fill_(-math.inf)


def copy_into(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Into each tensor its value, rounded to its dtype. There may be more values."""
    for tensor, value in zip(tensors, values, strict=False):
        tensor.copy_(value)


def _plan_forward(asked: Request, stats: bool) -> LaunchPlan | HostPlan:
    host = _host_plan(asked)
    if host is not None:
        return host
    spec, shape = _problem(asked)
    return _plan(spec.of("forward") if stats else spec, shape, asked)


def _plan_backward(asked: Request, dqdr: bool, dkdv: bool) -> BackwardPlan | HostPlan:
    host = _host_plan(asked)
    if host is not None:
        return host
    spec, shape = _problem(asked)
    of_rows = Shape(shape.batch, shape.heads, shape.heads, shape.seqlen_q, shape.seqlen_q)
    return BackwardPlan(
        _plan(spec.of("preprocess"), of_rows, asked),
        _plan(spec.of("dkdv"), shape, asked) if dkdv else None,
        _plan(spec.of("dqdr"), shape, asked) if dqdr else None,
    )


def _host_plan(asked: Request) -> HostPlan | None:
    if asked.cu_seqlens_q is not None and 0 in (
        asked.cu_seqlens_q.shape[0] - 1,
        asked.max_seqlen_q,
        asked.max_seqlen_k,
    ):
        return HostPlan(nothing_seen=True)
    return host_plan(asked.q, asked.k)


def _plan(spec: KernelSpec, shape: Shape, asked: Request) -> LaunchPlan:
    scale = scale_or_default(asked.softmax_scale, spec.head_dim)
    sizes = sizes_of(spec, shape.window, shape.seqlen_q, shape.seqlen_kv)
    return plan_launch(spec, shape, (scale, *sizes), asked.q.device.index)


def _problem(asked: Request) -> tuple[KernelSpec, Shape]:
    """The forward's spec, without statistics, and the sizes."""
    q, k = asked.q, asked.k
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if asked.cu_seqlens_q is None:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    else:
        batch, seqlen_q, seqlen_k = asked.cu_seqlens_q.shape[0] - 1, asked.max_seqlen_q, asked.max_seqlen_k
    window = window_of(asked.window_size, seqlen_k)
    spec = KernelSpec(
        "forward",
        q.shape[-1],
        dtype_name(q),
        group=heads // kv_heads,
        causal=asked.causal,
        window=window > 0,
        varlen=bool(starts_of(asked)),
    )
    return spec, Shape(batch, heads, kv_heads, seqlen_q, seqlen_k, window)


def _reference_forward(asked: Request) -> Reference:
    oracle: Callable[..., Reference] = reference_varlen_forward if starts_of(asked) else reference_forward
    return oracle(*inputs_of(asked), *starts_of(asked), **_options(asked))


def _reference_backward(do: Tensor, asked: Request) -> Gradients:
    """On a thread of its own: it differentiates by autograd, which torch has switched off around an operator's code."""
    oracle: Callable[..., Gradients] = reference_varlen_backward if starts_of(asked) else reference_backward
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(oracle, *inputs_of(asked), do, *starts_of(asked), **_options(asked)).result()


def _partial_backward(do: Tensor, asked: Request, saved: Saved) -> Gradients:
    assert saved.v_mean is not None
    found = (saved.out, saved.lse, saved.t_mean, saved.v_mean)
    scale = asked.softmax_scale
    return partial_backward(*inputs_of(asked), do, *found, causal=asked.causal, softmax_scale=scale)


def _options(asked: Request) -> dict[str, Any]:
    return {"causal": asked.causal, "window_size": asked.window_size, "softmax_scale": asked.softmax_scale}
