"""Ring attention: keys and values go round the ranks, and while a rank attends to those it holds, the next arrive."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.attention import Saved
from parallax_gen.runtime.autograd import backward_of_part, first_derivatives, forward_of_part
from parallax_gen.runtime.checks import check_request
from parallax_gen.runtime.requests import Request, cast_inputs, inputs_of
from parallax_gen.runtime.sharded import refuse_shards
from parallax_gen.runtime.states import State, absorb
from parallax_gen.runtime.transforms import refuse_batched, refuse_transforms


def shard_sequence(x: Tensor, *, causal: bool, dim: int = 1, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's part of a sequence that every rank has, as `ring_attn_func` wants it.

    causal  of 2·ranks chunks the rank-th and the rank-th from the end, one after the other: so that all ranks have as
            much to do. Else the rank-th of `ranks` parts
    dim     the sequence's dimension, whose length is a multiple of the number of chunks
    """
    ring = _Ring.of(group)
    chunks = ring.ranks * (2 if causal else 1)
    if x.shape[dim] % chunks:
        raise ArgumentError("x", f"{x.shape[dim]} in dimension {dim}", f"a multiple of {chunks} for {ring.ranks} ranks")
    parts = x.chunk(chunks, dim)
    if not causal:
        return parts[ring.rank].contiguous()
    return torch.cat([parts[ring.rank], parts[chunks - 1 - ring.rank]], dim)


def gather_sequence(x: Tensor, *, causal: bool, dim: int = 1, group: dist.ProcessGroup | None = None) -> Tensor:
    """The whole sequence, on every rank, from what `shard_sequence` gave each. There are no gradients."""
    ring = _Ring.of(group)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ring.ranks)]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    if not causal:
        return torch.cat(parts, dim)
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([half[0] for half in halves] + [half[1] for half in reversed(halves)], dim)


def ring_attn_func(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`parallax_attn_func` of a sequence that is spread over the ranks of a group, forward and backward.

    q, r           (batch, seqlen, heads, head_dim): this rank's part, as `shard_sequence` gives it, of equal length on
                   all ranks
    k, v           (batch, seqlen, kv_heads, head_dim), likewise
    causal         over the whole sequence; the part's length is even
    softmax_scale  of q·k; 1/√head_dim by default
    group          the default group if not given. All its ranks make the same call

    Returns out, like q: this rank's part. Parts are joined in fp32. Every rank holds its own part and one more of k and
    v, and in the backward their gradients in fp32. For the backward it keeps q, r, k, v, out, v̄, lse and t̄ of its own
    part. Gradients are first derivatives; tangents and transforms of torch.func are refused. Under torch.autocast q, r,
    k and v are cast to its dtype, and are sent in it. Raises ArgumentError, naming the argument.
    """
    refuse_transforms("ring_attn_func", q=q, r=r, k=k, v=v)
    refuse_shards("ring_attn_func", q=q, r=r, k=k, v=v)
    ring = _Ring.of(group)
    asked = cast_inputs(Request(q, r, k, v, causal=causal, softmax_scale=softmax_scale))
    check_request(asked, packed=False)
    q, r, k, v = inputs_of(asked)
    if causal and (q.shape[1] % 2 or q.shape[1] != k.shape[1]):
        got = f"{q.shape[1]} queries and {k.shape[1]} keys"
        raise ArgumentError("q", got, "an even number of queries and as many keys, with causal")
    out: Tensor = _RingAttention.apply(q, r, k, v, causal, softmax_scale, ring)  # type: ignore[no-untyped-call]
    return out


class _Part(NamedTuple):
    """Which queries see which of another rank's keys, and whether they see those up to themselves only."""

    rows: slice
    keys: slice
    causal: bool


class _Ring(NamedTuple):
    """A group as a ring: this rank gives to `next` and takes from `previous`, which are ranks of all processes."""

    group: dist.ProcessGroup | None
    rank: int
    ranks: int
    next: int
    previous: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> _Ring:
        rank, everyone = members(group)
        ranks = len(everyone)
        return cls(group, rank, ranks, everyone[(rank + 1) % ranks], everyone[(rank - 1) % ranks])

    def pass_on(self, *tensors: Tensor) -> _Passing:
        """Begin to send contiguous tensors to the next rank and to receive as many from the previous one."""
        arriving = tuple(torch.empty_like(x) for x in tensors)
        sent = [dist.P2POp(dist.isend, x, self.next, self.group) for x in tensors]
        received = [dist.P2POp(dist.irecv, x, self.previous, self.group) for x in arriving]
        return _Passing(dist.batch_isend_irecv([*sent, *received]), tensors, arriving)

    def part(self, step: int, seqlen: int, causal: bool) -> _Part:
        """What is to do with the keys that are here at a step: those of the rank that many before this one."""
        everything, half = slice(0, seqlen), seqlen // 2
        if not causal:
            return _Part(everything, everything, False)
        source = (self.rank - step) % self.ranks
        if source == self.rank:
            return _Part(everything, everything, True)
        if source < self.rank:  # its second chunk lies behind both of this rank's
            return _Part(everything, slice(0, half), False)
        return _Part(slice(half, seqlen), everything, False)  # both lie behind this rank's first chunk


class _Passing(NamedTuple):
    """Tensors on their way. `sent` must stay as they are until it is done."""

    works: list[dist.Work]
    sent: tuple[Tensor, ...]
    arriving: tuple[Tensor, ...]

    def arrived(self) -> tuple[Tensor, ...]:
        for work in self.works:
            work.wait()
        return self.arriving


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        softmax_scale: float | None,
        ring: _Ring,
    ) -> Tensor:
        found: State | None = None
        keys, values = k.contiguous(), v.contiguous()
        for step in range(ring.ranks):
            passing = ring.pass_on(keys, values) if step + 1 < ring.ranks else None
            part = ring.part(step, q.shape[1], causal)
            asked = _of_part(part, q, r, keys, values, softmax_scale)
            here = State(*forward_of_part(asked))
            if found is None:  # of its own keys, which all queries see some of
                found = here._replace(out=here.out.float(), v_mean=here.v_mean.float())
            else:
                absorb(_rows_of(found, part.rows), here)
            if passing is not None:
                keys, values = passing.arrived()
        assert found is not None
        out = found.out.to(q.dtype)
        ctx.save_for_backward(q, r, k, v, out, found.lse, found.t_mean, found.v_mean.to(q.dtype))
        ctx.options = causal, softmax_scale, ring
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(do)
        refuse_transforms("ring_attn_func", do=do)
        q, r, k, v, *state = ctx.saved_tensors
        causal, softmax_scale, ring = ctx.options
        do = do.contiguous()
        dq, dr = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, r))
        keys, values = k.contiguous(), v.contiguous()
        # The gradients of keys and values go round with them, one step behind, and come home after as many steps.
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
        coming: _Passing | None = None
        for step in range(ring.ranks):
            passing = ring.pass_on(keys, values) if step + 1 < ring.ranks else None
            part = ring.part(step, q.shape[1], causal)
            asked = _of_part(part, q, r, keys, values, softmax_scale)
            saved = Saved(*(x.contiguous() for x in _rows_of(State(*state), part.rows)))
            grads = backward_of_part(do[:, part.rows], asked, saved, some_keys=True)
            if coming is not None:
                dk, dv = coming.arrived()
            sums = (dq[:, part.rows], dr[:, part.rows], dk[:, part.keys], dv[:, part.keys])
            for total, grad in zip(sums, grads, strict=True):
                total += grad
            if ring.ranks > 1:
                coming = ring.pass_on(dk, dv)
            if passing is not None:
                keys, values = passing.arrived()
        if coming is not None:
            dk, dv = coming.arrived()
        grads = tuple(grad.to(x.dtype) for grad, x in zip((dq, dr, dk, dv), (q, r, k, v), strict=True))
        return *first_derivatives(grads, (q, r, k, v, do)), None, None, None


def _of_part(part: _Part, q: Tensor, r: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> Request:
    q, r = q[:, part.rows], r[:, part.rows]
    return Request(q, r, k[:, part.keys], v[:, part.keys], causal=part.causal, softmax_scale=softmax_scale)


def _rows_of(state: State, rows: slice) -> State:
    """Some of its queries: views."""
    out, lse, t_mean, v_mean = state
    return State(out[:, rows], lse[..., rows], t_mean[..., rows], v_mean[:, rows])


# -- Who is in a process group.


def members(group: dist.ProcessGroup | None) -> tuple[int, list[int]]:
    """This process's rank in a group, and of all its members their ranks among all processes. Raises ArgumentError."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ArgumentError("group", "no group", "one of torch.distributed: call init_process_group first")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ArgumentError("group", "a group without this rank", "one that this rank is in")
    return rank, dist.get_process_group_ranks(group or dist.group.WORLD)
