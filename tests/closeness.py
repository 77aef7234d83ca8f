"""What tests ask of a result: that it is as near the oracle as rounding allows."""

from __future__ import annotations

from torch import Tensor

from parallax_gen.oracle.accuracy import why_wrong


def assert_close(out: Tensor, ref: Tensor, dtype: str, natural: float | Tensor | None = None) -> None:
    """Raises AssertionError with what `why_wrong` says, if anything."""
    reason = why_wrong(out, ref, dtype, natural)
    if reason is not None:
        raise AssertionError(reason)
