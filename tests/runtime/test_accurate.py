"""accurate: which kernels calls get, that CPU tensors take it, and who refuses what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attention import Launch, plan_on_cpu
from torch import Tensor

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.distributed.ring import ring_attn_func
from parallax_gen.errors import ArgumentError
from parallax_gen.nn import ParallaxAttention
from parallax_gen.runtime import attention, autograd


@pytest.fixture
def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 7, 4, 32, generator=generator, requires_grad=True) for _ in range(4)]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    return plan_on_cpu(monkeypatch, interpret=False)


def packed(q: Tensor, r: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    ends = torch.tensor([0, 7, 14], dtype=torch.int32)
    q, r, k, v = (x.flatten(0, 1) for x in (q, r, k, v))
    return parallax_attn_varlen_func(q, r, k, v, ends, ends, 7, 7, **options).unflatten(0, (2, 7))


def batched(*x: Tensor, **options: Any) -> Tensor:
    return torch.func.vmap(lambda *y: parallax_attn_func(*(z[None] for z in y), **options)[0])(*x)


def compiled(*x: Tensor, **options: Any) -> Tensor:
    return torch.compile(lambda *y: parallax_attn_func(*y, **options), backend="aot_eager")(*x)


WAYS = [parallax_attn_func, packed, batched, compiled]


@pytest.mark.parametrize("function", WAYS)
def test_cpu_tensors_give_the_same(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    do = torch.randn(2, 7, 4, 32)
    one, other = (function(*inputs, causal=True, accurate=accurate) for accurate in (False, True))
    assert torch.equal(one, other)
    grads = (torch.autograd.grad(out, inputs, do) for out in (one, other))
    assert all(map(torch.equal, *grads))


def test_the_tangent_is_the_same(inputs: list[Tensor]) -> None:
    x, tangents = tuple(x.detach() for x in inputs), tuple(torch.randn_like(x) for x in inputs)
    one, other = (
        torch.func.jvp(lambda *x, how=how: parallax_attn_func(*x, accurate=how), x, tangents) for how in (False, True)
    )
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("function", WAYS)
def test_only_the_forward_is_another_kernel(
    function: Callable[..., Tensor], recorded: list[Launch], inputs: list[Tensor]
) -> None:
    x = [y.detach().bfloat16().requires_grad_() for y in inputs]
    with torch.no_grad():
        function(*x, causal=True, accurate=True)
    function(*x, causal=True, accurate=True).sum().backward()
    accurate = {(spec.op, spec.accurate) for spec, *_ in recorded}
    assert accurate == {("forward", True), *((op, False) for op in ("preprocess", "dkdv", "dqdr"))}
    function(*x, causal=True)
    assert (recorded[-1][0].op, recorded[-1][0].accurate) == ("forward", False)


def test_recomputing_v_mean_is_accurate_too(recorded: list[Launch], inputs: list[Tensor]) -> None:
    x = [y.detach().bfloat16().requires_grad_() for y in inputs]
    parallax_attn_func(*x, accurate=True, recompute_v_mean=True).sum().backward()
    assert {(spec.op, spec.accurate) for spec, *_ in recorded if spec.op == "forward"} == {("forward", True)}


def test_fp32_has_no_other_kernel_but_tf32_has(
    recorded: list[Launch], inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = [y.detach() for y in inputs]
    parallax_attn_func(*x, accurate=True)
    monkeypatch.setattr(attention, "dtype_name", lambda q: "tf32")
    parallax_attn_func(*x, causal=True, accurate=True)
    assert [(spec.dtype, spec.accurate) for spec, *_ in recorded] == [("fp32", False), ("tf32", True)]


def test_the_ring_passes_it_on(monkeypatch: pytest.MonkeyPatch, inputs: list[Tensor]) -> None:
    from parallax_gen.distributed import ring

    alone = ring._Ring(None, 0, 1, 0, 0)
    monkeypatch.setattr(ring._Ring, "of", lambda group: alone)
    seen = []
    for name in ("forward", "backward"):
        whole = getattr(autograd, f"{name}_without_autograd")

        def spy(*given: Any, whole: Any = whole, **options: Any) -> Any:
            seen.extend(x.accurate for x in given if isinstance(x, autograd.Request))
            return whole(*given, **options)

        monkeypatch.setattr(ring, f"{name}_without_autograd", spy)
    ring_attn_func(*inputs, accurate=True).sum().backward()
    assert seen == [True, True]


def test_the_layer_passes_it_on(recorded: list[Launch]) -> None:
    layer = ParallaxAttention(64, 2, accurate=True, dtype=torch.bfloat16)
    layer(torch.randn(1, 9, 64, dtype=torch.bfloat16))
    assert recorded[0][0].accurate
    assert "accurate" in repr(layer)
    assert "accurate" not in repr(ParallaxAttention(64, 2))


@pytest.mark.parametrize("accurate", [0, 1, None, "yes", 1.0])
def test_other_values_are_refused(accurate: Any, inputs: list[Tensor]) -> None:
    """Also where an equal value was accepted before: 1 == True."""
    x = [y.detach() for y in inputs]
    parallax_attn_func(*x, accurate=True)
    for function in (parallax_attn_func, packed):
        with pytest.raises(ArgumentError, match=r"^accurate: got .*; allowed: True or False$"):
            function(*x, accurate=accurate)
    with pytest.raises(ArgumentError, match=r"^accurate: got "):
        ParallaxAttention(64, 2, accurate=accurate)
