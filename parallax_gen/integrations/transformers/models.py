"""Models of transformers with Parallax attention: each a class of its own, so that a saved one is loaded as such."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama import configuration_llama, modeling_llama
from transformers.models.mistral import configuration_mistral, modeling_mistral
from transformers.models.qwen2 import configuration_qwen2, modeling_qwen2
from transformers.models.qwen3 import configuration_qwen3, modeling_qwen3

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.transformers.attention import NAME, parallax_attention
from parallax_gen.integrations.transformers.masks import parallax_mask
from parallax_gen.nn import ZeroInitLinear
from parallax_gen.problem.spec import LARGEST_HEAD_DIM


class WithProbes:
    """Goes before an attention class of transformers: r is projected like q, rotated like q, and handed on with q.

    r has no norm, though q may have one: at r = 0 the norm's gradient would be without bound.
    """

    rotate: Any  # the model's own apply_rotary_pos_emb
    head_dim: int
    r_proj: ZeroInitLinear
    config: Any

    def add_probes(self) -> None:
        like: nn.Linear = self.q_proj  # type: ignore[attr-defined]
        bias, device, dtype = like.bias is not None, like.weight.device, like.weight.dtype
        self.r_proj = ZeroInitLinear(like.in_features, like.out_features, bias, device=device, dtype=dtype)
        self.r_proj.train(like.training)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **others: Any) -> Any:
        if self.config._attn_implementation != NAME:
            raise ArgumentError("attn_implementation", repr(self.config._attn_implementation), repr(NAME))
        r = self.r_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        r, _ = self.rotate(r, r[:, :1], *position_embeddings)  # it takes a key too
        return super().forward(hidden_states, position_embeddings=position_embeddings, r=r, **others)  # type: ignore[misc]


class Converted:
    """Goes before a model class of transformers: its attention has probes, and is Parallax."""

    def __init__(self, config: Any, *inputs: Any, **others: Any):
        super().__init__(config, *inputs, **others)  # type: ignore[call-arg]
        change_classes(self)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention not in (None, NAME):
            raise ArgumentError("attn_implementation", repr(requested_attention), f"None or {NAME!r}")
        return NAME

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroInitLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


class ParallaxLlamaConfig(configuration_llama.LlamaConfig):
    model_type = "parallax_llama"


class ParallaxLlamaAttention(WithProbes, modeling_llama.LlamaAttention):
    rotate = staticmethod(modeling_llama.apply_rotary_pos_emb)


class ParallaxLlamaModel(Converted, modeling_llama.LlamaModel):
    config_class = ParallaxLlamaConfig


class ParallaxLlamaForCausalLM(Converted, modeling_llama.LlamaForCausalLM):
    config_class = ParallaxLlamaConfig


class ParallaxMistralConfig(configuration_mistral.MistralConfig):
    model_type = "parallax_mistral"


class ParallaxMistralAttention(WithProbes, modeling_mistral.MistralAttention):
    rotate = staticmethod(modeling_mistral.apply_rotary_pos_emb)


class ParallaxMistralModel(Converted, modeling_mistral.MistralModel):
    config_class = ParallaxMistralConfig


class ParallaxMistralForCausalLM(Converted, modeling_mistral.MistralForCausalLM):
    config_class = ParallaxMistralConfig


class ParallaxQwen2Config(configuration_qwen2.Qwen2Config):
    model_type = "parallax_qwen2"


class ParallaxQwen2Attention(WithProbes, modeling_qwen2.Qwen2Attention):
    rotate = staticmethod(modeling_qwen2.apply_rotary_pos_emb)


class ParallaxQwen2Model(Converted, modeling_qwen2.Qwen2Model):
    config_class = ParallaxQwen2Config


class ParallaxQwen2ForCausalLM(Converted, modeling_qwen2.Qwen2ForCausalLM):
    config_class = ParallaxQwen2Config


class ParallaxQwen3Config(configuration_qwen3.Qwen3Config):
    model_type = "parallax_qwen3"


class ParallaxQwen3Attention(WithProbes, modeling_qwen3.Qwen3Attention):
    rotate = staticmethod(modeling_qwen3.apply_rotary_pos_emb)


class ParallaxQwen3Model(Converted, modeling_qwen3.Qwen3Model):
    config_class = ParallaxQwen3Config


class ParallaxQwen3ForCausalLM(Converted, modeling_qwen3.Qwen3ForCausalLM):
    config_class = ParallaxQwen3Config


CONFIGS: tuple[Any, ...] = (ParallaxLlamaConfig, ParallaxMistralConfig, ParallaxQwen2Config, ParallaxQwen3Config)
ATTENTIONS = (ParallaxLlamaAttention, ParallaxMistralAttention, ParallaxQwen2Attention, ParallaxQwen3Attention)
MODELS = (ParallaxLlamaModel, ParallaxMistralModel, ParallaxQwen2Model, ParallaxQwen3Model)
CAUSAL_MODELS = (
    ParallaxLlamaForCausalLM,
    ParallaxMistralForCausalLM,
    ParallaxQwen2ForCausalLM,
    ParallaxQwen3ForCausalLM,
)
CONVERTED: dict[type, type] = {new.__bases__[-1]: new for new in (*CONFIGS, *ATTENTIONS, *MODELS, *CAUSAL_MODELS)}


def convert(model: Any) -> Any:
    """Give a model Parallax attention, in place: every attention gets an r_proj of zeros. Returns the model.

    model  LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, or the base model of one, such as
           LlamaModel, on any device, in fp32, bf16 or fp16; one that is converted already stays as it is

    Its other weights stay the tensors that they are, and its results the same, up to rounding, until r_proj is trained.
    Its class and its config become those of this module, such as ParallaxQwen3ForCausalLM: a config of its own, for
    other models may share the old one. Raises ArgumentError for another class, a head_dim that Parallax does not have,
    and what is to be done after: quantising, adding adapters, spreading over devices.
    """
    if isinstance(model, Converted):
        return model
    if type(model) not in CONVERTED:
        names = ", ".join(new.__bases__[-1].__name__ for new in (*CAUSAL_MODELS, *MODELS))
        raise ArgumentError("model", type(model).__name__, names)
    change_classes(model)
    return model


def change_classes(model: Any) -> None:
    """Make all modules and their config what `CONVERTED` says, and give attention its probes."""
    attentions = [module for module in model.modules() if CONVERTED.get(type(module)) in ATTENTIONS]
    for attention in attentions:
        check_attention(attention)
    old = model.config
    config = copy.deepcopy(old) if type(old) in CONVERTED else old
    config.__class__ = CONVERTED.get(type(old), type(old))
    vars(config).pop("model_type", None)  # one that was loaded has the old name as its own attribute, too
    config._attn_implementation = NAME
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config
        module.__class__ = CONVERTED.get(type(module), type(module))
        if isinstance(module, Converted):
            # transformers learns of a class, and of what output_hidden_states records in it, when one is made.
            PreTrainedModel.__init__(type(module).__new__(type(module)), config)
    for attention in attentions:
        attention.add_probes()


def check_attention(attention: Any) -> None:
    """Whether it can have probes. Raises ArgumentError."""
    if attention.head_dim % 8 or attention.head_dim > LARGEST_HEAD_DIM:
        raise ArgumentError("model", f"head_dim {attention.head_dim}", f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
    if type(attention.q_proj) is not nn.Linear:
        got = f"a q_proj of {type(attention.q_proj).__name__}"
        raise ArgumentError("model", got, "nn.Linear: convert before quantising, and before adding adapters")
    if "forward" in vars(attention):
        got = "an attention whose forward was replaced, as device_map does"
        raise ArgumentError("model", got, "its class's own: convert, save, and load what was saved with a device_map")


AttentionInterface.register(NAME, parallax_attention)
AttentionMaskInterface.register(NAME, parallax_mask)
for _config, _model, _causal_model in zip(CONFIGS, MODELS, CAUSAL_MODELS, strict=True):
    # Over the ranks of tensor parallelism r is split as q is, by heads.
    _config.base_model_tp_plan = {**_config.base_model_tp_plan, "layers.*.self_attn.r_proj": "colwise"}
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal_model)
