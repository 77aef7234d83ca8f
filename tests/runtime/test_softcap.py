"""softcap on CPU tensors: every public function against scores capped in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_close
from attention_samples import plain_attention
from torch import Tensor

from parallax_gen import (
    merge_states,
    parallax_attn_func,
    parallax_attn_varlen_func,
    parallax_attn_with_kvcache,
)
from parallax_gen.errors import ArgumentError
from parallax_gen.nn import ParallaxAttention

CAP = 1.5


capped = partial(plain_attention, softcap=CAP)


@pytest.fixture
def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 7, 4, 32, generator=generator, requires_grad=True) for _ in range(4)]


def test_values_and_gradients(inputs: list[Tensor]) -> None:
    out, expected = parallax_attn_func(*inputs, causal=True, softcap=CAP), capped(*inputs)
    assert_close(out, expected, "fp32")
    do = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, do), torch.autograd.grad(expected, inputs, do.double())
    for got, target in zip(*grads, strict=True):
        assert_close(got, target, "fp32")


def test_a_large_cap_is_none_and_a_small_one_levels_the_weights(inputs: list[Tensor]) -> None:
    plain = parallax_attn_func(*inputs, causal=True)
    assert_close(parallax_attn_func(*inputs, causal=True, softcap=1e9), plain, "fp32")
    out, _, _, v_mean = parallax_attn_func(*inputs, softcap=1e-6, return_stats=True)
    assert_close(v_mean, inputs[3].mean(1, keepdim=True).expand_as(out), "fp32")


def test_the_tangent(inputs: list[Tensor]) -> None:
    x, tangents = tuple(x.detach() for x in inputs), tuple(torch.randn_like(x) for x in inputs)
    got = torch.func.jvp(lambda *x: parallax_attn_func(*x, causal=True, softcap=CAP), x, tangents)
    expected = torch.func.jvp(capped, x, tangents)
    for tensor, expected_tensor in zip(got, expected, strict=True):
        assert_close(tensor, expected_tensor, "fp32")


def _packed(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ends = torch.tensor([0, 7, 14], dtype=torch.int32)
    q, r, k, v = (x.flatten(0, 1) for x in (q, r, k, v))
    return parallax_attn_varlen_func(q, r, k, v, ends, ends, 7, 7, causal=True, softcap=CAP).unflatten(0, (2, 7))


def _cached(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return parallax_attn_with_kvcache(q, r, k, v, causal=True, softcap=CAP)


def _in_two_states(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    options: dict[str, Any] = {"softcap": CAP, "return_state": True}
    last = parallax_attn_with_kvcache(q[:, 3:], r[:, 3:], k[:, 3:], v[:, 3:], causal=True, **options)
    first = parallax_attn_with_kvcache(q[:, 3:], r[:, 3:], k[:, :3], v[:, :3], **options)
    head = parallax_attn_with_kvcache(q[:, :3], r[:, :3], k[:, :3], v[:, :3], causal=True, softcap=CAP)
    return torch.cat([head, merge_states(first, last).out], dim=1)


def _batched(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    per_sample = torch.func.vmap(lambda *x: parallax_attn_func(*(y[None] for y in x), causal=True, softcap=CAP)[0])
    return per_sample(q, r, k, v)


def _compiled(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.compile(lambda *x: parallax_attn_func(*x, causal=True, softcap=CAP), backend="aot_eager")(q, r, k, v)


@pytest.mark.parametrize("function", [_packed, _cached, _in_two_states, _batched, _compiled])
def test_other_ways_to_the_same(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    x = [y.detach() for y in inputs]
    assert_close(function(*x), capped(*x), "fp32")


def test_the_layer_caps_its_scores() -> None:
    torch.manual_seed(0)
    plain, layer = (ParallaxAttention(64, 2, softcap=softcap) for softcap in (None, 0.1))
    layer.load_state_dict(plain.state_dict())
    x = 4 * torch.randn(1, 9, 64)
    q, r, k, v = (p(x).unflatten(-1, (2, 32)) for p in (layer.q_proj, layer.r_proj, layer.k_proj, layer.v_proj))
    expected = layer.o_proj(plain_attention(q, r, k, v, softcap=0.1).float().flatten(-2))
    assert_close(layer(x), expected, "fp32")
    assert not torch.allclose(layer(x), plain(x), atol=1e-2)


REFUSED = [0, -1.0, 1e-40, 2e18, 10**400, "30", float("inf"), float("nan"), True, np.float32(30), torch.tensor(30.0)]


@pytest.mark.parametrize("softcap", REFUSED, ids=lambda x: f"{x!r:.12}")
def test_other_caps_are_refused(softcap: Any, inputs: list[Tensor]) -> None:
    x = [y.detach() for y in inputs]
    ends = torch.tensor([0, 2], dtype=torch.int32)
    calls: list[Callable[[], object]] = [
        lambda: parallax_attn_func(*x, softcap=softcap),
        lambda: parallax_attn_with_kvcache(*x, softcap=softcap),
        lambda: parallax_attn_varlen_func(*(y[0] for y in x), ends, ends, 2, 2, softcap=softcap),
        lambda: ParallaxAttention(64, 2, softcap=softcap),
    ]
    for call in calls:
        allowed = r"^softcap: got .*; allowed: a float or int from 1e-18 to 1e\+18, or None for no cap$"
        with pytest.raises(ArgumentError, match=allowed):
            call()
