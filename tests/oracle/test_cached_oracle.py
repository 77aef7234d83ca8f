"""The oracle with a KV cache, compared with the oracle of each sequence by itself."""

from __future__ import annotations

from typing import Any

import cache_samples
import pytest
import torch
from cache_samples import KV_HEADS, SequenceTensors, cache_arguments, combined, expected_of_each

from parallax_gen.oracle.kvcache import gather_pages, reference_cached_forward
from parallax_gen.oracle.reference import reference_forward

EXACT = {"rtol": 1e-11, "atol": 1e-12}  # both sides are float64
LENGTHS = (9, 0, 5, 1)
BEFORE = (0, 4, 7, 2)


def sequences(queries: Any = 1, **options: Any) -> list[SequenceTensors]:
    return cache_samples.random_sequences(LENGTHS, queries, torch.float64, **options)


def check(parts: list[SequenceTensors], layout: dict[str, Any], **options: Any) -> None:
    inputs = cache_arguments(parts, **layout)
    inputs.pop("max_seqlen_q", None)
    result = reference_cached_forward(**inputs, **options)
    expected = combined(expected_of_each(parts, **options), packed=layout.get("packed", False))
    for name, tensor, expected_tensor in zip(result._fields, result, expected, strict=True):
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, expected_tensor, msg=lambda m, name=name: f"{name}: {m}", **EXACT)


LAYOUTS = [
    pytest.param({}, id="lengths"),
    pytest.param({"before": BEFORE}, id="left padding"),
    *(pytest.param({"page_size": size}, id=f"pages of {size}") for size in (1, 4, 16)),
    pytest.param({"before": BEFORE, "page_size": 4}, id="left padding in pages"),
]
OPTIONS = [
    pytest.param({}, id="full"),
    pytest.param({"causal": True}, id="causal"),
    pytest.param({"causal": True, "window_size": 1}, id="window of 1"),
    pytest.param({"causal": True, "window_size": 3, "softmax_scale": 0.3}, id="window of 3"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("queries", [1, 3])
def test_a_cached_sequence_gives_the_result_of_the_sequence(
    queries: int, layout: dict[str, Any], options: dict[str, Any]
) -> None:
    check(sequences(queries), layout, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_queries_attend_to_their_own_sequence(layout: dict[str, Any], options: dict[str, Any]) -> None:
    """The third sequence has more queries than keys, the last one none."""
    check(sequences((4, 2, 7, 0)), {**layout, "packed": True}, **options)


def test_padding_rows_have_no_keys() -> None:
    parts = sequences((4, 2, 7, 0))
    inputs = cache_arguments(parts, packed=True)
    del inputs["max_seqlen_q"]
    for name in ("q", "r"):
        inputs[name] = torch.cat([inputs[name], torch.ones(2, *inputs[name].shape[1:], dtype=torch.float64)])
    result = reference_cached_forward(**inputs)
    torch.testing.assert_close(result.out[:13], combined(expected_of_each(parts), packed=True).out, **EXACT)
    assert not result.out[13:].any()
    assert not result.v_mean[13:].any()
    assert not result.t_mean[:, 13:].any()
    assert (result.lse[:, 13:] == -torch.inf).all()


@pytest.mark.parametrize(
    ("k_scale", "v_scale"),
    [
        (0.5, None),
        (None, 3.0),
        (torch.tensor([0.5]), torch.tensor([3.0])),
        (torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.25])),
    ],
    ids=["k alone", "v alone", "one for all heads", "one a head"],
)
@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_scales_multiply_stored_values(cache: torch.dtype, k_scale: Any, v_scale: Any) -> None:
    parts = sequences(2, cache=cache)
    result = reference_cached_forward(**cache_arguments(parts), causal=True, k_scale=k_scale, v_scale=v_scale)
    scales = {"k_scale": 1.0 if k_scale is None else k_scale, "v_scale": 1.0 if v_scale is None else v_scale}
    expected = combined(expected_of_each(parts, causal=True, **scales))
    for tensor, expected_tensor in zip(result, expected, strict=True):
        torch.testing.assert_close(tensor, expected_tensor, **EXACT)
    assert (result.out - reference_cached_forward(**cache_arguments(parts), causal=True).out).abs().max() > 0.01


def test_without_lengths_all_keys_count() -> None:
    parts = cache_samples.random_sequences((6, 6), 2, torch.float64)
    inputs = {name: torch.stack([getattr(part, of) for part in parts]) for name, of in NAMES.items()}
    result = reference_cached_forward(**inputs, causal=True)
    torch.testing.assert_close(result.out, reference_forward(*inputs.values(), causal=True).out, **EXACT)


NAMES = {"q": "q", "r": "r", "k_cache": "k", "v_cache": "v"}


def test_padding_past_the_length_leaves_no_key() -> None:
    inputs = cache_arguments(sequences(2), before=BEFORE)
    inputs["cache_leftpad"] = inputs["cache_seqlens"] + torch.tensor([0, 1, 5, 100], dtype=torch.int32)
    result = reference_cached_forward(**inputs)
    assert not result.out.any()
    assert (result.lse == -torch.inf).all()


def test_lengths_and_padding_are_clamped_to_the_cache() -> None:
    parts = cache_samples.random_sequences((6, 6), 1, torch.float64)
    inputs = {name: torch.stack([getattr(part, of) for part in parts]) for name, of in NAMES.items()}
    lengths, pads = torch.tensor([7, 600]), torch.tensor([-1, -600])
    result = reference_cached_forward(**inputs, cache_seqlens=lengths, cache_leftpad=pads)
    torch.testing.assert_close(result.out, reference_forward(*inputs.values()).out, **EXACT)


def test_pages_are_gathered_in_order() -> None:
    pages = torch.arange(5 * 2 * KV_HEADS * 8).view(5, 2, KV_HEADS, 8)
    table = torch.tensor([[3, 0], [4, cache_samples.NO_PAGE]], dtype=torch.int32)
    result = gather_pages(pages, table)
    assert result.shape == (2, 4, KV_HEADS, 8)
    assert torch.equal(result[0], torch.cat([pages[3], pages[0]]))
    assert torch.equal(result[1, :2], pages[4])  # past its end any page
