"""Attention over whole sequences as torch operators with gradients: what autograd and torch.compile see.

    parallax_gen::attention             only out, for calls that record no gradients
    parallax_gen::attention_with_stats  out, and lse, t_mean and v_mean for the backward
    parallax_gen::attention_backward    the requested gradients of the inputs

Their arguments are the fields of `Request` and a few of their own. Sizes may be symbolic: only kernels read cu_seqlens,
so a new length or packing makes no new graph.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from parallax_gen.errors import ArgumentError
from parallax_gen.oracle.partial import reference_tangent, reference_varlen_tangent
from parallax_gen.problem.work import MATMULS, SCORES, visible_pairs
from parallax_gen.runtime.attention import SavedForBackward, backward, forward, stats_shape
from parallax_gen.runtime.operators import NAMESPACE, operator_name
from parallax_gen.runtime.requests import (
    INPUTS,
    SCALARS,
    TENSORS,
    Request,
    cu_seqlens_of,
    gradients_of,
    inputs_of,
    options_of,
    scalar_fields,
    split_request,
    tensor_fields,
)
from parallax_gen.runtime.transforms import (
    any_functionalized,
    dispatch_mode_is_active,
    map_samples,
    primal,
    refuse_batched,
    refuse_tangents,
    transforms_backward,
)

_REQUEST = (
    "Tensor q, Tensor r, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, SymInt? window_size, float? softmax_scale, "
    "float? softcap, bool batch_invariant"
)


def attend(request: Request, *, recompute_v_mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, t_mean and v_mean; only out has gradients. `request` must have been checked."""
    if torch.compiler.is_compiling() or not are_plain_tensors(*inputs_of(request)):
        return _attention_with_stats(*request, recompute_v_mean)  # type: ignore[no-any-return]
    return _Attention.apply(*request, recompute_v_mean)  # type: ignore[no-any-return,no-untyped-call]


def attend_transformed(request: Request, *, stats: bool, recompute_v_mean: bool) -> tuple[Tensor, ...]:
    """`attend` under a torch.func transform or forward-mode AD. `request` must have been checked.

    stats  whether the caller wants lse, t_mean and v_mean, which have no tangents
    """
    if any_functionalized(*inputs_of(request)):
        return _attention_with_stats(*request, recompute_v_mean)  # type: ignore[no-any-return]
    return _TransformedAttention.apply(*request, recompute_v_mean, stats)  # type: ignore[no-any-return,no-untyped-call]


def attend_without_gradients(request: Request, *, stats: bool) -> tuple[Tensor, ...]:
    """out, and with stats lse, t_mean and v_mean, by operators that torch.compile can trace.

    `request` must have been checked.
    """
    return _attention_with_stats(*request, False) if stats else (_attention(*request),)


def forward_without_autograd(request: Request) -> tuple[Tensor, ...]:
    """out, lse, t_mean and v_mean, for functions with their own backward.

    Calls an operator if a dispatch mode is active.
    """
    if dispatch_mode_is_active():
        return _attention_with_stats(*request, False)  # type: ignore[no-any-return]
    return forward(request, packed=False, stats=True)


def backward_without_autograd(
    do: Tensor, request: Request, saved: SavedForBackward, *, keys_are_partial: bool = False
) -> tuple[Tensor, ...]:
    """All gradients. Calls an operator if a dispatch mode is active.

    keys_are_partial: see `attention.backward`.
    """
    if dispatch_mode_is_active():
        forward_results = saved.out, saved.lse, saved.t_mean, saved.v_mean
        return tuple(_attention_backward(*request, do, *forward_results, True, True, keys_are_partial))
    return backward(do, request, saved, dqdr=True, dkdv=True, keys_are_partial=keys_are_partial)


def are_plain_tensors(*inputs: Tensor) -> bool:
    """Whether all are ordinary tensors. Subclasses, such as fake tensors, are accepted only by operators."""
    return _PLAIN_TYPES.issuperset(map(type, inputs))


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def _run(*request: Any) -> Tensor:
    request = Request(*request)
    refuse_tangents()
    return forward(request, packed=bool(cu_seqlens_of(request)))[0]


def _fake(*request: Any) -> Tensor:
    refuse_tangents()
    q = Request(*request).q
    return q.new_empty(q.shape)


_attention = torch.library.custom_op(
    operator_name("attention"), _run, mutates_args=(), schema=f"({_REQUEST}) -> Tensor"
)
_attention.register_fake(_fake)


def _run_with_stats(*arguments: Any) -> tuple[Tensor, ...]:
    request, _ = split_request(arguments)
    refuse_tangents()
    return forward(request, packed=bool(cu_seqlens_of(request)), stats=True)


def _fake_with_stats(*arguments: Any) -> tuple[Tensor, ...]:
    refuse_tangents()
    q = split_request(arguments)[0].q
    lse, t_mean = (q.new_empty(stats_shape(q), dtype=torch.float32) for _ in range(2))
    return q.new_empty(q.shape), lse, t_mean, q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    request, (recompute_v_mean,) = split_request(inputs)
    out, lse, t_mean, v_mean = output
    ctx.mark_non_differentiable(lse, t_mean, v_mean)
    ctx.set_materialize_grads(False)  # the statistics' gradients are unused, so torch need not make zeros for them
    ctx.save_for_backward(*tensor_fields(request), out, lse, t_mean, None if recompute_v_mean else v_mean)
    ctx.scalars = scalar_fields(request)


def _gradients(ctx: Any, do: Tensor | None, *_: None, operator: Any = None) -> tuple[Tensor | None, ...]:
    needs = dict(zip(INPUTS, ctx.needs_input_grad[: len(INPUTS)], strict=True))
    dqdr, dkdv = needs["q"] or needs["r"], needs["k"] or needs["v"]
    grads: dict[str, Tensor] = {}
    if do is not None:
        if operator is None:
            operator = _AttentionBackward.apply if transforms_backward(do) else _attention_backward
        saved, count = ctx.saved_tensors, len(TENSORS)
        results = operator(*saved[:count], *ctx.scalars, do, *saved[count:], dqdr, dkdv)
        grads = dict(zip(gradients_of(dqdr, dkdv), results, strict=True))
    return *map(grads.get, INPUTS), *[None] * (len(ctx.needs_input_grad) - len(INPUTS))


_attention_with_stats = torch.library.custom_op(
    operator_name("attention_with_stats"),
    _run_with_stats,
    mutates_args=(),
    schema=f"({_REQUEST}, bool recompute_v_mean) -> (Tensor, Tensor, Tensor, Tensor)",
)
_attention_with_stats.register_fake(_fake_with_stats)
_attention_with_stats.register_autograd(_gradients, setup_context=_save)


class _Attention(torch.autograd.Function):
    """`_attention_with_stats` for eager calls: the same gradients at a quarter of register_autograd's host time."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _attention_with_stats(*arguments)  # type: ignore[no-any-return]

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradients)  # type: ignore[assignment]


def _run_backward(*arguments: Any) -> list[Tensor]:
    request, (do, out, lse, t_mean, v_mean, dqdr, dkdv, *keys_are_partial) = split_request(arguments)
    saved = SavedForBackward(out, lse, t_mean, v_mean)
    refuse_tangents()
    # torch omits keys_are_partial if it has its default, False.
    return [*backward(do, request, saved, dqdr=dqdr, dkdv=dkdv, keys_are_partial=any(keys_are_partial))]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    refuse_tangents()
    request, (_do, _out, _lse, _t_mean, _v_mean, dqdr, dkdv, *_) = split_request(arguments)
    inputs = (getattr(request, name) for name in gradients_of(dqdr, dkdv))
    return [x.new_empty(x.shape) for x in inputs]


def _refuse_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise ArgumentError("create_graph", "a gradient of Parallax attention's gradients", "first derivatives only")


_attention_backward = torch.library.custom_op(
    operator_name("attention_backward"),
    _run_backward,
    mutates_args=(),
    schema=f"({_REQUEST}, Tensor do, Tensor out, Tensor lse, Tensor t_mean, Tensor? v_mean, bool dqdr, bool dkdv, "
    "bool keys_are_partial=False) -> Tensor[]",
)
_attention_backward.register_fake(_fake_backward)
_attention_backward.register_autograd(_refuse_second_derivative)


def refuse_second_derivatives(grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a backward's gradients so that differentiating them again (create_graph) raises ArgumentError.

    inputs  all tensors that the gradients depend on
    """
    if not torch.is_grad_enabled():
        return grads
    return _FirstDerivatives.apply(len(grads), *grads, *inputs)  # type: ignore[no-any-return,no-untyped-call]


class _FirstDerivatives(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:count]

    backward = staticmethod(_refuse_second_derivative)


def _vmap_samples(function: Any, info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> Any:
    """The vmap rule of a Function. torch.compile may trace it after a graph break and must then call the operators."""
    apply = function.forward if torch.compiler.is_compiling() else function.apply
    return map_samples(apply, info.batch_size, in_dims, arguments)


class _WithoutDerivatives(torch.autograd.Function):
    """A Function that computes a derivative. It cannot be differentiated again, so it saves nothing."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(_refuse_second_derivative)
    jvp = staticmethod(_refuse_second_derivative)


class _AttentionBackward(_WithoutDerivatives):
    """`_attention_backward` for torch.func transforms, which differentiate and batch Functions but not operators."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_attention_backward(*arguments))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _vmap_samples(_AttentionBackward, info, in_dims, arguments)


class _AttentionTangent(_WithoutDerivatives):
    """The tangent of out from the operator's arguments and the tangents of q, r, k and v, by the fp64 reference."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor]:
        request, tangents = split_request(arguments)
        oracle: Any = reference_varlen_tangent if cu_seqlens_of(request) else reference_tangent
        return (
            oracle(*inputs_of(request), tangents, *cu_seqlens_of(request), **options_of(request)).to(request.q.dtype),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _vmap_samples(_AttentionTangent, info, in_dims, arguments)


class _TransformedAttention(torch.autograd.Function):
    """`_Attention` for torch.func transforms and forward-mode AD, at a few times the host time."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _attention_with_stats(*arguments[:-1])  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *arguments, ctx.stats = inputs
        _save(ctx, tuple(arguments), output)
        ctx.save_for_forward(*tensor_fields(split_request(inputs)[0]))

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, do, operator=_AttentionBackward.apply)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        if ctx.stats:
            allowed = "False: statistics have no tangents"
            raise ArgumentError("return_stats", "True for an input with a tangent (forward-mode AD)", allowed)
        if dict(zip(SCALARS, ctx.scalars, strict=True))["batch_invariant"]:
            allowed = "False for an input with a tangent (forward-mode AD): tangents are computed in plain torch"
            raise ArgumentError("batch_invariant", True, allowed)
        input_tangents = tangents[: len(INPUTS)]
        for tangent in input_tangents:
            if tangent is not None:
                refuse_batched(tangent)
        arguments = (*map(primal, ctx.saved_tensors[: len(TENSORS)]), *ctx.scalars, *input_tangents)
        return *_AttentionTangent.apply(*arguments), None, None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _vmap_samples(_TransformedAttention, info, in_dims, arguments)


# -- FLOPs for torch.utils.flop_counter.FlopCounterMode, counted as in `problem.work.work_of`: 2 FLOP for each
# multiply-add of the matmuls, over the (query, key) pairs that are visible. Causal attention over a square has half of
# them.


def forward_flops(*arguments: Any, out_val: Any = None) -> int:
    """4 matmuls: 8 · batch · heads · seqlen_q · seqlen_kv · head_dim where every query sees every key."""
    return _flops(MATMULS["forward"], split_request(arguments)[0])


def backward_flops(*arguments: Any, out_val: Any = None) -> int:
    """8 matmuls for all gradients, 5 for q's and r's, 6 for k's and v's; plus the forward's if v̄ is recomputed.

    Two kernels for all gradients compute the scores twice; the second time is not counted.
    """
    request, (_do, _out, _lse, _t_mean, v_mean, dqdr, dkdv, *_) = split_request(arguments)
    matmuls = MATMULS["dqdr"] * dqdr + MATMULS["dkdv"] * dkdv - SCORES["dqdr"] * (dqdr and dkdv)
    return _flops(matmuls + MATMULS["forward"] * (v_mean is None), request)


def _flops(matmuls: int, request: Request) -> int:
    heads, head_dim = request.q.shape[-2:]
    return int(2 * matmuls * heads * head_dim * _pairs(request))


def _pairs(request: Request) -> float:
    """Visible (query, key) pairs of one head over all sequences.

    Packed sequences: reads cu_seqlens, which waits for the device. A fake tensor holds no values; then every sequence
    counts as the longest.
    """
    window = 0 if request.window_size is None else request.window_size
    if request.cu_seqlens_q is None or request.cu_seqlens_k is None:
        return request.q.shape[0] * visible_pairs(request.q.shape[1], request.k.shape[1], request.causal, window)
    queries = _lengths(request.cu_seqlens_q, request.max_seqlen_q)
    keys = _lengths(request.cu_seqlens_k, request.max_seqlen_k)
    return sum(visible_pairs(*lengths, request.causal, window) for lengths in zip(queries, keys, strict=True))


def _lengths(starts: Tensor, longest: int) -> list[int]:
    if type(starts) is not Tensor:
        return [longest] * (starts.shape[0] - 1)
    lengths: list[int] = starts.diff().clamp(min=0).tolist()
    return lengths


_OPS = getattr(torch.ops, NAMESPACE)
register_flop_formula([_OPS.attention, _OPS.attention_with_stats], get_raw=True)(forward_flops)
register_flop_formula(_OPS.attention_backward, get_raw=True)(backward_flops)
