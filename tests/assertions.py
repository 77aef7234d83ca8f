"""Assertions on numerical results: within the oracle's tolerance for rounding."""

from __future__ import annotations

from torch import Tensor

from parallax_gen.oracle.accuracy import why_wrong


def assert_close(out: Tensor, ref: Tensor, dtype: str, natural: float | Tensor | None = None) -> None:
    """Raises AssertionError with the reason of `why_wrong`, if there is one."""
    reason = why_wrong(out, ref, dtype, natural)
    if reason is not None:
        raise AssertionError(reason)
