"""The layer: softmax attention for r = 0, equal results dense and packed, and refused arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

import parallax_gen
from parallax_gen.errors import ArgumentError
from parallax_gen.nn import ParallaxAttention
from parallax_gen.oracle.reference import reference_forward

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"num_kv_heads": 2, "window_size": 3, "rope_theta": 1e4},
    {"num_kv_heads": 1, "head_dim": 16, "qk_norm": True, "rope_theta": 1e4, "bias": True, "softmax_scale": 0.2},
]


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE by complex numbers: x (batch, seqlen, heads, head_dim)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions[:, None, None] * theta ** (-torch.arange(half) / half)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1).float()


def layer_reference(layer: ParallaxAttention, x: Tensor, options: dict[str, Any], softmax: bool = False) -> Tensor:
    """An independent computation of the layer for x (batch, seqlen, hidden_size)."""
    projections = (layer.q_proj, layer.r_proj, layer.k_proj, layer.v_proj)
    q, r, k, v = (project(x).unflatten(-1, (-1, layer.head_dim)) for project in projections)
    if options.get("qk_norm"):
        q = rms_norm(q, (layer.head_dim,), layer.q_norm.weight)
        k = rms_norm(k, (layer.head_dim,), layer.k_norm.weight)
    if options.get("rope_theta"):
        q, r, k = (rotated(y, torch.arange(x.shape[1]), options["rope_theta"]) for y in (q, r, k))
    causal, window = options.get("causal", True), options.get("window_size")
    scale = options.get("softmax_scale", layer.head_dim**-0.5)
    if not softmax:
        out = reference_forward(q, r, k, v, causal=causal, window_size=window, softmax_scale=scale).out.float()
        return layer.o_proj(out.flatten(-2))
    ones = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    visible = ones.tril() if causal else ones
    if window:
        visible &= ~ones.tril(-window)
    heads_first = (y.transpose(1, 2) for y in (q, k, v))
    out = scaled_dot_product_attention(*heads_first, attn_mask=visible, scale=scale, enable_gqa=True)
    return layer.o_proj(out.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_layer_is_attention_of_its_projections(options: dict[str, Any]) -> None:
    layer = ParallaxAttention(32, 4, **options)
    x = torch.randn(2, 7, 32)
    out = layer(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, layer_reference(layer, x, options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_with_r_zero_it_is_softmax_attention_and_gradients_reach_r(options: dict[str, Any]) -> None:
    layer = ParallaxAttention(32, 4, **options, zero_init_r=True)
    x = torch.randn(2, 7, 32, requires_grad=True)
    others = [x, *(p for name, p in layer.named_parameters() if not name.startswith("r_proj"))]
    result, expected = layer(x), layer_reference(layer, x, options, softmax=True)
    torch.testing.assert_close(result, expected)
    do = torch.randn_like(result)
    grads = torch.autograd.grad(result, others, do, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, others, do), rtol=1e-4, atol=1e-5)
    result.backward(do)
    gradient = layer.r_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("options", OPTIONS)
def test_packed_sequences_are_independent_in_the_layer(options: dict[str, Any]) -> None:
    layer = ParallaxAttention(32, 4, **options)
    lengths = (3, 0, 1, 6, 0)
    x = torch.randn(sum(lengths), 32)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    result = layer(x, starts, 6)
    assert result.shape == x.shape
    for part, alone in zip(result.split(lengths), x.split(lengths), strict=True):
        torch.testing.assert_close(part, layer(alone[None])[0], rtol=1e-4, atol=1e-5)


def test_positions_are_relative() -> None:
    layer = ParallaxAttention(32, 4, rope_theta=100.0)
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(layer(x, position_offset=1000), layer(x), rtol=1e-3, atol=1e-4)
    offsets = torch.tensor([[0], [1000]])
    torch.testing.assert_close(layer(x, position_offset=offsets), layer(x), rtol=1e-3, atol=1e-4)
    one_sequence = torch.tensor([0, 14], dtype=torch.int32)
    whole = layer(x.flatten(0, 1), one_sequence, 14)
    torch.testing.assert_close(whole, layer(x.reshape(1, 14, 32))[0], rtol=1e-4, atol=1e-5)


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def parents_first(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        reset(module)
    return layer


def children_first(layer: nn.Module) -> nn.Module:
    for module in reversed(list(layer.modules())):
        reset(module)
    return layer


def fsdp(layer: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp2(layer: nn.Module) -> nn.Module:
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    return parents_first(layer.to_empty(device="cpu"))


INITIALISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "its own": lambda layer: [layer, layer.reset_parameters()][0],
    "parents first": parents_first,
    "children first": children_first,
    "apply": lambda layer: layer.apply(reset),
    "to_empty, parents first": lambda layer: parents_first(layer.to_empty(device="cpu")),
    "to_empty, children first": lambda layer: children_first(layer.to_empty(device="cpu")),
    "FSDP": fsdp,
    "FSDP2": fsdp2,
}


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("way", INITIALISED)
def test_r_is_zero_after_every_kind_of_initialisation(way: str) -> None:
    from_meta = way.startswith(("to_empty", "FSDP"))
    with torch.device("meta" if from_meta else "cpu"):
        layer = ParallaxAttention(32, 4, 2, bias=True, qk_norm=True, zero_init_r=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    assert isinstance(layer.r_proj, nn.Linear)  # so that adapters and quantisers recognise it
    for name, parameter in INITIALISED[way](layer).named_parameters():
        values = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if "r_proj" in name:
            assert not values.any()
        elif "norm" in name:
            assert (values == 1).all()
        else:
            assert 0 < values.abs().max() < 1, name


def test_zero_initialised_r_proj_has_the_usual_parameter_names() -> None:
    zero, drawn = (ParallaxAttention(32, 4, bias=True, zero_init_r=zero) for zero in (True, False))
    assert drawn.r_proj.weight.any()
    drawn.reset_parameters()
    assert drawn.r_proj.weight.any()
    zero.load_state_dict(drawn.state_dict())
    assert torch.equal(zero.r_proj.weight, drawn.r_proj.weight)


def test_dtype_and_submodules() -> None:
    layer = parallax_gen.nn.ParallaxAttention(32, 4, 2, qk_norm=True, dtype=torch.bfloat16, rope_theta=1e4)
    assert layer(torch.randn(2, 5, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    names = {name.split(".")[0] for name, _ in layer.named_parameters()}
    assert names == {"q_proj", "r_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    assert "num_kv_heads=2" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"hidden_size": 0, "num_heads": 4}, "hidden_size"),
        ({"hidden_size": 32, "num_heads": 0}, "num_heads"),
        ({"hidden_size": 32, "num_heads": 4, "num_kv_heads": 3}, "num_kv_heads"),
        ({"hidden_size": 30, "num_heads": 4}, "head_dim"),
        ({"hidden_size": 32, "num_heads": 4, "head_dim": 12}, "head_dim"),
        ({"hidden_size": 32, "num_heads": 4, "causal": False, "window_size": 3}, "window_size"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        ParallaxAttention(**arguments)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ((torch.zeros(7, 32),), "x"),
        ((torch.zeros(1, 7, 32), torch.tensor([0, 7], dtype=torch.int32), 7), "x"),
        ((torch.zeros(7, 32), torch.tensor([0, 7], dtype=torch.int32)), "max_seqlen"),
    ],
)
def test_a_bad_argument_of_a_call_is_named(arguments: tuple[Any, ...], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        ParallaxAttention(32, 4)(*arguments)
    assert caught.value.argument == argument
