"""Under torch.autocast every public function equals itself on manually cast inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallax_gen import (
    kvcache_workspace_size,
    merge_states,
    parallax_attn_func,
    parallax_attn_varlen_func,
    parallax_attn_with_kvcache,
)
from parallax_gen.compat import fla, parallax_kernel, parallax_kernel_triton
from parallax_gen.distributed import ring_attn_func
from parallax_gen.errors import ArgumentError
from parallax_gen.nn import ParallaxAttention

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STARTS = torch.tensor([0, 3, 4], dtype=torch.int32)


def dense(q: Tensor, r: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return parallax_attn_func(q, r, k, v, causal=True, **options)


def packed(q: Tensor, r: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return parallax_attn_varlen_func(q[0], r[0], k[0], v[0], STARTS, STARTS, 3, 3, causal=True, **options)


def ring(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Any:
    return ring_attn_func(q, r, k, v, causal=True)


def cached(q: Tensor, r: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return parallax_attn_with_kvcache(q, r, k, v, causal=True, **options)


def paged(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Any:
    table, lengths = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    pages = [x.reshape(2, 2, *x.shape[2:]) for x in (k, v)]
    return parallax_attn_with_kvcache(q, r, *pages, cache_seqlens=lengths, page_table=table, causal=True)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dense": dense,
    "packed": packed,
    "ring": ring,
    "cached": cached,
    "paged": paged,
}
DTYPES = {
    "all fp32": (FP32, FP32, FP32, FP32),
    "a norm's q in fp32": (FP32, BF16, BF16, BF16),
    "v in bf16": (FP32, FP32, FP32, BF16),
    "all bf16": (BF16, BF16, BF16, BF16),
}


def inputs(*dtypes: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, 4, heads, 16, generator=generator).to(dtype)
        for heads, dtype in zip((4, 4, 2, 2), dtypes, strict=True)
    ]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_are_cast(name: str, dtypes: str) -> None:
    call, arguments = FUNCTIONS[name], inputs(*DTYPES[dtypes])
    expected = call(*(x.bfloat16() for x in arguments))
    with torch.autocast("cpu", BF16):
        result = call(*arguments)
        with torch.autocast("cpu", enabled=False):
            if len(set(DTYPES[dtypes])) == 1:
                assert call(*arguments).dtype == arguments[0].dtype
            else:
                with pytest.raises(ArgumentError, match=r"as (q|k_cache) has"):
                    call(*arguments)
    assert result.dtype == BF16
    assert torch.equal(result, expected)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ["dense", "packed", "ring"])
def test_gradients_have_the_dtypes_of_the_inputs(name: str) -> None:
    arguments = [x.requires_grad_() for x in inputs(FP32, FP32, FP32, BF16)]
    with torch.autocast("cpu", BF16):
        out = FUNCTIONS[name](*arguments)
    result = torch.autograd.grad(out.float().sum(), arguments)
    by_hand = [x.detach().bfloat16().requires_grad_() for x in arguments]
    target = torch.autograd.grad(FUNCTIONS[name](*by_hand).float().sum(), by_hand)
    for x, grad, expected in zip(arguments, result, target, strict=True):
        assert grad.dtype == x.dtype
        assert torch.equal(grad, expected.to(x.dtype))


@pytest.mark.parametrize("name", ["dense", "packed", "cached"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_out_keeps_its_dtype(name: str, dtype: torch.dtype) -> None:
    arguments = inputs(FP32, FP32, FP32, BF16)
    expected = FUNCTIONS[name](*(x.to(dtype) for x in arguments))
    with torch.autocast("cpu", BF16):
        out = torch.empty_like(expected)
        assert FUNCTIONS[name](*arguments, out=out) is out
    assert torch.equal(out, expected)


def test_16_and_8_bit_caches_are_not_cast() -> None:
    q, r, k, v = inputs(FP32, FP32, FP16, FP16)
    with torch.autocast("cpu", BF16):
        result = cached(q, r, k, v)
    assert result.dtype == FP16
    assert torch.equal(result, cached(q.half(), r.half(), k, v))
    k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    with torch.autocast("cpu", BF16):
        result = cached(q, r, k, v)
        assert kvcache_workspace_size(q, r, k, v) == 0  # it accepts the arguments of the call
    assert torch.equal(result, cached(q.bfloat16(), r.bfloat16(), k, v))


def test_states_are_merged_in_fp32() -> None:
    q, r, k, v = inputs(FP32, FP32, FP32, FP32)
    states = [parallax_attn_func(q, r, k[:, keys], v[:, keys], return_stats=True) for keys in (slice(2), slice(2, 4))]
    expected = merge_states(*states)
    with torch.autocast("cpu", BF16):
        assert all(torch.equal(a, b) for a, b in zip(merge_states(*states), expected, strict=True))
        with_stats = parallax_attn_func(q, r, k, v, return_stats=True)
    assert [x.dtype for x in with_stats] == [BF16, FP32, FP32, BF16]


@pytest.mark.parametrize("packing", [None, STARTS])
def test_the_layer(packing: Tensor | None) -> None:
    torch.manual_seed(0)
    layer = ParallaxAttention(32, 4, 2, qk_norm=True, rope_theta=1e4)
    x = torch.randn(1, 4, 32) if packing is None else torch.randn(4, 32)
    lengths = () if packing is None else (packing, 3)
    with torch.autocast("cpu", BF16):
        result = layer(x, *lengths)
    assert result.dtype == BF16
    torch.testing.assert_close(result.float(), layer(x, *lengths), rtol=5e-2, atol=2e-2)  # a few bf16 rounding errors


def heads_first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: function(*(x.transpose(1, 2) for x in tensors))


LAST: dict[str, Callable[..., Tensor]] = {
    "fla parallel": fla.parallel_parallax,
    "fla naive": fla.naive_parallax,
    "fla decode": fla.parallax_decode,
    "parallax-kernel": heads_first(parallax_kernel.parallax_func),
    "parallax-kernel varlen": parallax_kernel.parallax_varlen_func,
    "parallax-kernel decode, Triton": lambda q, r, k, v: parallax_kernel_triton.parallax_decode(
        q[:, -1:], r[:, -1:], k, v
    ),
}


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("name", LAST)
def test_drop_ins_keep_dtypes_as_the_originals_do(name: str, dtype: torch.dtype) -> None:
    arguments = inputs(*[dtype] * 4)
    if dtype == FP32 and name in ("fla parallel", "parallax-kernel", "parallax-kernel varlen"):
        with torch.autocast("cpu", BF16), pytest.raises(TypeError, match="bf16 or fp16"):
            LAST[name](*arguments)
        return
    expected = LAST[name](*arguments)
    with torch.autocast("cpu", BF16):
        result = LAST[name](*arguments)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_compiled_call_casts_like_an_eager_one(enabled: bool) -> None:
    torch._dynamo.reset()
    arguments = inputs(*[FP32] * 4)

    def call(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16, enabled=enabled):
            out: Tensor = packed(*tensors)
        return out

    result = torch.compile(call, backend="aot_eager", fullgraph=True)(*arguments)
    assert result.dtype == (BF16 if enabled else FP32)
    assert torch.equal(result, call(*arguments))
    torch._dynamo.reset()
