"""How kernels widen the elements of 8-bit caches to 16 bits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Widening:
    """How 8-bit floats are widened to 16 bits, and how the sums are corrected for it.

    The seven bits below the sign are shifted right from the upper byte. If the exponent biases differ, the result is
    the value divided by 2^bias. Scaling each element would cost as much as widening it, so the sums are scaled after
    the last key. Until then q, r and p are scaled up by powers of two, so that no product underflows in fp32.

    wide_dtype   the 16-bit type, as the kernel writes it
    shift        by how many bits to shift; 0 if both types have the same exponents
    bias         the difference of the exponent biases
    qr_exponent  log2 of the factor of q and r: with 96, bf16 still holds values of up to 2^31
    p_exponent   log2 of the factor of p, which is at most 1 without it
    """

    wide_dtype: str
    shift: int = 0
    bias: int = 0
    qr_exponent: int = 0
    p_exponent: int = 0

    @property
    def shift_of_lower_byte(self) -> int:
        """By how many bits the lower byte is shifted left, to lie as the upper byte does after its shift."""
        return 8 - self.shift

    @property
    def magnitude_mask(self) -> str:
        """The mask of these bits in a word of two elements."""
        return f"0x{0x7F007F00 >> self.shift:08X}"

    @property
    def factor_of_scores(self) -> str:
        """The factor of k_scale in the scores' scale, as text. Those of d2, o1 and o2 follow."""
        return _power(self.bias - self.qr_exponent)

    @property
    def factor_of_d2(self) -> str:
        return _power(self.bias - self.qr_exponent - self.p_exponent)

    @property
    def factor_of_o1(self) -> str:
        return _power(self.bias - self.p_exponent)

    @property
    def factor_of_o2(self) -> str:
        return _power(2 * self.bias - self.qr_exponent - self.p_exponent)


def _power(exponent: int) -> str:
    return f"2.0**{exponent} * " if exponent else ""


WIDENINGS = {
    ("e4m3", "bf16"): Widening("tl.bfloat16", 4, 120, 96, 64),
    ("e5m2", "bf16"): Widening("tl.bfloat16", 3, 112, 96, 64),
    ("e4m3", "fp16"): Widening("tl.float16", 1, 8, 0, 8),
    ("e5m2", "fp16"): Widening("tl.float16"),
}
