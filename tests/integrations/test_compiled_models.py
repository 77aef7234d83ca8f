"""Converted models under torch.compile: one graph, with runtime assertions for checks that need tensor values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_samples import CACHE, FP32, converted_model, padding, prompts
from transformers import StaticCache

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of torch's compiler


@pytest.fixture(autouse=True)
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


MASK = padding([0, 3, 8], [0, 0, 0])


@pytest.mark.parametrize("options", [{}, {"attention_mask": MASK}, {"use_cache": False}])
def test_compiled_as_one_graph(options: dict[str, Any]) -> None:
    model = converted_model("qwen2", r=0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    result, expected = (run(prompts(), labels=prompts(), **options) for run in (compiled, model))
    tokens = options.get("attention_mask", torch.ones(3, 11)).bool()
    torch.testing.assert_close(result.logits[tokens], expected.logits[tokens], **FP32)
    gradients = (torch.autograd.grad(run.loss, list(model.parameters())) for run in (result, expected))
    torch.testing.assert_close(*gradients, **FP32)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_steps_with_a_static_cache_compiled_as_one_graph(padded: bool) -> None:
    model, x = converted_model("qwen3", r=0.1, layers=1), prompts()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    cache = StaticCache(model.config, max_cache_len=16)
    result = []
    for begin, end in ((0, 8), (8, 9), (9, 10), (10, 11)):
        step = compiled if begin else model
        mask_argument = {"attention_mask": MASK[:, :end]} if padded else {}
        positions = torch.arange(begin, end)[None]
        result.append(step(x[:, begin:end], position_ids=positions, **mask_argument, **{CACHE: cache}).logits)
    tokens = MASK.bool() if padded else MASK.bool() | True
    expected = model(x, attention_mask=tokens).logits
    torch.testing.assert_close(torch.cat(result, 1)[tokens], expected[tokens], **FP32)


def test_compiled_models_assert_what_eager_ones_refuse() -> None:
    compiled = torch.compile(converted_model("qwen3", layers=1), backend="aot_eager", fullgraph=True)
    packed = torch.tensor([[*range(4), *range(7)]] * 3)
    with pytest.raises(RuntimeError, match=r"position_ids: got packed sequences; allowed: .* cu_seq_lens_q"):
        compiled(prompts(), position_ids=packed, use_cache=False)
    torn = torch.tensor([[1, 1, 0, *[1] * 8]] * 3)
    with pytest.raises(RuntimeError, match="attention_mask: got padding between tokens"):
        compiled(prompts(), attention_mask=torn)
    starts = torch.tensor([0, 4, 11])
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
    packed_inputs = {"input_ids": prompts()[:1], "position_ids": packed[:1], "use_cache": False}
    torch.testing.assert_close(
        compiled(**packed_inputs, **lengths).logits, converted_model("qwen3", layers=1)(**packed_inputs).logits, **FP32
    )
