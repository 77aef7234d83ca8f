"""A config.json as attention layers, and the errors for what cannot be read or is not supported."""

from __future__ import annotations

from typing import Any

import pytest

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.models import FAMILIES, REFUSED, Model, model_of
from parallax_gen.problem.steps import Serving, Training, serving_steps, steps_of, training_steps

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 16,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
GEMMA2 = {
    **LLAMA,
    "model_type": "gemma2",
    "head_dim": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "num_hidden_layers": 26,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "sliding_window": 512, "use_sliding_window": True, "max_window_layers": 10}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}
FLA = {"model_type": "parallax", "hidden_size": 2048, "num_heads": 32, "num_hidden_layers": 24, "window_size": None}


def read(config: dict[str, Any], **changes: Any) -> Model:
    return model_of({**config, **changes}, "m/config.json", "m")


def without(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != name}


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (LLAMA, Model("m", 32, 8, 64, ((0, 16),), False, "bf16", 131072)),
        (without(LLAMA, "num_key_value_heads"), Model("m", 32, 32, 64, ((0, 16),), False, "bf16", 131072)),
        ({**LLAMA, "head_dim": None}, Model("m", 32, 8, 64, ((0, 16),), False, "bf16", 131072)),
        ({**LLAMA, "dtype": "float32"}, Model("m", 32, 8, 64, ((0, 16),), False, "fp32", 131072)),
        ({**LLAMA, "model_type": "parallax_llama"}, Model("m", 32, 8, 64, ((0, 16),), False, "bf16", 131072)),
        (GEMMA2, Model("m", 32, 8, 256, ((0, 13), (4096, 13)), True, "bf16", 131072)),
        (QWEN2, Model("m", 32, 8, 64, ((0, 10), (512, 6)), False, "bf16", 131072)),
        ({**QWEN2, "use_sliding_window": False}, Model("m", 32, 8, 64, ((0, 16),), False, "bf16", 131072)),
        ({**QWEN2, "layer_types": ["sliding_attention"] * 16}, Model("m", 32, 8, 64, ((512, 16),), max_len=131072)),
        (GPT2, Model("m", 12, 12, 64, ((0, 12),), False, "bf16", 1024)),
        (FLA, Model("m", 32, 32, 64, ((0, 24),), False, "bf16", None)),
        ({**FLA, "window_size": 300, "num_kv_heads": 4}, Model("m", 32, 4, 64, ((300, 24),), False, "bf16", None)),
    ],
)
def test_configs_are_read(config: dict[str, Any], model: Model) -> None:
    assert read(config) == model


def test_the_text_part_of_a_model_is_read() -> None:
    """As Gemma 3 is published: its text_config lacks what has transformers' defaults."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    model = read({"model_type": "gemma3", "text_config": text, "torch_dtype": "float16", "vision_config": {}})
    assert (model.heads, model.kv_heads, model.head_dim, model.dtype) == (8, 4, 256, "fp16")
    assert model.windows == ((0, 5), (1024, 29))
    with pytest.raises(ArgumentError, match=r"^m/config.json: text_config: num_hidden_layers: got nothing; allowed: "):
        read({"model_type": "gemma3", "text_config": without(text, "num_hidden_layers")})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (without(LLAMA, "model_type"), f"model_type: got nothing; allowed: {', '.join(FAMILIES)}"),
        ({**LLAMA, "model_type": "bert"}, f"model_type: got 'bert'; allowed: {', '.join(FAMILIES)}"),
        ({**LLAMA, "model_type": ["llama"]}, "model_type: got ['llama']; allowed: "),
        (without(LLAMA, "num_attention_heads"), "num_attention_heads: got nothing; allowed: an int of 1 or more"),
        ({**LLAMA, "num_hidden_layers": "16"}, "num_hidden_layers: got '16'; allowed: an int of 1 or more"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers: got True; allowed: an int of 1 or more"),
        ({**LLAMA, "num_key_value_heads": 5}, "num_key_value_heads: got 5; allowed: a divisor of the 32 query heads"),
        ({**LLAMA, "head_dim": 100}, "head_dim: got 100; allowed: a multiple of 8 from 8 to 256"),
        ({**LLAMA, "hidden_size": 32 * 512}, "head_dim: got 512; allowed: a multiple of 8 from 8 to 256"),
        ({**LLAMA, "torch_dtype": "float64"}, "torch_dtype: got 'float64'; allowed: auto, bfloat16, float16, float32"),
        ({**LLAMA, "dtype": [1]}, "dtype: got [1]; allowed: auto, bfloat16, float16, float32"),
        (without(GEMMA2, "head_dim"), "head_dim: got nothing; allowed: an int of 1 or more"),
        (without(GEMMA2, "sliding_window"), "sliding_window: got nothing; allowed: an int of 1 or more, or null for "),
        (without(GEMMA2, "attn_logit_softcapping"), "attn_logit_softcapping: got nothing; allowed: a number, or null"),
        (
            {**GEMMA2, "layer_types": ["linear_attention"] * 26},
            "layer_types: got 'linear_attention'; allowed: 'full_attention' or 'sliding_attention'",
        ),
        (
            {**LLAMA, "layer_types": ["chunked_attention"] * 16},
            "layer_types: got 'chunked_attention'; allowed: 'full_attention' or 'sliding_attention'",
        ),
        (
            {**GEMMA2, "layer_types": ["full_attention"] * 3},
            "layer_types: got 3 layers; allowed: 26, as num_hidden_layers says",
        ),
        ({**LLAMA, "attention_chunk_size": 8192}, "attention_chunk_size: got 8192; allowed: null: no chunked"),
        ({**GEMMA2, "use_bidirectional_attention": True}, "use_bidirectional_attention: got True; allowed: false"),
        ({**LLAMA, "model_type": "gpt_oss"}, "model_type: got 'gpt_oss', which has attention sinks; allowed: "),
        ({**LLAMA, "model_type": "llama4_text"}, "model_type: got 'llama4_text', which has chunked attention; allowed"),
        ({**LLAMA, "model_type": "qwen3_next"}, "model_type: got 'qwen3_next', which has linear attention; allowed: "),
    ],
)
def test_an_error_names_the_file_the_field_and_what_is_allowed(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        read(config)
    assert str(refused.value).startswith(f"m/config.json: {message}")


def test_no_family_is_both_read_and_refused() -> None:
    assert not set(FAMILIES) & set(REFUSED)


def test_tensor_parallelism_divides_heads() -> None:
    model = read(LLAMA).split(4)
    assert (model.heads, model.kv_heads, model.head_dim, model.layers) == (8, 2, 64, 16)
    for ranks in (0, 3, 16):
        with pytest.raises(ArgumentError, match=r"^tp: got \d+; allowed: a divisor of the model's 8 kv heads$"):
            read(LLAMA).split(ranks)


def test_a_model_in_words() -> None:
    assert str(read(LLAMA)) == "m: 16 layers, heads 32/8, head_dim 64, bf16"
    assert str(read(GEMMA2)) == "m: 26 layers (13 with window 4096), heads 32/8, head_dim 256, bf16, softcap"


def test_sizes_are_those_of_the_run() -> None:
    model = read(GPT2)
    assert Training.for_model(model) == Training(4, 1024)
    assert Serving.for_model(model, max_batch=3) == Serving(max_len=1024, max_batch=3)
    assert Serving(max_batch=6).batches == [1, 2, 4, 6]
    assert Serving(max_batch=8).batches == [1, 2, 4, 8]
    assert Serving(max_batch=1).batches == [1]
    names = [step.name for step in steps_of(model, Training(), Serving(max_batch=2, page_size=16))]
    assert names == ["training", "decode, batch 1", "decode, batch 2", "chunk, batch 1", "chunk, batch 2"]
    assert steps_of(model, None, None) == []
    (call,) = serving_steps(model, Serving(max_len=1000, page_size=16, max_batch=1))[0].calls
    assert call.shape.seqlen_kv == 1008  # whole pages
    chunk = serving_steps(model, Serving(max_len=1000, max_batch=1, chunk=4096))[1]
    assert chunk.calls[0].shape.seqlen_q == 1000
    assert training_steps(model, Training(2, 512))[0].calls[0].count == 12


@pytest.mark.parametrize(
    ("kind", "sizes"), [(Training, {"batch": 0}), (Serving, {"chunk": 0}), (Serving, {"page_size": -1})]
)
def test_sizes_are_checked(kind: Any, sizes: dict[str, int]) -> None:
    ((name, value),) = sizes.items()
    with pytest.raises(ArgumentError, match=rf"^{name}: got {value}; allowed: an int of \d or more$"):
        kind(**sizes)
