"""Converted models of transformers: the same function while r is 0, and Parallax attention otherwise."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from hf_samples import CACHE, CONFIGS, FP32, converted_model, padding, prompts, stock_model, use_dense_reference
from transformers import DynamicCache, StaticCache

from parallax_gen.nn import ParallaxAttention

pytestmark = [
    pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors"),
    pytest.mark.filterwarnings(
        "ignore:.*gradient_checkpointing:FutureWarning"
    ),  # the new name does not exist in all versions
]

PADDED = {
    "none": padding([0, 0, 0], [0, 0, 0]),
    "before": padding([0, 3, 8], [0, 0, 0]),
    "behind": padding([0, 0, 0], [0, 2, 7]),
    "both": padding([0, 4, 1], [5, 2, 0]),
}
PACKED = torch.tensor([[*range(4), *range(1), *range(6)], [*range(3, 14)], [*range(9), *range(2)]])


@pytest.mark.parametrize("name", CONFIGS)
def test_conversion_keeps_logits(name: str) -> None:
    before, after = stock_model(name), converted_model(name)
    x = prompts()
    with torch.no_grad():
        torch.testing.assert_close(after(x).logits, before(x).logits, **FP32)
        packed = {
            "position_ids": PACKED,
            "use_cache": False,
        }  # transformers detects packed sequences only without a cache
        torch.testing.assert_close(after(x, **packed).logits, before(x, **packed).logits, **FP32)
        for mask in PADDED.values():
            result, expected = (model(x, attention_mask=mask).logits[mask.bool()] for model in (after, before))
            torch.testing.assert_close(result, expected, **FP32)


def test_conversion_keeps_logits_within_bf16_rounding() -> None:
    truth = stock_model("qwen3")(prompts()).logits
    result, eager = (
        model.bfloat16()(prompts()).logits.float() for model in (converted_model("qwen3"), stock_model("qwen3"))
    )
    # Everything else is rounded to bf16 alike; within attention the converted model rounds less.
    assert (result - truth).abs().max() <= 1.5 * (eager - truth).abs().max()
    assert (result - eager).abs().max() <= 1.5 * (eager - truth).abs().max()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_conversion_keeps_generated_text(name: str, cache: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": PADDED["before"]}
    options |= {} if cache == "dynamic" else {"cache_implementation": cache}
    result, expected = (model.generate(prompts(), **options) for model in (converted_model(name), stock_model(name)))
    assert result.tolist() == expected.tolist()
    assert result[:, 11:].unique().numel() > 4  # the output is not constant


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3, "eos_token_id": 63}, {"prefill_chunk_size": 4}]
)
def test_other_ways_to_generate(options: dict[str, Any]) -> None:
    x = prompts(1).repeat(1, 2)  # a prompt for prompt lookup decoding
    result = converted_model("qwen3", r=0.1).generate(x, max_new_tokens=8, do_sample=False, **options)
    with use_dense_reference():
        expected = converted_model("qwen3", r=0.1).generate(x, max_new_tokens=8, do_sample=False, **options)
    assert result.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["gemma2", "llama", "mistral", "qwen2", "qwen3"])
def test_a_converted_attention_is_our_layer(name: str) -> None:
    attention = converted_model(name, r=0.2).model.layers[1].self_attn
    windowed, biased = name in ("mistral", "qwen2"), name in ("llama", "qwen2")
    options: dict[str, Any] = {"window_size": 5} if windowed else {"softcap": 2.0} if name == "gemma2" else {}
    layer = ParallaxAttention(64, 4, 2, 16, rope_theta=1e4, qk_norm=name == "qwen3", bias=biased, **options)
    weights = attention.state_dict()
    if name == "qwen2":
        weights["o_proj.bias"] = torch.zeros(64)
    layer.load_state_dict(weights)
    x = torch.randn(2, 9, 64)
    rotary = converted_model(name).model.rotary_emb
    out, attention_weights = attention(
        hidden_states=x, position_embeddings=rotary(x, torch.arange(9)[None]), attention_mask=None
    )
    torch.testing.assert_close(out, layer(x), **FP32)
    assert attention_weights is None


def outputs_and_gradients(name: str, mask: Tensor, **options: Any) -> list[Tensor]:
    model = converted_model(name, r=0.1)
    logits = model(prompts(), attention_mask=mask, **options).logits[mask.bool()]
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)))
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("name", "padded"),
    [(name, padded) for name in CONFIGS for padded in (PADDED if name in ("mistral", "qwen3") else ["both"])],
)
def test_attention_with_r_and_its_gradients(name: str, padded: str) -> None:
    result = outputs_and_gradients(name, PADDED[padded])
    with use_dense_reference():
        expected = outputs_and_gradients(name, PADDED[padded])
    assert len(result) == len(list(converted_model(name).parameters())) + 1
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)  # sums over all tokens, of size up to 300


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padded", ["none", "before"])
@pytest.mark.parametrize("name", ["gemma3_text", "ministral3", "mistral", "qwen2", "qwen3"])
def test_chunks_and_steps_with_a_cache(name: str, padded: str, static: bool) -> None:
    model = converted_model(name, r=0.1)
    x, mask = prompts(), PADDED[padded]
    with use_dense_reference():
        expected = model(x, attention_mask=mask).logits
    cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    result = []
    for begin, end in ((0, 4), (4, 9), (9, 10), (10, 11)):
        visible_mask = mask[:, :end] if padded == "before" else None
        positions = torch.arange(begin, end)[None]
        out = model(x[:, begin:end], attention_mask=visible_mask, position_ids=positions, **{CACHE: cache})
        result.append(out.logits)
    torch.testing.assert_close(torch.cat(result, 1)[mask.bool()], expected[mask.bool()], **FP32)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_packed_sequences(name: str) -> None:
    model, x = converted_model(name, r=0.1), prompts()
    result = model(x, position_ids=PACKED, use_cache=False).logits
    for row, cuts in enumerate(((0, 4, 5, 11), (0, 11), (0, 9, 11))):
        for begin, end in itertools.pairwise(cuts):
            alone = model(x[row : row + 1, begin:end]).logits[0]
            torch.testing.assert_close(result[row, begin:end], alone, **FP32)
    starts = torch.tensor([0, 4, 5, 11])
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 6, "max_length_k": 6}
    for positions in ({}, {"position_ids": PACKED[:1]}):
        by_lengths = model(x[:1], **lengths, **positions, use_cache=False).logits
        torch.testing.assert_close(by_lengths, result[:1], **FP32)


def test_training_r_proj_only() -> None:
    model = converted_model("qwen3").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("r_proj" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, losses = prompts(2, 16), []
    for _ in range(50):
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    untouched = stock_model("qwen3").state_dict()
    for name, weight in model.state_dict().items():
        assert weight.any() if "r_proj" in name else torch.equal(weight, untouched[name])


def test_checkpointed_layers_have_the_same_gradients() -> None:
    result = {}
    for checkpointed in (False, True):
        model = converted_model("qwen3", r=0.1).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(prompts(), labels=prompts(), attention_mask=PADDED["before"], use_cache=False).loss.backward()
        result[checkpointed] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(result[True], result[False])


def test_under_autocast() -> None:
    model = converted_model("qwen3", r=0.1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = model(prompts(), attention_mask=PADDED["before"]).logits
        generated = model.generate(prompts(), attention_mask=PADDED["before"], max_new_tokens=3, do_sample=False)
        with use_dense_reference():
            expected = model(prompts(), attention_mask=PADDED["before"]).logits
    assert generated.shape == (3, 14)
    tokens = PADDED["before"].bool()
    assert (result - expected)[tokens].norm() < 0.02 * expected[tokens].norm()  # a few bf16 rounding errors of 2⁻⁹
