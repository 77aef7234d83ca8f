"""The backend and layer for vLLM, between stand-ins for its model runner and its Attention."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_stub
from engine_stubs import STEPS, TOTALS, Requests, assert_overrides_fit, engine, imported, signatures

import parallax_gen
from parallax_gen.errors import ArgumentError
from parallax_gen.integrations import vllm as integration

BLOCKS, SCALE = 40, 16**-0.5


@pytest.fixture(autouse=True)
def _vllm() -> Iterator[None]:
    with engine(vllm_stub):
        yield
    vllm_stub.OVERRIDES.clear()


def layer_of(requests: Requests, block_size: int, **options: Any) -> Any:
    """A layer with an empty cache, as vLLM's runner allocates it: filled with NaN."""
    module = imported("vllm.layer")
    layer = module.ParallaxAttention(
        requests.heads,
        requests.head_dim,
        SCALE,
        num_kv_heads=requests.kv_heads,
        prefix="model.layers.0.attn",
        **options,
    )
    backend = layer.attn_backend
    shape = backend.get_kv_cache_shape(BLOCKS, block_size, requests.kv_heads, requests.head_dim)
    layer.kv_cache = torch.full(shape, float("nan"))
    return layer


def step(layer: Any, requests: Requests, counts: tuple[int, ...], block_size: int, padding: int = 0) -> torch.Tensor:
    """Run a step through the layer, with the metadata that vLLM's runner makes. padding: tokens after the batch's."""
    batch = len(counts)
    before = list(requests.lengths)
    q, r, k, v = (torch.nn.functional.pad(x, (0, 0, 0, padding)) for x in requests.advance(counts))
    blocks_each = BLOCKS // batch
    table = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1))[: batch * blocks_each]
    table = table.view(batch, blocks_each).int()
    slots = [
        int(table[i, position // block_size]) * block_size + position % block_size
        for i in range(batch)
        for position in range(before[i], requests.lengths[i])
    ]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    common = vllm_stub.CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(requests.lengths, dtype=torch.int32),
        num_reqs=batch,
        num_actual_tokens=sum(counts),
        max_query_len=max(counts),
        max_seq_len=max(requests.lengths),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots + [-1] * padding),
    )
    builder = layer.attn_backend.get_builder_cls()(None, ["model.layers.0.attn"], None, torch.device("cpu"))
    layer.metadata = builder.build(0, common)
    out: torch.Tensor = layer(q, r, k, v)
    return out


@pytest.mark.parametrize(
    ("block_size", "options", "ours"),
    [
        (16, {}, {}),
        (4, {"per_layer_sliding_window": 6, "logits_soft_cap": 2.0}, {"window_size": 6, "softcap": 2.0}),
    ],
)
def test_steps_compute_parallax_attention(block_size: int, options: dict[str, Any], ours: dict[str, Any]) -> None:
    """Chunks of prompts and decode steps, over a cache that only the steps themselves wrote."""
    requests = Requests(TOTALS)
    layer = layer_of(requests, block_size, **options)
    for counts in STEPS:
        out = step(layer, requests, counts, block_size)
        torch.testing.assert_close(out, requests.expected(counts, **ours), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [(5, 1, 9), (1, 1, 1)])
def test_padding_of_a_batch_is_neither_stored_nor_attended(counts: tuple[int, ...]) -> None:
    requests = Requests(TOTALS)
    layer = layer_of(requests, 16)
    step(layer, requests, STEPS[0], 16)
    filled = int((~layer.kv_cache.isnan()).sum())
    out = step(layer, requests, counts, 16, padding=3)
    assert out.shape[0] == sum(counts) + 3
    torch.testing.assert_close(out[: sum(counts)], requests.expected(counts), rtol=1e-4, atol=1e-5)
    added = int((~layer.kv_cache.isnan()).sum()) - filled
    assert added == 2 * sum(counts) * requests.kv_heads * requests.head_dim


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_kernel_of_a_decode_step(batch_invariant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """That for one query, but in the mode that of prompts, with which the other requests of a batch may come."""
    requests = Requests(TOTALS)
    layer = layer_of(requests, 16)
    backend = imported("vllm.backend")
    called = []
    attend = backend.parallax_attn_with_kvcache

    def watched(q: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        called.append((q.dim(), options["cu_seqlens_q"] is None))
        return attend(q, *arguments, **options)

    monkeypatch.setattr(backend, "parallax_attn_with_kvcache", watched)
    with parallax_gen.batch_invariant(batch_invariant):
        for counts in ((4, 2, 1), (1, 1, 1)):
            out = step(layer, requests, counts, 16)
            torch.testing.assert_close(out, requests.expected(counts), rtol=1e-4, atol=1e-5)
    assert called == [(3, False), (3, False) if batch_invariant else (4, True)]


def test_an_8_bit_cache_is_read_with_the_layers_scales() -> None:
    requests = Requests((12,))
    cache_config = SimpleNamespace(cache_dtype="fp8")
    layer = layer_of(requests, 16, cache_config=cache_config)
    layer.kv_cache = torch.zeros(layer.kv_cache.shape, dtype=torch.uint8)
    layer._k_scale.fill_(0.5)
    layer._v_scale.fill_(2.0)
    rounded = Requests((12,))
    for name in ("q", "r", "k", "v"):
        setattr(requests, name, [x.bfloat16() for x in getattr(requests, name)])
        setattr(rounded, name, [x.float() for x in getattr(requests, name)])
    for x, scale in ((rounded.k, 0.5), (rounded.v, 2.0)):
        x[0] = (x[0] / scale).to(torch.float8_e4m3fn).float() * scale
    rounded.lengths = [12]
    out = step(layer, requests, (12,), 16)
    torch.testing.assert_close(out.float(), rounded.expected((12,)), rtol=2e-2, atol=2e-2)


def test_scales_have_the_names_that_vllm_loads() -> None:
    """vLLM renames a checkpoint's `self_attn.k_proj.k_scale` to `self_attn.attn.k_scale`, else leaves it out."""
    attention = torch.nn.Module()
    attention.attn = layer_of(Requests((1,)), 16)
    assert set(attention.state_dict()) == {"attn._k_scale", "attn._v_scale"}
    assert isinstance(attention.attn, vllm_stub.Attention)  # vLLM prepares the scales of these after loading


def test_while_vllm_measures_memory_the_output_is_0() -> None:
    requests = Requests((7,))
    layer = layer_of(requests, 16)
    assert not layer(*requests.advance((7,))).any()


def test_a_layer_without_r_is_refused() -> None:
    """Such as a softmax model's with `--attention-backend CUSTOM`: half of its heads would be taken for r."""
    backend = imported("vllm.backend").ParallaxAttentionBackend
    with pytest.raises(ArgumentError, match="CUSTOM for a layer without r"):
        vllm_stub.Attention(8, 64, 0.125, num_kv_heads=2, prefix="a", attn_backend=backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alibi_slopes": [1.0]}, "alibi_slopes"), ({"attn_type": "encoder_only"}, "attn_type: got encoder_only")],
)
def test_attention_of_other_kinds_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        layer_of(Requests((1,)), 16, **options)


def test_8_bit_caches_are_refused_with_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """On gfx942 vLLM stores e4m3fnuz, whose numbers are half of those of e4m3fn with the same bits."""
    monkeypatch.setattr(torch.version, "hip", "7.0.51831")
    layer_of(Requests((1,)), 16)
    with pytest.raises(ArgumentError, match="kv_cache_dtype: got fp8; allowed: auto, float16 or bfloat16 on AMD GPUs"):
        layer_of(Requests((1,)), 16, cache_config=SimpleNamespace(cache_dtype="fp8"))


def test_attention_that_is_not_causal_is_refused() -> None:
    builder = imported("vllm.backend").ParallaxMetadataBuilder(None, [], None, torch.device("cpu"))
    with pytest.raises(ArgumentError, match="causal: got False"):
        builder.build(0, SimpleNamespace(causal=False))


def test_the_backend_says_what_it_supports() -> None:
    backend = imported("vllm.backend").ParallaxAttentionBackend
    sizes = (64, 128, 256, 257, 12, 512)
    assert [size for size in sizes if backend.supports_head_size(size)] == [64, 128, 256]
    capabilities = [SimpleNamespace(major=7), SimpleNamespace(major=8), SimpleNamespace(major=12)]
    assert list(map(backend.supports_compute_capability, capabilities)) == [False, True, True]
    order = backend.get_kv_cache_stride_order(include_num_layers_dimension=True)
    assert sorted(order) == list(range(len(backend.get_kv_cache_shape(1, 2, 3, 4)) + 1))


def test_the_code_on_the_page_is_valid_and_imports_what_exists() -> None:
    """That of both engines: it cannot run without them."""
    page = Path(__file__).parents[2] / "docs" / "engines.md"
    blocks = re.findall(r"^```text\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    ours = []
    for node in [node for block in blocks for node in ast.walk(ast.parse(block))]:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("parallax_gen"):
            ours += [(node.module, alias.name) for alias in node.names]
    assert len(ours) == 2
    for module, name in ours:
        text = (page.parents[1] / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert f"class {name}(" in text


# -- registration and signatures


def test_register_takes_the_custom_backend_unless_it_is_taken() -> None:
    custom = vllm_stub.AttentionBackendEnum.CUSTOM
    integration.register()
    path = custom.get_path()
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name).get_name() == "CUSTOM"
    vllm_stub.OVERRIDES[custom] = "another.Backend"
    integration.register()
    assert custom.get_path() == "another.Backend"


def test_register_in_another_vllm_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr("vllm.v1.attention.backends.registry.register_backend")
    with caplog.at_level(logging.WARNING):
        integration.register()
    assert "registers no attention backend with this vLLM" in caplog.text
    assert vllm_stub.OVERRIDES == {}


@pytest.mark.parametrize(
    ("ours", "base"),
    [
        ("ParallaxAttentionBackend", vllm_stub.AttentionBackend),
        ("ParallaxAttentionImpl", vllm_stub.AttentionImpl),
        ("ParallaxMetadataBuilder", vllm_stub.AttentionMetadataBuilder),
    ],
)
def test_overrides_take_what_vllm_passes(ours: str, base: type) -> None:
    assert_overrides_fit(getattr(imported("vllm.backend"), ours), base)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(("name", "parameters"), signatures(vllm_stub).items())
def test_the_stand_in_has_vllms_signatures(name: str, parameters: list[str]) -> None:
    module, _, path = name.partition(":")
    result = importlib.import_module(module)
    for part in path.split("."):
        result = getattr(result, part)
    assert list(inspect.signature(result).parameters) == parameters
