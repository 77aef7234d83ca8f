"""Forward and backward over whole sequences, dense or packed: kernels on CUDA, the fp64 reference on the CPU.

A request is checked once for its sizes, strides and dtypes, when its plan is made. Nothing here records gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from parallax_gen.codegen.abi import empty_row_stats, launch_scalars
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
from parallax_gen.runtime.layout import layout_notice
from parallax_gen.runtime.plan import HostPlan, LaunchPlan, PlanCache, host_plan, plan_key, plan_launch
from parallax_gen.runtime.requests import (
    MAX_ROW_STRIDE,
    TENSORS,
    Request,
    cu_seqlens_of,
    dtype_name,
    gradients_of,
    inputs_of,
    options_of,
    rounds_to_tf32,
    tensor_fields,
    window_of,
)

# dqdr runs beside dkdv up to this many programs of dkdv per multiprocessor. From an H200, in bf16 at head_dim 128:
# there a backward takes 27 to 42 % less time. With more programs dkdv fills the card: 0 to 3 % less, or more time.
MAX_PROGRAMS_PER_SM_BESIDE = 2


def forward(request: Request, *, packed: bool, out: Tensor | None = None, stats: bool = False) -> tuple[Tensor, ...]:
    """out, and with stats also lse, t_mean and v_mean. Raises ArgumentError.

    packed  whether the sequences are packed; `request`, not checked yet, may contradict it
    """
    key = plan_key(*request, out, packed, stats, rounds_to_tf32(request.q))
    plan = _forwards.get(key)
    if plan is None:
        check_request(request, packed, out)
        plan = _plan_forward(request, stats)
        _forwards.remember(key, plan)
    outputs = allocate_outputs(request.q, out, stats)
    if isinstance(plan, LaunchPlan):
        plan.launch(request, outputs)
    elif plan.is_empty:
        write_result_without_keys(outputs)
    else:
        copy_outputs(outputs, _reference_forward(request))
    return outputs


@dataclass(frozen=True)
class SavedForBackward:
    """What the forward saves for the backward, all contiguous. v_mean is None if the backward must recompute it."""

    out: Tensor
    lse: Tensor
    t_mean: Tensor
    v_mean: Tensor | None


def backward(
    do: Tensor, request: Request, saved: SavedForBackward, *, dqdr: bool, dkdv: bool, keys_are_partial: bool = False
) -> tuple[Tensor, ...]:
    """The gradients of q and r if dqdr, then those of k and v if dkdv: contiguous, in the inputs' dtype.

    do                the gradient of out, of any strides
    keys_are_partial  `saved` comes from attention over more keys than `request` has; the result is the contribution
                      of the request's keys
    """
    if do.stride(-1) != 1 or do.stride(-3) > MAX_ROW_STRIDE:  # such as the expanded gradient of a sum
        do = do.contiguous()
    key = plan_key(*request, do, dqdr, dkdv, rounds_to_tf32(request.q))
    plan = _backwards.get(key)
    if plan is None:
        check_request(request, packed=bool(cu_seqlens_of(request)))
        plan = _plan_backward(request, dqdr, dkdv)
        _backwards.remember(key, plan)
    names = gradients_of(dqdr, dkdv)
    inputs = [getattr(request, name) for name in names]
    grads = tuple([torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs])
    if isinstance(plan, BackwardPlan):
        plan.launch(do, request, saved, grads)
    elif plan.is_empty:
        for grad in grads:
            grad.zero_()
    else:
        outputs = _partial_backward(do, request, saved) if keys_are_partial else _reference_backward(do, request)
        copy_outputs(grads, [getattr(outputs, f"d{name}") for name in names])
    return grads


@dataclass(frozen=True)
class BackwardPlan:
    """The backward's kernels in launch order; None for gradients that are not requested.

    forks  whether a captured graph runs dqdr beside dkdv: both are requested, and dkdv leaves room on the card
    """

    preprocess: LaunchPlan
    dkdv: LaunchPlan | None
    dqdr: LaunchPlan | None
    forks: bool

    def launch(self, do: Tensor, request: Request, saved: SavedForBackward, grads: tuple[Tensor, ...]) -> None:
        v_mean = saved.v_mean
        if v_mean is None:
            v_mean = forward(request, packed=bool(cu_seqlens_of(request)), stats=True)[3]
        sequences = 0 if request.cu_seqlens_q is None else request.cu_seqlens_q.shape[0] - 1
        row_stats = empty_row_stats(saved.lse, sequences)
        tensors = dict(zip(TENSORS, tensor_fields(request), strict=True))
        forward_results = {"out": saved.out, "lse": saved.lse, "t_mean": saved.t_mean, "v_mean": v_mean}
        arguments = SimpleNamespace(do=do, row_stats=row_stats, **tensors, **forward_results)
        self.preprocess.launch(arguments, (row_stats,))
        # Only in a graph: steps this small are otherwise bound by the host's time, and events take more of it.
        if self.forks and torch.cuda.is_current_stream_capturing():
            self._launch_forked(arguments, grads)
            return
        if self.dkdv is not None:
            self.dkdv.launch(arguments, grads[-2:])
        if self.dqdr is not None:
            self.dqdr.launch(arguments, grads[:2])

    def _launch_forked(self, arguments: SimpleNamespace, grads: tuple[Tensor, ...]) -> None:
        """Launch dkdv on the current stream, which is being captured, and dqdr on another one beside it.

        No tensor needs record_stream: all belong to the current stream, and live until it waits for the other.
        row_stats and a recomputed v_mean end with `launch`, the others with the caller. dkdv and dqdr take no scratch,
        and tensor descriptors are passed by value, so that the graph has a copy of them.
        """
        assert self.dkdv is not None
        assert self.dqdr is not None
        current = torch.cuda.current_stream(grads[0].device)
        side = _side_stream(current)
        side.wait_stream(current)
        try:
            self.dkdv.launch(arguments, grads[-2:])
            with torch.cuda.stream(side):
                self.dqdr.launch(arguments, grads[:2])
        finally:  # else the capture's error, of a stream that was not joined, would hide that of the launch
            current.wait_stream(side)


@cache
def _side_stream(captured: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream beside one that is being captured.

    Each has its own: a stream that joins a capture is part of it until the capture ends, and meanwhile another capture,
    by another thread or nested in the first, may not use it.
    """
    return torch.cuda.Stream(captured.device)


_forwards: PlanCache[LaunchPlan | HostPlan] = PlanCache()
_backwards: PlanCache[BackwardPlan | HostPlan] = PlanCache()


def allocate_outputs(q: Tensor, out: Tensor | None, stats: bool) -> tuple[Tensor, ...]:
    """The tensors to write: out, allocated if not given, and with stats also lse, t_mean and v_mean."""
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # half the time of torch.empty
    if not stats:
        return (out,)
    lse, t_mean = (torch.empty(stats_shape(q), dtype=torch.float32, device=q.device) for _ in range(2))
    return out, lse, t_mean, torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)


def stats_shape(q: Tensor) -> tuple[int, ...]:
    """The shape of lse and t_mean: (batch, heads, seqlen_q), or (heads, total_q) for packed sequences."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def write_result_without_keys(outputs: Sequence[Tensor]) -> None:
    """Write the result of attention without any key: 0, and -inf for lse."""
    for tensor in outputs:
        tensor.zero_()
    if len(outputs) > 1:
        outputs[1].fill_(-math.inf)


def copy_outputs(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its tensor, rounded to the tensor's dtype. Surplus values are ignored."""
    for tensor, value in zip(tensors, values, strict=False):
        tensor.copy_(value)


def _plan_forward(request: Request, stats: bool) -> LaunchPlan | HostPlan:
    host = _host_plan(request)
    if request.cu_seqlens_q is None and not (host and host.is_empty):
        layout_notice().check(request.q, request.k)
    if host is not None:
        return host
    spec, shape = _problem(request)
    return _plan(spec.for_op("forward") if stats else spec, shape, request)


def _plan_backward(request: Request, dqdr: bool, dkdv: bool) -> BackwardPlan | HostPlan:
    host = _host_plan(request)
    if host is not None:
        return host
    spec, shape = _problem(request)
    query_rows = Shape(shape.batch, shape.heads, shape.heads, shape.seqlen_q, shape.seqlen_q)
    preprocess = _plan(spec.for_op("preprocess"), query_rows, request)
    dkdv_plan = _plan(spec.for_op("dkdv"), shape, request) if dkdv else None
    dqdr_plan = _plan(spec.for_op("dqdr"), shape, request) if dqdr else None
    leaves_room = dkdv_plan is not None and dkdv_plan.programs_per_sm <= MAX_PROGRAMS_PER_SM_BESIDE
    return BackwardPlan(preprocess, dkdv_plan, dqdr_plan, forks=dqdr and leaves_room)


def _host_plan(request: Request) -> HostPlan | None:
    if request.cu_seqlens_q is not None and 0 in (
        request.cu_seqlens_q.shape[0] - 1,
        request.max_seqlen_q,
        request.max_seqlen_k,
    ):
        return HostPlan(is_empty=True)
    return host_plan(request.q, request.k)


def _plan(spec: KernelSpec, shape: Shape, request: Request) -> LaunchPlan:
    scale = scale_or_default(request.softmax_scale, spec.head_dim)
    scalars = launch_scalars(spec, scale, request.softcap, shape.window, shape.seqlen_q, shape.seqlen_kv)
    return plan_launch(spec, shape, scalars, request.q.device.index)


def _problem(request: Request) -> tuple[KernelSpec, Shape]:
    """The spec of the forward without statistics, and the shape."""
    q, k = request.q, request.k
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if request.cu_seqlens_q is None:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    else:
        batch, seqlen_q, seqlen_k = request.cu_seqlens_q.shape[0] - 1, request.max_seqlen_q, request.max_seqlen_k
    window = window_of(request.window_size, seqlen_k, batch_invariant=request.batch_invariant)
    spec = KernelSpec(
        "forward",
        q.shape[-1],
        dtype_name(q),
        group=heads // kv_heads,
        causal=request.causal,
        window=window > 0,
        varlen=bool(cu_seqlens_of(request)),
        softcap=request.softcap is not None,
        batch_invariant=request.batch_invariant,
    )
    return spec, Shape(batch, heads, kv_heads, seqlen_q, seqlen_k, window)


def _reference_forward(request: Request) -> Reference:
    oracle: Callable[..., Reference] = reference_varlen_forward if cu_seqlens_of(request) else reference_forward
    return oracle(*inputs_of(request), *cu_seqlens_of(request), **options_of(request))


def _reference_backward(do: Tensor, request: Request) -> Gradients:
    """Run the reference on another thread: it uses autograd, which torch disables inside an operator."""
    oracle: Callable[..., Gradients] = reference_varlen_backward if cu_seqlens_of(request) else reference_backward
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(oracle, *inputs_of(request), do, *cu_seqlens_of(request), **options_of(request)).result()


def _partial_backward(do: Tensor, request: Request, saved: SavedForBackward) -> Gradients:
    assert saved.v_mean is not None
    outputs = (saved.out, saved.lse, saved.t_mean, saved.v_mean)
    options = {name: value for name, value in options_of(request).items() if name != "window_size"}
    return partial_backward(*inputs_of(request), do, *outputs, **options)
