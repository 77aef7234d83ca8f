"""The oracle: Parallax attention in float64, from its definition.

Independent of the kernels' methods: softmax over whole rows, materialised scores, no running state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.work import scale_or_default

# Scores in memory at the same time: the few arrays of this many float64 take 128 MiB each.
_SCORES_AT_ONCE = 1 << 24


class Reference(NamedTuple):
    """The result of `reference_forward`, in float64.

    out     (batch, seqlen_q, heads, head_dim), o
    lse     (batch, heads, seqlen_q), natural logarithm of the sum of exp(s) over visible keys, s the (capped) scores
    t_mean  (batch, heads, seqlen_q), t̄
    v_mean  (batch, seqlen_q, heads, head_dim), v̄, the output of softmax attention

    A row that sees no key has out, t_mean and v_mean 0, and lse -inf.
    """

    out: Tensor
    lse: Tensor
    t_mean: Tensor
    v_mean: Tensor


class Gradients(NamedTuple):
    """The result of `reference_backward`, in float64: each gradient has the shape of its tensor."""

    dq: Tensor
    dr: Tensor
    dk: Tensor
    dv: Tensor


def reference_forward(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    cache_seqlens: Tensor | Sequence[int] | None = None,
) -> Reference:
    """Parallax attention over whole sequences, on the device of the inputs; differentiable.

    q, r           (batch, seqlen_q, heads, head_dim)
    k, v           (batch, seqlen_kv, kv_heads, head_dim); query head h reads kv head h // (heads // kv_heads)
    causal         query i sees keys up to length - seqlen_q + i, where length is the length of its sequence
    window_size    with causal: a query sees only the last this many of its visible keys; None for no limit
    softmax_scale  of q·k; 1 / sqrt(head_dim) when None
    softcap        c, more than 0: a score s = softmax_scale q·k becomes c tanh(s / c); None for no cap
    cache_seqlens  (batch,), each sequence's length, 0 to seqlen_kv; keys beyond it do not exist and are not read
    """
    batch, seqlen_q, heads, head_dim = check_shapes(q, r, k, v)
    lengths = _check_lengths(cache_seqlens, batch, k.shape[1])
    result = _empty(q.new_zeros((batch, seqlen_q, heads, head_dim), dtype=torch.float64))
    scale = scale_or_default(softmax_scale, head_dim)
    for b, length in enumerate(lengths):
        for block in blocks(heads // k.shape[2], k.shape[2], seqlen_q, length, causal, window_size, softcap):
            out, lse, t_mean, v_mean = _attend(q[b], r[b], k[b], v[b], scale, block)
            result.out[b, block.rows, block.heads] = out
            result.v_mean[b, block.rows, block.heads] = v_mean
            result.t_mean[b, block.heads, block.rows] = t_mean
            result.lse[b, block.heads, block.rows] = lse
    return result


def reference_backward(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    *,
    causal: bool = False,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Gradients:
    """The gradients of q, r, k and v for the output's gradient `do`, by torch's autograd through the definition.

    Arguments and shapes as in `reference_forward`; do is like q. Computed block by block, with as much memory as the
    forward.
    """
    batch, seqlen_q, heads, head_dim = check_shapes(q, r, k, v)
    if do.shape != q.shape:
        raise ArgumentError("do", tuple(do.shape), f"{tuple(q.shape)}, the shape of q")
    result = Gradients(*(torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, r, k, v)))
    scale = scale_or_default(softmax_scale, head_dim)
    for b in range(batch):
        for block in blocks(heads // k.shape[2], k.shape[2], seqlen_q, k.shape[1], causal, window_size, softcap):
            rows, keys = (block.rows, block.heads), (slice(None), block.kv_heads)
            parts = (x[b][i].detach().double() for x, i in zip((q, r, k, v), (rows, rows, keys, keys), strict=True))
            with torch.enable_grad():
                leaves = [x.requires_grad_() for x in parts]
                out = _attend_rows(leaves[0], leaves[1], leaves[2], leaves[3], scale, block)[0]
                grads = torch.autograd.grad(out, leaves, do[b][rows].double())
            result.dq[b][rows], result.dr[b][rows] = grads[0], grads[1]
            result.dk[b][keys] += grads[2]
            result.dv[b][keys] += grads[3]
    return result


def reference_varlen_forward(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    *,
    causal: bool = False,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Reference:
    """`reference_forward` of packed sequences; differentiable.

    q, r          (total_q, heads, head_dim): the queries of all sequences, back to back
    k, v          (total_k, kv_heads, head_dim): the keys and values of all sequences, back to back
    cu_seqlens_q  (batch + 1,): sequence b has the rows cu_seqlens_q[b] up to cu_seqlens_q[b + 1]
    cu_seqlens_k  (batch + 1,): the same for the rows of k and v

    Returns out and v_mean like q, and lse and t_mean (heads, total_q).
    """
    packed = _empty(q.new_zeros((1, *q.shape), dtype=torch.float64))
    for rows, keys in sequences_of(cu_seqlens_q, cu_seqlens_k):
        tensors = (x[None] for x in (q[rows], r[rows], k[keys], v[keys]))
        parts = reference_forward(
            *tensors, causal=causal, window_size=window_size, softmax_scale=softmax_scale, softcap=softcap
        )
        for tensor, part in zip(packed, parts, strict=True):
            if tensor.dim() == 4:
                tensor[:, rows] = part
            else:
                tensor[..., rows] = part
    return Reference(*(x[0] for x in packed))


def reference_varlen_backward(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    *,
    causal: bool = False,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Gradients:
    """`reference_backward` of packed sequences: shapes as in `reference_varlen_forward`, do like q."""
    result = Gradients(*(torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, r, k, v)))
    for rows, keys in sequences_of(cu_seqlens_q, cu_seqlens_k):
        tensors = (x[None] for x in (q[rows], r[rows], k[keys], v[keys], do[rows]))
        parts = reference_backward(
            *tensors, causal=causal, window_size=window_size, softmax_scale=softmax_scale, softcap=softcap
        )
        result.dq[rows], result.dr[rows], result.dk[keys], result.dv[keys] = (x[0] for x in parts)
    return result


class Block(NamedTuple):
    """Some query rows of the heads of one or more kv heads, and the keys of their sequence.

    heads    the query heads that read kv_heads
    offset   with causal, row i sees keys up to i + offset; None if every row sees all keys
    window   a row sees only the last `window` of them; None for no limit
    softcap  the cap of scores; None for no cap
    """

    rows: slice
    heads: slice
    kv_heads: slice
    length: int
    offset: int | None
    window: int | None
    softcap: float | None


def blocks(
    group: int,
    kv_heads: int,
    seqlen_q: int,
    length: int,
    causal: bool,
    window_size: int | None,
    softcap: float | None,
) -> Iterator[Block]:
    """The work of one sequence in blocks of _SCORES_AT_ONCE scores, head by head; no blocks without keys."""
    if length == 0:
        return
    if window_size is not None and (not causal or window_size < 1):
        raise ArgumentError("window_size", window_size, "None, or 1 or more with causal=True")
    rows_at_once = max(1, _SCORES_AT_ONCE // (group * length))
    heads_at_once = max(1, rows_at_once // max(1, seqlen_q))  # several kv heads, if all of their rows fit
    offset = length - seqlen_q if causal else None
    for head in range(0, kv_heads, heads_at_once):
        last = min(head + heads_at_once, kv_heads)
        kv_slice, query_slice = slice(head, last), slice(head * group, last * group)
        for first in range(0, seqlen_q, rows_at_once):
            rows = slice(first, min(first + rows_at_once, seqlen_q))
            yield Block(rows, query_slice, kv_slice, length, offset, window_size, softcap)


def _attend(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, scale: float, block: Block
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_attend_rows` on a block of one sequence's tensors (seqlen, heads, head_dim)."""
    rows, keys = (block.rows, block.heads), (slice(block.length), block.kv_heads)
    return _attend_rows(q[rows].double(), r[rows].double(), k[keys].double(), v[keys].double(), scale, block)


def _attend_rows(
    q: Tensor, r: Tensor, keys: Tensor, values: Tensor, scale: float, block: Block
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition. q, r (rows, heads, d); keys, values (length, kv_heads, d) -> out, lse, t_mean, v_mean."""
    s, t, sees_any = masked_scores(q, r, keys, scale, block)
    p = s.softmax(dim=-1) * sees_any
    t_mean = (p * t).sum(dim=-1, keepdim=True)
    out = weighted_sums(p * (1 + t_mean - t), values)
    lse = s.logsumexp(dim=-1).masked_fill(~sees_any[:, 0], -math.inf)
    return out, lse, t_mean[..., 0], weighted_sums(p, values)


def masked_scores(q: Tensor, r: Tensor, keys: Tensor, scale: float, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """s and t, (heads, rows, keys), with s = -inf for invisible keys; and whether a row sees any key, (rows, 1).

    A row that sees no key has finite scores, so that softmax and gradients have no NaN. The caller must multiply p by
    the third result.
    """
    s = capped(scale * dot_products(q, keys), block.softcap)
    t = dot_products(r, keys)
    sees_any = torch.ones(s.shape[1], 1, dtype=torch.bool, device=q.device)
    if block.offset is not None:
        last = torch.arange(block.rows.start, block.rows.stop, device=q.device)[:, None] + block.offset
        key = torch.arange(block.length, device=q.device)
        visible = key <= last
        if block.window is not None:
            visible &= key > last - block.window
        sees_any = visible.any(dim=1, keepdim=True)
        s = s.masked_fill(~visible & sees_any, -math.inf)
    return s, t, sees_any


def capped(s: Tensor, softcap: float | None) -> Tensor:
    """Scores under a softcap: c tanh(s / c)."""
    return s if softcap is None else softcap * (s / softcap).tanh()


def dot_products(q: Tensor, keys: Tensor) -> Tensor:
    """q·k of queries (rows, heads, d) with the keys (length, kv_heads, d) of their kv heads: (heads, rows, length)."""
    (rows, heads, head_dim), (length, kv_heads, _) = q.shape, keys.shape
    queries = q.transpose(0, 1).reshape(kv_heads, heads // kv_heads * rows, head_dim)
    return (queries @ keys.permute(1, 2, 0)).reshape(heads, rows, length)


def weighted_sums(weights: Tensor, values: Tensor) -> Tensor:
    """The sums of values (length, kv_heads, d), weighted by (heads, rows, length): (rows, heads, d)."""
    (heads, rows, length), (_, kv_heads, head_dim) = weights.shape, values.shape
    grouped = weights.reshape(kv_heads, heads // kv_heads * rows, length)
    return (grouped @ values.transpose(0, 1)).reshape(heads, rows, head_dim).transpose(0, 1)


def _empty(out: Tensor) -> Reference:
    """The result of rows without keys. out: a tensor of zeros."""
    batch, seqlen_q, heads, _ = out.shape
    t_mean = out.new_zeros((batch, heads, seqlen_q))
    return Reference(out, torch.full_like(t_mean, -math.inf), t_mean, torch.zeros_like(out))


def sequences_of(
    cu_seqlens_q: Tensor | Sequence[int], cu_seqlens_k: Tensor | Sequence[int]
) -> list[tuple[slice, slice]]:
    """The slices of each packed sequence's queries and keys."""
    ends_q, ends_k = (x.tolist() if isinstance(x, Tensor) else list(x) for x in (cu_seqlens_q, cu_seqlens_k))
    if len(ends_q) != len(ends_k):
        raise ArgumentError("cu_seqlens_k", f"{len(ends_k)} numbers", f"{len(ends_q)}, as cu_seqlens_q has")
    return [(slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])) for b in range(len(ends_q) - 1)]


def check_shapes(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    if q.dim() != 4:
        raise ArgumentError("q", tuple(q.shape), "4 dimensions: (batch, seqlen_q, heads, head_dim)")
    batch, seqlen_q, heads, head_dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != head_dim:
        raise ArgumentError("k", tuple(k.shape), f"({batch}, seqlen_kv, kv_heads, {head_dim}), as q's shape implies")
    if k.shape[2] < 1 or heads % k.shape[2]:
        raise ArgumentError("k", f"{k.shape[2]} kv heads", f"a divisor of q's {heads} heads")
    for name, tensor, other_name, other in (("r", r, "q", q), ("v", v, "k", k)):
        if tensor.shape != other.shape:
            raise ArgumentError(name, tuple(tensor.shape), f"{tuple(other.shape)}, the shape of {other_name}")
    return batch, seqlen_q, heads, head_dim


def _check_lengths(cache_seqlens: Tensor | Sequence[int] | None, batch: int, seqlen_kv: int) -> list[int]:
    if cache_seqlens is None:
        return [seqlen_kv] * batch
    tensor = torch.as_tensor(cache_seqlens)
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.shape != (batch,):
        raise ArgumentError(
            "cache_seqlens", f"{tensor.dtype} of shape {tuple(tensor.shape)}", f"ints of shape ({batch},)"
        )
    lengths: list[int] = tensor.tolist()
    if not all(0 <= length <= seqlen_kv for length in lengths):
        raise ArgumentError("cache_seqlens", lengths, f"0 to {seqlen_kv}")
    return lengths
