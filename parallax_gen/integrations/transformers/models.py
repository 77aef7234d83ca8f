"""transformers models with Parallax attention: separate classes, so that a saved model is loaded as Parallax."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.gemma2 import configuration_gemma2, modeling_gemma2
from transformers.models.llama import configuration_llama, modeling_llama
from transformers.models.mistral import configuration_mistral, modeling_mistral
from transformers.models.qwen2 import configuration_qwen2, modeling_qwen2
from transformers.models.qwen3 import configuration_qwen3, modeling_qwen3
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.transformers.attention import NAME, parallax_attention, parallax_mask
from parallax_gen.nn import ZeroInitLinear
from parallax_gen.problem.spec import LARGEST_HEAD_DIM

# The quantisation method in saved configs: it makes transformers load them with `ProbeLoader`.
LOADER = "parallax_gen"


class ParallaxConfigMixin:
    """A mixin before a transformers config class, so that no saved model is loaded as one without r_proj.

    A stock class such as LlamaForCausalLM ignores the saved model_type, so two more entries are saved for it.
    quantization_config makes `ProbeLoader` convert the model before its weights are read. attn_implementation names an
    attention that transformers does not have unless this package is imported, so loading fails without it.
    """

    def __post_init__(self, **extra_arguments: Any) -> None:
        extra_arguments.setdefault("attn_implementation", NAME)
        if extra_arguments.get("quantization_config") == {"quant_method": LOADER}:
            del extra_arguments["quantization_config"]  # models made from this config already have an r_proj
        super().__post_init__(**extra_arguments)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {"quantization_config": {"quant_method": LOADER}, **saved, "attn_implementation": NAME}


class ProbeAttentionMixin:
    """A mixin before a transformers attention class: r is projected and rotated like q, and passed on with q.

    r has no norm, though q may have one: at r = 0 the norm's gradient would be unbounded.
    """

    rotate: Any  # the model's own apply_rotary_pos_emb
    head_dim: int
    r_proj: ZeroInitLinear
    config: Any

    def add_probes(self) -> None:
        q_proj: nn.Linear = self.q_proj  # type: ignore[attr-defined]
        bias, device, dtype = q_proj.bias is not None, q_proj.weight.device, q_proj.weight.dtype
        self.r_proj = ZeroInitLinear(q_proj.in_features, q_proj.out_features, bias, device=device, dtype=dtype)
        self.r_proj.train(q_proj.training)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **extra_arguments: Any) -> Any:
        if self.config._attn_implementation != NAME:
            raise ArgumentError("attn_implementation", repr(self.config._attn_implementation), repr(NAME))
        r = self.r_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        r, _ = self.rotate(r, r[:, :1], *position_embeddings)  # rotate also needs a key
        return super().forward(hidden_states, position_embeddings=position_embeddings, r=r, **extra_arguments)  # type: ignore[misc]


class ParallaxModelMixin:
    """A mixin before a transformers model class: its attention layers have probes and use Parallax attention."""

    def __init__(self, config: Any, *inputs: Any, **extra_arguments: Any):
        super().__init__(config, *inputs, **extra_arguments)  # type: ignore[call-arg]
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


class ParallaxLlamaConfig(ParallaxConfigMixin, configuration_llama.LlamaConfig):
    model_type = "parallax_llama"


class ParallaxLlamaAttention(ProbeAttentionMixin, modeling_llama.LlamaAttention):
    rotate = staticmethod(modeling_llama.apply_rotary_pos_emb)


class ParallaxLlamaModel(ParallaxModelMixin, modeling_llama.LlamaModel):
    config_class = ParallaxLlamaConfig


class ParallaxLlamaForCausalLM(ParallaxModelMixin, modeling_llama.LlamaForCausalLM):
    config_class = ParallaxLlamaConfig


class ParallaxMistralConfig(ParallaxConfigMixin, configuration_mistral.MistralConfig):
    model_type = "parallax_mistral"


class ParallaxMistralAttention(ProbeAttentionMixin, modeling_mistral.MistralAttention):
    rotate = staticmethod(modeling_mistral.apply_rotary_pos_emb)


class ParallaxMistralModel(ParallaxModelMixin, modeling_mistral.MistralModel):
    config_class = ParallaxMistralConfig


class ParallaxMistralForCausalLM(ParallaxModelMixin, modeling_mistral.MistralForCausalLM):
    config_class = ParallaxMistralConfig


class ParallaxQwen2Config(ParallaxConfigMixin, configuration_qwen2.Qwen2Config):
    model_type = "parallax_qwen2"


class ParallaxQwen2Attention(ProbeAttentionMixin, modeling_qwen2.Qwen2Attention):
    rotate = staticmethod(modeling_qwen2.apply_rotary_pos_emb)


class ParallaxQwen2Model(ParallaxModelMixin, modeling_qwen2.Qwen2Model):
    config_class = ParallaxQwen2Config


class ParallaxQwen2ForCausalLM(ParallaxModelMixin, modeling_qwen2.Qwen2ForCausalLM):
    config_class = ParallaxQwen2Config


class ParallaxQwen3Config(ParallaxConfigMixin, configuration_qwen3.Qwen3Config):
    model_type = "parallax_qwen3"


class ParallaxQwen3Attention(ProbeAttentionMixin, modeling_qwen3.Qwen3Attention):
    rotate = staticmethod(modeling_qwen3.apply_rotary_pos_emb)


class ParallaxQwen3Model(ParallaxModelMixin, modeling_qwen3.Qwen3Model):
    config_class = ParallaxQwen3Config


class ParallaxQwen3ForCausalLM(ParallaxModelMixin, modeling_qwen3.Qwen3ForCausalLM):
    config_class = ParallaxQwen3Config


class ParallaxGemma2Config(ParallaxConfigMixin, configuration_gemma2.Gemma2Config):
    model_type = "parallax_gemma2"


class ParallaxGemma2Attention(ProbeAttentionMixin, modeling_gemma2.Gemma2Attention):
    rotate = staticmethod(modeling_gemma2.apply_rotary_pos_emb)


class ParallaxGemma2Model(ParallaxModelMixin, modeling_gemma2.Gemma2Model):
    config_class = ParallaxGemma2Config


class ParallaxGemma2ForCausalLM(ParallaxModelMixin, modeling_gemma2.Gemma2ForCausalLM):
    config_class = ParallaxGemma2Config


CONFIGS: tuple[Any, ...] = (
    ParallaxGemma2Config,
    ParallaxLlamaConfig,
    ParallaxMistralConfig,
    ParallaxQwen2Config,
    ParallaxQwen3Config,
)
ATTENTIONS = (
    ParallaxGemma2Attention,
    ParallaxLlamaAttention,
    ParallaxMistralAttention,
    ParallaxQwen2Attention,
    ParallaxQwen3Attention,
)
MODELS: tuple[Any, ...] = (
    ParallaxGemma2Model,
    ParallaxLlamaModel,
    ParallaxMistralModel,
    ParallaxQwen2Model,
    ParallaxQwen3Model,
)
CAUSAL_MODELS: tuple[Any, ...] = (
    ParallaxGemma2ForCausalLM,
    ParallaxLlamaForCausalLM,
    ParallaxMistralForCausalLM,
    ParallaxQwen2ForCausalLM,
    ParallaxQwen3ForCausalLM,
)
CONVERTED: dict[type, Any] = {new.__bases__[-1]: new for new in (*CONFIGS, *ATTENTIONS, *MODELS, *CAUSAL_MODELS)}


def convert(model: Any) -> Any:
    """Convert a model to Parallax attention in place: every attention layer gets an r_proj of zeros. Returns the model.

    model  Gemma2, Llama, Mistral, Qwen2 or Qwen3 of transformers with any of its heads, such as Qwen3ForCausalLM or
           LlamaForSequenceClassification, on any device, in fp32, bf16 or fp16; or a base model, such as LlamaModel, by
           itself or inside another model. A converted model stays as it is

    Its other weights stay the same tensors, and its results stay the same up to rounding until r_proj is trained. Its
    class and config become those of this module, such as ParallaxQwen3ForCausalLM. A model with a head gets its own
    config. A base model keeps its config object, which the model around it shares, and changes it: another base model
    with that object raises ArgumentError until it is converted too. Either way all models that share the old config
    object save as Parallax models; one of them without r_proj loads with r = 0, which computes the same function.

    Adapters that are added later do not record the original checkpoint as their base, because it lacks r_proj. Save the
    converted model, load it, and add adapters to that.

    Raises ArgumentError for another class, an unsupported head_dim, and for models that are already quantised, have
    adapters, or are spread over devices: convert first.
    """
    if isinstance(model, ParallaxModelMixin):
        return model
    if type(model) not in CONVERTED:
        allowed = ", ".join(new.__bases__[-1].__name__ for new in (*CAUSAL_MODELS, *MODELS)) + ", or with another head"
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        if inside := next((name for name, module in modules if CONVERTED.get(type(module)) in MODELS), None):
            allowed += f"; or the base model in this one, model.{inside}"
        raise ArgumentError("model", type(model).__name__, allowed)
    change_classes(model)
    model.name_or_path = ""  # adapters would save it as the base model to load
    return model


def change_classes(model: Any) -> None:
    """Change the classes of all modules and configs as `CONVERTED` says, and add r_proj to attention layers."""
    attentions = [module for module in model.modules() if CONVERTED.get(type(module)) in ATTENTIONS]
    for attention in attentions:
        check_attention(attention)
    keep_config = CONVERTED.get(type(model)) in MODELS
    changed: dict[int, Any] = {}  # id of the old config -> new config
    for module in list(model.modules()):
        old = getattr(module, "config", None)
        if id(old) not in changed and (type(old) in CONVERTED or type(old) in CONFIGS):
            changed[id(old)] = change_config(old, keep_config)
        if id(old) in changed:
            module.config = changed[id(old)]
        module.__class__ = CONVERTED.get(type(module), type(module))
        if isinstance(module, ParallaxModelMixin):
            # transformers registers a class, and its outputs for output_hidden_states, when an instance is made.
            PreTrainedModel.__init__(type(module).__new__(type(module)), module.config)  # type: ignore[attr-defined]
        if plan := vars(module).get("_tp_plan"):  # copied from the old config, without r_proj
            plan |= {name.replace("q_proj", "r_proj"): style for name, style in plan.items() if "q_proj" in name}
    for attention in attentions:
        attention.add_probes()


def change_config(old: Any, keep: bool) -> Any:
    """Convert a config: `old` itself if `keep`, else a copy for this model. Both are saved as Parallax."""
    config = old if keep or old._attn_implementation == NAME else copy.deepcopy(old)
    for changed in (old, config):
        changed.__class__ = CONVERTED.get(type(changed), type(changed))
        vars(changed).pop("model_type", None)  # a loaded config also has the old name as an instance attribute
    config._attn_implementation = NAME
    return config


def check_attention(attention: Any) -> None:
    """Check that an attention layer can get an r_proj. Raises ArgumentError."""
    if attention.head_dim % 8 or attention.head_dim > LARGEST_HEAD_DIM:
        raise ArgumentError("model", f"head_dim {attention.head_dim}", f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
    if type(attention.q_proj) is not nn.Linear:
        got = f"a q_proj of {type(attention.q_proj).__name__}"
        raise ArgumentError("model", got, "an nn.Linear: convert before quantising, and before adding adapters")
    if "forward" in vars(attention):
        got = "an attention whose forward was replaced, as device_map does"
        raise ArgumentError(
            "model", got, "the forward of its class: convert, save, and load the saved model with a device_map"
        )


def add_heads(modeling: Any, config: Any) -> None:
    """Make a converted class for every other head of a family, as an attribute of this module so that it pickles."""
    for stock in [getattr(modeling, name) for name in modeling.__all__]:
        abstract = stock.__name__.endswith("PreTrainedModel")
        if issubclass(stock, PreTrainedModel) and not abstract and stock not in CONVERTED:
            new = type(
                f"Parallax{stock.__name__}",
                (ParallaxModelMixin, stock),
                {"config_class": config, "__module__": __name__},
            )
            CONVERTED[stock] = globals()[new.__name__] = new


def register(config: Any) -> None:
    """Register the converted classes with AutoConfig and every Auto class that knows the config's stock class."""
    AutoConfig.register(config.model_type, config)
    stock = config.__bases__[-1]
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is not None and stock in mapping and mapping[stock] in CONVERTED:
            auto.register(config, CONVERTED[mapping[stock]])


AttentionInterface.register(NAME, parallax_attention)
AttentionMaskInterface.register(NAME, parallax_mask)
_MODELING = (modeling_gemma2, modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3)
for _modeling, _config in zip(_MODELING, CONFIGS, strict=True):
    # Tensor parallelism splits r by heads, like q.
    _config.base_model_tp_plan = {**_config.base_model_tp_plan, "layers.*.self_attn.r_proj": "colwise"}
    add_heads(_modeling, _config)
    register(_config)


# -- How a stock transformers class, such as LlamaForCausalLM, loads a saved converted model.
# from_pretrained of a class makes a model of that class, whatever model_type was saved, and drops unknown weights, so
# r_proj would be lost. Quantisers are transformers' hook between making a model and reading its weights, so the saved
# config names one.
# It quantises nothing and leaves no trace on the model.


@register_quantization_config(LOADER)
class ProbeLoaderConfig(QuantizationConfigMixin):
    """The quantization_config in a converted model's config.json."""

    dequantize = True  # makes transformers remove all traces of a quantiser from the loaded model

    def __init__(self, quant_method: str = LOADER, **_: Any):
        self.quant_method = quant_method


@register_quantizer(LOADER)
class ProbeLoader(HfQuantizer):
    """Converts a model that a stock class made from a saved config, before its weights are loaded."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        requested = model.config._attn_implementation
        if requested != NAME:
            raise ArgumentError(
                "attn_implementation", repr(requested), f"None or {NAME!r}: the checkpoint is a Parallax model"
            )
        change_classes(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
