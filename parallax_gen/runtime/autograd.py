"""Attention of whole sequences as torch operators, with their gradients: what autograd and torch.compile see.

    parallax_gen::attention             out alone, for calls that record no gradients
    parallax_gen::attention_with_stats  out, and what the backward needs: lse, t̄ and v̄
    parallax_gen::attention_backward    the gradients of the inputs, those that are wanted

Their arguments are `Request`'s, and one or two of their own. Sizes may be symbols: no operator looks at cu_seqlens
outside a kernel, and a new length or packing makes no new graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.attention import Saved, backward, forward, stats_shape
from parallax_gen.runtime.checks import Request, inputs_of, starts_of

_REQUEST = (
    "Tensor q, Tensor r, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, SymInt? window_size, float? softmax_scale"
)


def attend(asked: Request, *, recompute_v_mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, t̄ and v̄, of which out has gradients. asked: checked."""
    if torch.compiler.is_compiling() or not plain(*inputs_of(asked)):
        return _attention_with_stats(*asked, recompute_v_mean)  # type: ignore[no-any-return]
    return _Attention.apply(*asked, recompute_v_mean)  # type: ignore[no-any-return,no-untyped-call]


def attend_without_gradients(asked: Request, *, stats: bool) -> tuple[Tensor, ...]:
    """out, and with stats lse, t̄ and v̄: by operators, which a compiler can trace. asked: checked."""
    return _attention_with_stats(*asked, False) if stats else (_attention(*asked),)


def plain(*inputs: Tensor) -> bool:
    """Whether these are tensors of memory, not stand-ins such as torch's fake tensors, which operators alone take."""
    return all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in inputs)


def _run(*asked: Any) -> Tensor:
    request = Request(*asked)
    return forward(request, packed=bool(starts_of(request)))[0]


def _fake(*asked: Any) -> Tensor:
    q = Request(*asked).q
    return q.new_empty(q.shape)


_attention = torch.library.custom_op("parallax_gen::attention", _run, mutates_args=(), schema=f"({_REQUEST}) -> Tensor")
_attention.register_fake(_fake)


def _run_with_stats(*given: Any) -> tuple[Tensor, ...]:
    request = Request(*given[:-1])
    return forward(request, packed=bool(starts_of(request)), stats=True)


def _fake_with_stats(*given: Any) -> tuple[Tensor, ...]:
    q = Request(*given[:-1]).q
    lse, t_mean = (q.new_empty(stats_shape(q), dtype=torch.float32) for _ in range(2))
    return q.new_empty(q.shape), lse, t_mean, q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *asked, recompute_v_mean = inputs
    out, lse, t_mean, v_mean = output
    ctx.mark_non_differentiable(lse, t_mean, v_mean)
    ctx.set_materialize_grads(False)  # nobody needs zeros for the statistics' gradients
    ctx.save_for_backward(*asked[:6], out, lse, t_mean, None if recompute_v_mean else v_mean)
    ctx.numbers = asked[6:]


def _gradients(ctx: Any, do: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    dqdr, dkdv = needs[0] or needs[1], needs[2] or needs[3]
    grads: list[Tensor | None] = [None] * len(needs)
    if do is not None:
        saved = ctx.saved_tensors
        found = _attention_backward(*saved[:6], *ctx.numbers, do, *saved[6:], dqdr, dkdv)
        for place in (0, 1) * dqdr + (2, 3) * dkdv:
            grads[place] = found[place if dqdr else place - 2]
    return tuple(grads)


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
    backward = staticmethod(_gradients)


def _run_backward(*given: Any) -> list[Tensor]:
    *asked, do, out, lse, t_mean, v_mean, dqdr, dkdv = given
    return [*backward(do, Request(*asked), Saved(out, lse, t_mean, v_mean), dqdr=dqdr, dkdv=dkdv)]


def _fake_backward(*given: Any) -> list[Tensor]:
    q, r, k, v, *_, dqdr, dkdv = given
    return [x.new_empty(x.shape) for x in (q, r) * dqdr + (k, v) * dkdv]


def _refuse(ctx: Any, *_: Any) -> None:
    raise ArgumentError("create_graph", "a gradient of Parallax attention's gradients", "first derivatives only")


_attention_backward = torch.library.custom_op(
    "parallax_gen::attention_backward",
    _run_backward,
    mutates_args=(),
    schema=f"({_REQUEST}, Tensor do, Tensor out, Tensor lse, Tensor t_mean, Tensor? v_mean, bool dqdr, bool dkdv)"
    " -> Tensor[]",
)
_attention_backward.register_fake(_fake_backward)
_attention_backward.register_autograd(_refuse)
