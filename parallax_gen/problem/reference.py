"""The oracle: Parallax attention in float64, from its definition, and how far a result is from it.

Independent of what the kernels do: softmax over whole rows, scores written out, no running state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

# Scores written out at a time: each of the few arrays of this many float64 takes 128 MiB.
_SCORES_AT_ONCE = 1 << 24


class Reference(NamedTuple):
    """What `reference_forward` finds, in float64.

    out     (batch, seqlen_q, heads, head_dim), o
    lse     (batch, heads, seqlen_q), natural logarithm of the sum of exp(scale * q·k) over the visible keys
    t_mean  (batch, heads, seqlen_q), t̄
    v_mean  (batch, seqlen_q, heads, head_dim), v̄, which is softmax attention

    A row that sees no key has out, t_mean and v_mean 0, and lse -inf.
    """

    out: Tensor
    lse: Tensor
    t_mean: Tensor
    v_mean: Tensor


def reference_forward(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    cache_seqlens: Tensor | Sequence[int] | None = None,
) -> Reference:
    """Parallax attention of whole sequences, on the device where the inputs are; differentiable.

    q, r           (batch, seqlen_q, heads, head_dim)
    k, v           (batch, seqlen_kv, kv_heads, head_dim); query head h reads kv head h // (heads // kv_heads)
    causal         query i sees keys up to length - seqlen_q + i, where length is its sequence's
    softmax_scale  of q·k; 1 / sqrt(head_dim) when None
    cache_seqlens  (batch,), each sequence's length, 0 to seqlen_kv; keys from there on do not exist and are not read
    """
    batch, seqlen_q, heads, head_dim = _check_shapes(q, r, k, v)
    seqlen_kv, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    lengths = _check_lengths(cache_seqlens, batch, seqlen_kv)

    out = q.new_zeros((batch, seqlen_q, heads, head_dim), dtype=torch.float64)
    v_mean = torch.zeros_like(out)
    t_mean = q.new_zeros((batch, heads, seqlen_q), dtype=torch.float64)
    lse = torch.full_like(t_mean, -math.inf)
    for b, length in enumerate(lengths):
        if length == 0:
            continue
        rows = max(1, _SCORES_AT_ONCE // (group * length))
        for h in range(kv_heads):
            keys, values = k[b, :length, h].double(), v[b, :length, h].double()
            of_group = slice(h * group, (h + 1) * group)
            for first in range(0, seqlen_q, rows):
                chunk = slice(first, first + rows)
                queries = q[b, chunk, of_group].double().transpose(0, 1)  # (group, rows, head_dim)
                probes = r[b, chunk, of_group].double().transpose(0, 1)
                s = scale * queries @ keys.T  # (group, rows, keys)
                t = probes @ keys.T
                sees_any = torch.ones(s.shape[1], 1, dtype=torch.bool, device=q.device)
                if causal:
                    position = torch.arange(first, first + s.shape[1], device=q.device)[:, None] + length - seqlen_q
                    visible = torch.arange(length, device=q.device) <= position
                    sees_any = visible.any(dim=1, keepdim=True)
                    # A row that sees nothing gets finite scores here and zeros below: no NaN, in gradients either.
                    s = s.masked_fill(~visible & sees_any, -math.inf)
                p = s.softmax(dim=-1) * sees_any
                t_bar = (p * t).sum(dim=-1, keepdim=True)
                out[b, chunk, of_group] = (p * (1 + t_bar - t) @ values).transpose(0, 1)
                v_mean[b, chunk, of_group] = (p @ values).transpose(0, 1)
                t_mean[b, of_group, chunk] = t_bar[..., 0]
                lse[b, of_group, chunk] = s.logsumexp(dim=-1).masked_fill(~sees_any[:, 0], -math.inf)
    return Reference(out, lse, t_mean, v_mean)


@dataclass(frozen=True)
class Errors:
    """How far a result is from the oracle's. NaN on either side makes all of them inf.

    relative  ||out - ref|| / ||ref||, over everything
    worst     the same for the worst row (last dimension): one wrong row in many hardly shows in `relative`
    maximum   the largest |out - ref|
    """

    relative: float
    worst: float
    maximum: float


def errors(out: Tensor, ref: Tensor) -> Errors:
    """The errors of `out` against `ref`, in float64. Infinities that agree are no error, and 0 / 0 is none."""
    difference, expected = _difference(out, ref)
    if difference.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    return Errors(
        relative=_ratio(difference.norm(), expected.norm()).item(),
        worst=_row_errors(difference, expected).max().item(),
        maximum=difference.abs().max().item(),
    )


# The relative error that a right kernel keeps below: four times what its rounding makes, except fp32.
# A kernel rounds p, p·t and o to the input dtype, each by up to u of its size (bf16 2^-9, fp16 2^-12), some u/2 in
# the mean; o = v̄ (1 + t̄) - Σ p t v is a difference of terms up to 1 + 2|t| times its size, and |t| is about 1. With
# just these roundings the error was 2.3e-3 to 2.6e-3 in bf16 and 2.8e-4 to 3.1e-4 in fp16, on random_inputs of 64 to
# 8192 keys. In fp32 sums and exponentials are what errs, 4.4e-7 here; the room is for other orders of summation and
# coarser exponentials, and still tells fp32 from tf32 (2^-11).
_TOLERANCE = {"bf16": 1e-2, "fp16": 1.25e-3, "fp32": 2e-5}
# A single row may be this many times worse: |t| reaches 5 somewhere in a large batch. Measured: 1.04 times.
_WORST_ROW = 5


def tolerance(dtype: str) -> float:
    """The largest `Errors.relative` that rounding explains, for unit-variance inputs of `dtype`."""
    if dtype not in _TOLERANCE:
        raise ArgumentError("dtype", repr(dtype), ", ".join(_TOLERANCE))
    return _TOLERANCE[dtype]


def why_wrong(out: Tensor, ref: Tensor, dtype: str) -> str | None:
    """How and where `out` is further from `ref` than rounding explains; None when it is not."""
    found, allowed = errors(out, ref), tolerance(dtype)
    allowed_row = _WORST_ROW * allowed
    if found.relative <= allowed and found.worst <= allowed_row:
        return None
    difference, expected = _difference(out, ref)
    rows = _row_errors(difference, expected)
    at = _index_of_largest(difference.abs())
    return (
        f"relative error {found.relative:.3g} ({allowed:g} allowed for {dtype}); "
        f"{int((rows > allowed_row).sum())} of {rows.numel()} rows beyond {allowed_row:g}, "
        f"the worst, {found.worst:.3g}, at {_index_of_largest(rows)}; "
        f"largest difference {found.maximum:.3g} at {at}: {out.reshape(difference.shape)[at].item():.6g}, "
        f"not {ref.reshape(difference.shape)[at].item():.6g}"
    )


def assert_close(out: Tensor, ref: Tensor, dtype: str) -> None:
    """Raises AssertionError with what `why_wrong` says, if anything."""
    reason = why_wrong(out, ref, dtype)
    if reason is not None:
        raise AssertionError(reason)


class Inputs(NamedTuple):
    """The tensors of one call; in this order, arguments of `reference_forward` and of the kernels."""

    q: Tensor
    r: Tensor
    k: Tensor
    v: Tensor


def random_inputs(spec: KernelSpec, shape: Shape, *, seed: int, device: torch.device | str | None = None) -> Inputs:
    """Normal q, k and v of unit variance, and r so small that t is of unit variance too; in the spec's dtype.

    The same seed gives the same numbers on the same kind of device (torch's default one when None).
    """
    if shape.group != spec.group:
        raise ArgumentError("shape", f"{shape.group} query heads a kv head", f"the spec's {spec.group}")
    if spec.op == "decode" and shape.seqlen_q != 1:
        raise ArgumentError("shape", f"seqlen_q {shape.seqlen_q}", "seqlen_q 1 for decode")
    where = torch.get_default_device() if device is None else torch.device(device)
    generator = torch.Generator(device=where).manual_seed(seed)

    def normal(seqlen: int, heads: int) -> Tensor:
        size = (shape.batch, seqlen, heads, spec.head_dim)
        return torch.randn(size, dtype=torch_dtype(spec.dtype), device=where, generator=generator)

    q, r = normal(shape.seqlen_q, shape.heads), normal(shape.seqlen_q, shape.heads)
    k, v = normal(shape.seqlen_kv, shape.kv_heads), normal(shape.seqlen_kv, shape.kv_heads)
    return Inputs(q, r * spec.head_dim**-0.5, k, v)


_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a spec's dtype."""
    if name not in _TORCH_DTYPES:
        raise ArgumentError("dtype", repr(name), ", ".join(_TORCH_DTYPES))
    return _TORCH_DTYPES[name]


def _difference(out: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """out - ref and ref in float64, at least 1-D: NaN made inf, and infinities that agree made 0 in both."""
    if out.shape != ref.shape:
        raise ArgumentError("out", tuple(out.shape), f"the reference's shape, {tuple(ref.shape)}")
    actual, expected = (x.detach().double().reshape(x.shape or (1,)) for x in (out, ref))
    agree = (actual == expected) & actual.isinf()
    difference = (actual - expected).masked_fill(agree, 0.0)
    return difference.masked_fill(difference.isnan(), math.inf), expected.masked_fill(agree, 0.0)


def _row_errors(difference: Tensor, expected: Tensor) -> Tensor:
    """Each row's relative error; a row far smaller than the others is measured against a tenth of their size.

    The tenth is for rows that happen to be near zero, such as a single t̄. A row of zeros must be zeros.
    """
    sizes = expected.norm(dim=-1)
    floor = sizes.square().mean().sqrt() / 10
    return _ratio(difference.norm(dim=-1), torch.where(sizes == 0, sizes, sizes.maximum(floor)))


def _ratio(size: Tensor, expected: Tensor) -> Tensor:
    """size / expected, where 0 / 0 is 0 and what is not finite is inf."""
    return torch.where(size == 0, size, size / expected).nan_to_num(nan=math.inf, posinf=math.inf)


def _index_of_largest(values: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(values.argmax(), values.shape))


def _check_shapes(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    if q.dim() != 4:
        raise ArgumentError("q", tuple(q.shape), "4 dimensions: (batch, seqlen_q, heads, head_dim)")
    batch, seqlen_q, heads, head_dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != head_dim:
        raise ArgumentError("k", tuple(k.shape), f"({batch}, seqlen_kv, kv_heads, {head_dim}), as q's shape implies")
    if k.shape[2] < 1 or heads % k.shape[2]:
        raise ArgumentError("k", f"{k.shape[2]} kv heads", f"a divisor of q's {heads} heads")
    for name, tensor, of, other in (("r", r, "q", q), ("v", v, "k", k)):
        if tensor.shape != other.shape:
            raise ArgumentError(name, tuple(tensor.shape), f"{tuple(other.shape)}, the shape of {of}")
    return batch, seqlen_q, heads, head_dim


def _check_lengths(cache_seqlens: Tensor | Sequence[int] | None, batch: int, seqlen_kv: int) -> list[int]:
    if cache_seqlens is None:
        return [seqlen_kv] * batch
    given = torch.as_tensor(cache_seqlens)
    if given.dtype not in (torch.int32, torch.int64) or given.shape != (batch,):
        raise ArgumentError(
            "cache_seqlens", f"{given.dtype} of shape {tuple(given.shape)}", f"ints of shape ({batch},)"
        )
    lengths: list[int] = given.tolist()
    if not all(0 <= length <= seqlen_kv for length in lengths):
        raise ArgumentError("cache_seqlens", lengths, f"0 to {seqlen_kv}")
    return lengths
