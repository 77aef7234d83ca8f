"""The public functions for whole sequences, dense or packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.attention import forward
from parallax_gen.runtime.autograd import are_plain_tensors, attend, attend_transformed, attend_without_gradients
from parallax_gen.runtime.checks import check_flag, check_request
from parallax_gen.runtime.invariance import is_batch_invariant
from parallax_gen.runtime.requests import INPUTS, Request, cast_inputs, inputs_of, tensor_fields
from parallax_gen.runtime.sharded import DENSE, PACKED, REPLICATED, is_sharded, run_on_shards
from parallax_gen.runtime.transforms import (
    any_transformed,
    dispatch_mode_is_active,
    is_plain_eager_call,
    must_break_graph,
    records_gradients,
    transform_is_active,
    with_supported_strides,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

Stats = tuple[Tensor, Tensor, Tensor, Tensor]


class Options(TypedDict, total=False):
    """The keyword arguments of the public functions, except return_stats."""

    causal: bool
    window_size: int | None
    softmax_scale: float | None
    softcap: float | None
    batch_invariant: bool | None
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
    softcap: float | None = None,
    batch_invariant: bool | None = None,
    out: Tensor | None = None,
    return_stats: bool = False,
    recompute_v_mean: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Parallax attention: o_i = Σ_j p_ij (1 + t̄_i − t_ij) v_j, with p = softmax(s), s = scale·q·k, t = r·k, t̄ = Σ p t.

    (Parallax: Parameterized Local Linear Attention for Language Modeling, arXiv 2605.29157, algorithm 1. r = 0 is
    softmax attention.)

    q, r              (batch, seqlen_q, heads, head_dim), bf16, fp16 or fp32; head_dim a multiple of 8 up to 256
    k, v              (batch, seqlen_kv, kv_heads, head_dim); heads is a multiple of kv_heads, and query head h
                      attends with kv head h // (heads / kv_heads)
    causal            query i sees keys up to its position, seqlen_kv − seqlen_q + i (aligned to the end); a query that
                      sees no key gives 0
    window_size       with causal: a query sees at most this many keys, its own and those right before it
    softmax_scale     scale of q·k, from 1e-18 to 1e18; 1/√head_dim by default. r·k is not scaled
    softcap           c, from 1e-18 to 1e18: scores s become c·tanh(s/c), as in Gemma 2; None for no cap
    batch_invariant   the bits of a sequence's results do not depend on the batch around it: docs/batch_invariance.md.
                      None for the process's mode, `parallax_gen.batch_invariant`, which is off by default
    out               where to write, like q; allocated if not given. Not allowed if gradients are recorded
    return_stats      also return lse = log Σ exp(s) (capped s) and t̄, (batch, heads, seqlen_q) fp32, and v̄ = Σ p v,
                      like q. They have no gradients
    recompute_v_mean  save less for the backward, which then runs the forward once more

    Any strides with a contiguous last dimension are supported. On CUDA tensors the forward launches one kernel (some
    configs add a fixup kernel, which rarely has work) and the backward three, on the current stream, and neither
    synchronises; on CPU tensors the fp64 reference runs. fp32 matmuls round to TF32 if torch's own may
    (torch.backends.cuda.matmul.fp32_precision, torch.set_float32_matmul_precision). Under torch.autocast q, r, k and v
    are cast to its dtype, or to that of `out`. Under torch.compile this is one operator.

    With DTensors, all four on one mesh, each rank computes its own sequences or kv heads (if those divide evenly).
    Nothing is sent if all are sharded alike; otherwise they are redistributed first.

    Gradients: first derivatives of out with respect to q, r, k and v, bitwise the same in every run. Besides the inputs
    and out, the forward saves 8 bytes per query and head (lse and t̄), and v̄, which is as large as out: for bf16 and
    head_dim 128 that is 264 bytes per query and head, and 8 with recompute_v_mean. The backward allocates another 16
    while it runs, with each sequence's queries rounded up to a multiple of 128. Nothing is saved if no gradients are
    recorded.

    torch.func: grad, vjp, jacrev, functional_call, vmap (samples become one larger batch) and vmap of grad, for
    per-sample gradients. Forward-mode AD (dual numbers, jvp, jacfwd, linearize) is correct but slow: the tangent of
    out is computed in plain torch, in fp64, on the inputs' device; statistics have no tangents, so return_stats is
    refused for inputs with a tangent. Second derivatives in any combination of modes raise ArgumentError.
    torch.compile traces vmap, breaks the graph at other transforms, and refuses dual numbers.
    torch.utils.flop_counter counts 8 · head_dim FLOP for each query, head and visible key, and twice that in the
    backward for all gradients.

    Raises ArgumentError, naming the argument. Warns once per process if the tensors are likely (batch, heads, seqlen,
    head_dim), the layout of scaled_dot_product_attention: if dimension 2 is the same in q and k and over 128, more than
    models have heads, while dimension 1 is at most 128 in q, and a multiple of k's. Then pass q.transpose(1, 2), and
    the others likewise.
    """
    request = Request(
        q, r, k, v, None, None, 0, 0,
        causal, window_size, softmax_scale, softcap, is_batch_invariant(batch_invariant),
    )  # fmt: skip
    return _attend(request, False, out, return_stats, recompute_v_mean)


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
    softcap: float | None = None,
    batch_invariant: bool | None = None,
    out: Tensor | None = None,
    return_stats: bool = False,
    recompute_v_mean: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`parallax_attn_func` for sequences of different lengths, packed one after the other.

    q, r          (total_q, heads, head_dim)
    k, v          (total_k, kv_heads, head_dim)
    cu_seqlens_q  (batch + 1,) int32, on the same device, from 0 to total_q, non-decreasing: sequence b has the rows
                  cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1 of q and r. A sequence may be empty, and the batch may be
                  0. Rows of no sequence, before the first or after the last, are not read: out, t̄, v̄ and all
                  gradients are 0 there, and lse is -inf
    cu_seqlens_k  the same for k and v; their gradients are 0 in rows of no sequence
    max_seqlen_q  at least the largest number of queries of a sequence, and not much more: it sizes the grid
    max_seqlen_k  the same for keys

    Everything else, including gradients and autocast, is as in parallax_attn_func; lse and t̄ are (heads, total_q).
    On CUDA tensors only the kernels read the lengths: nothing synchronises, and a new packing compiles nothing. But
    vmap runs its samples one after the other, and forward-mode AD and FLOP counting read cu_seqlens, which waits
    for the device. If cu_seqlens are fake tensors, each sequence counts as the longest.
    """
    request = Request(
        q, r, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        causal, window_size, softmax_scale, softcap, is_batch_invariant(batch_invariant),
    )  # fmt: skip
    return _attend(request, True, out, return_stats, recompute_v_mean)


def _attend(
    request: Request, packed: bool, out: Tensor | None, return_stats: bool, recompute_v_mean: bool
) -> Tensor | tuple[Tensor, ...]:
    check_flag("return_stats", return_stats)
    check_flag("recompute_v_mean", recompute_v_mean)
    if is_plain_eager_call() and are_plain_tensors(*inputs_of(request)):
        outputs = _attend_eagerly(request, packed, out, return_stats, recompute_v_mean)
    else:
        outputs = _attend_general(request, packed, out, return_stats, recompute_v_mean)
    return outputs if return_stats else outputs[0]


def _attend_eagerly(
    request: Request, packed: bool, out: Tensor | None, return_stats: bool, recompute_v_mean: bool
) -> tuple[Tensor, ...]:
    if records_gradients(*inputs_of(request)):
        check_request(request, packed, out)
        return _attend_with_gradients(request, out, recompute_v_mean)
    return forward(request, packed=packed, out=out, stats=return_stats)


def _attend_general(
    request: Request, packed: bool, out: Tensor | None, return_stats: bool, recompute_v_mean: bool
) -> tuple[Tensor, ...]:
    """`_attend` in general: also under a tracer, mode, transform or autocast, and with tensor subclasses."""
    outputs: tuple[Tensor, ...]
    request = cast_inputs(request, out)
    inputs = inputs_of(request)
    compiling = torch.compiler.is_compiling()
    if compiling and must_break_graph(request.q):
        torch._dynamo.graph_break(
            msg="torch.compile traces Parallax attention under vmap, but under no other transform of torch.func"
        )
    if (
        not compiling
        and transform_is_active()
        and (any_transformed(*tensor_fields(request)) or dispatch_mode_is_active() or records_gradients(*inputs))
        and not is_sharded(*inputs)  # each rank's local tensors reach this point in a call of their own
    ):
        request = with_supported_strides(request)
        check_request(request, packed)
        if out is not None:
            raise ArgumentError("out", "a tensor, under a transform of torch.func or with tangents", "None")
        outputs = attend_transformed(request, stats=return_stats, recompute_v_mean=recompute_v_mean)
    elif compiling or dispatch_mode_is_active() or not are_plain_tensors(*inputs):
        check_request(request, packed, out)
        if is_sharded(*inputs):
            outputs = _attend_shards(request, packed, out, return_stats, recompute_v_mean)
        elif records_gradients(*inputs):
            outputs = _attend_with_gradients(request, out, recompute_v_mean)
        else:
            outputs = attend_without_gradients(request, stats=return_stats)
            outputs = outputs if out is None else (out.copy_(outputs[0]), *outputs[1:])
    else:
        outputs = _attend_eagerly(request, packed, out, return_stats, recompute_v_mean)
    return outputs


def _attend_with_gradients(request: Request, out: Tensor | None, recompute_v_mean: bool) -> tuple[Tensor, ...]:
    if out is not None:
        raise ArgumentError("out", "a tensor, where gradients are recorded", "None, or no_grad")
    return attend(request, recompute_v_mean=recompute_v_mean)


def _attend_shards(
    request: Request, packed: bool, out: Tensor | None, return_stats: bool, recompute_v_mean: bool
) -> tuple[Tensor, ...]:
    """`_attend` of DTensors."""
    if out is not None and records_gradients(*inputs_of(request)):
        raise ArgumentError("out", "a tensor, where gradients are recorded", "None, or no_grad")

    def attend(*local: Any) -> tuple[Tensor, ...]:
        outputs = _attend(Request(*local), packed, None, return_stats, recompute_v_mean)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    dims = dict.fromkeys(INPUTS, PACKED if packed else DENSE)
    dims |= {"cu_seqlens_q": REPLICATED, "cu_seqlens_k": REPLICATED}
    outputs = run_on_shards(attend, request, dims)
    return outputs if out is None else (out.copy_(outputs[0]), *outputs[1:])
