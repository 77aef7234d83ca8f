"""Argument checks of the public functions: run before any launch; each error names its argument.

torch.compile traces these checks, so symbolic sizes are only compared with each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.spec import LARGEST_HEAD_DIM
from parallax_gen.runtime.requests import DTYPE_NAMES, INPUTS, MAX_ROW_STRIDE, Request, inputs_of

# The bounds of softmax_scale and softcap: their quotient is a normal number of fp32.
SMALLEST_SCALE, LARGEST_SCALE = 1e-18, 1e18


def check_numbers(causal: bool, window: int | None, softmax_scale: float | None, softcap: float | None) -> None:
    """Check the arguments that are not tensors. Raises ArgumentError."""
    check_flag("causal", causal)
    if window is not None:
        if not is_int(window) or window < 1:
            raise ArgumentError("window_size", repr(window), "an int of 1 or more, or None for no window")
        if not causal:
            raise ArgumentError("window_size", f"{window} without causal", "None, or a window with causal=True")
    _check_positive("softmax_scale", softmax_scale)
    _check_positive("softcap", softcap, ", or None for no cap")


def check_request(request: Request, packed: bool, out: Tensor | None = None) -> None:
    """Check a whole request. Raises ArgumentError for the first unusable argument."""
    check_numbers(request.causal, request.window_size, request.softmax_scale, request.softcap)
    for name, longest in (("max_seqlen_q", request.max_seqlen_q), ("max_seqlen_k", request.max_seqlen_k)):
        if not is_int(longest) or longest < 0:
            raise ArgumentError(name, repr(longest), "an int of 0 or more")
    q = request.q
    check_inputs(*inputs_of(request), packed=packed)
    if q.shape[-1] % 8 or not 0 < q.shape[-1] <= LARGEST_HEAD_DIM:
        raise ArgumentError("q", f"head_dim {q.shape[-1]}", f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
    if packed:
        _check_packing(request)
    check_out(out, q)


def check_inputs(q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, packed: bool = False) -> None:
    """Check that q, r, k and v fit each other. Raises ArgumentError for the first that does not."""
    layout = ("total", "heads", "head_dim") if packed else ("batch", "seqlen", "heads", "head_dim")
    for name, tensor in zip(INPUTS, (q, r, k, v), strict=True):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(name, type(tensor).__name__, "a tensor")
        if tensor.dim() != len(layout):
            allowed = f"{len(layout)} dimensions: ({', '.join(layout)})"
            raise ArgumentError(name, f"shape {tuple(tensor.shape)}", allowed)
        if tensor.dtype not in DTYPE_NAMES:
            raise ArgumentError(name, tensor.dtype, ", ".join(DTYPE_NAMES.values()))
        if tensor.dtype != q.dtype:
            raise ArgumentError(name, tensor.dtype, f"{q.dtype}, as q has")
        if tensor.device != q.device:
            raise ArgumentError(name, f"on {tensor.device}", f"on {q.device}, where q is")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ArgumentError(name, f"strides {tensor.stride()}", "a contiguous last dimension (stride 1)")
        if tensor.stride(-3) > MAX_ROW_STRIDE:
            raise ArgumentError(name, f"{tensor.stride(-3)} elements from row to row", f"at most {MAX_ROW_STRIDE}")
    if q.device.type not in ("cuda", "cpu"):
        raise ArgumentError("q", f"on {q.device}", "a CUDA or CPU tensor")
    *batch, _, heads, head_dim = q.shape
    if r.shape != q.shape:
        raise ArgumentError("r", f"shape {tuple(r.shape)}", f"{tuple(q.shape)}, q's shape")
    if list(k.shape[:-3]) != batch or k.shape[-1] != head_dim:
        matching = ", ".join(map(str, (*batch, layout[-3], layout[-2], head_dim)))
        raise ArgumentError("k", f"shape {tuple(k.shape)}", f"({matching}), to match q")
    if k.shape[-2] == 0 or heads == 0 or heads % k.shape[-2]:
        raise ArgumentError(
            "k", f"{k.shape[-2]} kv heads", f"a divisor of q's {heads} heads, in the dimension before head_dim"
        )
    if v.shape != k.shape:
        raise ArgumentError("v", f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, the shape of k")


def check_out(out: Tensor | None, q: Tensor) -> None:
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise ArgumentError("out", type(out).__name__, "a tensor or None")
    fits = out.shape == q.shape and out.dtype == q.dtype and out.device == q.device
    if not fits or out.stride(-1) != 1:
        got = f"shape {tuple(out.shape)}, {out.dtype}, strides {out.stride()}, on {out.device}"
        allowed = f"shape {tuple(q.shape)}, {q.dtype}, on {q.device}, the last dimension contiguous"
        raise ArgumentError("out", got, allowed)


def check_flag(name: str, flag: bool) -> None:
    if type(flag) is not bool:
        raise ArgumentError(name, repr(flag), "True or False")


def _check_positive(name: str, value: float | None, otherwise: str = "") -> None:
    """Check a number that kernels multiply scores by, or divide them by: in fp32 neither may overflow."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and SMALLEST_SCALE <= value <= LARGEST_SCALE):
        allowed = f"a float or int from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}{otherwise}"
        raise ArgumentError(name, f"{value!r:.80}", allowed)


def is_int(value: object) -> bool:
    """Whether value is an int or an int symbol of torch.export."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _check_packing(request: Request) -> None:
    first, device = request.cu_seqlens_q, request.q.device
    for name, starts in (("cu_seqlens_q", first), ("cu_seqlens_k", request.cu_seqlens_k)):
        allowed = f"an int32 tensor of shape (batch + 1,), contiguous, on {device}"
        if not isinstance(starts, Tensor):
            raise ArgumentError(name, type(starts).__name__, allowed)
        valid = starts.dtype == torch.int32 and starts.dim() == 1 and starts.shape[0] > 0
        if not valid or not starts.is_contiguous() or starts.device != device:
            raise ArgumentError(name, f"{starts.dtype} of shape {tuple(starts.shape)} on {starts.device}", allowed)
        if first is not None and starts.shape != first.shape:
            raise ArgumentError(name, f"shape {tuple(starts.shape)}", f"{tuple(first.shape)}, as cu_seqlens_q has")
