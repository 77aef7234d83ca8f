"""The public functions: Parallax attention of whole sequences, and of one query against a KV cache."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from parallax_gen.codegen.calling import scratch_of
from parallax_gen.errors import ArgumentError
from parallax_gen.problem.reference import Reference, reference_forward
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import DTYPES, KernelSpec
from parallax_gen.runtime.dispatch import default_dispatcher, gpu_of_device
from parallax_gen.runtime.plan import LaunchPlan

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# Kernels add up offsets within a block of keys, of 128 at the most, in 32 bits; from block to block in 64.
FURTHEST_KEY = 2**24 - 1

# Plans are kept by everything they were checked for. A cache that grows by a key each step makes a plan each step:
# past this many, start over.
MOST_PLANS = 4096


def parallax_attn_func(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    out: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parallax attention: o_i = Σ_j p_ij (1 + t̄_i − t_ij) v_j, with p = softmax(scale·q·k), t = r·k, t̄ = Σ p t.

    (Parallax: Parameterized Local Linear Attention for Language Modeling, arXiv 2605.29157, algorithm 1. r = 0 is
    softmax attention.)

    q, r           (batch, seqlen_q, heads, head_dim), bf16, fp16 or fp32
    k, v           (batch, seqlen_kv, kv_heads, head_dim); heads is a multiple of kv_heads, and query head h
                   attends with kv head h // (heads / kv_heads)
    causal         query i sees keys up to seqlen_kv − seqlen_q + i (aligned to the end); a query that sees none gives 0
    softmax_scale  of q·k, greater than 0; 1/√head_dim by default. r·k is not scaled
    out            where to write, like q; made if not given
    return_stats   also return lse = log Σ exp(scale·q·k) and t̄, (batch, heads, seqlen_q) fp32, and v̄ = Σ p v, like q

    Any strides do that keep the last dimension contiguous. On CUDA tensors this launches one kernel on the current
    stream and waits for nothing; on CPU tensors it runs the fp64 reference. There are no gradients yet.
    Raises ArgumentError, naming the argument.
    """
    key = None
    try:
        key = (_key(q, r, k, v, out), softmax_scale, causal, return_stats)
        plan = _plans[key]
    except (KeyError, TypeError, AttributeError):  # new sizes, or arguments that are no tensors
        plan = _plan_forward(q, r, k, v, out, softmax_scale, causal, return_stats)
        _remember(key, plan)
    _refuse_gradients(q, r, k, v)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats: tuple[Tensor, ...] = ()
    if return_stats:
        rows = (q.shape[0], q.shape[2], q.shape[1])
        lse, t_mean = (torch.empty(rows, dtype=torch.float32, device=q.device) for _ in range(2))
        stats = (lse, t_mean, torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device))
    if isinstance(plan, LaunchPlan):
        plan.launch((q, r, k, v, out, *stats))
    elif plan.nothing_seen:
        _nothing_seen(out, stats)
    else:
        found = reference_forward(q, r, k, v, causal=causal, softmax_scale=plan.softmax_scale)
        _copy(found, out, stats)
    return (out, *stats) if return_stats else out  # type: ignore[return-value]


def parallax_attn_with_kvcache(
    q: Tensor,
    r: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | int | None = None,
    softmax_scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Parallax attention of one new query a sequence over its cached keys, as in a decode step.

    q, r              (batch, 1, heads, head_dim), bf16, fp16 or fp32
    k_cache, v_cache  (batch, seqlen, kv_heads, head_dim); heads is a multiple of kv_heads
    cache_seqlens     (batch,) int32 on the same device: how many keys of each sequence count, 0 to seqlen; an int
                      for all of them; None for all keys. What lies behind is never read, and may be NaN. A sequence
                      of length 0 gives 0
    softmax_scale     of q·k, greater than 0; 1/√head_dim by default. r·k is not scaled
    out               where to write, like q; made if not given

    Returns out. Any strides do that keep the last dimension contiguous. On CUDA tensors nothing is waited for, and
    the call can be captured in a CUDA graph; lengths are read on the device. See `parallax_attn_func` for the
    formula. Raises ArgumentError, naming the argument.
    """
    if isinstance(cache_seqlens, int):
        _check_inputs(q, r, k_cache, v_cache, "k_cache", "v_cache")
        k_cache, v_cache = _first_keys(k_cache, v_cache, cache_seqlens)
        cache_seqlens = None
    key = None
    try:
        key = (_key(q, r, k_cache, v_cache, out, cache_seqlens), softmax_scale)
        plan = _plans[key]
    except (KeyError, TypeError, AttributeError):  # new sizes, or arguments that are no tensors
        plan = _plan_decode(q, r, k_cache, v_cache, out, cache_seqlens, softmax_scale)
        _remember(key, plan)
    _refuse_gradients(q, r, k_cache, v_cache)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if isinstance(plan, LaunchPlan):
        lengths = () if cache_seqlens is None else (cache_seqlens,)
        plan.launch((q, r, k_cache, v_cache, out, *lengths))
    elif plan.nothing_seen:
        _nothing_seen(out, ())
    else:
        scale = plan.softmax_scale
        found = reference_forward(q, r, k_cache, v_cache, softmax_scale=scale, cache_seqlens=cache_seqlens)
        _copy(found, out, ())
    return out


@dataclass(frozen=True)
class HostPlan:
    """A call that launches no kernel: of CPU tensors, or without any key to attend to."""

    softmax_scale: float
    nothing_seen: bool


_plans: dict[object, LaunchPlan | HostPlan] = {}


def _key(*tensors: Tensor | None) -> tuple[object, ...]:
    """Everything that a plan is checked for: a call with the same key needs no further look at its tensors."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.get_device()) for x in tensors])


def _remember(key: object, plan: LaunchPlan | HostPlan) -> None:
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    _plans[key] = plan


def _plan_forward(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    return_stats: bool,
) -> LaunchPlan | HostPlan:
    for name, flag in (("causal", causal), ("return_stats", return_stats)):
        if type(flag) is not bool:
            raise ArgumentError(name, repr(flag), "True or False")
    dtype = _check_inputs(q, r, k, v, "k", "v")
    _check_out(out, q)
    group = q.shape[2] // k.shape[2]
    spec = KernelSpec("forward", q.shape[3], dtype, group=group, causal=causal, stats=return_stats)
    return _plan(spec, q, k, softmax_scale)


def _plan_decode(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cache_seqlens: Tensor | None,
    softmax_scale: float | None,
) -> LaunchPlan | HostPlan:
    dtype = _check_inputs(q, r, k, v, "k_cache", "v_cache")
    _check_out(out, q)
    if q.shape[1] != 1:
        raise ArgumentError("q", f"{q.shape[1]} queries a sequence", "1: the shape (batch, 1, heads, head_dim)")
    if cache_seqlens is not None:
        _check_lengths(cache_seqlens, q)
    group = q.shape[2] // k.shape[2]
    spec = KernelSpec("decode", q.shape[3], dtype, group=group, ragged=cache_seqlens is not None)
    return _plan(spec, q, k, softmax_scale)


def _plan(spec: KernelSpec, q: Tensor, k: Tensor, softmax_scale: float | None) -> LaunchPlan | HostPlan:
    """The plan of a call whose tensors were checked."""
    if softmax_scale is None:
        softmax_scale = float(spec.head_dim**-0.5)
    _check_scale(softmax_scale)
    if q.numel() == 0 or k.numel() == 0:
        return HostPlan(softmax_scale, nothing_seen=True)
    if not q.is_cuda:
        _warn_of_cpu()
        return HostPlan(softmax_scale, nothing_seen=False)
    index = q.device.index
    shape = Shape(q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1])
    choice, module = default_dispatcher().kernel(spec, shape, gpu_of_device(index))
    scratch = scratch_of(spec, choice.config, shape.batch, shape.kv_heads)
    return LaunchPlan(module, softmax_scale, index, scratch)


def _check_inputs(q: Tensor, r: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str) -> str:
    """The dtype's name, if the inputs fit each other. Raises ArgumentError at the first that does not."""
    named = (("q", q), ("r", r), (k_name, k), (v_name, v))
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise ArgumentError(name, type(tensor).__name__, "a tensor")
        if tensor.dim() != 4:
            raise ArgumentError(name, f"shape {tuple(tensor.shape)}", "4 dimensions: (batch, seqlen, heads, head_dim)")
        if tensor.dtype not in DTYPE_NAMES:
            raise ArgumentError(name, tensor.dtype, ", ".join(DTYPES))
        if tensor.dtype != q.dtype:
            raise ArgumentError(name, tensor.dtype, f"{q.dtype}, as q has")
        if tensor.device != q.device:
            raise ArgumentError(name, f"on {tensor.device}", f"on {q.device}, where q is")
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            raise ArgumentError(name, f"strides {tensor.stride()}", "a contiguous last dimension (stride 1)")
    if q.device.type not in ("cuda", "cpu"):
        raise ArgumentError("q", f"on {q.device}", "a CUDA or CPU tensor")
    batch, _, heads, head_dim = q.shape
    if r.shape != q.shape:
        raise ArgumentError("r", f"shape {tuple(r.shape)}", f"{tuple(q.shape)}, q's shape")
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ArgumentError(k_name, f"shape {tuple(k.shape)}", f"({batch}, seqlen, kv_heads, {head_dim}), to go with q")
    if k.shape[2] == 0 or heads == 0 or heads % k.shape[2]:
        raise ArgumentError(k_name, f"{k.shape[2]} kv heads", f"a divisor of q's {heads} heads")
    for name, tensor in ((k_name, k), (v_name, v)):
        if tensor.stride(1) > FURTHEST_KEY:
            raise ArgumentError(name, f"{tensor.stride(1)} elements from key to key", f"at most {FURTHEST_KEY}")
    if v.shape != k.shape:
        raise ArgumentError(v_name, f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, the shape of {k_name}")
    return DTYPE_NAMES[q.dtype]


def _check_lengths(cache_seqlens: object, q: Tensor) -> None:
    allowed = f"an int, or an int32 tensor of shape ({q.shape[0]},), contiguous, on {q.device}"
    if not isinstance(cache_seqlens, Tensor):
        raise ArgumentError("cache_seqlens", type(cache_seqlens).__name__, allowed)
    right = cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == q.shape[:1]
    if not right or not cache_seqlens.is_contiguous() or cache_seqlens.device != q.device:
        got = f"{cache_seqlens.dtype} of shape {tuple(cache_seqlens.shape)} on {cache_seqlens.device}"
        raise ArgumentError("cache_seqlens", got, allowed)


def _check_out(out: Tensor | None, q: Tensor) -> None:
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise ArgumentError("out", type(out).__name__, "a tensor or None")
    if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device or out.stride(3) != 1:
        got = f"shape {tuple(out.shape)}, {out.dtype}, strides {out.stride()}, on {out.device}"
        allowed = f"shape {tuple(q.shape)}, {q.dtype}, on {q.device}, the last dimension contiguous"
        raise ArgumentError("out", got, allowed)


def _check_scale(softmax_scale: float) -> None:
    if not (isinstance(softmax_scale, (int, float)) and 0 < softmax_scale < math.inf):
        raise ArgumentError("softmax_scale", repr(softmax_scale), "a number greater than 0")


def _refuse_gradients(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> None:
    if (q.requires_grad or r.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
        name = next(n for n, x in (("q", q), ("r", r), ("k", k), ("v", v)) if x.requires_grad)
        raise ArgumentError(
            name, "a tensor that needs gradients", "tensors without (there is no backward yet), or no_grad"
        )


def _first_keys(k_cache: Tensor, v_cache: Tensor, length: int) -> tuple[Tensor, Tensor]:
    if isinstance(length, bool) or not 0 <= length <= k_cache.shape[1]:
        raise ArgumentError("cache_seqlens", length, f"0 to {k_cache.shape[1]}, the keys in k_cache")
    return k_cache[:, :length], v_cache[:, :length]


def _nothing_seen(out: Tensor, stats: tuple[Tensor, ...]) -> None:
    """No key at all: every row gives 0."""
    out.zero_()
    if stats:
        lse, t_mean, v_mean = stats
        lse.fill_(-math.inf)
        t_mean.zero_()
        v_mean.zero_()


def _copy(found: Reference, out: Tensor, stats: tuple[Tensor, ...]) -> None:
    out.copy_(found.out)
    for tensor, value in zip(stats, (found.lse, found.t_mean, found.v_mean), strict=False):
        tensor.copy_(value)


@cache
def _warn_of_cpu() -> None:
    """Once a process."""
    warnings.warn("parallax_gen: these are CPU tensors; they run through the slow fp64 reference", stacklevel=5)
