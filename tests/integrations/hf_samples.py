"""Tiny random models of transformers, and a dense reference of Parallax attention that uses transformers' masks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.masking_utils import sdpa_mask

from parallax_gen.integrations.transformers import convert

# Weights large enough that attention is far from uniform, and that tokens differ in what is generated.
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TOKENS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
WINDOW_FIRST = ["sliding_attention", "full_attention"]
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
GROWING_SCALE = {  # q is scaled by a factor that grows every 8 positions
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5,
}
CONFIGS = {
    "gemma2": Gemma2Config(
        **SIZES,
        **HEADS,
        **TOKENS,
        query_pre_attn_scalar=16,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        tie_word_embeddings=False,
        final_logit_softcapping=None,
    ),
    "gemma3_text": Gemma3TextConfig(
        **SIZES,
        **HEADS,
        **TOKENS,
        query_pre_attn_scalar=16,
        sliding_window=5,
        layer_types=WINDOW_FIRST,
        tie_word_embeddings=False,
    ),
    "glm": GlmConfig(**SIZES, **HEADS, **TOKENS),
    "glm4": Glm4Config(**SIZES, **HEADS, **TOKENS),  # RoPE of half of head_dim, interleaved
    "granite": GraniteConfig(**SIZES, **HEADS, **TOKENS, attention_multiplier=0.3, residual_multiplier=0.5),
    "llama": LlamaConfig(**SIZES, **HEADS, **TOKENS, attention_bias=True),
    "ministral": MinistralConfig(**SIZES, **HEADS, **TOKENS, sliding_window=5, layer_types=WINDOW_FIRST),
    "ministral3": Ministral3Config(
        **SIZES, **HEADS, **TOKENS, sliding_window=None, rope_parameters=GROWING_SCALE, max_position_embeddings=32
    ),
    "mistral": MistralConfig(**SIZES, **HEADS, **TOKENS, sliding_window=5),
    "olmo2": Olmo2Config(**SIZES, **HEADS, **TOKENS),
    "olmo3": Olmo3Config(**SIZES, **HEADS, **TOKENS, sliding_window=5, layer_types=WINDOW_FIRST),
    "phi3": Phi3Config(**SIZES, **HEADS, **TOKENS, sliding_window=5, rope_parameters=PARTIAL_ROPE),
    "qwen2": Qwen2Config(**SIZES, **HEADS, **TOKENS, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, **HEADS, **TOKENS),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, **HEADS, **TOKENS, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
    "smollm3": SmolLM3Config(**SIZES, **HEADS, **TOKENS, no_rope_layers=[1, 0]),
}

# fp32 models against the fp64 reference of CPU tensors: rounding errors of 6e-8, amplified by two layers.
FP32 = {"rtol": 1e-4, "atol": 1e-4}


# The name of a model's cache argument, which was renamed.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def stock_model(name: str, layers: int = 2) -> PreTrainedModel:
    """An unconverted model with the same weights in every call."""
    torch.manual_seed(1)
    changed = {**CONFIGS[name].to_dict(), "num_hidden_layers": layers}
    if layer_types := changed.get("layer_types"):
        changed["layer_types"] = layer_types[:layers]
    config = type(CONFIGS[name])(**changed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def converted_model(name: str, r: float = 0.0, layers: int = 2) -> PreTrainedModel:
    """`stock_model`, converted, with random r_proj weights of size `r`."""
    model = convert(stock_model(name, layers))
    torch.manual_seed(2)
    for parameter_name, parameter in model.named_parameters():
        if "r_proj" in parameter_name and r:
            nn.init.normal_(parameter, std=r)
    return model


def prompts(batch: int = 3, length: int = 11) -> Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(3))


def padding(before: list[int], behind: list[int], length: int = 11) -> Tensor:
    """A mask (batch, length) with these numbers of zeros at the beginning and the end of each sequence."""
    places = torch.arange(length)
    first, end = torch.tensor(before)[:, None], length - torch.tensor(behind)[:, None]
    return ((places >= first) & (places < end)).long()


def dense_reference(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    r: Callable[[], Tensor],
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Dense attention by the formula, in fp64. mask (batch, 1, new tokens, keys): True where a query sees a key."""
    group = query.shape[1] // key.shape[1]
    q, r, k, v = (x.double() for x in (query, r(), key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)))
    s = scaling * q @ k.mT
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    p = s.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)  # a padding query may see no key
    t = r @ k.mT
    t_mean = (p * t).sum(-1, keepdim=True)
    return ((p * (1 + t_mean - t)) @ v).transpose(1, 2).to(value.dtype), None


def dense_mask(**arguments: Any) -> Tensor:
    mask = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    assert mask is not None
    return mask


@contextmanager
def use_dense_reference() -> Iterator[None]:
    """Within the context converted models use the dense reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "parallax", dense_reference)
        patch.setitem(AttentionMaskInterface._global_mapping, "parallax", dense_mask)
        yield
