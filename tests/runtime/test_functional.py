"""The public functions without a GPU: what they accept, what they refuse and how, and what CPU tensors give."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func, parallax_attn_with_kvcache
from parallax_gen.errors import ArgumentError
from parallax_gen.problem.accuracy import assert_close
from parallax_gen.problem.reference import reference_forward, reference_varlen_forward

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def whole() -> dict[str, Any]:
    """Arguments of parallax_attn_func."""
    return {"q": normal(2, 5, 4, 64), "r": normal(2, 5, 4, 64) / 8, "k": normal(2, 7, 2, 64), "v": normal(2, 7, 2, 64)}


def packed() -> dict[str, Any]:
    """Arguments of parallax_attn_varlen_func: sequences of 2, 0 and 3 queries, and 3, 1 and 3 keys."""
    return {
        "q": normal(5, 4, 64),
        "r": normal(5, 4, 64) / 8,
        "k": normal(7, 2, 64),
        "v": normal(7, 2, 64),
        "cu_seqlens_q": torch.tensor([0, 2, 2, 5], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 3, 4, 7], dtype=torch.int32),
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
    }


def cached() -> dict[str, Any]:
    """Arguments of parallax_attn_with_kvcache."""
    k, v = normal(2, 7, 2, 64), normal(2, 7, 2, 64)
    return {"q": normal(2, 1, 4, 64), "r": normal(2, 1, 4, 64) / 8, "k_cache": k, "v_cache": v}


def test_whole_sequences_give_the_reference_and_its_statistics() -> None:
    given = whole()
    out, lse, t_mean, v_mean = parallax_attn_func(**given, causal=True, softmax_scale=0.3, return_stats=True)
    expected = reference_forward(**given, causal=True, softmax_scale=0.3)
    for found, wanted in zip((out, lse, t_mean, v_mean), expected, strict=True):
        assert_close(found, wanted, "fp32")
    assert out.dtype == torch.float32
    assert lse.shape == t_mean.shape == (2, 4, 5)


@pytest.mark.parametrize("window_size", [1, 3, 6])
def test_a_window_keeps_the_last_keys(window_size: int) -> None:
    given = whole()
    out = parallax_attn_func(**given, causal=True, window_size=window_size)
    assert_close(out, reference_forward(**given, causal=True, window_size=window_size).out, "fp32")
    assert (out - parallax_attn_func(**given, causal=True)).abs().max() > 0.01


@pytest.mark.parametrize("window_size", [7, 8, 10**9])
def test_a_window_that_holds_every_key_is_none(window_size: int) -> None:
    given = whole()
    windowed = parallax_attn_func(**given, causal=True, window_size=window_size)
    assert torch.equal(windowed, parallax_attn_func(**given, causal=True))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_size": 2, "softmax_scale": 0.3}])
def test_packed_sequences_give_the_reference_and_its_statistics(options: dict[str, Any]) -> None:
    given = packed()
    found = parallax_attn_varlen_func(**given, **options, return_stats=True)
    del given["max_seqlen_q"], given["max_seqlen_k"]
    for x, wanted in zip(found, reference_varlen_forward(**given, **options), strict=True):
        assert_close(x, wanted, "fp32")
    assert found[1].shape == found[2].shape == (4, 5)


def test_without_queries_or_keys_packed_sequences_give_zeros() -> None:
    given = packed()
    none, zeros = torch.zeros(0, 2, 64), torch.zeros(4, dtype=torch.int32)
    out = parallax_attn_varlen_func(**{**given, "k": none, "v": none, "cu_seqlens_k": zeros, "max_seqlen_k": 0})
    assert torch.equal(out, torch.zeros(5, 4, 64))
    no_batch = {"cu_seqlens_q": zeros[:1], "cu_seqlens_k": zeros[:1], "max_seqlen_q": 0, "max_seqlen_k": 0}
    empty = {"q": torch.zeros(0, 4, 64), "r": torch.zeros(0, 4, 64), "k": none, "v": none}
    assert parallax_attn_varlen_func(**empty, **no_batch).shape == (0, 4, 64)


def test_out_is_written_and_returned() -> None:
    given = cached()
    out = torch.full((2, 1, 4, 64), float("nan"))
    assert parallax_attn_with_kvcache(**given, out=out) is out
    assert_close(out, parallax_attn_with_kvcache(**given), "fp32")


def test_lengths_as_tensor_and_as_int_agree_and_hide_what_lies_behind() -> None:
    given = cached()
    given["k_cache"][:, 3:] = float("nan")
    given["v_cache"][:, 3:] = float("nan")
    lengths = torch.tensor([3, 3], dtype=torch.int32)
    by_tensor = parallax_attn_with_kvcache(**given, cache_seqlens=lengths)
    by_int = parallax_attn_with_kvcache(**given, cache_seqlens=3)
    assert_close(by_tensor, by_int.double(), "fp32")
    assert torch.isfinite(by_tensor).all()


def paged(page_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments with the cache in pages, and the same without: sequences of 5 and 7 keys, poison behind them."""
    given = cached()
    lengths = torch.tensor([5, 7], dtype=torch.int32)
    pages = -(-7 // page_size)
    table = torch.full((2, pages), 1 << 30, dtype=torch.int32)
    order = torch.randperm(2 * pages + 1, generator=torch.Generator().manual_seed(1)).tolist()
    caches = {name: torch.full((2 * pages + 1, page_size, 2, 64), float("nan")) for name in ("k_cache", "v_cache")}
    for b, length in enumerate(lengths.tolist()):
        for n in range(length):
            if n % page_size == 0:
                table[b, n // page_size] = order.pop()
            for name, cache in caches.items():
                cache[table[b, n // page_size], n % page_size] = given[name][b, n]
    return {**given, **caches, "cache_seqlens": lengths, "page_table": table}, {**given, "cache_seqlens": lengths}


@pytest.mark.parametrize("page_size", [1, 2, 3, 7, 16])
def test_a_paged_cache_is_as_one_in_one_piece(page_size: int) -> None:
    in_pages, in_one_piece = paged(page_size)
    found, wanted = parallax_attn_with_kvcache(**in_pages), parallax_attn_with_kvcache(**in_one_piece)
    assert_close(found, wanted.double(), "fp32")
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"cache_seqlens": None}, "cache_seqlens"),
        ({"cache_seqlens": 3}, "cache_seqlens"),
        ({"page_table": [[0], [1]]}, "page_table"),
        ({"page_table": torch.zeros(2, 4)}, "page_table"),
        ({"page_table": torch.zeros(3, 4, dtype=torch.int32)}, "page_table"),
        ({"page_table": torch.zeros(2, dtype=torch.int32)}, "page_table"),
        ({"page_table": torch.zeros(4, 2, dtype=torch.int32).T}, "page_table"),
        ({"k_cache": torch.zeros(9, 2, 3, 64)}, "k_cache"),
        ({"v_cache": torch.zeros(9, 3, 2, 64)}, "v_cache"),
    ],
)
def test_a_bad_argument_of_a_paged_cache_is_named(change: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parallax_attn_with_kvcache(**{**paged(2)[0], **change})
    assert caught.value.argument == argument


def test_a_page_table_without_pages_gives_zeros() -> None:
    given, nothing = paged(2)[0], torch.zeros(2, 0, dtype=torch.int32)
    lengths = torch.zeros(2, dtype=torch.int32)
    out = parallax_attn_with_kvcache(**{**given, "page_table": nothing, "cache_seqlens": lengths})
    assert torch.equal(out, torch.zeros(2, 1, 4, 64))


@pytest.mark.parametrize("length", [0, torch.tensor([0, 0], dtype=torch.int32)], ids=["int", "tensor"])
def test_a_sequence_without_keys_gives_zero(length: Any) -> None:
    assert torch.equal(parallax_attn_with_kvcache(**cached(), cache_seqlens=length), torch.zeros(2, 1, 4, 64))


def test_no_queries_give_an_empty_output_and_no_keys_give_zeros() -> None:
    given = whole()
    empty = parallax_attn_func(given["q"][:, :0], given["r"][:, :0], given["k"], given["v"])
    assert empty.shape == (2, 0, 4, 64)
    out, lse, t_mean, v_mean = parallax_attn_func(
        given["q"], given["r"], given["k"][:, :0], given["v"][:, :0], return_stats=True
    )
    assert not out.any()
    assert not t_mean.any()
    assert not v_mean.any()
    assert torch.equal(lse, torch.full((2, 4, 5), -torch.inf))


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"q": 3}, "q"),
        ({"q": torch.zeros(2, 4, 64)}, "q"),
        ({"q": torch.zeros(2, 5, 4, 64, dtype=torch.int32)}, "q"),
        ({"r": torch.zeros(2, 5, 2, 64)}, "r"),
        ({"r": torch.zeros(2, 5, 4, 64, dtype=torch.float16)}, "r"),
        ({"k": torch.zeros(2, 7, 3, 64)}, "k"),
        ({"k": torch.zeros(1, 7, 2, 64)}, "k"),
        ({"k": torch.zeros(2, 7, 64, 2).transpose(2, 3)}, "k"),
        ({"k": torch.zeros(2, 7, 2, 64, device="meta")}, "k"),
        ({"v": torch.zeros(2, 8, 2, 64)}, "v"),
        ({"v": None}, "v"),
        ({"v": torch.empty(2**24 * 6 + 64).as_strided((2, 7, 2, 64), (0, 2**24, 0, 1))}, "v"),
        ({"softmax_scale": 0.0}, "softmax_scale"),
        ({"softmax_scale": float("nan")}, "softmax_scale"),
        ({"softmax_scale": "1"}, "softmax_scale"),
        ({"causal": 2}, "causal"),
        ({"q": torch.zeros(2, 5, 4, 64, dtype=torch.float64)}, "q"),
        ({"q": torch.zeros(2, 5, 4, 64).expand(2, 5, 4, 64).transpose(2, 3)}, "q"),
        ({"softmax_scale": -1}, "softmax_scale"),
        ({"return_stats": 1}, "return_stats"),
        ({"recompute_v_mean": None}, "recompute_v_mean"),
        ({"window_size": 3}, "window_size"),
        ({"causal": True, "window_size": 0}, "window_size"),
        ({"causal": True, "window_size": True}, "window_size"),
        ({"causal": True, "window_size": 2.0}, "window_size"),
        ({"causal": True, "window_size": (2, 0)}, "window_size"),
        ({"out": torch.zeros(2, 5, 4, 32)}, "out"),
        ({"out": 1}, "out"),
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_bad_argument_is_named(change: dict[str, Any], argument: str, gradients: bool) -> None:
    given = whole()
    given["v"].requires_grad_(gradients)
    with pytest.raises(ArgumentError, match=r"got .*; allowed: ") as caught:
        parallax_attn_func(**{**given, **change})
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"q": torch.zeros(1, 5, 4, 64)}, "q"),
        ({"r": torch.zeros(5, 2, 64)}, "r"),
        ({"k": torch.zeros(7, 3, 64)}, "k"),
        ({"k": torch.zeros(7, 2, 32)}, "k"),
        ({"v": torch.zeros(6, 2, 64)}, "v"),
        ({"cu_seqlens_q": None}, "cu_seqlens_q"),
        ({"cu_seqlens_k": None}, "cu_seqlens_k"),
        ({"cu_seqlens_q": None, "cu_seqlens_k": None}, "cu_seqlens_q"),
        ({"cu_seqlens_q": [0, 2, 2, 5]}, "cu_seqlens_q"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 2, 5])}, "cu_seqlens_q"),
        ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_q"),
        ({"cu_seqlens_k": torch.tensor([0, 7], dtype=torch.int32)}, "cu_seqlens_k"),
        ({"cu_seqlens_k": torch.zeros(4, 1, dtype=torch.int32)}, "cu_seqlens_k"),
        ({"cu_seqlens_k": torch.zeros(8, dtype=torch.int32)[::2]}, "cu_seqlens_k"),
        ({"max_seqlen_q": -1}, "max_seqlen_q"),
        ({"max_seqlen_q": torch.tensor(3)}, "max_seqlen_q"),
        ({"max_seqlen_k": None}, "max_seqlen_k"),
        ({"max_seqlen_k": 3.0}, "max_seqlen_k"),
        ({"window_size": 2}, "window_size"),
        ({"out": torch.zeros(5, 2, 64)}, "out"),
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_bad_argument_of_packed_sequences_is_named(change: dict[str, Any], argument: str, gradients: bool) -> None:
    given = packed()
    given["v"].requires_grad_(gradients)
    with pytest.raises(ArgumentError, match=r"got .*; allowed: ") as caught:
        parallax_attn_varlen_func(**{**given, **change})
    assert caught.value.argument == argument


@pytest.mark.parametrize("head_dim", [8, 72, 256])
def test_head_dims(head_dim: int) -> None:
    q, k = normal(1, 3, 2, head_dim), normal(1, 3, 1, head_dim)
    assert_close(parallax_attn_func(q, q / 8, k, k), reference_forward(q, q / 8, k, k).out, "fp32")


@pytest.mark.parametrize("head_dim", [0, 4, 60, 264])
def test_an_unsupported_head_dim_says_which_are(head_dim: int) -> None:
    x = torch.zeros(1, 3, 2, head_dim)
    with pytest.raises(ArgumentError, match=f"q: got head_dim {head_dim}; allowed: a multiple of 8 from 8 to 256"):
        parallax_attn_func(x, x, x, x)
    with pytest.raises(ArgumentError, match=f"q: got head_dim {head_dim}; allowed: 64 or 128"):
        parallax_attn_with_kvcache(x[:, :1], x[:, :1], x, x)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"q": torch.zeros(2, 2, 4, 64), "r": torch.zeros(2, 2, 4, 64)}, "q"),
        ({"k_cache": torch.zeros(2, 7, 3, 64)}, "k_cache"),
        ({"v_cache": torch.zeros(2, 9, 2, 64)}, "v_cache"),
        ({"cache_seqlens": 8}, "cache_seqlens"),
        ({"cache_seqlens": -1}, "cache_seqlens"),
        ({"cache_seqlens": True}, "cache_seqlens"),
        ({"cache_seqlens": [1, 2]}, "cache_seqlens"),
        ({"cache_seqlens": torch.tensor([1, 2])}, "cache_seqlens"),
        ({"cache_seqlens": torch.tensor([1], dtype=torch.int32)}, "cache_seqlens"),
        ({"cache_seqlens": torch.tensor([1, 0, 2, 0], dtype=torch.int32)[::2]}, "cache_seqlens"),
        ({"v_cache": torch.zeros(2, 7, 2, 64, requires_grad=True)}, "v_cache"),
    ],
)
def test_a_bad_argument_of_decode_is_named(change: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parallax_attn_with_kvcache(**{**cached(), **change})
    assert caught.value.argument == argument


def test_without_gradients_recorded_inputs_that_need_them_are_fine() -> None:
    given = {name: tensor.requires_grad_() for name, tensor in whole().items()}
    with torch.no_grad():
        out = parallax_attn_func(**given)
    assert torch.isfinite(out).all()
    assert not out.requires_grad


def test_cpu_tensors_warn_once() -> None:
    program = """
import torch, warnings
from parallax_gen import parallax_attn_func
x = torch.randn(1, 3, 2, 64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    parallax_attn_func(x, x, x, x)
    parallax_attn_func(x, x, x[:, :2], x[:, :2])
print(len([w for w in caught if "CPU tensors" in str(w.message)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
