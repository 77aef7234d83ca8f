"""A basket's calls: which, how often, and what is wrong with one."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.basket import BasketCall, basket_calls
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

BASKET: dict[str, Any] = {
    "comment": "one model on one card and on two",
    "training": {"batch": [1, 4], "seqlen": [1024, 4096], "at_most_tokens": 4096},
    "serving": {
        "batch": [1, 64],
        "kv_len": [1024, 8192],
        "page_size": [0, 16],
        "chunk": [2048],
        "chunk_batch": [1, 4],
        "cache_gib_at_most": 1,
        "chunk_tokens_at_most": 4096,
    },
    "models": [{"name": "some 1B", "heads": 16, "kv_heads": 8, "head_dim": 128, "tp": [1, 2], "weight": 3}],
}


def calls_of(**changes: Any) -> list[BasketCall]:
    basket = copy.deepcopy(BASKET)
    basket["models"][0].update(changes)
    return basket_calls(basket, "basket.json")


def test_training_is_of_at_most_so_many_tokens() -> None:
    calls = [call for call in calls_of(tp=[1]) if call.kind == "training"]
    assert {(c.shape.batch, c.shape.seqlen_q) for c in calls} == {(1, 1024), (1, 4096), (4, 1024)}
    assert Counter(c.spec.op for c in calls) == {"forward": 3, "preprocess": 3, "dkdv": 3, "dqdr": 3}
    assert all(c.spec.stats for c in calls if c.spec.op == "forward")


def test_caches_take_at_most_so_many_bytes() -> None:
    """Keys and values of 64 sequences of 8192 tokens take 2 GiB on one card, and 1 GiB on each of two."""
    decode = KernelSpec("decode_varlen", 128, "bf16", 2)
    shapes = {c.shape for c in calls_of() if c.spec == decode}
    assert Shape(64, 16, 8, 1, 8192) not in shapes
    assert {Shape(64, 8, 4, 1, 8192), Shape(64, 16, 8, 1, 1024), Shape(1, 16, 8, 1, 8192)} <= shapes
    assert {c.spec.page_size for c in calls_of() if c.kind == "decode"} == {0, 16}


def test_chunks_fit_the_cache_and_a_call() -> None:
    shapes = {c.shape for c in calls_of(tp=[1]) if c.kind == "prompts in chunks"}
    assert shapes == {Shape(1, 16, 8, 2048, 8192)}


def test_layers_with_and_without_windows() -> None:
    windows = {c.shape.window for c in calls_of(windows=[None, 513]) if c.spec.op == "dkdv"}
    assert windows == {0, 513}


def test_weights_of_models_with_the_same_calls_add() -> None:
    twice = copy.deepcopy(BASKET)
    twice["models"] += [dict(BASKET["models"][0], name="another", weight=2)]
    once, both = basket_calls(BASKET, ""), basket_calls(twice, "")
    assert {c.weight for c in once} == {3}
    assert {c.weight for c in both} == {5}
    assert len(once) == len(both) == len(set(once))


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("models", "heads", "16", r"heads \(basket.json, model 1\): .*'16'.*a whole number from 1"),
        ("models", "heads", True, "True.*a whole number from 1"),
        ("models", "tp", [0], r"tp .*\[0\].*a list of whole numbers from 1"),
        ("models", "tp", [3], "a divisor of the model's 8 kv heads"),
        ("models", "windows", [0], r"windows .*a list of whole numbers from 1, and null"),
        ("serving", "page_size", [-1], r"page_size \(basket.json, serving\).*a list of whole numbers from 0"),
        ("training", "at_most_tokens", None, "at_most_tokens .*None.*a whole number from 1"),
    ],
)
def test_a_wrong_field_is_named(part: str, name: str, value: object, message: str) -> None:
    basket = copy.deepcopy(BASKET)
    (basket["models"][0] if part == "models" else basket[part])[name] = value
    with pytest.raises(ArgumentError, match=message):
        basket_calls(basket, "basket.json")


@pytest.mark.parametrize("data", [[], {"training": {}, "serving": {}}, {"training": 1, "serving": {}, "models": []}])
def test_what_is_no_basket_is_refused(data: object) -> None:
    with pytest.raises(ArgumentError, match=r"basket\.json"):
        basket_calls(data, "basket.json")
