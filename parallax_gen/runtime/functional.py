"""The public functions for whole sequences, dense or packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.attention import forward
from parallax_gen.runtime.autograd import attend, attend_under_transforms, attend_without_gradients, plain
from parallax_gen.runtime.checks import check_flag, check_request
from parallax_gen.runtime.requests import INPUTS, Request, cast_inputs, inputs_of, tensors_of
from parallax_gen.runtime.sharded import DENSE, OF_ALL, PACKED, is_sharded, over_shards
from parallax_gen.runtime.transforms import (
    breaks_graph,
    nothing_intervenes,
    records_gradients,
    transformed,
    under_a_mode,
    under_a_transform,
    without_odd_strides,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

Stats = tuple[Tensor, Tensor, Tensor, Tensor]


class Options(TypedDict, total=False):
    """What the functions take by name, beside the flag that says what they return."""

    causal: bool
    window_size: int | None
    softmax_scale: float | None
    out: Tensor | None
    recompute_v_mean: bool


@overload
def parallax_attn_func(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, return_stats: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...


@overload
def parallax_attn_func(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, return_stats: Literal[True], **options: Unpack[Options]
) -> Stats: ...


@overload
def parallax_attn_func(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, return_stats: bool, **options: Unpack[Options]
) -> Tensor | Stats: ...


def parallax_attn_func(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    out: Tensor | None = None,
    return_stats: bool = False,
    recompute_v_mean: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Parallax attention: o_i = Σ_j p_ij (1 + t̄_i − t_ij) v_j, with p = softmax(scale·q·k), t = r·k, t̄ = Σ p t.

    (Parallax: Parameterized Local Linear Attention for Language Modeling, arXiv 2605.29157, algorithm 1. r = 0 is
    softmax attention.)

    q, r              (batch, seqlen_q, heads, head_dim), bf16, fp16 or fp32; head_dim a multiple of 8 up to 256
    k, v              (batch, seqlen_kv, kv_heads, head_dim); heads is a multiple of kv_heads, and query head h
                      attends with kv head h // (heads / kv_heads)
    causal            query i sees keys up to its position, seqlen_kv − seqlen_q + i (aligned to the end); a query
                      that sees none gives 0
    window_size       with causal: a query sees this many keys at the most, its position's and those right before
    softmax_scale     of q·k, greater than 0; 1/√head_dim by default. r·k is not scaled
    out               where to write, like q; made if not given. Not where gradients are recorded
    return_stats      also return lse = log Σ exp(scale·q·k) and t̄, (batch, heads, seqlen_q) fp32, and v̄ = Σ p v,
                      like q. They have no gradients
    recompute_v_mean  keep less for the backward, which then runs the forward once more

    Any strides do that keep the last dimension contiguous. On CUDA tensors this launches one kernel, or one and
    another that seldom has anything to do, on the current stream and waits for nothing; on CPU tensors it runs the
    fp64 reference. fp32 matmuls round to TF32 where torch's own may (torch.backends.cuda.matmul.fp32_precision,
    torch.set_float32_matmul_precision). Under torch.autocast q, r, k and v are cast to its dtype, or to that of `out`.
    Under torch.compile this is one operator.

    DTensors, all four of them on one mesh, are attended by each rank for its own sequences or kv heads (where those
    can be divided evenly), and nothing is sent where they are sharded alike; else they are redistributed first.

    Gradients: first derivatives of out, with respect to q, r, k and v, the same in every run. Kept for them, besides
    the inputs and out, are 8 bytes a query and head (lse and t̄), and v̄, as large as out: for bf16 and head_dim 128
    that is 264 bytes a query and head, and 8 with recompute_v_mean. The backward takes another 16 while it runs, of
    each sequence's queries rounded up to a multiple of 128. Without gradients recorded nothing is kept.

    torch.func: grad, vjp, jacrev, functional_call, vmap (of samples: one larger batch) and vmap of grad, for per-sample
    gradients. Forward-mode AD (dual numbers, jvp, jacfwd, linearize) is right and slow: a tangent of out is found in
    plain torch, in fp64, on the inputs' device; statistics have none, and return_stats is refused beside one. Second
    derivatives, of whichever modes, raise ArgumentError. In torch.compile's graphs vmap is traced, around other
    transforms they break, and dual numbers are refused. torch.utils.flop_counter counts 8 · head_dim FLOP for each
    query, head and visible key, and in the backward twice as much for all gradients.

    Raises ArgumentError, naming the argument.
    """
    asked = Request(q, r, k, v, None, None, 0, 0, causal, window_size, softmax_scale)
    return _attend(asked, False, out, return_stats, recompute_v_mean)


@overload
def parallax_attn_varlen_func(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def parallax_attn_varlen_func(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_stats: Literal[True],
    **options: Unpack[Options],
) -> Stats: ...


@overload
def parallax_attn_varlen_func(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_stats: bool,
    **options: Unpack[Options],
) -> Tensor | Stats: ...


def parallax_attn_varlen_func(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    out: Tensor | None = None,
    return_stats: bool = False,
    recompute_v_mean: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`parallax_attn_func` of sequences of different lengths, packed one after the other.

    q, r          (total_q, heads, head_dim)
    k, v          (total_k, kv_heads, head_dim)
    cu_seqlens_q  (batch + 1,) int32, on the same device, from 0 to total_q, none less than the one before: sequence b
                  has the rows cu_seqlens_q[b] up to cu_seqlens_q[b + 1] of q and r. A sequence may be empty, and there
                  may be none. Rows that no sequence has, before the first or behind the last, are not read: out and
                  all gradients are 0 there, lse is -inf, and t̄ and v̄ are 0
    cu_seqlens_k  likewise of k and v, whose gradients are 0 in rows that no sequence has
    max_seqlen_q  at least the longest sequence's queries, and not much more: programs are launched for them
    max_seqlen_k  likewise of keys

    The rest, gradients and autocast, as of parallax_attn_func; lse and t̄ are (heads, total_q). On CUDA tensors the
    lengths are read by the kernels alone: nothing waits for them, and a new packing compiles nothing. But vmap attends
    its samples one after the other, and forward-mode AD and a count of FLOPs read cu_seqlens, which waits for the
    device; where these are a compiler's stand-ins, each sequence counts as the longest.
    """
    asked = Request(
        q, r, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size, softmax_scale
    )
    return _attend(asked, True, out, return_stats, recompute_v_mean)


def _attend(
    asked: Request, packed: bool, out: Tensor | None, return_stats: bool, recompute_v_mean: bool
) -> Tensor | tuple[Tensor, ...]:
    check_flag("return_stats", return_stats)
    check_flag("recompute_v_mean", recompute_v_mean)
    if nothing_intervenes() and plain(*inputs_of(asked)):
        found = _attend_eagerly(asked, packed, out, return_stats, recompute_v_mean)
    else:
        found = _attend_where_seen(asked, packed, out, return_stats, recompute_v_mean)
    return found if return_stats else found[0]


def _attend_eagerly(
    asked: Request, packed: bool, out: Tensor | None, return_stats: bool, recompute_v_mean: bool
) -> tuple[Tensor, ...]:
    if records_gradients(*inputs_of(asked)):
        check_request(asked, packed, out)
        return _attend_with_gradients(asked, out, recompute_v_mean)
    return forward(asked, packed=packed, out=out, stats=return_stats)


def _attend_where_seen(
    asked: Request, packed: bool, out: Tensor | None, return_stats: bool, recompute_v_mean: bool
) -> tuple[Tensor, ...]:
    """`_attend` where a tracer, mode, transform or tensor subclass is to see what is done, or autocast casts."""
    found: tuple[Tensor, ...]
    asked = cast_inputs(asked, out)
    inputs = inputs_of(asked)
    compiling = torch.compiler.is_compiling()
    if compiling and breaks_graph(asked.q):
        torch._dynamo.graph_break(msg="transforms of torch.func other than vmap see Parallax attention in eager calls")
    if (
        not compiling
        and under_a_transform()
        and (transformed(*tensors_of(asked)) or under_a_mode() or records_gradients(*inputs))
        and not is_sharded(*inputs)  # what each rank has of these comes here by itself
    ):
        asked = without_odd_strides(asked)
        check_request(asked, packed)
        if out is not None:
            raise ArgumentError("out", "a tensor, under a transform of torch.func or beside tangents", "None")
        found = attend_under_transforms(asked, stats=return_stats, recompute_v_mean=recompute_v_mean)
    elif compiling or under_a_mode() or not plain(*inputs):
        check_request(asked, packed, out)
        if is_sharded(*inputs):
            found = _attend_shards(asked, packed, out, return_stats, recompute_v_mean)
        elif records_gradients(*inputs):
            found = _attend_with_gradients(asked, out, recompute_v_mean)
        else:
            found = attend_without_gradients(asked, stats=return_stats)
            found = found if out is None else (out.copy_(found[0]), *found[1:])
    else:
        found = _attend_eagerly(asked, packed, out, return_stats, recompute_v_mean)
    return found


def _attend_with_gradients(asked: Request, out: Tensor | None, recompute_v_mean: bool) -> tuple[Tensor, ...]:
    if out is not None:
        raise ArgumentError("out", "a tensor, where gradients are recorded", "None, or no_grad")
    return attend(asked, recompute_v_mean=recompute_v_mean)


def _attend_shards(
    asked: Request, packed: bool, out: Tensor | None, return_stats: bool, recompute_v_mean: bool
) -> tuple[Tensor, ...]:
    """`_attend` of DTensors."""
    if out is not None and records_gradients(*inputs_of(asked)):
        raise ArgumentError("out", "a tensor, where gradients are recorded", "None, or no_grad")

    def attend(*local: Any) -> tuple[Tensor, ...]:
        found = _attend(Request(*local), packed, None, return_stats, recompute_v_mean)
        return found if isinstance(found, tuple) else (found,)

    dims = dict.fromkeys(INPUTS, PACKED if packed else DENSE)
    dims |= {"cu_seqlens_q": OF_ALL, "cu_seqlens_k": OF_ALL}
    found = over_shards(attend, asked, dims)
    return found if out is None else (out.copy_(found[0]), *found[1:])
