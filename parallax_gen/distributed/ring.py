"""Ring attention: keys and values are passed around the ranks while each rank attends over the keys it holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.runtime.attention import SavedForBackward
from parallax_gen.runtime.autograd import backward_without_autograd, forward_without_autograd, refuse_second_derivatives
from parallax_gen.runtime.checks import check_request
from parallax_gen.runtime.invariance import is_batch_invariant
from parallax_gen.runtime.requests import Request, cast_inputs, inputs_of
from parallax_gen.runtime.sharded import refuse_dtensors
from parallax_gen.runtime.states import State, merge_into
from parallax_gen.runtime.transforms import refuse_batched, refuse_transforms


def shard_sequence(x: Tensor, *, causal: bool, dim: int = 1, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's shard of a sequence that every rank has in full, in the layout that `ring_attn_func` expects.

    causal  the sequence is split into 2·ranks chunks and rank i takes chunks i and 2·ranks − 1 − i, which balances the
            work of all ranks. Otherwise rank i takes the i-th of `ranks` parts
    dim     the sequence dimension; its length must be a multiple of the number of chunks
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
    """The whole sequence on every rank, from the shards of `shard_sequence`. There are no gradients."""
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
    softcap: float | None = None,
    batch_invariant: bool | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`parallax_attn_func` over a sequence that is sharded over the ranks of a group, forward and backward.

    q, r           (batch, seqlen, heads, head_dim): this rank's shard, as from `shard_sequence`, of equal length on all
                   ranks
    k, v           (batch, seqlen, kv_heads, head_dim): this rank's shard in the same layout
    causal         over the whole sequence; the shard's length must be even
    softmax_scale  scale of q·k; 1/√head_dim by default
    softcap        of scores, as in `parallax_attn_func`; None for no cap
    batch_invariant  refused: the bits depend on the number of ranks. False where the mode of the process, None, is on
    group          by default the default group. All its ranks must make the same call

    Returns out, like q: this rank's shard. Partial results are merged in fp32. Every rank holds its own shard of k and
    v and one more, and in the backward also their gradients in fp32. For the backward it saves q, r, k, v, out, v̄, lse
    and t̄ of its own shard. Gradients are first derivatives; tangents and torch.func transforms are refused. Under
    torch.autocast q, r, k and v are cast to its dtype and sent in it. Raises ArgumentError, naming the argument.
    """
    refuse_transforms("ring_attn_func", q=q, r=r, k=k, v=v)
    refuse_dtensors("ring_attn_func", q=q, r=r, k=k, v=v)
    if is_batch_invariant(batch_invariant):
        allowed = "batch_invariant=False: the bits of ring attention depend on the number of ranks"
        raise ArgumentError("batch_invariant", True, allowed)
    ring = _Ring.of(group)
    request = Request(q, r, k, v, causal=causal, softmax_scale=softmax_scale, softcap=softcap)
    request = cast_inputs(request)
    check_request(request, packed=False)
    q, r, k, v = inputs_of(request)
    if causal and (q.shape[1] % 2 or q.shape[1] != k.shape[1]):
        got = f"{q.shape[1]} queries and {k.shape[1]} keys"
        raise ArgumentError("q", got, "an even number of queries, and as many keys, with causal=True")
    out: Tensor = _RingAttention.apply(  # type: ignore[no-untyped-call]
        q, r, k, v, causal, softmax_scale, softcap, ring
    )
    return out


class _Visible(NamedTuple):
    """The query rows that see keys of the held shard, the part of these keys that they see, and whether causal."""

    rows: slice
    keys: slice
    causal: bool


class _Ring(NamedTuple):
    """A group as a ring: this rank sends to `next` and receives from `previous`, both global ranks."""

    group: dist.ProcessGroup | None
    rank: int
    ranks: int
    next: int
    previous: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> _Ring:
        rank, global_ranks = members(group)
        ranks = len(global_ranks)
        return cls(group, rank, ranks, global_ranks[(rank + 1) % ranks], global_ranks[(rank - 1) % ranks])

    def start_transfer(self, *tensors: Tensor) -> _Transfer:
        """Start sending contiguous tensors to the next rank and receiving the same number from the previous rank."""
        received = tuple(torch.empty_like(x) for x in tensors)
        sends = [dist.P2POp(dist.isend, x, self.next, self.group) for x in tensors]
        receives = [dist.P2POp(dist.irecv, x, self.previous, self.group) for x in received]
        return _Transfer(dist.batch_isend_irecv([*sends, *receives]), tensors, received)

    def visible(self, step: int, seqlen: int, causal: bool) -> _Visible:
        """Which keys this rank's queries see at `step`, when it holds the keys of the rank `step` places before it."""
        all_rows, half = slice(0, seqlen), seqlen // 2
        if not causal:
            return _Visible(all_rows, all_rows, False)
        owner = (self.rank - step) % self.ranks
        if owner == self.rank:
            return _Visible(all_rows, all_rows, True)
        if owner < self.rank:  # the owner's second chunk comes after both chunks of this rank
            return _Visible(all_rows, slice(0, half), False)
        # Both chunks of the owner come after this rank's first chunk.
        return _Visible(slice(half, seqlen), all_rows, False)


class _Transfer(NamedTuple):
    """An unfinished exchange of tensors. `sent` must not change until `wait` returns."""

    works: list[dist.Work]
    sent: tuple[Tensor, ...]
    received: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        for work in self.works:
            work.wait()
        return self.received


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
        softcap: float | None,
        ring: _Ring,
    ) -> Tensor:
        merged: State | None = None
        keys, values = k.contiguous(), v.contiguous()
        for step in range(ring.ranks):
            transfer = ring.start_transfer(keys, values) if step + 1 < ring.ranks else None
            visible = ring.visible(step, q.shape[1], causal)
            request = _request_for(visible, q, r, keys, values, softmax_scale, softcap)
            partial = State(*forward_without_autograd(request))
            if merged is None:  # the rank's own keys; every query sees some of them
                merged = partial._replace(out=partial.out.float(), v_mean=partial.v_mean.float())
            else:
                merge_into(_state_rows(merged, visible.rows), partial)
            if transfer is not None:
                keys, values = transfer.wait()
        assert merged is not None
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, r, k, v, out, merged.lse, merged.t_mean, merged.v_mean.to(q.dtype))
        ctx.options = causal, softmax_scale, softcap, ring
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(do)
        refuse_transforms("ring_attn_func", do=do)
        q, r, k, v, *state = ctx.saved_tensors
        causal, softmax_scale, softcap, ring = ctx.options
        do = do.contiguous()
        dq, dr = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, r))
        keys, values = k.contiguous(), v.contiguous()
        # The gradients of keys and values follow one step later. After the last step every rank has its own again.
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
        gradient_transfer: _Transfer | None = None
        for step in range(ring.ranks):
            transfer = ring.start_transfer(keys, values) if step + 1 < ring.ranks else None
            visible = ring.visible(step, q.shape[1], causal)
            request = _request_for(visible, q, r, keys, values, softmax_scale, softcap)
            saved = SavedForBackward(*(x.contiguous() for x in _state_rows(State(*state), visible.rows)))
            grads = backward_without_autograd(do[:, visible.rows], request, saved, keys_are_partial=True)
            if gradient_transfer is not None:
                dk, dv = gradient_transfer.wait()
            sums = (dq[:, visible.rows], dr[:, visible.rows], dk[:, visible.keys], dv[:, visible.keys])
            for total, grad in zip(sums, grads, strict=True):
                total += grad
            if ring.ranks > 1:
                gradient_transfer = ring.start_transfer(dk, dv)
            if transfer is not None:
                keys, values = transfer.wait()
        if gradient_transfer is not None:
            dk, dv = gradient_transfer.wait()
        grads = tuple(grad.to(x.dtype) for grad, x in zip((dq, dr, dk, dv), (q, r, k, v), strict=True))
        return *refuse_second_derivatives(grads, (q, r, k, v, do)), None, None, None, None


def _request_for(
    visible: _Visible,
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    softcap: float | None,
) -> Request:
    q, r, k, v = q[:, visible.rows], r[:, visible.rows], k[:, visible.keys], v[:, visible.keys]
    return Request(q, r, k, v, causal=visible.causal, softmax_scale=softmax_scale, softcap=softcap)


def _state_rows(state: State, rows: slice) -> State:
    """Views of the state of some query rows."""
    out, lse, t_mean, v_mean = state
    return State(out[:, rows], lse[..., rows], t_mean[..., rows], v_mean[:, rows])


# -- Members of a process group.


def members(group: dist.ProcessGroup | None) -> tuple[int, list[int]]:
    """This process's rank in a group, and the global ranks of all its members. Raises ArgumentError."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ArgumentError("group", "no group", "a torch.distributed group: call init_process_group first")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ArgumentError("group", "a group without this rank", "a group that includes this rank")
    return rank, dist.get_process_group_ranks(group or dist.group.WORLD)
