"""Models with any task head, converted whole or as an inner base model, saved and loaded: with r, or an error."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from hf_samples import CONFIGS, FP32, SIZES, prompts
from transformers import AttentionInterface
from transformers.models.auto import modeling_auto
from transformers.quantizers import auto as quantizers

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.transformers import convert, models

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")

FAMILIES = {
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "glm": "Glm",
    "glm4": "Glm4",
    "granite": "Granite",
    "llama": "Llama",
    "ministral": "Ministral",
    "ministral3": "Ministral3",
    "mistral": "Mistral",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "smollm3": "SmolLM3",
}
HEADS = ["ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
# All heads of one family, and the other families with the head of reward models.
CASES = [("llama", head, inside) for head in HEADS for inside in (False, True)]
CASES += [
    (name, "ForSequenceClassification", True) for name in FAMILIES if name not in ("llama", "granite", "olmo2", "olmo3")
]
CASES += [(name, "ForCausalLM", True) for name in ("granite", "olmo2", "olmo3", "qwen3_moe")]


def stock_class(name: str, head: str) -> Any:
    return getattr(transformers, FAMILIES[name] + head)


def stock_model(name: str, head: str, **changes: Any) -> Any:
    config = CONFIGS[name].to_dict() | {"num_hidden_layers": 1, "num_labels": 1} | changes
    for derived in ("layer_types", "id2label", "label2id"):
        config.pop(derived, None)  # with windows in the one layer
    torch.manual_seed(1)
    return stock_class(name, head)(type(CONFIGS[name])(**config)).eval()


def train(model: nn.Module) -> None:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "r_proj" in name:
            nn.init.normal_(parameter, std=0.2)


def base_of(model: Any) -> Any:
    return getattr(model, model.base_model_prefix)


def converted_model(name: str, head: str, *, inside: bool, **changes: Any) -> Any:
    model = stock_model(name, head, **changes)
    convert(base_of(model) if inside else model)
    train(model)
    return model


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    result = model(prompts())
    return result.start_logits if hasattr(result, "start_logits") else result.logits


def ways_to_load(name: str, head: str) -> list[Any]:
    stock = stock_class(name, head)
    return [getattr(transformers, f"AutoModel{head}"), stock, models.CONVERTED[stock]]


def check_clean(model: Any) -> None:
    """Nothing marks the model as quantised."""
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    for module in model.modules():
        assert not hasattr(getattr(module, "config", None), "quantization_config")
        assert not hasattr(getattr(module, "config", None), "_is_quantized")


@pytest.mark.parametrize(("name", "head", "inside"), CASES)
def test_saved_and_loaded(name: str, head: str, inside: bool, tmp_path: Path) -> None:
    model = converted_model(name, head, inside=inside)
    expected = outputs(model)
    assert not torch.allclose(expected, outputs(stock_model(name, head)), atol=1e-2)  # r changes the outputs
    model.save_pretrained(tmp_path)
    for way in ways_to_load(name, head):
        loaded, report = way.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is models.CONVERTED[stock_class(name, head)]
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(outputs(loaded), expected, **FP32)
        check_clean(loaded)
    loaded.save_pretrained(tmp_path / "again")
    reloaded = stock_class(name, head).from_pretrained(tmp_path / "again")
    torch.testing.assert_close(outputs(reloaded), expected, **FP32)


def test_dtypes_and_tied_weights(tmp_path: Path) -> None:
    model = converted_model("llama", "ForCausalLM", inside=True, tie_word_embeddings=True).bfloat16()
    model.save_pretrained(tmp_path)
    for way in ways_to_load("llama", "ForCausalLM"):
        loaded = way.from_pretrained(tmp_path)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        weights = loaded.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        in_fp32 = way.from_pretrained(tmp_path, dtype=torch.float32)
        assert {p.dtype for p in in_fp32.parameters()} == {torch.float32}


def test_a_reward_model_of_a_converted_language_model(tmp_path: Path) -> None:
    model = converted_model("llama", "ForCausalLM", inside=False)
    model.save_pretrained(tmp_path)
    for way in ways_to_load("llama", "ForSequenceClassification"):
        reward, report = way.from_pretrained(tmp_path, num_labels=1, output_loading_info=True)
        assert set(report["missing_keys"]) == {"score.weight"}
        assert torch.equal(
            reward.model.layers[0].self_attn.r_proj.weight, model.model.layers[0].self_attn.r_proj.weight
        )


@pytest.mark.parametrize("head", ["ForCausalLM", "ForSequenceClassification"])
def test_transformers_alone_refuses_it(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted_model("llama", head, inside=True).save_pretrained(tmp_path)
    monkeypatch.delitem(AttentionInterface._global_mapping, "parallax")
    monkeypatch.delitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "parallax_gen")
    with pytest.raises(ValueError, match='attn_implementation="parallax"` is not supported'):
        stock_class("llama", head).from_pretrained(tmp_path)


def test_stock_classes_refuse_other_attention(tmp_path: Path) -> None:
    model = converted_model("llama", "ForCausalLM", inside=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="attn_implementation: got 'sdpa'; allowed: None or 'parallax'"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ArgumentError, match="attn_implementation: got 'sdpa'"):
        outputs(model)
    # Loading with a converted config alone converts nothing: without r_proj there is no attention.
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="'parallax' in a LlamaAttention without r"):
        outputs(transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=config))


@pytest.mark.parametrize("head", ["ForCausalLM", ""])
def test_folders_saved_by_older_versions_load(head: str, tmp_path: Path) -> None:
    """Older configs have only the model_type."""
    model = stock_model("llama", "ForCausalLM")
    model = convert(model if head else model.model)
    train(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert (saved.pop("attn_implementation"), saved.pop("quantization_config")["quant_method"]) == (
        "parallax",
        "parallax_gen",
    )
    path.write_text(json.dumps(saved), encoding="utf-8")
    for way in (getattr(transformers, f"AutoModel{head}"), type(model)):
        for original, loaded in zip(model(prompts()), way.from_pretrained(tmp_path)(prompts()), strict=False):
            if isinstance(original, Tensor):
                torch.testing.assert_close(loaded, original, **FP32)


def test_every_auto_class_of_a_family_takes_the_converted_config() -> None:
    mappings = [
        getattr(auto, "_model_mapping", None) for auto in vars(modeling_auto).values() if isinstance(auto, type)
    ]
    heads = 0
    for stock, config in zip(map(type, CONFIGS.values()), models.CONFIGS, strict=True):
        for mapping in mappings:
            # Some wrap a model of this family, and have their own config class.
            if mapping is not None and stock in mapping and mapping[stock].config_class is stock:
                assert mapping[config] is models.CONVERTED[mapping[stock]]
                heads += 1
    assert heads >= 20


class Wrapper(transformers.LlamaPreTrainedModel):
    """A user's model that wraps a base model."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.body = transformers.LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.score(self.body(tokens).last_hidden_state)
        return result


@torch.no_grad()
def test_a_users_wrapper_of_a_base_model(tmp_path: Path) -> None:
    model = Wrapper(stock_model("llama", "ForCausalLM").config).eval()
    with pytest.raises(ArgumentError, match=r"model: got Wrapper; .* or the base model in this one, model\.body"):
        convert(model)
    convert(model.body)
    train(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(Wrapper.from_pretrained(tmp_path)(prompts()), model(prompts()), **FP32)


@torch.no_grad()
@pytest.mark.parametrize("part", ["text_config of a base model", "text_config of a model with a head"])
def test_a_model_of_several_parts(part: str, tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4)
    text = stock_model("llama", "ForCausalLM").config
    text._attn_implementation = "sdpa"
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    ).eval()
    language = model.model.language_model
    if part.endswith("head"):  # shares the config object, as in models that contain a language model with a head
        head = transformers.LlamaForCausalLM(language.config)
        head.model = language
        language = head
    convert(language)
    train(model)
    model.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["text_config"]["model_type"]
        == "parallax_llama"
    )
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(prompts()).logits, model(prompts()).logits, **FP32)


def test_converting_the_base_and_then_the_whole() -> None:
    model = stock_model("llama", "ForCausalLM")
    config = model.config
    convert(model.model)
    assert model.config is config  # later settings apply to the base model, too
    train(model)
    expected = outputs(model)
    result = model.generate(prompts(), max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert type(convert(model)) is models.CONVERTED[transformers.LlamaForCausalLM]
    assert torch.equal(outputs(model), expected)
    assert torch.equal(model.generate(prompts(), max_new_tokens=3, do_sample=False), result)


def test_r_starts_at_zero_however_models_are_initialised() -> None:
    model = converted_model("llama", "ForSequenceClassification", inside=True)
    with torch.device("meta"):
        empty = transformers.AutoModelForSequenceClassification.from_config(model.config)
    for initialised in (model, empty.to_empty(device="cpu")):
        for part in (*initialised.modules(), *initialised.parameters()):
            part._is_hf_initialized = False
        initialised.initialize_weights()
        attention = initialised.model.layers[0].self_attn
        assert not attention.r_proj.weight.any()
        assert not attention.r_proj.bias.any()
        assert 0 < attention.q_proj.weight.abs().max() < 2


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copy_of: Any) -> None:
    for inside in (False, True):
        model = converted_model("llama", "ForTokenClassification", inside=inside)
        assert torch.equal(outputs(copy_of(model)), outputs(model))


def test_a_converted_model_has_its_own_name_and_tensor_parallel_plan() -> None:
    model = stock_model("qwen3", "ForCausalLM")
    model.name_or_path = "Qwen/Qwen3-0.6B"
    plan = convert(model)._tp_plan
    assert model.name_or_path == ""  # adapters would record it as the model to load
    assert plan["model.layers.*.self_attn.r_proj"] == plan["model.layers.*.self_attn.q_proj"]
    assert not hasattr(model.generation_config, "quantization_config")
    assert not hasattr(model.generation_config, "attn_implementation")
    assert SIZES["hidden_size"] == model.config.hidden_size


def test_a_users_quantiser_replaces_the_loaders_entry() -> None:
    config = convert(stock_model("llama", "ForCausalLM").model).config
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()
    quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    saved = type(config)(**config.to_dict() | {"quantization_config": quantization}).to_dict()
    assert (saved["quantization_config"]["load_in_8bit"], saved["attn_implementation"]) == (True, "parallax")
