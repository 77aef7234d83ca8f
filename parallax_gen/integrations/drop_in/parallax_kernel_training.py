"""parallax-kernel's training functions and its reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.drop_in.calls import attend, with_supported_strides
from parallax_gen.integrations.drop_in.checks import (
    HEADS_FIRST,
    HEADS_LAST,
    ArgumentAssertionError,
    check_dims,
    check_half,
    check_sizes,
    parse_scale,
    parse_window,
)
from parallax_gen.oracle.reference import reference_forward
from parallax_gen.runtime.attention import SavedForBackward
from parallax_gen.runtime.autograd import backward_without_autograd, forward_without_autograd
from parallax_gen.runtime.invariance import is_batch_invariant
from parallax_gen.runtime.requests import Request
from parallax_gen.runtime.sharded import refuse_dtensors
from parallax_gen.runtime.transforms import refuse_transforms, transform_is_active

LOG2_E = math.log2(math.e)


def parallax_func(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, qk_scale: float | None = None, window_size_left: int = -1
) -> Tensor:
    """Causal Parallax attention over whole sequences, heads first, with gradients.

    q, r              (batch, heads, seqlen_q, head_dim), bf16 or fp16
    k, v              (batch, kv_heads, seqlen_kv, head_dim), of q's dtype; heads is a multiple of kv_heads. Query i is
                      at key i, also if seqlen_q and seqlen_kv differ
    qk_scale          scale of q·k; 1/√head_dim by default
    window_size_left  a query sees at most this many keys, its own and those right before it; negative for no limit.
                      With more queries than keys a window must cover every query

    Returns out, like q and contiguous; it is a copy, because our kernels write heads last. Raises TypeError for other
    dtypes, ValueError for sizes that do not match; both are ArgumentErrors.
    """
    check_half(q)
    check_sizes(q, r, k, v, HEADS_FIRST)
    scale, window = parse_scale("qk_scale", qk_scale, q.shape[-1]), parse_window("window_size_left", window_size_left)
    inputs = [x.transpose(1, 2) for x in (q, r, k, v)]
    outs = [
        attend(*piece.of(*inputs), scale=scale, window=window if piece.causal else None, causal=piece.causal)
        for piece in _causal_pieces(q.shape[2], k.shape[2], window)
    ]
    return _concatenated(outs, 1).transpose(1, 2).contiguous()


def parallax_varlen_func(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: float | None = None,
    window_size_left: int = -1,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal Parallax attention over packed sequences, or a batch of sequences, heads last, with gradients.

    q, r        (batch, seqlen, heads, head_dim), bf16 or fp16
    k, v        (batch, seqlen, kv_heads, head_dim), of q's dtype; heads is a multiple of kv_heads
    cu_seqlens  (sequences + 1,) int32 or int64 on the same device: sequence n has the rows cu_seqlens[n] to
                cu_seqlens[n + 1] - 1 of a batch of 1. The call waits for the longest length;
                `parallax_gen.parallax_attn_varlen_func`, which takes it as an argument, does not

    Other arguments are as in `parallax_func`. head_dim is anything up to 256; if it is not a multiple of 8, the inputs
    are copied. Returns out, like q and contiguous. Raises TypeError for other dtypes, ValueError for sizes that do not
    match; both are ArgumentErrors.
    """
    check_half(q)
    check_sizes(q, r, k, v, HEADS_LAST, same_length=True)
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ArgumentError("q", f"a batch of {q.shape[0]}", "a batch of 1, with cu_seqlens")
    scale, window = parse_scale("qk_scale", qk_scale, q.shape[-1]), parse_window("window_size_left", window_size_left)
    return attend(q, r, k, v, scale=scale, window=window, cu_seqlens=cu_seqlens)


def parallax_fwd(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: float | Tensor,
    n_rep: int = 1,
    window_size_left: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward of `parallax_func`, with the results that `parallax_bwd` needs. It records no gradients.

    q, r   (batch · heads, seqlen_q, head_dim)
    k, v   (batch · kv_heads, seqlen_kv, head_dim)
    n_rep  heads / kv_heads

    Returns (o, barv, d1, bart, m): o and barv, which is softmax attention, like q; d1, bart = Σ p t and m (batch ·
    heads, seqlen_q, 1) fp32. Σ_j 2^(log2(e) qk_scale q·k_j) is d1 · 2^m, as in parallax-kernel, whose
    names these are. But m is not the row's largest score: here m is log2 of the whole sum, and d1 is 1. Raises
    AssertionError if n_rep does not match, ValueError for other sizes; both are ArgumentErrors.
    """
    if transform_is_active():
        refuse_transforms("parallax_fwd", q=q, r=r, k=k, v=v)
    refuse_dtensors("parallax_fwd", q=q, r=r, k=k, v=v)
    _check_folded(q, r, k, v, n_rep)
    scale, window = parse_scale("qk_scale", qk_scale, q.shape[-1]), parse_window("window_size_left", window_size_left)
    pieces = _causal_pieces(q.shape[1], k.shape[1], window)
    with torch.no_grad():
        results = [forward_without_autograd(_request(piece, q, r, k, v, scale, n_rep, window)) for piece in pieces]
        out, lse, t_mean, v_mean = (
            _concatenated(parts, dim) for parts, dim in zip(zip(*results, strict=True), (1, 2, 2, 1), strict=True)
        )
        stats_shape = (*q.shape[:2], 1)
        m = (lse * LOG2_E).reshape(stats_shape)
        return _unfolded(out), _unfolded(v_mean), torch.ones_like(m), t_mean.reshape(stats_shape), m


def parallax_bwd(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    barv: Tensor,
    d1: Tensor,
    bart: Tensor,
    m: Tensor,
    grad_o: Tensor,
    qk_scale: float | Tensor,
    n_rep: int = 1,
    window_size_left: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, r, k and v in their shapes, always bf16.

    o to m  the results of `parallax_fwd`, ours or parallax-kernel's
    grad_o  the gradient of o, like o

    Other arguments are as in `parallax_fwd`. Raises AssertionError if n_rep does not match, ValueError for other sizes;
    both are ArgumentErrors.
    """
    if transform_is_active():
        refuse_transforms("parallax_bwd", q=q, r=r, k=k, v=v, o=o, barv=barv, bart=bart, m=m, grad_o=grad_o)
    refuse_dtensors("parallax_bwd", q=q, r=r, k=k, v=v, grad_o=grad_o)
    _check_folded(q, r, k, v, n_rep)
    stats_shape = (*q.shape[:2], 1)
    for name, x, shape in (
        *(("o", o, q.shape), ("barv", barv, q.shape), ("grad_o", grad_o, q.shape)),
        *(("d1", d1, stats_shape), ("bart", bart, stats_shape), ("m", m, stats_shape)),
    ):
        if tuple(x.shape) != tuple(shape):
            raise ArgumentError(name, f"shape {tuple(x.shape)}", f"{tuple(shape)}, to match q")
    scale, window = parse_scale("qk_scale", qk_scale, q.shape[-1]), parse_window("window_size_left", window_size_left)
    with torch.no_grad():
        lse = (m + d1.log2()) / LOG2_E
        out, v_mean, do = (_folded(x, n_rep) for x in (o, barv, grad_o))
        lse, t_mean = (x.reshape(k.shape[0], n_rep, q.shape[1]) for x in (lse, bart))
        grads = []
        for piece in _causal_pieces(q.shape[1], k.shape[1], window):
            saved = SavedForBackward(
                out[:, piece.rows].contiguous(),
                lse[..., piece.rows].contiguous(),
                t_mean[..., piece.rows].contiguous(),
                v_mean[:, piece.rows].contiguous(),
            )
            request = _request(piece, q, r, k, v, scale, n_rep, window)
            grads.append(backward_without_autograd(do[:, piece.rows], request, saved))
        dq, dr, dk, dv = zip(*grads, strict=True)
        query_grads = (_unfolded(_concatenated(parts, 1)) for parts in (dq, dr))
        key_grads = (_unfolded(_sum_padded(parts, k.shape[1])) for parts in (dk, dv))
        grad_q, grad_r, grad_k, grad_v = (x.bfloat16() for x in (*query_grads, *key_grads))
    return grad_q, grad_r, grad_k, grad_v


def parallax_reference(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: float,
    *,
    causal: bool = True,
    window_size_left: int = -1,
) -> Tensor:
    """Parallax attention from its definition, differentiable, on any device. In fp64 (in parallax-kernel: fp32).

    q, r              (batch, seqlen_q, heads, head_dim), heads last, of any dtype
    k, v              (batch, seqlen_kv, kv_heads, head_dim)
    causal            query i is at key seqlen_kv − seqlen_q + i: aligned to the end, unlike `parallax_func`
    window_size_left  as in `parallax_func`; only with causal

    Returns out, like q, in fp32; 0 for a query that sees no key, where parallax-kernel's has NaN. Raises ValueError, an
    ArgumentError.
    """
    check_sizes(q, r, k, v, HEADS_LAST)
    window = parse_window("window_size_left", window_size_left)
    if window is not None and not causal:
        raise ArgumentError("window_size_left", f"{window} without causal", "a negative number, or causal=True")
    return reference_forward(q, r, k, v, causal=causal, window_size=window, softmax_scale=float(qk_scale)).out.float()


class _Piece(NamedTuple):
    """Some queries and the keys that they see. causal: aligned to the last key, as in our kernels."""

    rows: slice
    keys: slice
    causal: bool

    def of(self, q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The piece of inputs (batch, seqlen, heads, head_dim)."""
        return q[:, self.rows], r[:, self.rows], k[:, self.keys], v[:, self.keys]


def _causal_pieces(seqlen_q: int, seqlen_kv: int, window: int | None) -> list[_Piece]:
    """Split attention with query i at key i into calls of our kernels. Surplus queries see all keys."""
    if seqlen_q <= seqlen_kv:
        return [_Piece(slice(seqlen_q), slice(seqlen_q), True)]
    if window is not None and window < seqlen_q:
        allowed = f"{seqlen_q} or more, or a negative number, with {seqlen_q} queries and {seqlen_kv} keys"
        raise ArgumentError("window_size_left", window, allowed)
    all_keys = slice(seqlen_kv)
    return [_Piece(all_keys, all_keys, True), _Piece(slice(seqlen_kv, seqlen_q), all_keys, False)]


def _check_folded(q: Tensor, r: Tensor, k: Tensor, v: Tensor, n_rep: int) -> None:
    """Check tensors whose batch is folded into their heads."""
    layout = ("heads", "seqlen", "head_dim")
    check_dims(q, r, k, v, layout)
    if n_rep < 1 or q.shape[0] % n_rep:
        raise ArgumentAssertionError("n_rep", n_rep, f"a divisor of {q.shape[0]}, q's batch * heads")
    if k.shape[0] != q.shape[0] // n_rep:
        allowed = f"{q.shape[0] // n_rep}, q's batch * heads over n_rep"
        raise ArgumentAssertionError("k", f"{k.shape[0]} for batch * kv_heads", allowed)
    check_sizes(q, r, k, v, layout)


def _request(
    piece: _Piece, q: Tensor, r: Tensor, k: Tensor, v: Tensor, scale: float, n_rep: int, window: int | None
) -> Request:
    groups = ((q, n_rep), (r, n_rep), (k, 1), (v, 1))
    inputs = piece.of(*(with_supported_strides(_folded(x, heads)) for x, heads in groups))
    window = window if piece.causal else None
    request = Request(*inputs, causal=piece.causal, window_size=window, softmax_scale=scale)
    return request._replace(batch_invariant=is_batch_invariant(None))


def _folded(x: Tensor, n_rep: int) -> Tensor:
    """(batch * heads, seqlen, head_dim) as (batch * kv_heads, seqlen, n_rep, head_dim): a view."""
    grouped: Tensor = x.unflatten(0, (x.shape[0] // n_rep, n_rep))
    return grouped.transpose(1, 2)


def _unfolded(x: Tensor) -> Tensor:
    """The inverse of `_folded`, contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _concatenated(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def _sum_padded(parts: Sequence[Tensor], seqlen: int) -> Tensor:
    """The sum of gradients of the same first keys, zero-padded to seqlen for keys that no query saw."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total if total.shape[1] == seqlen else pad(total, (0, 0, 0, 0, 0, seqlen - total.shape[1]))
