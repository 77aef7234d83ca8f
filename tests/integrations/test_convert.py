"""`convert`: the converted model, saving and loading it, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from hf_samples import CONFIGS, FP32, converted_model, padding, prompts, stock_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.transformers import convert

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_attention_gets_an_r_proj_of_zeros_like_its_q_proj(name: str) -> None:
    model = stock_model(name).to(torch.bfloat16)
    before = dict(model.named_parameters())
    assert convert(model) is model
    assert convert(model) is model  # a second time does nothing
    after = dict(model.named_parameters())
    assert all(after[key] is parameter for key, parameter in before.items())
    new = {key: after[key] for key in after.keys() - before.keys()}
    assert {key.rpartition(".")[0] for key in new} == {f"model.layers.{i}.self_attn.r_proj" for i in range(2)}
    for key, parameter in new.items():
        like = before[key.replace("r_proj", "qkv_proj" if name == "phi3" else "q_proj")]
        shape = (64, *like.shape[1:]) if name == "phi3" else like.shape
        assert (parameter.shape, parameter.dtype) == (shape, like.dtype)
        assert not parameter.any()
        assert parameter.requires_grad
    assert all(module.training == model.training for module in model.modules())


def test_other_models_with_the_same_config_are_unchanged(tmp_path: Path) -> None:
    stock = stock_model("qwen3")
    other = type(stock)(stock.config).eval()
    before = other(prompts()).logits
    convert(stock)
    assert other.config is not stock.config
    assert other.config._attn_implementation == "eager"
    assert torch.equal(other(prompts()).logits, before)
    assert {module.config.model_type for module in stock.modules() if hasattr(module, "config")} == {"parallax_qwen3"}
    # A wrapper of `stock` may share the config object: what it saves must not load as a model without r_proj.
    assert other.config.model_type == "parallax_qwen3"
    other.save_pretrained(tmp_path)
    for model_class in (AutoModelForCausalLM, Qwen3ForCausalLM):
        torch.testing.assert_close(model_class.from_pretrained(tmp_path)(prompts()).logits, before, **FP32)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = converted_model(name, r=0.1)
    model.save_pretrained(tmp_path)
    # It has its own model_type, so transformers alone does not load it as a model without r_proj.
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == f"parallax_{name}"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(prompts()).logits, model(prompts()).logits)
        base = AutoModel.from_pretrained(tmp_path)
        hidden = base(prompts()).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(prompts()).logits)
    assert loaded.generate(prompts(), max_new_tokens=3).shape == (3, 14)


def test_a_base_model_converts_and_is_saved(tmp_path: Path) -> None:
    model = convert(stock_model("qwen3").model)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert isinstance(loaded, Qwen3Model)
    with torch.no_grad():
        expected = stock_model("qwen3").model(prompts()).last_hidden_state
        torch.testing.assert_close(loaded(prompts()).last_hidden_state, expected, **FP32)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_made_from_a_converted_config_starts_with_r_zero(name: str, tmp_path: Path) -> None:
    config = converted_model(name).config
    model = AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():
        zero = "r_proj" in key or key.endswith(".bias") or (name.startswith("gemma") and "norm" in key)  # it adds 1
        assert bool(parameter.any()) != zero, key
    config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)


def test_a_checkpoint_without_r_proj_can_be_loaded_as_parallax(tmp_path: Path) -> None:
    stock_model("qwen3").save_pretrained(tmp_path)
    model = type(converted_model("qwen3")).from_pretrained(tmp_path)
    assert model.config.model_type == "parallax_qwen3"
    with torch.no_grad():
        torch.testing.assert_close(model(prompts()).logits, stock_model("qwen3")(prompts()).logits, **FP32)


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_still_recorded(name: str, tmp_path: Path) -> None:
    model = converted_model(name)
    model.save_pretrained(tmp_path)
    expected = stock_model(name)(prompts(), output_hidden_states=True).hidden_states
    for loaded in (
        model,
        model.model,
        convert(stock_model(name).model),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        torch.testing.assert_close(loaded(prompts(), output_hidden_states=True).hidden_states, expected, **FP32)


def test_r_proj_is_split_over_ranks_like_q_proj() -> None:
    for name in CONFIGS:
        stock = stock_model(name)
        # A config with a plan of its own, as some transformers make for tied embeddings.
        stock.config.base_model_tp_plan = {**stock.config.base_model_tp_plan, "embed_tokens": "embedding_rowwise"}
        for model, own in ((converted_model(name), False), (convert(stock), True)):
            plan = model.config.base_model_tp_plan
            q_proj = "qkv_proj" if name == "phi3" else "q_proj"
            assert plan["layers.*.self_attn.r_proj"] == plan[f"layers.*.self_attn.{q_proj}"]
            assert not own or "embed_tokens" in plan
            assert "layers.*.self_attn.r_proj" not in CONFIGS[name].base_model_tp_plan


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copy_of: Any) -> None:
    model = converted_model("mistral", r=0.1)
    assert torch.equal(copy_of(model)(prompts()).logits, model(prompts()).logits)


MASK = padding([0, 3, 8], [0, 0, 0])
INNER_PADDING = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1]] * 3)
STARTS = torch.tensor([0, 11])
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attention_mask": INNER_PADDING}, "attention_mask: got padding between tokens"),
    ({"attention_mask": torch.ones(3, 12)}, "attention_mask: got 12 columns; allowed: one per token so far"),
    ({"attention_mask": torch.ones(3, 1, 11, 11).tril().bool()}, "attention_mask: got torch.bool of shape"),
    ({"output_attentions": True}, "output_attentions: got True"),
    ({"cu_seq_lens_q": STARTS}, "cu_seq_lens_q: got passed without the others; allowed: all of cu_seq_lens_q"),
    (
        {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 11, "max_length_k": 11}
        | {"attention_mask": MASK},
        "attention_mask: got padding, or a cache, together with cu_seq_lens_q",
    ),
    ({"s_aux": torch.zeros(4)}, "s_aux: got a value; allowed: None"),
    (
        {"is_causal": False},
        "is_causal: got False|not causal",
    ),  # set on the layer or in the mask, depending on transformers
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused_calls(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        converted_model("qwen3")(prompts(), **options)


def test_refused_configs() -> None:
    model = converted_model("qwen3")
    model.config.is_causal = False
    with pytest.raises(ArgumentError, match="attention_mask: got attention that is not causal"):
        model(prompts())
    model = stock_model("qwen3")
    model.config.output_attentions = True
    with pytest.raises(ArgumentError, match="output_attentions: got True"):
        convert(model)(prompts())
    model = converted_model("qwen3").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ArgumentError, match=r"attention_dropout: got 0\.1; allowed: 0"):
        model(prompts())
    assert model.eval()(prompts()).logits.shape == (3, 11, 64)


def test_other_attention_implementations_are_refused() -> None:
    """sdpa would silently ignore r."""
    model = converted_model("qwen3")
    with pytest.raises(ArgumentError, match="attn_implementation: got 'sdpa'; allowed: None or 'parallax'"):
        model.set_attn_implementation("sdpa")
    with pytest.raises(ArgumentError, match="attn_implementation: got 'eager'"):
        AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ArgumentError, match="attn_implementation: got 'sdpa'"):
        model(prompts())
    with pytest.raises(ArgumentError, match="attn_implementation: got 'parallax' in a Qwen3Attention without r"):
        AutoModelForCausalLM.from_config(CONFIGS["qwen3"], attn_implementation="parallax")(prompts())


def test_models_that_cannot_be_converted() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8, n_positions=8))
    for model, name in ((gpt2, "GPT2LMHeadModel"), (nn.Linear(2, 2), "Linear")):
        message = f"model: got {name}; allowed: Gemma2, .*Llama, .*SmolLM3 of transformers, with any head or none$"
        with pytest.raises(ArgumentError, match=message):
            convert(model)
    adapted = stock_model("llama")
    adapted.model.layers[1].self_attn.q_proj = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ArgumentError, match=r"model: got a q_proj of Sequential; allowed: an nn\.Linear"):
        convert(adapted)
    assert type(adapted).__name__ == "LlamaForCausalLM"  # unchanged
    spread = stock_model("llama")
    attention = spread.model.layers[0].self_attn
    attention.forward = attention.forward  # as accelerate's hooks do
    with pytest.raises(ArgumentError, match="model: got an attention whose forward was replaced, as device_map does"):
        convert(spread)
    narrow = AutoModelForCausalLM.from_config(type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), "head_dim": 12}))
    with pytest.raises(ArgumentError, match="model: got head_dim 12; allowed: a multiple of 8 from 8 to 256"):
        convert(narrow)
