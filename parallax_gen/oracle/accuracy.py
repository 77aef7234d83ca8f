"""The error of a result against the oracle, and the largest error that rounding explains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.oracle.reference import Gradients
from parallax_gen.problem.work import scale_or_default


@dataclass(frozen=True)
class Errors:
    """The errors of a result against the oracle. NaN on either side makes all of them inf.

    relative  ||out - ref|| / ||ref||, over everything
    worst     the relative error of the worst row (last dimension): one wrong row among many hardly changes `relative`
    maximum   the largest |out - ref|
    """

    relative: float
    worst: float
    maximum: float


def errors(out: Tensor, ref: Tensor, term_size: float | Tensor | None = None) -> Errors:
    """The errors of `out` against `ref`, in float64. Equal infinities have no error, and 0 / 0 counts as no error.

    term_size  for a gradient: the size of a row's terms, see `gradient_term_sizes`; one size for all rows, or one per
               row
    """
    difference, expected = _difference(out, ref)
    if difference.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    size = expected.norm()
    if term_size is not None:
        size_of_terms = (
            torch.as_tensor(term_size, dtype=size.dtype, device=size.device).expand(expected.shape[:-1]).norm()
        )
        if size < 1e-3 * size_of_terms:
            size = 0.2 * size_of_terms  # the terms cancel, only rounding remains
    return Errors(
        relative=_ratio(difference.norm(), size).item(),
        worst=_row_errors(difference, expected, term_size).max().item(),
        maximum=difference.abs().max().item(),
    )


def gradient_term_sizes(
    q: Tensor, r: Tensor, k: Tensor, v: Tensor, do: Tensor, softmax_scale: float | None = None
) -> Gradients:
    """The norm of a row of each gradient if its terms did not cancel, as 0-D tensors.

    A query that sees one key has dq = dr = 0, the difference of two numbers of this size: a kernel's result there is
    their rounding error. So errors of gradients are relative to this size where the gradient itself is far smaller.
    """
    scale = scale_or_default(softmax_scale, q.shape[-1])
    q_size, r_size, k_size, v_size, do_size = (x.double().square().sum(-1).mean().sqrt() for x in (q, r, k, v, do))
    dp_size = do_size * v_size / q.shape[-1] ** 0.5
    dk_size = dp_size * torch.maximum(scale * q_size, r_size)
    return Gradients(dq=scale * dp_size * k_size, dr=dp_size * k_size, dk=dk_size, dv=do_size)


# The largest relative error of a correct kernel: four times the measured error of its roundings, except for fp32.
# A kernel rounds p, p·t and o to the input dtype. Rounding to bf16 is off by up to 2^-8 of a value and to fp16 by up to
# 2^-11, about a third of that in the mean. o = v̄ (1 + t̄) - Σ p t v is a difference of terms up to 1 + 2|t| times its
# size, and |t| is about 1. With only these roundings the error was 2.3e-3 to 2.6e-3 in bf16 and 2.8e-4 to 3.1e-4 in
# fp16, on random_inputs of 64 to 8192 keys. In fp32 the errors come from sums and exponentials, 4.4e-7 here; the
# tolerance allows other orders of summation and coarser exponentials, and still distinguishes fp32 from tf32 (2^-11).
# tf32 has fp16's mantissa, but the inputs of every matmul are rounded too, which fp16's are not: twice fp16's error.
# Tensor cores truncate fp32 inputs to tf32 instead of rounding them, always towards 0, which doubles it again: the
# tolerance of tf32 is four times fp16's. Measured on an H200: 3.24e-3, for a dq.
_TOLERANCE = {"bf16": 1e-2, "fp16": 1.25e-3, "fp32": 2e-5, "tf32": 5e-3}
# The tolerance of the worst row, as a multiple of `tolerance`: |t| reaches 5 in a large batch. Measured: 1.04.
_WORST_ROW = 5


def tolerance(dtype: str) -> float:
    """The largest `Errors.relative` that rounding explains, for unit-variance inputs of `dtype`."""
    if dtype not in _TOLERANCE:
        raise ArgumentError("dtype", repr(dtype), ", ".join(_TOLERANCE))
    return _TOLERANCE[dtype]


def why_wrong(out: Tensor, ref: Tensor, dtype: str, term_size: float | Tensor | None = None) -> str | None:
    """How and where `out` differs from `ref` by more than rounding explains, or None. term_size: see `errors`."""
    actual, allowed = errors(out, ref, term_size), tolerance(dtype)
    allowed_row = _WORST_ROW * allowed
    if actual.relative <= allowed and actual.worst <= allowed_row:
        return None
    difference, expected = _difference(out, ref)
    rows = _row_errors(difference, expected, term_size)
    index = _index_of_largest(difference.abs())
    return (
        f"relative error {actual.relative:.3g} ({allowed:g} allowed for {dtype}); "
        f"{int((rows > allowed_row).sum())} of {rows.numel()} rows beyond {allowed_row:g}, "
        f"the worst, {actual.worst:.3g}, at {_index_of_largest(rows)}; "
        f"largest difference {actual.maximum:.3g} at {index}: {out.reshape(difference.shape)[index].item():.6g}, "
        f"not {ref.reshape(difference.shape)[index].item():.6g}"
    )


def _difference(out: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """out - ref and ref in float64, at least 1-D. NaN becomes inf, and equal infinities become 0 in both."""
    if out.shape != ref.shape:
        raise ArgumentError("out", tuple(out.shape), f"the reference's shape, {tuple(ref.shape)}")
    actual, expected = (x.detach().double().reshape(x.shape or (1,)) for x in (out, ref))
    agree = (actual == expected) & actual.isinf()
    difference = (actual - expected).masked_fill(agree, 0.0)
    return difference.masked_fill(difference.isnan(), math.inf), expected.masked_fill(agree, 0.0)


def _row_errors(difference: Tensor, expected: Tensor, term_size: float | Tensor | None = None) -> Tensor:
    """Each row's relative error; for a row far smaller than the others, relative to a tenth of their size.

    A tenth, because some rows happen to be near zero, such as a single t̄. A row of zeros must be exactly zero, except
    in a gradient: there the first rows of a causal sequence are small differences of large numbers.
    """
    sizes = expected.norm(dim=-1)
    mean = sizes.square().mean().sqrt()
    if term_size is not None:
        minimum = 0.05 * torch.as_tensor(term_size, dtype=sizes.dtype, device=sizes.device)
        return _ratio(difference.norm(dim=-1), sizes.maximum(mean).maximum(minimum))
    least = mean / 10
    return _ratio(difference.norm(dim=-1), torch.where(sizes == 0, sizes, sizes.maximum(least)))


def _ratio(size: Tensor, expected: Tensor) -> Tensor:
    """size / expected, where 0 / 0 is 0 and a result that is not finite is inf."""
    return torch.where(size == 0, size, size / expected).nan_to_num(nan=math.inf, posinf=math.inf)


def _index_of_largest(values: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(values.argmax(), values.shape))
