"""The kernels that `tune --model` plans are those that calls of the layer and over a cache launch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from dispatched_kernels import kernels_of, recorded_kernels
from torch import Tensor

from parallax_gen import parallax_attn_with_kvcache
from parallax_gen.nn import ParallaxAttention
from parallax_gen.problem.models import Model
from parallax_gen.problem.steps import Serving, Training, serving_steps, training_steps

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")

MODEL = Model("tiny", heads=4, kv_heads=2, head_dim=16, windows=((0, 1), (150, 2)), softcap=True)
PLAIN = Model("tiny", heads=3, kv_heads=3, head_dim=8, windows=((0, 2),), dtype="fp32")
INVARIANT = dataclasses.replace(MODEL, batch_invariant=True)


def layers_of(model: Model) -> list[int]:
    """The window of each layer."""
    return [window for window, layers in model.windows for _ in range(layers)]


def options_of(model: Model, window: int) -> dict[str, Any]:
    options = {"causal": True, "window_size": window or None, "softcap": 30.0 if model.softcap else None}
    return {**options, "batch_invariant": model.batch_invariant}


def normal(model: Model, *sizes: int) -> Tensor:
    return torch.randn(*sizes, model.head_dim, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[model.dtype])


@pytest.mark.parametrize("model", [MODEL, PLAIN, MODEL.split(2), INVARIANT])
@pytest.mark.parametrize("seqlen", [150, 260])  # the window covers all of the first
def test_a_training_step_of_layers(model: Model, seqlen: int) -> None:
    width = model.heads * model.head_dim
    layers = [
        ParallaxAttention(width, model.heads, model.kv_heads, **options_of(model, window)).to(normal(model, 1).dtype)
        for window in layers_of(model)
    ]
    with recorded_kernels() as launched:
        for layer in layers:
            layer(torch.randn(3, seqlen, width, dtype=layer.q_proj.weight.dtype)).sum().backward()
    assert launched == kernels_of(training_steps(model, Training(batch=3, seqlen=seqlen)))


def decode(model: Model, run: Serving, batch: int, queries: int = 1, *, lengths: bool = True, **options: Any) -> None:
    """One step's calls of `parallax_attn_with_kvcache`, one per layer, as an engine makes them."""
    pages = -(-run.max_len // run.page_size) if run.page_size else 0
    caches = (batch * pages, run.page_size) if pages else (batch, run.max_len)
    packed = queries > 1
    for window in layers_of(model):
        q, r = (normal(model, *((batch * queries,) if packed else (batch, 1)), model.heads) for _ in range(2))
        k, v = (normal(model, *caches, model.kv_heads) for _ in range(2))
        if run.cache_dtype:
            k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
        arguments: dict[str, Any] = {"cache_seqlens": torch.full((batch,), run.max_len, dtype=torch.int32)}
        if pages:
            arguments["page_table"] = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
        if packed:
            arguments["cu_seqlens_q"] = torch.arange(batch + 1, dtype=torch.int32) * queries
            arguments["max_seqlen_q"] = queries
        parallax_attn_with_kvcache(q, r, k, v, **arguments, **options_of(model, window), **options)


@pytest.mark.parametrize("model", [MODEL, PLAIN, INVARIANT])
@pytest.mark.parametrize("page_size", [0, 16, 48])
def test_an_engines_steps(model: Model, page_size: int) -> None:
    run = Serving(max_len=290, page_size=page_size, max_batch=3, chunk=7)
    engine = [step for step in serving_steps(model, run) if not step.name.startswith("generate")]
    with recorded_kernels() as launched:
        for batch in (1, 2, 3):
            decode(model, run, batch)
        for batch in (1, 3):
            decode(model, run, batch, queries=run.chunk)
    assert launched == kernels_of(engine)


def test_an_8_bit_cache() -> None:
    run = Serving(max_len=290, page_size=16, max_batch=1, chunk=5, cache_dtype="e4m3")
    with recorded_kernels() as launched:
        decode(MODEL, run, 1)
        decode(MODEL, run, 1, queries=5)
    assert launched == kernels_of(serving_steps(MODEL, run))
    assert all(spec.cache_dtype == "e4m3" for spec, _ in launched)


def test_each_kernel_is_named_once_in_a_step() -> None:
    equal = dataclasses.replace(MODEL, windows=((0, 1), (4096, 2)))  # a window of all keys is none
    (step,) = training_steps(equal, Training(batch=1, seqlen=4096))
    assert [(call.spec.op, call.count) for call in step.calls] == [
        ("forward", 3),
        ("preprocess", 3),
        ("dkdv", 3),
        ("dqdr", 3),
    ]
    (step,) = training_steps(MODEL, Training(batch=1, seqlen=4096))
    assert sum(call.count for call in step.calls if call.spec.op == "preprocess") == MODEL.layers
    assert len({(call.spec, call.shape) for call in step.calls}) == len(step.calls) == 7
