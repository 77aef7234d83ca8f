"""Loading fla's Parallax layers by weight names: results as in fla's formula, the way back, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from parallax_gen.errors import ArgumentError
from parallax_gen.integrations.fla import attention_from_fla, attention_to_fla, attentions_from_fla
from parallax_gen.nn import ParallaxAttention

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")

PLAIN = {"hidden_size": 64, "num_heads": 4}
CONFIGS: list[dict[str, Any]] = [
    PLAIN,
    {**PLAIN, "num_kv_heads": 2, "qkv_bias": True, "window_size": 4, "rope_theta": 500.0},
]


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Weights with the names of fla's layer."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads = config.get("num_kv_heads") or config["num_heads"]
    wide = {"q": 64, "r": 64, "k": 16 * kv_heads, "v": 16 * kv_heads, "o": 64}
    result = {f"{x}_proj.weight": torch.randn(n, 64, generator=generator) / 8 for x, n in wide.items()}
    if config.get("qkv_bias"):
        result |= {f"{x}_proj.bias": torch.randn(wide[x], generator=generator) / 8 for x in "qrkv"}
    return result


def fla_reference(state: dict[str, Tensor], config: dict[str, Any], x: Tensor) -> Tensor:
    """fla's layer by its source: RoPE rotates halves, r·k is not scaled, a window includes the token's own key."""
    length, group = x.shape[1], 4 // (config.get("num_kv_heads") or 4)

    def heads(name: str) -> Tensor:
        bias = state.get(f"{name}_proj.bias")
        y = linear(x, state[f"{name}_proj.weight"], bias).unflatten(-1, (-1, 16)).transpose(1, 2).double()
        if name != "v":
            angles = torch.arange(length)[:, None] * config.get("rope_theta", 1e4) ** -(torch.arange(8) / 8).double()
            turned = torch.complex(y[..., :8], y[..., 8:]) * torch.polar(torch.ones_like(angles), angles)
            y = torch.cat((turned.real, turned.imag), -1)
        return y.repeat_interleave(group, 1) if name in "kv" else y

    q, r, k, v = map(heads, "qrkv")
    behind = torch.arange(length)[:, None] - torch.arange(length)
    visible = (behind >= 0) & (behind < (config.get("window_size") or length))
    p = (q @ k.mT / 4).masked_fill(~visible, -torch.inf).softmax(-1)
    t = p * (r @ k.mT)
    out = (p @ v) * (1 + t.sum(-1, keepdim=True)) - t @ v
    return linear(out.transpose(1, 2).flatten(2).float(), state["o_proj.weight"])


@pytest.mark.parametrize("config", CONFIGS)
def test_a_layer_of_fla_and_back(config: dict[str, Any]) -> None:
    state, x = weights(config), torch.randn(2, 9, 64)
    layer = attention_from_fla(state, config)
    torch.testing.assert_close(layer(x), fla_reference(state, config, x), rtol=1e-4, atol=1e-5)  # fp32 against fp64
    back, options = attention_to_fla(layer)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], weight) for name, weight in state.items())
    assert {**options, **config} == options
    round_tripped = attention_from_fla(back, options)
    assert torch.equal(round_tripped(x), layer(x))


def test_the_layers_of_a_model() -> None:
    config = {**PLAIN, "num_hidden_layers": 3, "model_type": "parallax", "vocab_size": 8, "hidden_ratio": 4}
    per_layer = [weights(PLAIN, seed=i) for i in range(3)]
    for prefix in ("model.", ""):
        state = {f"{prefix}layers.{i}.attn.{name}": w for i in (2, 0, 1) for name, w in per_layer[i].items()}
        state |= {f"{prefix}embeddings.weight": torch.zeros(8, 64), "lm_head.weight": torch.zeros(8, 64)}
        state |= {f"{prefix}layers.{i}.attn_norm.weight": torch.zeros(64) for i in range(3)}
        layers = attentions_from_fla(state, config)
        for layer, w in zip(layers, per_layer, strict=True):
            assert torch.equal(layer.r_proj.weight, w["r_proj.weight"])
    del state["layers.1.attn.k_proj.weight"]
    with pytest.raises(ArgumentError, match=r"state: got no k_proj\.weight; allowed: q_proj\.weight, r_proj"):
        attentions_from_fla(state, config)
    with pytest.raises(ArgumentError, match="state: got attention in layers 0, 1, 2; allowed: layers 0 to 3"):
        attentions_from_fla(state, {**config, "num_hidden_layers": 4})
    with pytest.raises(ArgumentError, match=r"state: got no layers\.0\.attn"):
        attentions_from_fla({"lm_head.weight": torch.zeros(8, 64)}, config)


def test_weights_are_copied_with_their_dtype() -> None:
    state = {name: weight.bfloat16() for name, weight in weights(PLAIN).items()}
    layer = attention_from_fla(state, PLAIN)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    state["q_proj.weight"].zero_()
    assert layer.q_proj.weight.any()


REFUSED: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
    ({"qk_norm": True}, {}, "config: got qk_norm; allowed: no qk_norm: fla also norms r"),
    ({"model_type": "llama"}, {}, "config: got model_type 'llama'; allowed: 'parallax'"),
    ({}, {"r_norm.weight": torch.ones(16)}, r"state: got r_norm\.weight; allowed: q_proj"),
    ({"qkv_bias": True}, {}, r"state: got no k_proj\.bias, no q_proj\.bias"),
    ({"num_kv_heads": 2}, {}, r"state: got k_proj\.weight of shape \(64, 64\); allowed: \(32, 64\)"),
    ({"num_kv_heads": 3}, {}, "num_kv_heads: got 3"),
]


@pytest.mark.parametrize(("config", "more", "message"), REFUSED)
def test_refused_from_fla(config: dict[str, Any], more: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        attention_from_fla(weights(PLAIN) | more, {**PLAIN, **config})


def test_sizes_come_from_the_config() -> None:
    with pytest.raises(ArgumentError, match="config: got no num_heads; allowed: fla's config"):
        attention_from_fla(weights(PLAIN), {"hidden_size": 64})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"causal": False}, "causal"),
        ({"qk_norm": True}, "qk_norm"),
        ({"rope_theta": None}, "rope_theta"),
        ({"softmax_scale": 1.0}, "softmax_scale"),
        ({"head_dim": 32}, "head_dim"),
        ({"bias": True}, "bias"),
    ],
)
def test_refused_to_fla(options: dict[str, Any], name: str) -> None:
    layer = ParallaxAttention(64, 4, **{"rope_theta": 1e4, **options})
    with pytest.raises(ArgumentError, match=f"layer: got a {name} that fla does not support"):
        attention_to_fla(layer)
