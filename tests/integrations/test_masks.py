"""Our masks equal transformers' masks for every token that is not padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")

from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
    sdpa_mask,
)

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.transformers import parallax_mask
from parallax_gen.integrations.transformers.attention import cu_seqlens_of_mask, key_range


def mask_of_runs(starts_q: Tensor, starts_k: Tensor, batch: int, q_length: int, kv_length: int) -> Tensor:
    """(batch, q_length, kv_length): the causal mask of runs, aligned to the end of each run."""
    visible = torch.zeros(batch * q_length, batch * kv_length, dtype=torch.bool)
    for q, q_end, k, k_end in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True):
        rows, columns = torch.arange(q_end - q)[:, None], torch.arange(k_end - k)
        visible[q:q_end, k:k_end] = columns <= rows + (k_end - k) - (q_end - q)
    blocks = visible.view(batch, q_length, batch, kv_length)
    rows = torch.arange(batch)
    assert blocks.sum() == blocks[rows, :, rows].sum()  # sequences do not see each other
    return blocks[rows, :, rows]


def mask_of_cache(first: Tensor, end: Tensor, q_length: int, kv_length: int) -> Tensor:
    columns, last = torch.arange(kv_length), end[:, None] - q_length + torch.arange(q_length)
    return (columns >= first[:, None, None]) & (columns <= last[..., None])


@given(st.data())
def test_padding_and_caches(data: st.DataObject) -> None:
    def draw(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    batch, q_length, past = draw(1, 3), draw(1, 5), draw(0, 6)
    dropped = draw(0, past) if draw(0, 1) else 0  # dropped by a sliding-window cache
    room = draw(0, 3)  # unused slots of a static cache
    tokens = past + q_length
    kv_length = tokens - dropped + room
    attention_mask = None
    if draw(0, 3):
        first = torch.tensor([draw(0, tokens) for _ in range(batch)])[:, None]
        end = torch.tensor([draw(0, tokens) if draw(0, 1) else tokens for _ in range(batch)])[:, None]
        attention_mask = (torch.arange(tokens) >= first) & (torch.arange(tokens) < end)
    arguments: dict[str, Any] = {
        "batch_size": batch,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": torch.tensor(past) if room else past,
        "kv_offset": dropped,
        "mask_function": causal_mask_function,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": bool(draw(0, 1)),
    }
    expected = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})[:, 0]
    mask = parallax_mask(**arguments)
    if mask is None:
        result = mask_of_cache(torch.zeros(batch), torch.full((batch,), kv_length), q_length, kv_length)
    else:
        assert (mask.dtype, mask.dim()) == (torch.int32, 4)  # so transformers passes it on unchanged
        starts = cu_seqlens_of_mask(mask, q_length, kv_length)
        assert starts is not None
        result = mask_of_runs(*starts, batch, q_length, kv_length)
    real = torch.ones(batch, q_length) if attention_mask is None else attention_mask[:, past:]
    assert torch.equal(result[real.bool()], expected[real.bool()])
    keys = key_range(mask)
    if keys is not None:
        assert torch.equal(mask_of_cache(*keys, q_length, kv_length)[real.bool()], expected[real.bool()])


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_packed_sequences(lengths: list[list[int]], longer: bool) -> None:
    total = max(map(sum, lengths))
    rows = [[*row, total - sum(row)] if sum(row) < total else row for row in lengths]
    positions = torch.stack([torch.cat([torch.arange(n) + 7 * longer for n in row]) for row in rows])
    packed = find_packed_sequence_indices(positions)
    arguments: dict[str, Any] = {"batch_size": len(rows), "q_length": total, "kv_length": total}
    if packed is None:
        arguments["mask_function"] = causal_mask_function
    else:
        joined = and_masks(causal_mask_function, packed_sequence_mask_function(packed))
        arguments |= {"mask_function": joined, "allow_is_causal_skip": False}
    expected = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})[:, 0]
    mask = parallax_mask(**arguments)
    assert (mask is None) == (packed is None)
    if mask is not None:
        starts = cu_seqlens_of_mask(mask, total, total)
        assert starts is not None
        assert len(starts[0]) == sum(map(len, rows)) + 1
        assert torch.equal(mask_of_runs(*starts, len(rows), total, total), expected)


def test_non_causal_masks_are_refused() -> None:
    arguments: dict[str, Any] = {"batch_size": 2, "q_length": 4, "kv_length": 4, "allow_is_causal_skip": False}
    for function in (lambda b, h, q, k: (q >= 0) & (k >= 0), lambda b, h, q, k: (k <= q) | ((k < 2) & (q < 2))):
        with pytest.raises(ArgumentError, match="attention_mask: got attention that is not causal"):
            parallax_mask(**arguments, mask_function=function)
