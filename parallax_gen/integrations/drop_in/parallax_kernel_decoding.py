"""parallax-kernel's decoding: one query per sequence over dense caches, and a decode step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.drop_in.calls import decode
from parallax_gen.integrations.drop_in.checks import (
    ArgumentAssertionError,
    ArgumentTypeError,
    UnsupportedArgumentError,
    check_heads,
    check_same_dtype_and_device,
    parse_scale,
    parse_window,
)
from parallax_gen.runtime import graphed
from parallax_gen.runtime.transforms import refuse_transforms, transform_is_active

GROUPS = (1, 2, 4, 8)
HEAD_DIMS = (64, 128)
OUR_FUNCTION = "parallax_gen.parallax_attn_with_kvcache"


def parallax_attn_with_kvcache(
    q: Tensor,
    r: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    page_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    window_size: Any = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one new query per sequence over its cached keys, including its own. Does not write to the caches.

    q, r              (batch, 1, heads, head_dim), bf16 or fp16, contiguous; head_dim 64 or 128
    k_cache, v_cache  (batch, seqlen, kv_heads, head_dim), of q's dtype, contiguous; heads / kv_heads is 1, 2, 4 or 8
    page_table        must be None: parallax-kernel has no pages. `parallax_gen.parallax_attn_with_kvcache` supports
                      pages, other head_dims and ratios of heads, and more queries
    seqused_k         (batch,) int32 on the same device: each sequence's number of keys, 1 to seqlen; its query is at
                      the last of them. All keys by default. The values are checked, which waits for the device, except
                      during CUDA graph capture and torch.compile tracing: there values above seqlen count as seqlen,
                      and 0 gives 0. Keys beyond the end may be NaN
    window_size       the largest number of keys that a query sees: an int, or (left, right) with left that number and
                      right at most 0; None or a negative number for no limit
    scale             scale of q·k; 1/√head_dim by default
    out               where to write, like q; allocated if not given

    Returns out. There are no gradients. Raises TypeError, ValueError, AssertionError and NotImplementedError where
    parallax-kernel does; all are ArgumentErrors.
    """
    if page_table is not None:
        raise UnsupportedArgumentError("page_table", "a tensor", f"None. {OUR_FUNCTION} supports paged caches")
    _check(q, r, out, k_cache=k_cache, v_cache=v_cache)
    if seqused_k is not None:
        _check_lengths("seqused_k", seqused_k, q, k_cache)
    window = parse_window("window_size", _left_window(window_size))
    scale = parse_scale("scale", scale, q.shape[-1])
    return decode(q, r, k_cache, v_cache, scale=scale, window=window, lengths=seqused_k, out=out)


def parallax_decode(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: float,
    *,
    window_size_left: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """`parallax_attn_with_kvcache` over whole caches; parallax-kernel deprecates it in favour of that function."""
    window = parse_window("window_size_left", window_size_left)
    _check(q, r, out, k=k, v=v)
    return decode(q, r, k, v, scale=parse_scale("qk_scale", qk_scale, q.shape[-1]), window=window, out=out)


class GraphedDecode:
    """parallax-kernel's class, not `parallax_gen.GraphedDecode`: a decode step of fixed sizes as a CUDA graph.

    It has its own tensors for each step's inputs.

        step = GraphedDecode(B=1, H=32, H_kv=8, max_kv_len=16384)
        step.k[:, t - 1], step.v[:, t - 1] = k_t, v_t
        out = step(q=q_t, r=r_t, cache_seqlens=t)  # or write to q, r and cache_seqlens, and replay()

    B, H, H_kv     sequences, query heads, and kv heads, H by default
    max_kv_len     capacity of k and v in keys
    kv_len         instead of max_kv_len: a fixed number of keys; then there is no cache_seqlens
    head_dim, dtype, window_size, scale  as in `parallax_attn_with_kvcache`
    device         without a graph on a CPU, where replay runs the reference
    warmup         ignored; in parallax-kernel the number of launches before the capture

    q, r, out          (B, 1, H, head_dim)
    k, v               (B, max_kv_len, H_kv, head_dim). Keys beyond a sequence's end may be anything
    cache_seqlens      (B,) int32, initially max_kv_len; None with kv_len
    graph              the CUDAGraph; None on a CPU

    Raises ValueError, AssertionError and NotImplementedError where parallax-kernel does; all are ArgumentErrors.
    """

    def __init__(
        self,
        B: int,
        H: int,
        max_kv_len: int | None = None,
        head_dim: int = 128,
        *,
        H_kv: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        window_size: Any = None,
        scale: float | None = None,
        device: torch.device | str = "cuda",
        warmup: int = 3,
        kv_len: int | None = None,
    ):
        seqlen = kv_len if max_kv_len is None else max_kv_len
        if seqlen is None or None not in (max_kv_len, kv_len):
            got = "neither it nor kv_len" if seqlen is None else f"{max_kv_len} and kv_len {kv_len}"
            raise ArgumentError("max_kv_len", got, "exactly one of max_kv_len and kv_len")
        kv_heads = H if H_kv is None else H_kv
        check_heads("H_kv", H, kv_heads)
        self.q, self.r, self.out = (torch.empty(B, 1, H, head_dim, device=device, dtype=dtype) for _ in range(3))
        self.k, self.v = (torch.empty(B, seqlen, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2))
        self.max_kv_len = seqlen
        self.cache_seqlens: Tensor | None = None
        if kv_len is None:
            self.cache_seqlens = torch.full((B,), seqlen, dtype=torch.int32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        window = parse_window("window_size", _left_window(window_size))
        scale = parse_scale("scale", scale, head_dim)
        _check(self.q, self.r, self.out, k=self.k, v=self.v)
        self._step: Callable[[], object]
        if self.q.is_cuda:
            step = graphed.GraphedDecode(
                self.q, self.r, self.k, self.v, cache_seqlens=self.cache_seqlens, causal=True, window_size=window,
                softmax_scale=scale, out=self.out,
            )  # fmt: skip
            self._step, self.graph = step, step.graph
        else:
            self._step = lambda: decode(
                self.q, self.r, self.k, self.v, scale=scale, window=window, lengths=self.cache_seqlens, out=self.out
            )

    def replay(self) -> Tensor:
        """Run the step on the tensors' current contents. Returns out, overwritten."""
        self._step()
        return self.out

    def __call__(
        self,
        *,
        q: Tensor | None = None,
        r: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        cache_seqlens: Tensor | Sequence[int] | int | None = None,
    ) -> Tensor:
        """Copy the given inputs to where the graph reads them, then replay.

        cache_seqlens  one length for all sequences, or one each, 1 to max_kv_len; ignored with kv_len. Raises
                       ValueError, an ArgumentError, for other lengths
        """
        if transform_is_active():
            refuse_transforms("GraphedDecode", q=q, r=r, k=k, v=v)
        for own, new in ((self.q, q), (self.r, r), (self.k, k), (self.v, v)):
            if new is not None:
                own.copy_(new)
        if cache_seqlens is not None and self.cache_seqlens is not None:
            lengths = torch.as_tensor(cache_seqlens)
            low, high = _min_and_max(lengths)
            if low < 1 or high > self.max_kv_len:
                raise ArgumentError("cache_seqlens", f"{low} to {high}, out of range", f"1 to {self.max_kv_len}")
            if lengths.dim() == 0:
                self.cache_seqlens.fill_(low)
            else:
                self.cache_seqlens.copy_(lengths)
        return self.replay()


def _left_window(window_size: Any) -> Any:
    """The window in keys, from an int or a pair (left, right).

    Unlike FlashAttention's, left includes the query's key.
    """
    if window_size is None or isinstance(window_size, int):
        return window_size
    allowed = "None, an int, or a pair (left, right) of ints with right at most 0"
    try:
        left, right = window_size
        left, right = int(left), int(right or 0)
    except (TypeError, ValueError):
        raise ArgumentError("window_size", repr(window_size), allowed) from None
    if right > 0:
        raise ArgumentError("window_size", f"right {right}", allowed)
    return left


def _check_lengths(name: str, lengths: Tensor, q: Tensor, k_cache: Tensor) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int32:
        raise ArgumentTypeError(name, getattr(lengths, "dtype", type(lengths).__name__), "a tensor in int32")
    if lengths.shape != q.shape[:1]:
        raise ArgumentError(name, f"shape {tuple(lengths.shape)}", f"{name} must have shape ({q.shape[0]},)")
    if lengths.device != q.device:
        raise ArgumentError(name, f"on {lengths.device}", f"on {q.device}, where q is")
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    low, high = _min_and_max(lengths)
    allowed = f"1 to {k_cache.shape[1]}"
    if high > k_cache.shape[1]:
        raise ArgumentError(name, f"{high}, which exceeds k_cache.shape[1]", allowed)
    if low < 1:
        raise ArgumentError(name, f"{low}; values < 1 are not lengths", allowed)


def _min_and_max(lengths: Tensor) -> tuple[int, int]:
    """The shortest and the longest length; 1 and 1 if there are no sequences. Copies once from the device."""
    values = lengths.flatten().tolist() or [1]
    return min(values), max(values)


def _check(q: Tensor, r: Tensor, out: Tensor | None, **caches: Tensor) -> None:
    """Check that the tensors are ones that parallax-kernel accepts.

    caches  keys and values, by the caller's argument names
    """
    tensors = {"q": q, "r": r, **caches}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(name, type(x).__name__, "a tensor")
        if not x.is_contiguous():
            raise ArgumentAssertionError(name, f"strides {x.stride()}", "a contiguous tensor")
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ArgumentAssertionError("q", q.dtype, "bf16 or fp16")
    if q.dim() != 4 or q.shape[1] != 1:
        raise ArgumentAssertionError("q", f"shape {tuple(q.shape)}", "(batch, 1, heads, head_dim)")
    batch, _, heads, head_dim = q.shape
    if r.shape != q.shape:
        raise ArgumentAssertionError("r", f"shape {tuple(r.shape)}", f"{tuple(q.shape)}, q's shape")
    (k_name, k), (v_name, v) = caches.items()
    if k.dim() != 4 or (k.shape[0], k.shape[3]) != (batch, head_dim):
        allowed = f"({batch}, seqlen, kv_heads, {head_dim}), to match q"
        raise ArgumentAssertionError(k_name, f"shape {tuple(k.shape)}", allowed)
    kv_heads = k.shape[2]
    check_heads(k_name, heads, kv_heads)
    if heads // kv_heads not in GROUPS:
        allowed = f"heads / kv_heads (pack_n) of {', '.join(map(str, GROUPS))}. {OUR_FUNCTION} supports any"
        raise UnsupportedArgumentError(k_name, f"{kv_heads} kv heads for {heads} heads", allowed)
    if v.shape != k.shape:
        raise ArgumentAssertionError(v_name, f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, the shape of {k_name}")
    if head_dim not in HEAD_DIMS:
        allowed = f"{' or '.join(map(str, HEAD_DIMS))}. {OUR_FUNCTION} supports others"
        raise ArgumentAssertionError("q", f"head_dim {head_dim}", allowed)
    check_same_dtype_and_device(tensors)
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype):
        got = f"{out.dtype} of shape {tuple(out.shape)}"
        raise ArgumentAssertionError("out", got, f"{q.dtype} of shape {tuple(q.shape)}, as q is")
