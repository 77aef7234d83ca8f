"""How a stock class of transformers, such as LlamaForCausalLM, loads what a converted model saved.

from_pretrained of a class makes that class, whatever model_type was saved, and drops weights that it does not know:
r_proj would be lost. Quantisers are how transformers lets others change a model between its making and the reading of
its weights, so the saved config names one. It quantises nothing, and nothing of it is left on the model afterwards.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.transformers.attention import NAME
from parallax_gen.integrations.transformers.models import LOADER, change_classes


@register_quantization_config(LOADER)
class ProbeLoaderConfig(QuantizationConfigMixin):
    """What a converted model's config.json has as its quantization_config."""

    dequantize = True  # transformers then takes all traces of a quantiser from the loaded model

    def __init__(self, quant_method: str = LOADER, **_: Any):
        self.quant_method = quant_method


@register_quantizer(LOADER)
class ProbeLoader(HfQuantizer):
    """Converts a model that was made from the saved config by a stock class, before its weights are loaded."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        asked = model.config._attn_implementation
        if asked != NAME:
            raise ArgumentError(
                "attn_implementation", repr(asked), f"None or {NAME!r}: the checkpoint is a Parallax model"
            )
        change_classes(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
