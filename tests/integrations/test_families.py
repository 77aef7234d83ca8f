"""What differs from family to family: how r is projected and rotated, saved experts, several parts, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from hf_samples import CONFIGS, FP32, converted_model, prompts, stock_model
from transformers import AttentionInterface

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.transformers import convert, models, parallax_attention
from parallax_gen.integrations.transformers.families import FAMILIES, Family

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")

DOCS = Path(__file__).parents[2] / "docs/convert_and_finetune.md"


def test_samples_and_docs_have_every_family() -> None:
    model_types = [getattr(family.configuration(), family.config).model_type for family in FAMILIES]
    assert sorted(CONFIGS) == sorted(model_types)
    rows = re.findall(r"^\| .* \| `(\w+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows[1:]) == sorted(model_types)  # after the header


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_r_is_projected_and_rotated_like_q(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With q's weights in r_proj, r is q, but for the norm and the scale that only q has."""
    model = converted_model(name)
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(module: nn.Module, query: Tensor, *arguments: Any, r: Callable[[], Tensor], **options: Any) -> Any:
        seen.append((query, r()))
        return parallax_attention(module, query, *arguments, r=seen[-1][1], **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "parallax", spy)
    for attention in attentions(model):
        q_proj = getattr(attention, attention.family.projection)
        attention.r_proj.weight.copy_(q_proj.weight[:64])
        if q_proj.bias is not None:
            attention.r_proj.bias.copy_(q_proj.bias.normal_())
    model(prompts())
    assert len(seen) == 2
    for attention, (q, r) in zip(attentions(model), seen, strict=True):
        if hasattr(attention, "q_norm") or name == "ministral3":
            similarity = torch.nn.functional.cosine_similarity(q, r, dim=-1)
            torch.testing.assert_close(similarity, torch.ones(3, 4, 11), rtol=0, atol=1e-5)
            assert not torch.allclose(q, r)
        else:
            torch.testing.assert_close(q, r, rtol=1e-6, atol=1e-6)


def test_the_samples_differ_in_rope_windows_and_softcap() -> None:
    """So that the tests above and elsewhere see layers with and without each."""
    assert [bool(attention.use_rope) for attention in attentions(converted_model("smollm3"))] == [True, False]
    for name in ("gemma2", "gemma3_text", "ministral", "olmo3"):
        assert [attention.sliding_window for attention in attentions(converted_model(name))] == [5, None]
    for name in ("glm", "glm4", "phi3"):
        rotary = converted_model(name).model.rotary_emb
        cos, _ = rotary(torch.zeros(1, 3, 64), torch.arange(3)[None])
        assert cos.shape[-1] == 8  # of a head_dim of 16


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_r_proj_where_it_is_zero(name: str) -> None:
    model = converted_model(name).train()
    model(prompts(), labels=prompts()).loss.backward()
    for attention in attentions(model):
        for parameter in attention.r_proj.parameters():
            assert not parameter.any()
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()


# -- Qwen3-MoE: its files have one weight for each expert, its models one for all.


def test_experts_are_saved_one_by_one_as_in_unconverted_models(tmp_path: Path) -> None:
    from safetensors import safe_open

    names = {}
    for kind, model in (("stock", stock_model("qwen3_moe")), ("converted", converted_model("qwen3_moe", r=0.1))):
        model.save_pretrained(tmp_path / kind)
        with safe_open(tmp_path / kind / "model.safetensors", framework="pt") as file:
            names[kind] = set(file.keys())
    r_proj = {f"model.layers.{i}.self_attn.r_proj.weight" for i in range(2)}
    assert names["converted"] - names["stock"] == r_proj
    assert any("experts.3.gate_proj" in name for name in names["stock"])
    loaded = models.CONVERTED[transformers.Qwen3MoeForCausalLM].from_pretrained(tmp_path / "stock")
    with torch.no_grad():
        torch.testing.assert_close(loaded(prompts()).logits, stock_model("qwen3_moe")(prompts()).logits, **FP32)


def test_converted_models_have_their_stock_classs_choice_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    for stock, allowed in ((transformers.Qwen3MoeForCausalLM, True), (transformers.Qwen3ForCausalLM, False)):
        for cls in (stock, models.CONVERTED[stock]):
            # transformers caches the answer
            monkeypatch.delattr(cls, "_can_set_experts_implementation_cached_value", raising=False)
        assert models.CONVERTED[stock]._can_set_experts_implementation() is allowed


# -- Models of several parts, whose config makes their text's config.

IMAGE_SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
IMAGE_SIZES |= {"image_size": 8, "patch_size": 4}


def gemma3_of_images() -> Any:
    text = CONFIGS["gemma3_text"].to_dict()
    config = transformers.Gemma3Config(
        vision_config=IMAGE_SIZES, text_config=text, image_token_index=63, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def mistral3_of_images() -> Any:
    vision = transformers.PixtralVisionConfig(**IMAGE_SIZES, head_dim=16)
    text = CONFIGS["ministral3"].to_dict()
    config = transformers.Mistral3Config(vision_config=vision, text_config=text, image_token_index=63)
    return transformers.Mistral3ForConditionalGeneration(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("make", [gemma3_of_images, mistral3_of_images])
def test_the_text_of_a_model_of_images(make: Any, tmp_path: Path) -> None:
    model, x = make(), prompts().clamp(max=60)
    before = model(x).logits
    with pytest.raises(ArgumentError, match=r"or the base model in this one, model\.model\.language_model$"):
        convert(model)
    convert(model.model.language_model)
    torch.testing.assert_close(model(x).logits, before, **FP32)
    for name, parameter in model.named_parameters():
        if "r_proj" in name:
            nn.init.normal_(parameter, std=0.2)
    expected = model(x).logits
    assert not torch.allclose(expected, before, atol=0.1)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    if type(loaded.config.text_config) in models.CONVERTED:
        pytest.skip("this transformers reads no quantization_config of a part: docs/convert_and_finetune.md")
    assert not report["unexpected_keys"]
    torch.testing.assert_close(loaded(x).logits, expected, **FP32)
    text = loaded.config.get_text_config()
    assert loaded.model.language_model.config is text
    assert not hasattr(text, "quantization_config")
    generated = [of.generate(x, max_new_tokens=3, do_sample=False) for of in (loaded, model)]
    assert torch.equal(*generated)


# -- What is refused.

TINY = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
REFUSED = {
    "GptOss": "with attention sinks",
    "Llama4Text": "with layers of chunked_attention",
    "Qwen3Next": "with layers of linear_attention",
    "DeepseekV3": r"with latent attention \(MLA\)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_without_a_parallax_form_is_named(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**TINY)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    allowed = ", ".join(family.name for family in FAMILIES) + " of transformers, with any head or none$"
    with pytest.raises(ArgumentError, match=f"^model: got {type(model).__name__}, {REFUSED[name]}; allowed: {allowed}"):
        convert(model)
    assert type(model) not in models.CONVERTED.values()


def test_attention_that_is_not_causal_is_refused() -> None:
    config = type(CONFIGS["gemma3_text"])(**CONFIGS["gemma3_text"].to_dict() | {"use_bidirectional_attention": True})
    model = transformers.AutoModel.from_config(config)
    message = (
        "model: got a Gemma3Attention that is not causal; allowed: causal attention: .*use_bidirectional_attention"
    )
    with pytest.raises(ArgumentError, match=message):
        convert(model)
    assert type(model) is transformers.Gemma3TextModel  # unchanged


def test_fused_projections_are_checked() -> None:
    model: Any = stock_model("phi3")
    model.model.layers[1].self_attn.qkv_proj = nn.Sequential(nn.Linear(64, 128))
    with pytest.raises(ArgumentError, match=r"model: got a qkv_proj of Sequential; allowed: an nn\.Linear"):
        convert(model)


def test_a_family_has_the_names_of_its_classes() -> None:
    assert Family("qwen3_moe", "Qwen3MoeAttention", "Qwen3MoeConfig").name == "Qwen3Moe"
    for family in FAMILIES:
        assert issubclass(getattr(family.modeling(), family.attention), nn.Module)
        assert models.CONVERTED[getattr(family.configuration(), family.config)] in models.CONFIGS
