"""Errors of gradients whose terms cancel are measured relative to the size of the terms."""

from __future__ import annotations

import pytest
import torch

from parallax_gen.oracle.accuracy import errors, why_wrong


@pytest.fixture
def ref() -> torch.Tensor:
    """Four rows of norm 1, except for the first, whose terms nearly cancel."""
    rows = torch.eye(4, 8, dtype=torch.float64)
    rows[0] *= 1e-3
    return rows


def test_one_term_size_for_all_rows_equals_the_same_size_per_row(ref: torch.Tensor) -> None:
    out = ref + 1e-3
    assert errors(out, ref, 3.0) == errors(out, ref, torch.full((4,), 3.0, dtype=torch.float64))


def test_a_row_of_larger_terms_may_err_by_more(ref: torch.Tensor) -> None:
    out, natural = ref.clone(), torch.tensor([100.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    out[0, 1] = 0.2
    assert errors(out, ref, 1.0).worst == pytest.approx(0.2 / (3 / 4) ** 0.5, rel=1e-3)  # relative to the rows' mean
    assert errors(out, ref, natural).worst == pytest.approx(0.2 / 5, rel=1e-3)  # relative to a 20th of its terms
    out[0, 1], out[1, 1] = 0.0, 0.2  # the same error in other rows is too large
    assert errors(out, ref, natural).worst == errors(out, ref, 1.0).worst


def test_a_gradient_that_is_pure_rounding_error(ref: torch.Tensor) -> None:
    """Its size then counts as a fifth of the size of its terms, row by row."""
    nothing, natural = 0 * ref, torch.tensor([4.0, 4.0, 2.0, 0.0], dtype=torch.float64)
    out = nothing.clone()
    out[0, 0] = 0.06
    assert errors(out, nothing, natural).relative == pytest.approx(0.06 / (0.2 * 6))
    assert why_wrong(out, nothing, "bf16", natural) is not None  # five times the allowed error
    out[0, 0] = 0.009
    assert why_wrong(out, nothing, "bf16", natural) is None
