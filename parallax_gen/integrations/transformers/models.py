"""transformers models with Parallax attention: separate classes, so that a saved model is loaded as Parallax.

`families.py` says which models have such classes; they are made here, when this module is imported.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.transformers.attention import NAME, parallax_attention, parallax_mask
from parallax_gen.integrations.transformers.families import FAMILIES, Family, unsupported_attention
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

    family: Family
    rotate: Any  # the family's own apply_rotary_pos_emb
    use_rope = True  # attentions of families with layers without RoPE have their own
    head_dim: int
    r_proj: ZeroInitLinear
    config: Any

    def add_probes(self) -> None:
        like: nn.Linear = getattr(self, self.family.projection)
        width = self.config.num_attention_heads * self.head_dim
        bias, device, dtype = like.bias is not None, like.weight.device, like.weight.dtype
        self.r_proj = ZeroInitLinear(like.in_features, width, bias, device=device, dtype=dtype)
        self.r_proj.train(like.training)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **extra_arguments: Any) -> Any:
        if self.config._attn_implementation != NAME:
            raise ArgumentError("attn_implementation", repr(self.config._attn_implementation), repr(NAME))
        # Computed after q, so that it is likely at a higher address, as descriptors of q and r need.
        probes = partial(self.probes, hidden_states, position_embeddings)
        return super().forward(hidden_states, position_embeddings=position_embeddings, r=probes, **extra_arguments)  # type: ignore[misc]

    def probes(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """r, in the layout of transformers' attention functions: (batch, heads, tokens, head_dim)."""
        r: Tensor = self.r_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.use_rope:
            r, _ = self.rotate(r, r[:, :1], *position_embeddings)  # rotate also needs a key
        return r


class ParallaxModelMixin:
    """A mixin before a transformers model class: its attention layers have probes and use Parallax attention."""

    def __init__(self, config: Any, *inputs: Any, **extra_arguments: Any):
        super().__init__(config, *inputs, **extra_arguments)  # type: ignore[call-arg]
        change_classes(self)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention not in (None, NAME):
            raise ArgumentError("attn_implementation", repr(requested_attention), f"None or {NAME!r}")
        return NAME

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the source of the class's module.
        stock: Any = cls.__bases__[-1]
        return bool(stock._can_set_experts_implementation())

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroInitLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


# stock class -> converted class: configs, attentions, and models with every head. `add_family` fills it.
CONVERTED: dict[type, Any] = {}


def convert(model: Any) -> Any:
    """Convert a model to Parallax attention in place: every attention layer gets an r_proj of zeros. Returns the model.

    model  a transformers model of one of `families.FAMILIES` with any of its heads, such as Qwen3ForCausalLM or
           LlamaForSequenceClassification, on any device, in fp32, bf16 or fp16; or a base model, such as LlamaModel, by
           itself or inside another model. A converted model stays as it is

    Its other weights stay the same tensors, and its results stay the same up to rounding until r_proj is trained. Its
    class and config become those of this module, such as ParallaxQwen3ForCausalLM. A model with a head gets its own
    config. A base model keeps its config object, which the model around it shares, and changes it: another base model
    with that object raises ArgumentError until it is converted too. Either way all models that share the old config
    object save as Parallax models; one of them without r_proj loads with r = 0, which computes the same function.

    Adapters that are added later do not record the original checkpoint as their base, because it lacks r_proj. Save the
    converted model, load it, and add adapters to that.

    Raises ArgumentError for another class, an unsupported head_dim, attention that is not causal, and for models that
    are already quantised, have adapters, or are spread over devices: convert first. It names attention sinks, latent
    attention and layers that are not attention, which no family has.
    """
    if isinstance(model, ParallaxModelMixin):
        return model
    if type(model) not in CONVERTED:
        got = type(model).__name__
        allowed = f"{', '.join(family.name for family in FAMILIES)} of transformers, with any head or none"
        if isinstance(model, nn.Module):
            if inside := next((name for name, module in model.named_modules() if is_base_model(module)), None):
                allowed += f"; or the base model in this one, model.{inside}"
            elif obstacle := unsupported_attention(model):
                got += f", with {obstacle}"
        raise ArgumentError("model", got, allowed)
    change_classes(model)
    model.name_or_path = ""  # adapters would save it as the base model to load
    return model


def change_classes(model: Any) -> None:
    """Change the classes of all modules and configs as `CONVERTED` says, and add r_proj to attention layers."""
    attentions = [m for m in model.modules() if issubclass(CONVERTED.get(type(m), object), ProbeAttentionMixin)]
    for attention in attentions:
        check_attention(attention, CONVERTED[type(attention)].family)
    keep_config = is_base_model(model)
    changed: dict[int, Any] = {}  # id of the old config -> new config
    for module in list(model.modules()):
        old = getattr(module, "config", None)
        if id(old) not in changed and (type(old) in CONVERTED or isinstance(old, ParallaxConfigMixin)):
            changed[id(old)] = change_config(old, keep_config)
        if id(old) in changed:
            module.config = changed[id(old)]
        module.__class__ = CONVERTED.get(type(module), type(module))
        if isinstance(module, ParallaxModelMixin):
            # transformers registers a class, and its outputs for output_hidden_states, when an instance is made.
            PreTrainedModel.__init__(type(module).__new__(type(module)), module.config)  # type: ignore[attr-defined]
        if plan := vars(module).get("_tp_plan"):  # copied from the old config, without r_proj
            plan |= tp_plan_of_probes(plan)
    for attention in attentions:
        attention.add_probes()


def change_config(old: Any, keep: bool) -> Any:
    """Convert a config: `old` itself if `keep`, else a copy for this model. Both are saved as Parallax."""
    config = old if keep or old._attn_implementation == NAME else copy.deepcopy(old)
    for changed in (old, config):
        changed.__class__ = CONVERTED.get(type(changed), type(changed))
        vars(changed).pop("model_type", None)  # a loaded config also has the old name as an instance attribute
        if plan := vars(changed).get("base_model_tp_plan"):  # some transformers 5 add tied embeddings to a copy
            changed.base_model_tp_plan = plan | tp_plan_of_probes(plan)
    config._attn_implementation = NAME
    return config


def check_attention(attention: Any, family: Family) -> None:
    """Check that an attention layer can get an r_proj. Raises ArgumentError."""
    name = type(attention).__name__
    if not attention.is_causal:
        allowed = "causal attention: is_causal=True, and no use_bidirectional_attention in the config"
        raise ArgumentError("model", f"a {name} that is not causal", allowed)
    if attention.head_dim % 8 or attention.head_dim > LARGEST_HEAD_DIM:
        raise ArgumentError("model", f"head_dim {attention.head_dim}", f"a multiple of 8 from 8 to {LARGEST_HEAD_DIM}")
    projection = getattr(attention, family.projection)
    if type(projection) is not nn.Linear:
        got = f"a {family.projection} of {type(projection).__name__}"
        raise ArgumentError("model", got, "an nn.Linear: convert before quantising, and before adding adapters")
    if "forward" in vars(attention):
        got = "an attention whose forward was replaced, as device_map does"
        raise ArgumentError(
            "model", got, "the forward of its class: convert, save, and load the saved model with a device_map"
        )


def is_base_model(model: Any) -> bool:
    """Whether a model is convertible and has no head."""
    return type(model) in CONVERTED and isinstance(model, PreTrainedModel) and type(model).__name__.endswith("Model")


def tp_plan_of_probes(plan: dict[str, str]) -> dict[str, str]:
    """Entries for r_proj to add to a tensor-parallel plan: r is split over ranks as q is."""
    projections = {family.projection for family in FAMILIES}
    layers = [name.rpartition(".") for name in plan]
    return {f"{attention}.r_proj": plan[f"{attention}.{q}"] for attention, _, q in layers if q in projections}


# -- The converted classes of each family. They are attributes of this module, so that models pickle.


def add_family(family: Family) -> Any:
    """Make a family's converted classes and register them with transformers. Returns the config class.

    The models are all of the family's config: its base model, and a model for every head.
    """
    modeling, stock_config = family.modeling(), getattr(family.configuration(), family.config)
    model_type = f"parallax_{stock_config.model_type}"
    config = add_class(ParallaxConfigMixin, stock_config, model_type=model_type)
    config.base_model_tp_plan = stock_config.base_model_tp_plan | tp_plan_of_probes(stock_config.base_model_tp_plan)
    rotate = staticmethod(modeling.apply_rotary_pos_emb)
    add_class(ProbeAttentionMixin, getattr(modeling, family.attention), family=family, rotate=rotate)
    for stock in [getattr(modeling, name) for name in modeling.__all__]:
        abstract = stock.__name__.endswith("PreTrainedModel")
        if issubclass(stock, PreTrainedModel) and not abstract and stock.config_class is stock_config:
            add_class(ParallaxModelMixin, stock, config_class=config)
    AutoConfig.register(model_type, config)
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is not None and stock_config in mapping and mapping[stock_config] in CONVERTED:
            auto.register(config, CONVERTED[mapping[stock_config]])
    # Files have other weights than models where this list is not empty, such as one for each expert.
    if conversions := get_checkpoint_conversion_mapping(stock_config.model_type):
        register_checkpoint_conversion_mapping(model_type, conversions)
    return config


def add_class(mixin: type, stock: Any, **attributes: Any) -> Any:
    new = type(f"Parallax{stock.__name__}", (mixin, stock), {"__module__": __name__, **attributes})
    CONVERTED[stock] = globals()[new.__name__] = new
    return new


AttentionInterface.register(NAME, parallax_attention)
AttentionMaskInterface.register(NAME, parallax_mask)
CONFIGS: tuple[Any, ...] = tuple(add_family(family) for family in FAMILIES)


# -- How a stock transformers class, such as LlamaForCausalLM, loads a saved converted model.
# from_pretrained of a class makes a model of that class, whatever model_type was saved, and drops unknown weights, so
# r_proj would be lost. Quantisers are transformers' hook between making a model and reading its weights, so the saved
# config names one. It quantises nothing and leaves no trace on the model.


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
        text = model.config.get_text_config()  # the config itself, unless the model has several parts
        requested = text._attn_implementation
        if text is model.config and requested != NAME:
            raise ArgumentError(
                "attn_implementation", repr(requested), f"None or {NAME!r}: the checkpoint is a Parallax model"
            )
        if text is not model.config:
            text._attn_implementation = NAME  # the other parts may use another
            vars(text).pop("quantization_config", None)  # transformers removes only the whole model's
        change_classes(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
