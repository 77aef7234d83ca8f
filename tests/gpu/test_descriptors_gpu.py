"""Kernels that load blocks by tensor descriptors, on a card: the bits of those that load by pointers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import strategies
import torch
from descriptor_cases import CASES, assert_same, inputs_of
from torch import Tensor

from parallax_gen import parallax_attn_func
from parallax_gen.runtime.described import DescribedTensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="descriptors need Hopper"
    ),
]


@pytest.mark.parametrize("name", CASES)
def test_descriptors_load_what_pointers_load(name: str) -> None:
    spec, config = CASES[name]
    assert_same(spec, config, inputs_of(spec, "cuda"))


@pytest.mark.parametrize("name", ["forward, fixed reference", "dkdv, stacked", "dkdv, stacked, GQA", "dqdr"])
def test_strides_that_are_no_multiples_of_each_other(name: str) -> None:
    """Heads before rows, and one more row of other tensors between sequences."""
    spec, config = CASES[name]
    inputs = inputs_of(spec, "cuda")

    def spread(*tensors: Tensor) -> list[Tensor]:
        batch, rows, heads, head_dim = tensors[0].shape
        storage = tensors[0].new_zeros(len(tensors), batch, heads, rows + 3, head_dim + 24)
        for part, tensor in zip(storage, tensors, strict=True):
            part[:, :, :rows, :head_dim] = tensor.transpose(1, 2)
        return [part[:, :, :rows, :head_dim].transpose(1, 2) for part in storage]

    q, r = spread(inputs.q, inputs.r)
    k, v = spread(inputs.k, inputs.v)
    do = None if inputs.do is None else spread(inputs.do)[0]
    assert_same(spec, config, replace(inputs, q=q, r=r, k=k, v=v, do=do))


@pytest.mark.parametrize("between", [1 << 20, 1 << 33], ids=["1 MB", "8 GB"])
def test_q_and_r_of_separate_allocations(between: int) -> None:
    """What lies between q and r, here NaN, is not read."""
    spec, config = CASES["dkdv, stacked"]
    inputs = inputs_of(spec, "cuda")
    size = inputs.q.numel()
    storage = torch.full((2 * size + between // 2,), float("nan"), dtype=inputs.q.dtype, device="cuda")
    q, r = storage[:size].view(inputs.q.shape), storage[-size:].view(inputs.q.shape)
    q.copy_(inputs.q)
    r.copy_(inputs.r)
    assert_same(spec, config, replace(inputs, q=q, r=r))


def step(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, r, k, v)]
    out = parallax_attn_func(*leaves, causal=True)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def normal_tensors(*size: int) -> list[Tensor]:
    torch.manual_seed(0)
    return list(torch.randn(4, *size, device="cuda", dtype=torch.bfloat16))


def test_the_bits_of_a_step_do_not_depend_on_where_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With r at the lower address, or heads 8 bytes off, pointers load the blocks."""
    allowed: list[bool] = []
    allow = DescribedTensors.allow

    def noted(self: DescribedTensors, tensors: list[Tensor]) -> bool:
        allowed.append(allow(self, tensors))
        return allowed[-1]

    monkeypatch.setattr(DescribedTensors, "allow", noted)
    q, r, k, v = normal_tensors(2, 333, 4, 64)
    expected = step(q, r, k, v)
    if not allowed:
        pytest.skip("the kernels known here load by pointers")
    assert all(allowed)
    allowed.clear()

    r_below, q_above = torch.stack([r, q])
    found = {"r below q": step(q_above, r_below, k, v)}
    assert not all(allowed)
    allowed.clear()
    odd = [torch.nn.functional.pad(x, (0, 4))[..., :64] for x in (q, r, k, v)]  # heads 8 bytes off
    found["odd heads"] = step(*odd)
    assert not any(allowed[:1])
    for name, tensors in found.items():
        for one, other in zip(expected, tensors, strict=True):
            assert torch.equal(one, other), name


def test_a_captured_step_loads_from_the_tensors_of_each_replay() -> None:
    q, r, k, v = normal_tensors(2, 256, 4, 64)
    others = normal_tensors(2, 256, 4, 64)
    for x in others:
        x.mul_(-0.5)
    step(q, r, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(q, r, k, v)
    for x, other in zip((q, r, k, v), others, strict=True):
        x.copy_(other)
    graph.replay()
    for one, other in zip(captured, step(*others), strict=True):
        assert torch.equal(one, other)


def test_direct_launches_of_new_tensors() -> None:
    """The second call of the same sizes launches directly, with descriptors of its own tensors."""
    first, second = normal_tensors(2, 300, 4, 64), normal_tensors(2, 300, 4, 64)
    for x in second:
        x.mul_(0.5)
    expected = step(*second)
    step(*first)
    for one, other in zip(step(*second), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", [strategies.heads_first, strategies.fused_projection], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["forward", "dqdr"])
def test_strided_tensors(name: str, layout: object) -> None:
    spec, config = CASES[name]
    assert_same(spec, config, layout(inputs_of(spec, "cuda")))  # type: ignore[operator]
