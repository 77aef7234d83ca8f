"""Attention against a KV cache, as an inference engine calls it: on CUDA by one kernel, on the CPU by the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from parallax_gen.codegen.abi import in_fours, sizes_of
from parallax_gen.oracle.kvcache import reference_cached_forward
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import scale_or_default
from parallax_gen.runtime.attention import copy_into, fill_unseen, room_for
from parallax_gen.runtime.autograd import plain
from parallax_gen.runtime.cache_checks import (
    check_cached,
    check_fours,
    check_workspace,
    check_workspace_type,
    refuse_gradients,
    refuse_tangents_of,
)
from parallax_gen.runtime.kvcache_operators import laid_out, needs_operator, operators_of
from parallax_gen.runtime.plan import HostPlan, LaunchPlan, Plans, host_plan, key_of, plan_launch
from parallax_gen.runtime.requests import (
    CACHE_DTYPE_NAMES,
    CACHED_INPUTS,
    CacheRequest,
    cached_inputs_of,
    cast_to_cache,
    dtype_name,
    rounds_to_tf32,
    window_of,
)
from parallax_gen.runtime.sharded import DENSE, OF_ALL, OF_SEQUENCES, PACKED, PAGES, Dims, is_sharded, over_shards
from parallax_gen.runtime.states import State
from parallax_gen.runtime.transforms import nothing_intervenes
from parallax_gen.runtime.workspace import bytes_of, of_one_launch

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CacheOptions(TypedDict, total=False):
    """What the function takes by name, beside the flag that says what it returns."""

    cache_seqlens: Tensor | int | None
    page_table: Tensor | None
    cache_leftpad: Tensor | None
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | None
    causal: bool
    window_size: int | None
    softmax_scale: float | None
    k_scale: Tensor | float | None
    v_scale: Tensor | float | None
    out: Tensor | None
    workspace: Tensor | None


@overload
def parallax_attn_with_kvcache(
    q: Tensor,
    r: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_state: Literal[False] = False,
    **options: Unpack[CacheOptions],
) -> Tensor: ...


@overload
def parallax_attn_with_kvcache(
    q: Tensor,
    r: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_state: Literal[True],
    **options: Unpack[CacheOptions],
) -> State: ...


@overload
def parallax_attn_with_kvcache(
    q: Tensor, r: Tensor, k_cache: Tensor, v_cache: Tensor, *, return_state: bool, **options: Unpack[CacheOptions]
) -> Tensor | State: ...


def parallax_attn_with_kvcache(
    q: Tensor,
    r: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | int | None = None,
    page_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = False,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    out: Tensor | None = None,
    return_state: bool = False,
    workspace: Tensor | None = None,
) -> Tensor | State:
    """Parallax attention of new queries over their sequences' cached keys: a decode step, or a prompt's next chunk.

    q, r              (batch, seqlen_q, heads, head_dim), bf16, fp16 or fp32; head_dim a multiple of 8 up to 256. With
                      cu_seqlens_q (total_q, heads, head_dim). The keys of these very tokens are in the cache already:
                      a sequence's last query is at its last key
    k_cache, v_cache  (batch, seqlen, kv_heads, head_dim), or (pages, page_size, kv_heads, head_dim) with a page_table,
                      of any page_size; heads is a multiple of kv_heads. Of q's dtype, or both float8_e4m3fn or both
                      float8_e5m2 beside bf16 or fp16 queries
    cache_seqlens     (batch,) int32 on the same device: how many keys of each sequence count, 0 to seqlen; an int
                      for all of them; None for all keys. What lies behind is never read, and may be NaN. A sequence
                      of length 0 gives 0, and a length below 0 in a tensor counts as 0
    page_table        (batch, pages of a sequence at the most) int32 on the same device: each sequence's pages in their
                      order; entries behind its length may be anything. Needs cache_seqlens, a tensor, and v_cache
                      in k_cache's strides
    cache_leftpad     (batch,) int32 on the same device: each sequence's first key, which cache_seqlens counts from 0
                      all the same. What lies before is never read
    cu_seqlens_q      (batch + 1,) int32 on the same device, none less than the one before: sequence b has the rows
                      cu_seqlens_q[b] up to cu_seqlens_q[b + 1] of q and r, and may have none. In rows that no sequence
                      has out is 0, lse is -inf, and t̄ and v̄ are 0
    max_seqlen_q      with cu_seqlens_q: at least the longest sequence's queries, and not much more
    causal            of many queries, each sees keys up to its own position. A single query sees them all, either way
    window_size       with causal: a query sees this many keys at the most, its position's and those right before
    softmax_scale     of q·k, greater than 0; 1/√head_dim by default. r·k is not scaled
    k_scale, v_scale  of caches in eight bits: what stored numbers are to be multiplied by, (1,) or (kv_heads,) fp32 on
                      the same device, or a number; 1 by default
    out               where to write, like q; made if not given
    return_state      return a `State` (out, lse, t̄, v̄), which `merge_states` joins with that over other keys
    workspace         scratch of at least `kvcache_workspace_size` bytes: torch.zeros(bytes, dtype=torch.uint8) on the
                      same device, which each launch leaves as it found it where it matters. One for every stream that
                      runs by itself. By default it is the library's own: one a stream, and one a captured launch

    Returns out, or a State. Any strides do that keep the last dimension contiguous. On CUDA tensors nothing is waited
    for, and the call can be captured in a CUDA graph: lengths, pages and where queries begin are read on the device, so
    that one graph serves every step. There are no gradients. See `parallax_attn_func` for the formula.

    Under torch.compile and torch.export this is one operator, of any lengths and sizes. It takes no `workspace`, which
    is only checked: each call makes its own scratch; and what it returns is copied to `out`. Under torch.func.vmap
    samples with dense caches of their own are one launch, others one each. DTensors are sharded on sequences or on
    heads, or are redistributed so; what is a plain tensor beside them, lengths and tables, is taken to be whole and
    the same on every rank.

    Under torch.autocast q and r are cast to the caches' dtype where that is bf16 or fp16, else to autocast's; caches in
    fp32 are cast too, which copies all of them at every call, and caches in eight bits stay. With `out` the dtype is
    out's.

    Raises ArgumentError, naming the argument; so it does for tensors with a tangent (forward-mode AD),
    or that a transform of torch.func differentiates by.
    """
    asked = CacheRequest(
        q, r, k_cache, v_cache, cache_seqlens, page_table, cache_leftpad, cu_seqlens_q, k_scale, v_scale,
        max_seqlen_q, causal, window_size, softmax_scale,
    )  # fmt: skip
    # Each type by itself takes a third of the time of a loop.
    bare = type(q) is Tensor and type(r) is Tensor and type(k_cache) is Tensor and type(v_cache) is Tensor
    bare = bare and nothing_intervenes()
    if not bare:
        asked = cast_to_cache(asked, out)
        if needs_operator(asked):
            found = _attend_by_operator(asked, out, return_state, workspace)
            return State(*found) if return_state else found[0]
    ready, plan = _planned(asked, out, return_state)
    learned = q.requires_grad or r.requires_grad or k_cache.requires_grad or v_cache.requires_grad
    if learned or not bare or k_scale is not None or v_scale is not None:
        refuse_gradients(asked)
    found = _attend(ready, plan, out, return_state, workspace)
    return State(*found) if return_state else found[0]


def kvcache_workspace_size(
    q: Tensor,
    r: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | int | None = None,
    page_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = False,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    out: Tensor | None = None,
    return_state: bool = False,
) -> int:
    """Bytes of workspace that `parallax_attn_with_kvcache` needs with these arguments; 0 where it needs none.

    It depends on the tensors' sizes, never on what they hold. Raises ArgumentError, as that does.
    """
    asked = CacheRequest(
        q, r, k_cache, v_cache, cache_seqlens, page_table, cache_leftpad, cu_seqlens_q, k_scale, v_scale,
        max_seqlen_q, causal, window_size, softmax_scale,
    )  # fmt: skip
    asked = cast_to_cache(asked, out)
    if not plain(q, r, k_cache, v_cache):  # they may have no key
        check_cached(asked, out, return_state)
    _, plan = _planned(asked, out, return_state)
    return bytes_of(plan.scratch) if isinstance(plan, LaunchPlan) else 0


def _attend(
    asked: CacheRequest, plan: LaunchPlan | HostPlan, out: Tensor | None, state: bool, workspace: Tensor | None
) -> tuple[Tensor, ...]:
    """out, and with `state` lse, t̄ and v̄."""
    found = room_for(asked.q, out, state)
    if isinstance(plan, LaunchPlan):
        if workspace is not None:
            check_workspace(workspace, bytes_of(plan.scratch), asked.q)
        if asked.k_scale is not None:  # as it has where the cache is in eight bits
            asked = asked._replace(k_cache=in_fours(asked.k_cache), v_cache=in_fours(asked.v_cache))
        plan.launch(asked, found, workspace)
    elif plan.nothing_seen:
        fill_unseen(found)
    else:
        options = {name: getattr(asked, name) for name in _OPTIONS}
        copy_into(found, reference_cached_forward(*cached_inputs_of(asked), **options))
    return found


def _attend_by_operator(
    asked: CacheRequest, out: Tensor | None, state: bool, workspace: Tensor | None
) -> tuple[Tensor, ...]:
    """`_attend` where a tracer, a mode, a transform or a tensor subclass is to see one operator."""
    asked = laid_out(asked)
    check_cached(asked, out, state)
    refuse_tangents_of(asked)
    refuse_gradients(asked)
    if workspace is not None:
        check_workspace_type(workspace, asked.q)
    if is_sharded(*cached_inputs_of(asked)):
        found = _attend_shards(asked, state)
    else:
        asked = _ready(asked)
        found = _attention_with_state(*asked) if state else (_attention(*asked),)
    return found if out is None else (out.copy_(found[0]), *found[1:])


def _attend_shards(asked: CacheRequest, state: bool) -> tuple[Tensor, ...]:
    """`_attend` of DTensors."""

    def attend(*local: Any) -> tuple[Tensor, ...]:
        found = parallax_attn_with_kvcache(**CacheRequest(*local)._asdict(), return_state=state)
        return found if isinstance(found, tuple) else (found,)

    rows, keys = DENSE if asked.cu_seqlens_q is None else PACKED, DENSE if asked.page_table is None else PAGES
    dims = {"q": rows, "r": rows, "k_cache": keys, "v_cache": keys, "cu_seqlens_q": OF_ALL}
    for name in ("cache_seqlens", "page_table", "cache_leftpad"):
        dims[name] = OF_SEQUENCES if asked.cu_seqlens_q is None else OF_ALL
    for name in ("k_scale", "v_scale"):
        scale, kv_heads = getattr(asked, name), asked.k_cache.shape[2]
        dims[name] = Dims(None, 0) if isinstance(scale, Tensor) and len(scale) == kv_heads > 1 else OF_ALL
    return over_shards(attend, asked, dims, CACHED_INPUTS)


def _run(*given: Any, state: bool) -> tuple[Tensor, ...]:
    """What the operators do."""
    asked, plan = _planned(CacheRequest(*given), None, state)
    workspace = of_one_launch(plan.scratch, asked.q.device) if isinstance(plan, LaunchPlan) else None
    return _attend(asked, plan, None, state, workspace)


_attention, _attention_with_state = operators_of(_run)

_plans: Plans[LaunchPlan | HostPlan] = Plans()


def _planned(asked: CacheRequest, out: Tensor | None, return_state: bool) -> tuple[CacheRequest, LaunchPlan | HostPlan]:
    """The request, with tensors for all that the kernel reads, and its plan."""
    key = key_of(*asked, out, return_state, rounds_to_tf32(asked.q))
    plan = _plans.get(key)
    if plan is None:
        check_cached(asked, out, return_state)
    asked = _ready(asked)
    if plan is None:
        plan = _plan(asked, return_state)
        _plans.remember(key, plan)
    if asked.cache_seqlens is None and isinstance(plan, LaunchPlan) and plan.own_lengths:
        batch, seqlen = asked.k_cache.shape[:2]
        lengths = torch.full((batch,), seqlen, dtype=torch.int32, device=asked.q.device)
        asked = asked._replace(cache_seqlens=lengths)
    return asked, plan


def _ready(asked: CacheRequest) -> CacheRequest:
    """With tensors for all that the kernel reads. asked: checked, but for what a plan does not know."""
    length = asked.cache_seqlens
    if length is not None and not isinstance(length, Tensor):
        k_cache, v_cache = asked.k_cache.narrow(1, 0, length), asked.v_cache.narrow(1, 0, length)
        asked = asked._replace(k_cache=k_cache, v_cache=v_cache, cache_seqlens=None)
    if asked.k_cache.dtype in CACHE_DTYPE_NAMES:
        check_fours(asked)
        asked = _with_scales(asked)
    return asked


def _plan(asked: CacheRequest, state: bool) -> LaunchPlan | HostPlan:
    q, k = asked.q, asked.k_cache
    page_size = 0 if asked.page_table is None else k.shape[1]
    seqlen = k.shape[1] if asked.page_table is None else page_size * asked.page_table.shape[1]
    batch, seqlen_q = q.shape[0], q.shape[1]
    packed = asked.cu_seqlens_q is not None
    if asked.cu_seqlens_q is not None:
        assert asked.max_seqlen_q is not None
        batch, seqlen_q = asked.cu_seqlens_q.shape[0] - 1, asked.max_seqlen_q
    host = HostPlan(nothing_seen=True) if 0 in (batch, seqlen, seqlen_q) else host_plan(q, k)
    if host is not None:
        return host
    heads, kv_heads, head_dim = q.shape[-2], k.shape[2], q.shape[-1]
    many = packed or seqlen_q > 1
    window = window_of(asked.window_size, seqlen)
    own_lengths = (
        many
        or state
        or window > 0
        or k.dtype in CACHE_DTYPE_NAMES
        or asked.cache_seqlens is not None
        or asked.cache_leftpad is not None
    )
    spec = KernelSpec(
        "decode_varlen" if own_lengths else "decode",
        head_dim,
        dtype_name(q),
        group=heads // kv_heads,
        causal=window > 0 or (many and asked.causal),
        stats=state,
        window=window > 0,
        varlen=packed,
        page_size=page_size,
        leftpad=asked.cache_leftpad is not None,
        many_queries=many,
        cache_dtype=CACHE_DTYPE_NAMES.get(k.dtype, ""),
    )
    scale = scale_or_default(asked.softmax_scale, head_dim)
    numbers = (scale, *sizes_of(spec, window, seqlen_q, 0))
    shape = Shape(batch, heads, kv_heads, seqlen_q, seqlen, window)
    return plan_launch(spec, shape, numbers, q.device.index, RENAMED)


RENAMED = {"k": "k_cache", "v": "v_cache"}  # what a launch takes, and the name that it has in a request

# Of what is asked, and the reference takes by these names.
_OPTIONS = (
    "cache_seqlens", "page_table", "cache_leftpad", "cu_seqlens_q", "k_scale", "v_scale", "causal", "window_size",
    "softmax_scale",
)  # fmt: skip


def _with_scales(asked: CacheRequest) -> CacheRequest:
    """With tensors of one size for both scales: of a number each, or where either has more of one for every kv head."""
    scales = [
        x
        if isinstance(x, Tensor)
        else torch.full((1,), 1.0 if x is None else x, dtype=torch.float32, device=asked.q.device)
        for x in (asked.k_scale, asked.v_scale)
    ]
    size = max(len(x) for x in scales)
    k_scale, v_scale = (x if len(x) == size else x.repeat(size) for x in scales)
    return asked._replace(k_scale=k_scale, v_scale=v_scale)
