"""GPUs' arithmetic in Triton's CPU interpreter: bf16, and the instructions that kernels name in inline assembly.

The interpreter stores bf16 as raw bits. It multiplies matrices of those bits as if they were integers, it truncates
where a GPU rounds to nearest even, and it has no inline assembly. With the functions here a kernel's error in bf16 is
that on a GPU, so tests without one see which roundings a kernel suffers from.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


def use_in_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Patch the interpreter of this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast, convert = (getattr(InterpreterBuilder, name) for name in ("create_dot", "cast_impl", "create_fp_to_fp"))

    def in_fp32(x: Any) -> Any:
        """bf16 as fp32: products of bf16 are exact there."""
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounds_to_bf16(x: Any, to: Any) -> bool:
        return bool(x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16)

    def in_bf16(x: Any) -> Any:
        return TensorHandle(bf16_bits(x.data), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, in_fp32(a), in_fp32(b), *others)

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        return in_bf16(x) if rounds_to_bf16(x, to) else cast(self, x, to)

    def create_fp_to_fp(self: Any, x: Any, to: Any, rounding_mode: Any) -> Any:
        return in_bf16(x) if rounds_to_bf16(x, to) else convert(self, x, to, rounding_mode)

    def create_inline_asm(self: Any, asm: str, constraints: str, inputs: Any, types: Any, pure: bool, pack: int) -> Any:
        results = INSTRUCTIONS[asm.split()[0]](*(x.data for x in inputs))
        return SimpleNamespace(
            get_result=[TensorHandle(x, t.scalar) for x, t in zip(results, types, strict=True)].__getitem__
        )

    for replacement in (create_dot, cast_impl, create_fp_to_fp, create_inline_asm):
        patch.setattr(InterpreterBuilder, replacement.__name__, replacement)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """The bits of the bf16 numbers nearest to fp32 numbers, of two equally near ones the even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    of_nan = (bits >> 16) | 0x40  # rounding could turn a NaN into an infinity
    return np.where(np.isnan(x), of_nan, nearest).astype(np.uint16)


def tanh_approx(x: np.ndarray) -> tuple[np.ndarray]:
    """tanh.approx.f32, with errors up to its bound of 2^-11 of the tanh: rounded to 11 significant bits."""
    return (((np.tanh(x).view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32),)


def zeros(index: np.ndarray) -> tuple[np.ndarray]:
    """mov.f32 of 0."""
    return (np.zeros(index.shape, np.float32),)


INSTRUCTIONS: dict[str, Callable[..., tuple[np.ndarray, ...]]] = {
    "tanh.approx.f32": tanh_approx,
    "mov.f32": zeros,
}
