"""Attention against KV caches on a card: all cache layouts, bf16 and fp8; graphs, streams, workspaces."""

from __future__ import annotations

from typing import Any

import pytest
import strategies
import torch
from assertions import assert_close
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import OutOfResources

from parallax_gen import GraphedDecode, State, kvcache_workspace_size, merge_states, parallax_attn_with_kvcache
from parallax_gen.codegen.abi import torch_dtype as torch_dtype_of
from parallax_gen.codegen.device import gpu_of_device
from parallax_gen.codegen.render import render
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.oracle import verify
from parallax_gen.oracle.inputs import random_inputs_of
from parallax_gen.oracle.kvcache import reference_cached_forward
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import DTYPES, KernelSpec

pytestmark = pytest.mark.gpu

SKEWED = (4096, 128, 0, 1, 97, 128, 3000, 33)


def cache_arguments(
    lengths: tuple[int, ...] = SKEWED, *, seqlen_q: int = 1, page_size: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Arguments of parallax_attn_with_kvcache: 8 query heads over 2 kv heads of 128, NaN past each sequence's end."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", generator=generator).bfloat16()

    batch, longest = len(lengths), max(lengths)
    q, r = normal(batch, seqlen_q, 8, 128), normal(batch, seqlen_q, 8, 128) * 128**-0.5
    k, v = (normal(batch, longest, 2, 128) for _ in range(2))
    ends = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    behind = torch.arange(longest, device="cuda") >= ends[:, None]
    k[behind] = v[behind] = float("nan")
    result = {"q": q, "r": r, "k_cache": k, "v_cache": v, "cache_seqlens": ends}
    if page_size:
        pages = -(-longest // page_size)
        table = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(seed)).cuda().view(batch, pages)
        for name in ("k_cache", "v_cache"):
            whole = torch.full((batch, pages * page_size, 2, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
            whole[:, :longest] = result[name]
            paged = torch.empty((batch * pages, page_size, 2, 128), dtype=torch.bfloat16, device="cuda")
            paged[table] = whole.view(batch, pages, page_size, 2, 128)
            result[name] = paged
        result["page_table"] = table.int()
    return result


def expected(arguments: dict[str, Any]) -> Tensor:
    return reference_cached_forward(
        **{name: x for name, x in arguments.items() if name not in ("max_seqlen_q", "return_state")}
    ).out


@settings(max_examples=40)
@given(data=st.data())
def test_any_decode_varlen_kernel_agrees_with_the_oracle(data: st.DataObject) -> None:
    gpu = gpu_of_device(0)
    case = data.draw(
        strategies.cases("decode_varlen", DTYPES, gpu, most_programs=1 << 20).filter(
            lambda case: case.spec.dtype != "fp32" or case.spec.head_dim <= 128
        )
    )
    inputs = random_inputs_of(case.spec, case.shape, seed=case.seed, device="cuda")
    source = render(case.spec, case.config, gpu)
    try:
        assert (
            verify.launch_and_check(source, case.spec, case.config, inputs, verify.oracle(case.spec, inputs)).wrong
            is None
        )
    except OutOfResources:  # only compiling shows it
        reject()


@pytest.mark.parametrize("cache_dtype", ["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_fp8_value_is_read_exactly_on_a_card(dtype: str, cache_dtype: str) -> None:
    """All 256 codes except NaN: one key has all the weight, so the output is its value."""
    torch_dtype = torch.float8_e4m3fn if cache_dtype == "e4m3" else torch.float8_e5m2
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").view(torch_dtype)
    numbers = codes[codes.float().isfinite()]
    count = len(numbers)
    v = numbers.view(count, 1, 1, 1).expand(count, 1, 1, 128).contiguous()
    k, q = torch.zeros_like(v), torch.ones(count, 1, 1, 128, device="cuda").to(torch_dtype_of(dtype))
    out = parallax_attn_with_kvcache(q, torch.zeros_like(q), k, v)
    assert isinstance(out, Tensor)
    assert torch.equal(out[:, 0, 0, 0].double(), numbers.double())
    assert torch.equal(out[:, 0, 0, 0], out[:, 0, 0, 127])


@pytest.mark.parametrize("cache_dtype", ["e4m3", "e5m2"])
def test_only_subnormal_keys_and_values(cache_dtype: str) -> None:
    """e4m3 subnormals reach the tensor cores as bf16 subnormals; the scales make the smallest one 1/4."""
    torch_dtype = torch.float8_e4m3fn if cache_dtype == "e4m3" else torch.float8_e5m2
    generator = torch.Generator("cuda").manual_seed(0)
    digits = torch.randint(8 if cache_dtype == "e4m3" else 4, (2, 3, 700, 2, 128), device="cuda", generator=generator)
    signs = torch.randint(2, digits.shape, device="cuda", generator=generator) * 128
    k, v = (digits + signs).to(torch.uint8).view(torch_dtype)
    q, r = torch.randn(2, 3, 1, 8, 128, device="cuda", generator=generator).bfloat16() / 4
    scale = torch.full((1,), 2.0**7 if cache_dtype == "e4m3" else 2.0**14, device="cuda")
    arguments = {"q": q, "r": r, "k_cache": k, "v_cache": v, "k_scale": scale, "v_scale": scale}
    arguments["cache_seqlens"] = torch.tensor([700, 64, 3], dtype=torch.int32, device="cuda")
    out = parallax_attn_with_kvcache(**arguments)
    assert isinstance(out, Tensor)
    assert_close(out, expected(arguments), "bf16")


@pytest.mark.parametrize("num_splits", [1, 3, 16])
@pytest.mark.parametrize("batch", [8, 31, 33, 200])
def test_many_sequences_of_very_different_lengths(batch: int, num_splits: int) -> None:
    spec = KernelSpec("decode_varlen", 128, "bf16", group=4, page_size=16)
    config = DecodeConfig(32, 8, num_splits, "last", num_warps=2, num_stages=4)
    inputs = random_inputs_of(spec, Shape(batch, 8, 2, 1, 2048), seed=batch, device="cuda")
    source = render(spec, config, gpu_of_device(0))
    assert verify.launch_and_check(source, spec, config, inputs, verify.oracle(spec, inputs)).wrong is None


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_size": 700}], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 5, 300])
def test_the_public_function(seqlen_q: int, options: dict[str, Any], page_size: int) -> None:
    arguments = cache_arguments(seqlen_q=seqlen_q, page_size=page_size) | options
    assert_close(parallax_attn_with_kvcache(**arguments), expected(arguments), "bf16")


def test_prefill_chunks_beside_decode_steps() -> None:
    """Packed queries: a chunk of 500, a sequence without queries, single queries, a draft of 4."""
    counts = (500, 1, 0, 1, 4, 1, 1, 1)
    arguments = cache_arguments(page_size=16)
    ends = torch.tensor((0, *counts), device="cuda").cumsum(0).int()
    generator = torch.Generator("cuda").manual_seed(1)
    q, r = (torch.randn(sum(counts), 8, 128, device="cuda", generator=generator).bfloat16() for _ in range(2))
    arguments |= {"q": q, "r": r * 128**-0.5, "cu_seqlens_q": ends, "max_seqlen_q": 500, "causal": True}
    assert_close(parallax_attn_with_kvcache(**arguments), expected(arguments), "bf16")


def test_a_shared_prefix_merged_with_the_rest_equals_the_whole() -> None:
    arguments = cache_arguments((900, 700, 650, 801), seqlen_q=2)
    k, v, ends = (arguments.pop(name) for name in ("k_cache", "v_cache", "cache_seqlens"))
    k[:, :600], v[:, :600] = k[:1, :600].clone(), v[:1, :600].clone()
    q, r = arguments["q"], arguments["r"]
    prefix = parallax_attn_with_kvcache(
        *(x.flatten(0, 1)[None] for x in (q, r)), k[:1, :600], v[:1, :600], return_state=True
    )
    rest = parallax_attn_with_kvcache(
        q, r, k[:, 600:], v[:, 600:], cache_seqlens=ends - 600, causal=True, return_state=True
    )
    assert isinstance(prefix, State)
    assert isinstance(rest, State)
    of_all = State(
        *(x.view_as(y) for x, y in zip(prefix[:1], rest[:1], strict=True)),
        *(x[0].unflatten(-1, (4, 2)).transpose(0, 1) for x in prefix[1:3]),
        prefix.v_mean.view_as(rest.v_mean),
    )
    whole = {"q": q, "r": r, "k_cache": k, "v_cache": v, "cache_seqlens": ends, "causal": True}
    merged = merge_states(of_all, rest)
    assert_close(merged.out, expected(whole), "bf16")


@pytest.mark.parametrize("page_size", [0, 64])
def test_one_graph_for_every_step(page_size: int) -> None:
    arguments = cache_arguments(page_size=page_size)
    step = GraphedDecode(**arguments)
    for seed, lengths in enumerate(((5, 4096, 0, 1, 2, 3, 64, 65), (4096,) * 8, SKEWED), start=1):
        new = cache_arguments(lengths, page_size=page_size, seed=seed)
        for name, tensor in arguments.items():
            tensor.copy_(new[name])
        result = step()
        assert isinstance(result, Tensor)
        assert_close(result, expected(arguments), "bf16")


def test_streams_with_separate_workspaces_are_independent() -> None:
    calls = []
    for seed in range(4):
        arguments = cache_arguments(seed=seed)
        needed = kvcache_workspace_size(**arguments)
        assert needed > 0
        workspace = torch.zeros(needed, dtype=torch.uint8, device="cuda")
        calls.append((arguments, workspace, torch.cuda.Stream(), torch.empty_like(arguments["q"])))
    torch.cuda.synchronize()
    for _ in range(20):
        for arguments, workspace, stream, out in calls:
            with torch.cuda.stream(stream):
                parallax_attn_with_kvcache(**arguments, workspace=workspace, out=out)
    torch.cuda.synchronize()
    for arguments, _, _, out in calls:
        assert_close(out, expected(arguments), "bf16")


@pytest.mark.parametrize("scale", [None, 0.25, "a tensor", "a tensor a head"])
def test_scales_of_an_fp8_cache(scale: Any) -> None:
    arguments = cache_arguments((300, 1, 0, 64), page_size=0)
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].nan_to_num().to(torch.float8_e4m3fn)
    if isinstance(scale, str):
        size = 2 if scale.endswith("head") else 1
        arguments |= {name: torch.rand(size, device="cuda") + 0.5 for name in ("k_scale", "v_scale")}
    elif scale is not None:
        arguments |= {"k_scale": scale, "v_scale": 2 * scale}
    assert_close(parallax_attn_with_kvcache(**arguments), expected(arguments), "bf16")


@pytest.mark.filterwarnings("ignore")  # warnings of torch's compiler
@pytest.mark.parametrize("page_size", [0, 16])
def test_a_compiled_step_is_captured_without_synchronisation(page_size: int) -> None:
    """mode="reduce-overhead": a CUDA graph whose lengths and queries change from step to step."""
    torch._dynamo.reset()
    arguments = cache_arguments(page_size=page_size)
    for name in ("k_cache", "v_cache"):
        torch._dynamo.mark_static_address(arguments[name])

    def step(q: Tensor, lengths: Tensor) -> Tensor:
        out = parallax_attn_with_kvcache(**{**arguments, "q": q, "cache_seqlens": lengths})
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for n in range(6):
        q, lengths = arguments["q"] * (1 + n), arguments["cache_seqlens"] - (arguments["cache_seqlens"] > n).int() * n
        torch.cuda.set_sync_debug_mode("error" if n > 3 else "default")  # the first compile, warm up and capture
        try:
            result = compiled(q, lengths)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(result, step(q, lengths))
    torch._dynamo.reset()
