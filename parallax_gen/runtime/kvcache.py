"""Attention over a KV cache for inference: one kernel on CUDA, the reference on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from parallax_gen.codegen.abi import as_int32, launch_scalars
from parallax_gen.oracle.kvcache import reference_cached_forward
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.work import scale_or_default
from parallax_gen.runtime.attention import allocate_outputs, copy_outputs, write_result_without_keys
from parallax_gen.runtime.autograd import are_plain_tensors
from parallax_gen.runtime.cache_checks import (
    check_cached,
    check_four_byte_alignment,
    check_workspace,
    check_workspace_type,
    refuse_cache_tangents,
    refuse_gradients,
)
from parallax_gen.runtime.invariance import is_batch_invariant
from parallax_gen.runtime.kvcache_operators import define_operators, needs_operator, with_contiguous_heads
from parallax_gen.runtime.plan import HostPlan, LaunchPlan, PlanCache, host_plan, plan_key, plan_launch
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
from parallax_gen.runtime.sharded import DENSE, PACKED, PAGES, PER_SEQUENCE, REPLICATED, Dims, is_sharded, run_on_shards
from parallax_gen.runtime.states import State
from parallax_gen.runtime.transforms import is_plain_eager_call
from parallax_gen.runtime.workspace import workspace_bytes, workspace_for_one_launch

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CacheOptions(TypedDict, total=False):
    """The keyword arguments of `parallax_attn_with_kvcache`, except return_state."""

    cache_seqlens: Tensor | int | None
    page_table: Tensor | None
    cache_leftpad: Tensor | None
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | None
    causal: bool
    window_size: int | None
    softmax_scale: float | None
    softcap: float | None
    batch_invariant: bool | None
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
    softcap: float | None = None,
    batch_invariant: bool | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    out: Tensor | None = None,
    return_state: bool = False,
    workspace: Tensor | None = None,
) -> Tensor | State:
    """Parallax attention of new queries over their sequences' cached keys: a decode step or a prompt's next chunk.

    q, r              (batch, seqlen_q, heads, head_dim), bf16, fp16 or fp32; head_dim a multiple of 8 up to 256. With
                      cu_seqlens_q (total_q, heads, head_dim). The cache already holds the keys of these tokens: a
                      sequence's last query is at its last key
    k_cache, v_cache  (batch, seqlen, kv_heads, head_dim), or (pages, page_size, kv_heads, head_dim) with a page_table,
                      of any page_size; heads is a multiple of kv_heads. In q's dtype; or, for bf16 or fp16 queries,
                      both float8_e4m3fn or both float8_e5m2
    cache_seqlens     (batch,) int32 on the same device: each sequence's number of valid keys, 0 to seqlen; an int if it
                      is the same for all; None for all keys. Keys beyond it are never read and may be NaN. The
                      output of a sequence of length 0 is 0; a negative length in a tensor counts as 0
    page_table        (batch, most pages of a sequence) int32 on the same device: each sequence's pages in order;
                      entries beyond its length may be anything. Needs cache_seqlens as a tensor, and v_cache with
                      k_cache's strides
    cache_leftpad     (batch,) int32 on the same device: the index of each sequence's first key; keys before it are
                      never read. cache_seqlens counts from index 0 all the same
    cu_seqlens_q      (batch + 1,) int32 on the same device, non-decreasing: sequence b has the rows cu_seqlens_q[b] to
                      cu_seqlens_q[b + 1] - 1 of q and r, and may have none. In rows of no sequence out, t̄ and v̄ are 0
                      and lse is -inf
    max_seqlen_q      with cu_seqlens_q: at least the largest number of queries of a sequence, and not much more
    causal            with several queries per sequence, each sees keys up to its position. A single query always sees
                      all keys
    window_size       with causal: a query sees at most this many keys, its own and those right before it
    softmax_scale     scale of q·k, from 1e-18 to 1e18; 1/√head_dim by default. r·k is not scaled
    softcap           c, from 1e-18 to 1e18: scores s = scale·q·k become c·tanh(s/c), as in Gemma 2; None for no cap
    batch_invariant   the bits of a sequence's results do not depend on the batch around it, on pages or on padding:
                      docs/batch_invariance.md. None for the process's mode, `parallax_gen.batch_invariant`
    k_scale, v_scale  for 8-bit caches: the factor of the stored values, (1,) or (kv_heads,) fp32 on the same device, or
                      a number; 1 by default
    out               where to write, like q; allocated if not given
    return_state      return a `State` (out, lse, t_mean, v_mean), to merge with states over other keys (`merge_states`)
    workspace         scratch of at least `kvcache_workspace_size` bytes: torch.zeros(bytes, dtype=torch.uint8) on the
                      same device. Each launch resets the part that must be 0. Use one per concurrent stream. By default
                      the library has one per stream, and one per captured launch

    Returns out, or a State. Any strides with a contiguous last dimension are supported. On CUDA tensors the call never
    synchronises and can be captured in a CUDA graph: lengths, pages and cu_seqlens_q are read on the device, so one
    graph serves every step. There are no gradients. See `parallax_attn_func` for the formula.

    Under torch.compile and torch.export this is one operator for all lengths and sizes. It checks `workspace` but does
    not use it: each call allocates its own scratch, and its result is copied to `out`. Under torch.func.vmap samples
    with their own dense caches run in one launch, others in one launch each. DTensors that are not sharded on sequences
    or heads are redistributed; plain tensors among them, such as lengths and tables, must be whole and the same on
    every rank.

    Under torch.autocast q and r are cast to the caches' dtype if that is bf16 or fp16, else to autocast's. fp32 caches
    are cast too, which copies all of them in every call; 8-bit caches are not. With `out` the target is out's dtype.

    Raises ArgumentError, naming the argument; also for tensors with a tangent (forward-mode AD) and tensors that a
    torch.func transform differentiates with respect to.
    """
    request = CacheRequest(
        q, r, k_cache, v_cache, cache_seqlens, page_table, cache_leftpad, cu_seqlens_q, k_scale, v_scale,
        max_seqlen_q, causal, window_size, softmax_scale, softcap, is_batch_invariant(batch_invariant),
    )  # fmt: skip
    # Four type checks written out take a third of the time of a loop over the four.
    is_plain = type(q) is Tensor and type(r) is Tensor and type(k_cache) is Tensor and type(v_cache) is Tensor
    is_plain = is_plain and is_plain_eager_call()
    if not is_plain:
        request = cast_to_cache(request, out)
        if needs_operator(request):
            outputs = _attend_by_operator(request, out, return_state, workspace)
            return State(*outputs) if return_state else outputs[0]
    request, plan = _planned(request, out, return_state)
    needs_grad = q.requires_grad or r.requires_grad or k_cache.requires_grad or v_cache.requires_grad
    if needs_grad or not is_plain or k_scale is not None or v_scale is not None:
        refuse_gradients(request)
    outputs = _attend(request, plan, out, return_state, workspace)
    return State(*outputs) if return_state else outputs[0]


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
    softcap: float | None = None,
    batch_invariant: bool | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    out: Tensor | None = None,
    return_state: bool = False,
) -> int:
    """Bytes of workspace that `parallax_attn_with_kvcache` needs with these arguments; 0 if it needs none.

    Depends only on the tensors' sizes, never on their values. Raises ArgumentError as that function does.
    """
    request = CacheRequest(
        q, r, k_cache, v_cache, cache_seqlens, page_table, cache_leftpad, cu_seqlens_q, k_scale, v_scale,
        max_seqlen_q, causal, window_size, softmax_scale, softcap, is_batch_invariant(batch_invariant),
    )  # fmt: skip
    request = cast_to_cache(request, out)
    if not are_plain_tensors(q, r, k_cache, v_cache):  # plan_key may fail on these
        check_cached(request, out, return_state)
    _, plan = _planned(request, out, return_state)
    return workspace_bytes(plan.scratch) if isinstance(plan, LaunchPlan) else 0


def _attend(
    request: CacheRequest, plan: LaunchPlan | HostPlan, out: Tensor | None, state: bool, workspace: Tensor | None
) -> tuple[Tensor, ...]:
    """out, and with `state` lse, t_mean and v_mean."""
    outputs = allocate_outputs(request.q, out, state)
    if isinstance(plan, LaunchPlan):
        if workspace is not None:
            check_workspace(workspace, workspace_bytes(plan.scratch), request.q)
        if request.k_scale is not None:  # set for every 8-bit cache
            request = request._replace(k_cache=as_int32(request.k_cache), v_cache=as_int32(request.v_cache))
        plan.launch(request, outputs, workspace)
    elif plan.is_empty:
        write_result_without_keys(outputs)
    else:
        options = {name: getattr(request, name) for name in _OPTIONS}
        copy_outputs(outputs, reference_cached_forward(*cached_inputs_of(request), **options))
    return outputs


def _attend_by_operator(
    request: CacheRequest, out: Tensor | None, state: bool, workspace: Tensor | None
) -> tuple[Tensor, ...]:
    """`_attend` as one operator, for a tracer, dispatch mode, transform or tensor subclass."""
    request = with_contiguous_heads(request)
    check_cached(request, out, state)
    refuse_cache_tangents(request)
    refuse_gradients(request)
    if workspace is not None:
        check_workspace_type(workspace, request.q)
    if is_sharded(*cached_inputs_of(request)):
        outputs = _attend_shards(request, state)
    else:
        request = _with_kernel_inputs(request)
        outputs = _attention_with_state(*request) if state else (_attention(*request),)
    return outputs if out is None else (out.copy_(outputs[0]), *outputs[1:])


def _attend_shards(request: CacheRequest, state: bool) -> tuple[Tensor, ...]:
    """`_attend` of DTensors."""

    def attend(*local: Any) -> tuple[Tensor, ...]:
        outputs = parallax_attn_with_kvcache(**CacheRequest(*local)._asdict(), return_state=state)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    queries = DENSE if request.cu_seqlens_q is None else PACKED
    cache = DENSE if request.page_table is None else PAGES
    dims = {"q": queries, "r": queries, "k_cache": cache, "v_cache": cache, "cu_seqlens_q": REPLICATED}
    for name in ("cache_seqlens", "page_table", "cache_leftpad"):
        dims[name] = PER_SEQUENCE if request.cu_seqlens_q is None else REPLICATED
    for name in ("k_scale", "v_scale"):
        scale, kv_heads = getattr(request, name), request.k_cache.shape[2]
        dims[name] = Dims(None, 0) if isinstance(scale, Tensor) and len(scale) == kv_heads > 1 else REPLICATED
    return run_on_shards(attend, request, dims, CACHED_INPUTS)


def _run(*arguments: Any, state: bool) -> tuple[Tensor, ...]:
    """The implementation of the operators."""
    request, plan = _planned(CacheRequest(*arguments), None, state)
    workspace = workspace_for_one_launch(plan.scratch, request.q.device) if isinstance(plan, LaunchPlan) else None
    return _attend(request, plan, None, state, workspace)


_attention, _attention_with_state = define_operators(_run)

_plans: PlanCache[LaunchPlan | HostPlan] = PlanCache()


def _planned(
    request: CacheRequest, out: Tensor | None, return_state: bool
) -> tuple[CacheRequest, LaunchPlan | HostPlan]:
    """The request with everything that the kernel reads as tensors, and its plan."""
    key = plan_key(*request, out, return_state, rounds_to_tf32(request.q))
    plan = _plans.get(key)
    if plan is None:
        check_cached(request, out, return_state)
    request = _with_kernel_inputs(request)
    if plan is None:
        plan = _plan(request, return_state)
        _plans.remember(key, plan)
    if request.cache_seqlens is None and isinstance(plan, LaunchPlan) and plan.per_sequence_lengths:
        batch, seqlen = request.k_cache.shape[:2]
        lengths = torch.full((batch,), seqlen, dtype=torch.int32, device=request.q.device)
        request = request._replace(cache_seqlens=lengths)
    return request, plan


def _with_kernel_inputs(request: CacheRequest) -> CacheRequest:
    """A checked request with its length and scales as the kernel reads them. Checks what plan keys leave out."""
    length = request.cache_seqlens
    if length is not None and not isinstance(length, Tensor):
        k_cache, v_cache = request.k_cache.narrow(1, 0, length), request.v_cache.narrow(1, 0, length)
        request = request._replace(k_cache=k_cache, v_cache=v_cache, cache_seqlens=None)
    if request.k_cache.dtype in CACHE_DTYPE_NAMES:
        check_four_byte_alignment(request)
        request = _with_scales(request)
    return request


def _plan(request: CacheRequest, state: bool) -> LaunchPlan | HostPlan:
    q, k = request.q, request.k_cache
    page_size = 0 if request.page_table is None else k.shape[1]
    seqlen = k.shape[1] if request.page_table is None else page_size * request.page_table.shape[1]
    batch, seqlen_q = q.shape[0], q.shape[1]
    packed = request.cu_seqlens_q is not None
    if request.cu_seqlens_q is not None:
        assert request.max_seqlen_q is not None
        batch, seqlen_q = request.cu_seqlens_q.shape[0] - 1, request.max_seqlen_q
    host = HostPlan(is_empty=True) if 0 in (batch, seqlen, seqlen_q) else host_plan(q, k)
    if host is not None:
        return host
    heads, kv_heads, head_dim = q.shape[-2], k.shape[2], q.shape[-1]
    multi_token = packed or seqlen_q > 1
    window = window_of(request.window_size, seqlen, batch_invariant=request.batch_invariant)
    per_sequence_lengths = (
        multi_token
        or state
        or request.batch_invariant
        or window > 0
        or k.dtype in CACHE_DTYPE_NAMES
        or request.cache_seqlens is not None
        or request.cache_leftpad is not None
    )
    spec = KernelSpec(
        "decode_varlen" if per_sequence_lengths else "decode",
        head_dim,
        dtype_name(q),
        group=heads // kv_heads,
        causal=window > 0 or (multi_token and request.causal),
        stats=state,
        window=window > 0,
        varlen=packed,
        page_size=page_size,
        leftpad=request.cache_leftpad is not None,
        multi_token=multi_token,
        cache_dtype=CACHE_DTYPE_NAMES.get(k.dtype, ""),
        softcap=request.softcap is not None,
        batch_invariant=request.batch_invariant,
    )
    scale = scale_or_default(request.softmax_scale, head_dim)
    scalars = launch_scalars(spec, scale, request.softcap, window, seqlen_q, 0)
    shape = Shape(batch, heads, kv_heads, seqlen_q, seqlen, window)
    return plan_launch(spec, shape, scalars, q.device.index, CACHE_NAMES)


CACHE_NAMES = {"k": "k_cache", "v": "v_cache"}  # the op's tensor names -> the request's field names

# The request's fields that the reference takes by the same names.
_OPTIONS = (
    "cache_seqlens", "page_table", "cache_leftpad", "cu_seqlens_q", "k_scale", "v_scale", "causal", "window_size",
    "softmax_scale", "softcap",
)  # fmt: skip


def _with_scales(request: CacheRequest) -> CacheRequest:
    """Make both scales tensors of the same size: (1,), or (kv_heads,) if either has one scale per kv head."""
    scales = [
        x
        if isinstance(x, Tensor)
        else torch.full((1,), 1.0 if x is None else x, dtype=torch.float32, device=request.q.device)
        for x in (request.k_scale, request.v_scale)
    ]
    size = max(len(x) for x in scales)
    k_scale, v_scale = (x if len(x) == size else x.repeat(size) for x in scales)
    return request._replace(k_scale=k_scale, v_scale=v_scale)
