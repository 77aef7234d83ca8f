"""A hub package on a card: its functions launch what ours launch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from parallax_gen import parallax_attn_func, parallax_attn_with_kvcache
from parallax_gen.codegen import device
from parallax_gen.hub.folder import write_package
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import default_dispatcher
from parallax_gen.runtime.plan import PlanCache

pytestmark = pytest.mark.gpu

FORWARD = KernelSpec("forward", 128, "bf16", group=2, causal=True)
SPECS = [FORWARD, *(FORWARD.for_op(op) for op in ("forward", "preprocess", "dkdv", "dqdr"))]
SPECS += [KernelSpec(op, 128, "bf16", group=2) for op in ("decode", "decode_varlen")]
SPECS += [KernelSpec("decode_varlen", 128, "bf16", group=2, page_size=16)]


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    card = device.gpu_here(0)
    assert card is not None
    calls = [(spec, Shape(1, 8 * spec.group, 8, 1, 4096)) for spec in SPECS]
    package = write_package(tmp_path_factory.mktemp("hub"), calls, [card], Memory())
    spec = importlib.util.spec_from_file_location("hub_on_a_card", Path(package.build) / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def shipped_records_only() -> Iterator[None]:
    """The package was made from these."""
    dispatcher = default_dispatcher()
    before = dispatcher.memory
    dispatcher.use(Memory())
    PlanCache.clear_all()
    yield
    dispatcher.use(before)
    PlanCache.clear_all()


def normal(*size: int) -> Tensor:
    return torch.randn(*size, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize(("batch", "seqlen"), [(1, 77), (2, 1024), (4, 4096)])
def test_training_steps_are_bitwise_the_same(attention: ModuleType, batch: int, seqlen: int) -> None:
    heads = 16, 16, 8, 8
    inputs = [normal(batch, seqlen, count, 128).requires_grad_() for count in heads]
    do = normal(batch, seqlen, 16, 128)
    steps = []
    for function in (parallax_attn_func, attention.parallax_attn_func):
        out = function(*inputs, causal=True)
        steps.append((out, *torch.autograd.grad(out, inputs, do)))
    with torch.no_grad():
        steps = [(*steps[0], parallax_attn_func(*inputs, causal=True)),
                 (*steps[1], attention.parallax_attn_func(*inputs, causal=True))]  # fmt: skip
    for ours, theirs in zip(*steps, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("batch", "seqlen"), [(1, 130), (8, 4096)])
def test_decode_is_bitwise_the_same(attention: ModuleType, batch: int, seqlen: int) -> None:
    q, r = normal(batch, 1, 16, 128), normal(batch, 1, 16, 128)
    k, v = normal(batch, seqlen, 8, 128), normal(batch, seqlen, 8, 128)
    lengths = torch.randint(1, seqlen, (batch,), dtype=torch.int32, device="cuda")
    pages = -(-seqlen // 16)
    table = torch.randperm(batch * pages, device="cuda").int().view(batch, pages)
    paged = normal(batch * pages, 16, 8, 128), normal(batch * pages, 16, 8, 128)
    for caches, options in (
        ((k, v), {}),
        ((k, v), {"cache_seqlens": lengths}),
        (paged, {"cache_seqlens": lengths, "page_table": table}),
    ):
        for _ in range(2):  # by the JIT, then directly
            theirs = attention.parallax_attn_with_kvcache(q, r, *caches, **options)
            assert torch.equal(theirs, parallax_attn_with_kvcache(q, r, *caches, **options))
