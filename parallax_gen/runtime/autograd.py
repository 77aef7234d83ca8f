"""Attention of whole sequences as torch operators, with their gradients: what autograd and torch.compile see.

    parallax_gen::attention             out alone, for calls that record no gradients
    parallax_gen::attention_with_stats  out, and what the backward needs: lse, t̄ and v̄
    parallax_gen::attention_backward    the gradients of the inputs, those that are wanted

Their arguments are `Request`'s, and one or two of their own. Sizes may be symbols: no operator looks at cu_seqlens
outside a kernel, and a new length or packing makes no new graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from parallax_gen.errors import ArgumentError
from parallax_gen.oracle.partial import reference_tangent, reference_varlen_tangent
from parallax_gen.problem.work import MATMULS, SCORES, visible_pairs
from parallax_gen.runtime.attention import Saved, backward, forward, stats_shape
from parallax_gen.runtime.requests import (
    INPUTS,
    TENSORS,
    Request,
    inputs_of,
    numbers_of,
    parted,
    starts_of,
    tensors_of,
    wanted,
)
from parallax_gen.runtime.transforms import (
    functionalized,
    over_samples,
    primal_of,
    refuse_batched,
    refuse_tangents,
    transforms_see,
    under_a_mode,
)

_REQUEST = (
    "Tensor q, Tensor r, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, SymInt? window_size, float? softmax_scale"
)


def attend(asked: Request, *, recompute_v_mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, t̄ and v̄, of which out has gradients. asked: checked."""
    if torch.compiler.is_compiling() or not plain(*inputs_of(asked)):
        return _attention_with_stats(*asked, recompute_v_mean)  # type: ignore[no-any-return]
    return _Attention.apply(*asked, recompute_v_mean)  # type: ignore[no-any-return,no-untyped-call]


def attend_under_transforms(asked: Request, *, stats: bool, recompute_v_mean: bool) -> tuple[Tensor, ...]:
    """`attend` where a transform of torch.func or forward-mode AD is to see it. asked: checked.

    stats  whether the caller wants lse, t̄ and v̄, which have no tangents
    """
    if functionalized(*inputs_of(asked)):
        return _attention_with_stats(*asked, recompute_v_mean)  # type: ignore[no-any-return]
    return _TransformedAttention.apply(*asked, recompute_v_mean, stats)  # type: ignore[no-any-return,no-untyped-call]


def attend_without_gradients(asked: Request, *, stats: bool) -> tuple[Tensor, ...]:
    """out, and with stats lse, t̄ and v̄: by operators, which a compiler can trace. asked: checked."""
    return _attention_with_stats(*asked, False) if stats else (_attention(*asked),)


def forward_of_part(asked: Request) -> tuple[Tensor, ...]:
    """out, lse, t̄ and v̄, for functions that have gradients of their own: by an operator where a mode is to see it."""
    if under_a_mode():
        return _attention_with_stats(*asked, False)  # type: ignore[no-any-return]
    return forward(asked, packed=False, stats=True)


def backward_of_part(do: Tensor, asked: Request, saved: Saved, *, some_keys: bool = False) -> tuple[Tensor, ...]:
    """All gradients, as `forward_of_part`; some_keys as of `attention.backward`."""
    if under_a_mode():
        kept = saved.out, saved.lse, saved.t_mean, saved.v_mean
        return tuple(_attention_backward(*asked, do, *kept, True, True, some_keys))
    return backward(do, asked, saved, dqdr=True, dkdv=True, some_keys=some_keys)


def plain(*inputs: Tensor) -> bool:
    """Whether these are tensors of memory, not stand-ins such as torch's fake tensors, which operators alone take."""
    return _PLAIN.issuperset(map(type, inputs))


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _run(*asked: Any) -> Tensor:
    request = Request(*asked)
    refuse_tangents()
    return forward(request, packed=bool(starts_of(request)))[0]


def _fake(*asked: Any) -> Tensor:
    refuse_tangents()
    q = Request(*asked).q
    return q.new_empty(q.shape)


_attention = torch.library.custom_op("parallax_gen::attention", _run, mutates_args=(), schema=f"({_REQUEST}) -> Tensor")
_attention.register_fake(_fake)


def _run_with_stats(*given: Any) -> tuple[Tensor, ...]:
    request, _ = parted(given)
    refuse_tangents()
    return forward(request, packed=bool(starts_of(request)), stats=True)


def _fake_with_stats(*given: Any) -> tuple[Tensor, ...]:
    refuse_tangents()
    q = parted(given)[0].q
    lse, t_mean = (q.new_empty(stats_shape(q), dtype=torch.float32) for _ in range(2))
    return q.new_empty(q.shape), lse, t_mean, q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    asked, (recompute_v_mean,) = parted(inputs)
    out, lse, t_mean, v_mean = output
    ctx.mark_non_differentiable(lse, t_mean, v_mean)
    ctx.set_materialize_grads(False)  # nobody needs zeros for the statistics' gradients
    ctx.save_for_backward(*tensors_of(asked), out, lse, t_mean, None if recompute_v_mean else v_mean)
    ctx.numbers = numbers_of(asked)


def _gradients(ctx: Any, do: Tensor | None, *_: None, operator: Any = None) -> tuple[Tensor | None, ...]:
    needs = dict(zip(INPUTS, ctx.needs_input_grad, strict=False))
    dqdr, dkdv = needs["q"] or needs["r"], needs["k"] or needs["v"]
    found: Sequence[Tensor] = ()
    if do is not None:
        if operator is None:
            operator = _AttentionBackward.apply if transforms_see(do) else _attention_backward
        saved, count = ctx.saved_tensors, len(TENSORS)
        found = operator(*saved[:count], *ctx.numbers, do, *saved[count:], dqdr, dkdv)
    grads = dict(zip(wanted(dqdr, dkdv), found, strict=bool(found)))
    return *map(grads.get, INPUTS), *[None] * (len(ctx.needs_input_grad) - len(INPUTS))


_attention_with_stats = torch.library.custom_op(
    "parallax_gen::attention_with_stats",
    _run_with_stats,
    mutates_args=(),
    schema=f"({_REQUEST}, bool recompute_v_mean) -> (Tensor, Tensor, Tensor, Tensor)",
)
_attention_with_stats.register_fake(_fake_with_stats)
_attention_with_stats.register_autograd(_gradients, setup_context=_save)


class _Attention(torch.autograd.Function):
    """The same gradients, for eager calls: they cost the host a quarter of what those of register_autograd do."""

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, ...]:
        return _attention_with_stats(*given)  # type: ignore[no-any-return]

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradients)  # type: ignore[assignment]


def _run_backward(*given: Any) -> list[Tensor]:
    asked, (do, out, lse, t_mean, v_mean, dqdr, dkdv, *some_keys) = parted(given)
    saved = Saved(out, lse, t_mean, v_mean)
    refuse_tangents()
    # torch leaves some_keys out where it is False.
    return [*backward(do, asked, saved, dqdr=dqdr, dkdv=dkdv, some_keys=any(some_keys))]


def _fake_backward(*given: Any) -> list[Tensor]:
    refuse_tangents()
    asked, (_do, _out, _lse, _t_mean, _v_mean, dqdr, dkdv, *_) = parted(given)
    inputs = (getattr(asked, name) for name in wanted(dqdr, dkdv))
    return [x.new_empty(x.shape) for x in inputs]


def _refuse(ctx: Any, *_: Any) -> NoReturn:
    raise ArgumentError("create_graph", "a gradient of Parallax attention's gradients", "first derivatives only")


_attention_backward = torch.library.custom_op(
    "parallax_gen::attention_backward",
    _run_backward,
    mutates_args=(),
    schema=f"({_REQUEST}, Tensor do, Tensor out, Tensor lse, Tensor t_mean, Tensor? v_mean, bool dqdr, bool dkdv, "
    "bool some_keys=False) -> Tensor[]",
)
_attention_backward.register_fake(_fake_backward)
_attention_backward.register_autograd(_refuse)


def first_derivatives(grads: tuple[Tensor, ...], of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A backward's results, which refuse to be differentiated where they are recorded (create_graph).

    of  all that they depend on
    """
    if not torch.is_grad_enabled():
        return grads
    return _FirstDerivatives.apply(len(grads), *grads, *of)  # type: ignore[no-any-return,no-untyped-call]


class _FirstDerivatives(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:count]

    backward = staticmethod(_refuse)


def _over_samples(function: Any, info: Any, in_dims: tuple[int | None, ...], given: tuple[Any, ...]) -> Any:
    """A function's vmap rule. Where torch.compile traces it by itself, after a graph break, it takes the operators."""
    apply = function.forward if torch.compiler.is_compiling() else function.apply
    return over_samples(apply, info.batch_size, in_dims, given)


class _WithoutDerivatives(torch.autograd.Function):
    """A derivative, which has none of its own: nothing is kept for one that is refused."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(_refuse)
    jvp = staticmethod(_refuse)


class _AttentionBackward(_WithoutDerivatives):
    """`_attention_backward` for transforms of torch.func, which differentiate and batch Functions, not operators."""

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, ...]:
        return tuple(_attention_backward(*given))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> Any:
        return _over_samples(_AttentionBackward, info, in_dims, given)


class _AttentionTangent(_WithoutDerivatives):
    """The tangent of out, from an operator's arguments and the tangents of q, r, k and v: by the fp64 formula."""

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor]:
        asked, tangents = parted(given)
        options = {"causal": asked.causal, "window_size": asked.window_size, "softmax_scale": asked.softmax_scale}
        oracle: Any = reference_varlen_tangent if starts_of(asked) else reference_tangent
        return (oracle(*inputs_of(asked), tangents, *starts_of(asked), **options).to(asked.q.dtype),)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> Any:
        return _over_samples(_AttentionTangent, info, in_dims, given)


class _TransformedAttention(torch.autograd.Function):
    """`_Attention` for transforms of torch.func and for forward-mode AD, at a few times the host's time."""

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, ...]:
        return _attention_with_stats(*given[:-1])  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *given, ctx.stats = inputs
        _save(ctx, tuple(given), output)
        ctx.save_for_forward(*tensors_of(parted(inputs)[0]))

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, do, operator=_AttentionBackward.apply)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        if ctx.stats:
            allowed = "False: statistics have no tangents"
            raise ArgumentError("return_stats", "True, beside a tangent (forward-mode AD)", allowed)
        of_inputs = tangents[: len(INPUTS)]
        for tangent in of_inputs:
            if tangent is not None:
                refuse_batched(tangent)
        given = (*map(primal_of, ctx.saved_tensors[: len(TENSORS)]), *ctx.numbers, *of_inputs)
        return *_AttentionTangent.apply(*given), None, None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> Any:
        return _over_samples(_TransformedAttention, info, in_dims, given)


# -- What torch.utils.flop_counter.FlopCounterMode counts for the operators, as `problem.work.work_of` does: 2 FLOP for
# each multiply and add of the matmuls, over the pairs of a query and a key that it sees. A causal square is half a one.


def forward_flops(*given: Any, out_val: Any = None) -> int:
    """4 matmuls: 8 · batch · heads · seqlen_q · seqlen_kv · head_dim where every query sees every key."""
    return _flops(MATMULS["forward"], parted(given)[0])


def backward_flops(*given: Any, out_val: Any = None) -> int:
    """8 matmuls for all gradients, 5 for those of q and r, 6 for those of k and v; and v̄'s, where it is found anew.

    Two kernels that make all of them find the scores twice; that is not counted.
    """
    asked, (_do, _out, _lse, _t_mean, v_mean, dqdr, dkdv, *_) = parted(given)
    matmuls = MATMULS["dqdr"] * dqdr + MATMULS["dkdv"] * dkdv - SCORES["dqdr"] * (dqdr and dkdv)
    return _flops(matmuls + MATMULS["forward"] * (v_mean is None), asked)


def _flops(matmuls: int, asked: Request) -> int:
    heads, head_dim = asked.q.shape[-2:]
    return int(2 * matmuls * heads * head_dim * _pairs(asked))


def _pairs(asked: Request) -> float:
    """(query, key) pairs that are seen, of one head of all sequences.

    Of packed ones cu_seqlens are read, which waits for the device; a stand-in for them holds no numbers, and then each
    sequence counts as the longest one.
    """
    window = 0 if asked.window_size is None else asked.window_size
    if asked.cu_seqlens_q is None or asked.cu_seqlens_k is None:
        return asked.q.shape[0] * visible_pairs(asked.q.shape[1], asked.k.shape[1], asked.causal, window)
    rows = _lengths(asked.cu_seqlens_q, asked.max_seqlen_q)
    keys = _lengths(asked.cu_seqlens_k, asked.max_seqlen_k)
    return sum(visible_pairs(*lengths, asked.causal, window) for lengths in zip(rows, keys, strict=True))


def _lengths(starts: Tensor, longest: int) -> list[int]:
    if type(starts) is not Tensor:
        return [longest] * (starts.shape[0] - 1)
    lengths: list[int] = starts.diff().clamp(min=0).tolist()
    return lengths


_OPS = torch.ops.parallax_gen
register_flop_formula([_OPS.attention, _OPS.attention_with_stats], get_raw=True)(forward_flops)
register_flop_formula(_OPS.attention_backward, get_raw=True)(backward_flops)
