"""Converts Parallax layers of fla (flash-linear-attention 0.6) to `parallax_gen.nn.ParallaxAttention` and back.

fla is not imported: a state dict and its config.json are enough.

    state = safetensors.torch.load_file("model.safetensors")
    layers = attentions_from_fla(state, json.loads(Path("config.json").read_text()))
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError
from parallax_gen.nn import ParallaxAttention
from parallax_gen.problem.work import default_scale

# The defaults of fla's ParallaxConfig and layer.
DEFAULTS = {"num_kv_heads": None, "qkv_bias": False, "qk_norm": False, "window_size": None, "rope_theta": 10_000.0}
ATTENTION_WEIGHT = re.compile(r"(?:model\.)?layers\.(\d+)\.attn\.(.+)")


def attention_from_fla(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> ParallaxAttention:
    """Convert fla's layer to ours, with copies of its weights in the same dtype and on the same device.

    state   the state dict of fla's `Parallax` layer: q_proj.weight and so on
    config  the layer's arguments, or its model's config.json: hidden_size and num_heads; num_kv_heads, qkv_bias,
            window_size and rope_theta with fla's defaults. Entries that do not affect attention are ignored

    Raises ArgumentError for weights that are missing, unknown or of another shape, and for qk_norm: fla also norms r,
    and our layer does not.
    """
    layer = _empty_layer(config, state)
    shapes = {name: weight.shape for name, weight in layer.state_dict().items() if name != "o_proj.bias"}
    missing, unknown = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    if missing or unknown:
        got = ", ".join([*(f"no {name}" for name in missing), *unknown])
        raise ArgumentError("state", got, f"{', '.join(shapes)} for this config")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ArgumentError(
                "state", f"{name} of shape {tuple(state[name].shape)}", f"{tuple(shape)} for this config"
            )
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(state[name]) if name in state else parameter.zero_()  # fla's o_proj never has a bias
    return layer


def attentions_from_fla(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[ParallaxAttention]:
    """`attention_from_fla` for every layer of fla's `ParallaxModel` or `ParallaxForCausalLM`, in order.

    state   the model's state dict; only its attention weights are used
    config  its config.json, with num_hidden_layers
    """
    parts: dict[int, dict[str, Tensor]] = {}
    for name, weight in state.items():
        if match := ATTENTION_WEIGHT.fullmatch(name):
            parts.setdefault(int(match[1]), {})[match[2]] = weight
    count = _config_value(config, "num_hidden_layers")
    if sorted(parts) != list(range(count)):
        got = f"attention in layers {', '.join(map(str, sorted(parts)))}" if parts else "no layers.0.attn.q_proj.weight"
        raise ArgumentError("state", got, f"layers 0 to {count - 1}, as num_hidden_layers says")
    return [attention_from_fla(parts[i], config) for i in range(count)]


def attention_to_fla(layer: ParallaxAttention) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `attention_from_fla`: fla's state dict with the layer's tensors, and fla's layer arguments.

    Raises ArgumentError for features that fla's layer lacks: attention that is not causal, norms of q and k but not of
    r, no rotation, another softmax_scale, a head_dim that is not hidden_size / num_heads, an output bias.
    """
    weights = dict(layer.state_dict())
    output_bias = weights.pop("o_proj.bias", None)
    width = layer.q_proj.in_features
    unsupported = {
        "causal": not layer.causal,
        "qk_norm": "q_norm.weight" in weights,
        "rope_theta": layer.rope_theta is None,
        "softmax_scale": layer.softmax_scale not in (None, default_scale(layer.head_dim)),
        "head_dim": layer.head_dim * layer.num_heads != width,
        "bias": output_bias is not None and bool(output_bias.any()),
    }
    for name, is_unsupported in unsupported.items():
        if is_unsupported:
            allowed = "causal, rotated, without norms, of head_dim hidden_size / num_heads, o_proj without a bias"
            raise ArgumentError("layer", f"a {name} that fla does not support", allowed)
    config: dict[str, Any] = {"hidden_size": width, "num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    config |= {"qkv_bias": output_bias is not None, "window_size": layer.window_size, "rope_theta": layer.rope_theta}
    return weights, config


def _empty_layer(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ParallaxAttention:
    if config.get("model_type", "parallax") != "parallax":
        raise ArgumentError("config", f"model_type {config['model_type']!r}", "'parallax'")
    if _config_value(config, "qk_norm"):
        raise ArgumentError("config", "qk_norm", "no qk_norm: fla also norms r, and ParallaxAttention has no norm of r")
    any_weight = next(iter(state.values()), None)
    return ParallaxAttention(
        _config_value(config, "hidden_size"),
        _config_value(config, "num_heads"),
        _config_value(config, "num_kv_heads"),
        window_size=_config_value(config, "window_size"),
        rope_theta=_config_value(config, "rope_theta"),
        bias=_config_value(config, "qkv_bias"),
        device=None if any_weight is None else any_weight.device,
        dtype=None if any_weight is None else any_weight.dtype,
    )


def _config_value(config: Mapping[str, Any], name: str) -> Any:
    if name in config:
        return config[name]
    if name in DEFAULTS:
        return DEFAULTS[name]
    raise ArgumentError("config", f"no {name}", "fla's config.json, or the arguments of its layer")
