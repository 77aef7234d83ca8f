"""Which models of transformers convert: one line a family, and what keeps another model from converting."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

# The kinds of layers that the families have, as configs call them.
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Family:
    """A model family of transformers, and what a layer must know of its attention to project and rotate r.

    module      its folder in transformers.models
    attention   the class of its self-attention
    config      the class of its config; the models of this config convert, whatever their head
    projection  the attention's linear layer that projects q, alone or together with k and v: r_proj has a bias if this
                layer has one, and tensor parallelism splits r_proj likewise

    All else is the attention's own, since its forward runs unchanged: norms of q and k, per head or over all heads, the
    scale, the softcap and the windows. r is rotated as q is, by the family's `apply_rotary_pos_emb`: half by half,
    interleaved or in part; or not at all, in layers whose attention has a false `use_rope`.
    """

    module: str
    attention: str
    config: str
    projection: str = "q_proj"

    @property
    def name(self) -> str:
        return self.attention.removesuffix("Attention")

    def modeling(self) -> Any:
        return import_module(f"transformers.models.{self.module}.modeling_{self.module}")

    def configuration(self) -> Any:
        return import_module(f"transformers.models.{self.module}.configuration_{self.module}")


FAMILIES = (
    Family("gemma2", "Gemma2Attention", "Gemma2Config"),
    Family("gemma3", "Gemma3Attention", "Gemma3TextConfig"),  # Gemma3Config is that of images and text
    Family("glm", "GlmAttention", "GlmConfig"),
    Family("glm4", "Glm4Attention", "Glm4Config"),
    Family("granite", "GraniteAttention", "GraniteConfig"),
    Family("llama", "LlamaAttention", "LlamaConfig"),
    Family("ministral", "MinistralAttention", "MinistralConfig"),
    Family("ministral3", "Ministral3Attention", "Ministral3Config"),
    Family("mistral", "MistralAttention", "MistralConfig"),
    Family("olmo2", "Olmo2Attention", "Olmo2Config"),
    Family("olmo3", "Olmo3Attention", "Olmo3Config"),
    Family("phi3", "Phi3Attention", "Phi3Config", projection="qkv_proj"),
    Family("qwen2", "Qwen2Attention", "Qwen2Config"),
    Family("qwen3", "Qwen3Attention", "Qwen3Config"),
    Family("qwen3_moe", "Qwen3MoeAttention", "Qwen3MoeConfig"),
    Family("smollm3", "SmolLM3Attention", "SmolLM3Config"),
)


def unsupported_attention(model: nn.Module) -> str | None:
    """What a model's attention has that Parallax attention lacks, such as "attention sinks". None if nothing is known.

    It explains why a model of another family is refused; a model of which it says nothing is refused, too.
    """
    modules = list(model.modules())
    if any(getattr(module, "sinks", None) is not None for module in modules):
        return "attention sinks"
    if any(hasattr(module, "kv_a_proj_with_mqa") for module in modules):
        return "latent attention (MLA)"
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else None
    others = sorted({*(getattr(text, "layer_types", None) or ())} - LAYER_TYPES)
    return f"layers of {' and '.join(others)}" if others else None
