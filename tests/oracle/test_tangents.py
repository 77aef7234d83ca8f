"""The formula of the forward derivative against torch's forward-mode AD through the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parallax_gen.oracle import reference
from parallax_gen.oracle.partial import reference_tangent, reference_varlen_tangent
from parallax_gen.oracle.reference import reference_forward, reference_varlen_forward

MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"causal": True, "window_size": 2, "softmax_scale": 0.4}]


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


def inputs(rows: tuple[int, ...], keys: tuple[int, ...]) -> tuple[Tensor, ...]:
    """4 query heads and 2 kv heads of width 8; q and r differ, and so do k and v."""
    return normal(*rows, 4, 8), normal(*rows, 5, 8)[..., 1:, :], normal(*keys, 2, 8), normal(*keys, 3, 8)[..., 1:, :]


@pytest.mark.parametrize("options", MASKS, ids=["full", "causal", "window"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(5, 7), (7, 4), (3, 0)])
def test_the_formula_agrees_with_autodiff(
    seqlen_q: int, seqlen_kv: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 45)  # several blocks per head
    arguments = inputs((1, seqlen_q), (1, seqlen_kv))
    changes = tuple(torch.randn_like(x) for x in arguments)
    expected = torch.func.jvp(lambda *x: reference_forward(*x, **options).out, arguments, changes)[1]
    torch.testing.assert_close(reference_tangent(*arguments, changes, **options), expected)


def test_inputs_without_tangents() -> None:
    arguments = inputs((1, 3), (1, 4))
    changes = tuple(torch.randn_like(x) for x in arguments)
    for place in range(4):
        single_change = [changes[i] if i == place else None for i in range(4)]
        zeros = [torch.zeros_like(x) if d is None else d for x, d in zip(arguments, single_change, strict=True)]
        torch.testing.assert_close(reference_tangent(*arguments, single_change), reference_tangent(*arguments, zeros))


@pytest.mark.parametrize("options", MASKS, ids=["full", "causal", "window"])
def test_packed_sequences(options: dict[str, Any]) -> None:
    """One sequence has no queries, one no keys, and the last rows are padding."""
    starts = ([0, 2, 2, 4, 8], [0, 3, 4, 4, 9])  # lists, because torch 2.9 has no Tensor.tolist under a transform
    arguments = inputs((10,), (12,))
    changes = tuple(torch.randn_like(x) for x in arguments)
    expected = torch.func.jvp(lambda *x: reference_varlen_forward(*x, *starts, **options).out, arguments, changes)[1]
    result = reference_varlen_tangent(*arguments, changes, *starts, **options)
    torch.testing.assert_close(result, expected)
    assert not result[8:].any()


def test_no_sequences() -> None:
    arguments = inputs((0, 5), (0, 7))
    assert reference_tangent(*arguments, arguments).shape == (0, 5, 4, 8)
    arguments = inputs((3,), (4,))
    starts = torch.zeros(1, dtype=torch.int32)
    assert not reference_varlen_tangent(*arguments, arguments, starts, starts).any()
