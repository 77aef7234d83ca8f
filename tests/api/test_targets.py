"""The models that `tune` and `prepare` take, in any form, and the kernels that these launch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dispatched_kernels import kernels_of, recorded_kernels
from torch import nn

import parallax_gen
from parallax_gen.api.targets import A_MODEL, Target, models_of_module, only_one, target_of
from parallax_gen.errors import ArgumentError
from parallax_gen.nn import ParallaxAttention
from parallax_gen.problem.models import Model
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

SPEC, SHAPE = KernelSpec("decode", 64, "bf16", group=4), Shape(2, 8, 2, 1, 4096)
LLAMA = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 3}


def target(model: Any = None, kernels: Any = None, **options: Any) -> Target:
    return target_of(model, kernels, **{"training": None, "serving": None, "tp": 1, "dtype": None, **options})


def layers(*kinds: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    heads = {"hidden_size": 128, "num_heads": 8, "num_kv_heads": 2, "dtype": dtype}
    return nn.Sequential(*(ParallaxAttention(**heads | kind) for kind in kinds))


def test_a_folder_or_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    for path in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert target(path).title == f"{tmp_path.name}: 3 layers, heads 8, head_dim 16, bf16"
    with pytest.raises(ArgumentError, match=r"^model: got .*missing, which is not on this machine; allowed: a folder"):
        target(tmp_path / "missing")


def test_layers_that_differ_in_their_windows_are_one_model() -> None:
    model = layers({}, {"window_size": 100}, {}, {"window_size": 100})
    assert models_of_module(model) == [Model("Sequential", 8, 2, 16, ((0, 2), (100, 2)), dtype="bf16")]


def test_layers_that_differ_in_more_are_several_models() -> None:
    model = layers({}, {"softcap": 30.0}, {"num_kv_heads": 8, "causal": False}, {"head_dim": 64}, dtype=torch.float16)
    parts = {(m.heads, m.kv_heads, m.head_dim, m.softcap, m.causal, m.dtype) for m in models_of_module(model)}
    assert parts == {
        (8, 2, 16, False, True, "fp16"),
        (8, 2, 16, True, True, "fp16"),
        (8, 8, 16, False, False, "fp16"),
        (8, 2, 64, False, True, "fp16"),
    }


@pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")
@pytest.mark.parametrize(
    "kinds",
    [
        ({}, {}),
        ({}, {"window_size": 100}, {"num_kv_heads": 4, "softcap": 20.0}),
        ({"causal": False}, {"causal": False}),
        ({"causal": False, "head_dim": 24}, {}),
    ],
    ids=["equal", "differing", "not causal", "both"],
)
def test_a_training_step_of_layers_launches_the_planned_kernels(kinds: tuple[dict[str, Any], ...]) -> None:
    model = layers(*kinds)
    with recorded_kernels() as launched:
        model(torch.randn(2, 150, 128, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    (step,) = target(model, training={"batch": 2, "seqlen": 150}, serving=False).steps
    assert kernels_of([step]) == launched


def test_by_default_it_trains_and_serves() -> None:
    names = {step.name.partition(",")[0] for step in target(layers({})).steps}
    assert names == {"training", "decode", "chunk", "generate"}
    assert [step.name for step in target(layers({"causal": False})).steps] == ["training"]
    assert {step.name for step in target(layers({}), serving=False).steps} == {"training"}
    assert "training" not in {step.name for step in target(layers({}), training=False).steps}
    paged = target(layers({}), training=False, serving={"page_size": 16, "max_batch": 1, "max_len": 300}).steps
    assert {call.spec.page_size for step in paged for call in step.calls} == {16}


def test_tensor_parallel_ranks_and_another_dtype() -> None:
    step = target(layers({}, dtype=torch.float32), serving=False, tp=2, dtype="tf32").steps[0]
    assert {call.spec.dtype for call in step.calls} == {"tf32", "fp32"}  # preprocess has no matmuls
    assert {call.shape.heads for call in step.calls} == {4}


def test_dtypes_without_a_kernel_need_another() -> None:
    model = layers({}, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=r"model: got weights of float64; allowed: .*bfloat16.*, or dtype="):
        target(model)
    assert target(model, dtype="bf16").title.endswith("bf16")


def test_kernels() -> None:
    other = KernelSpec("preprocess", 64, "bf16"), Shape(2, 8, 8, 4096, 4096)
    assert target(kernels=(SPEC, SHAPE)).kernels == [(SPEC, SHAPE)]
    assert target(kernels=iter([(SPEC, SHAPE), other])).kernels == [(SPEC, SHAPE), other]
    twice = target(kernels=[(SPEC, SHAPE), (SPEC, SHAPE)])
    assert (twice.title, twice.kernels) == ("1 kernel", [(SPEC, SHAPE)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 1}, f"model: got 1; allowed: {A_MODEL}"),
        ({"model": nn.Linear(1, 1)}, f"model: got a Linear without such layers; allowed: {A_MODEL}"),
        ({"model": layers({}), "training": False, "serving": False}, "training and serving: got False; allowed: True"),
        ({"model": layers({}), "training": {"max_len": 1}}, "training: got {'max_len': 1}; allowed: True, False, or a"),
        ({"model": layers({}), "serving": 8}, "serving: got 8; allowed: True, False, or a dict of max_len, page_size,"),
        ({"model": layers({}), "training": {"batch": 0}}, "batch: got 0; allowed: an int of 1 or more"),
        ({"model": layers({"causal": False}), "serving": True}, "serving: got True; allowed: False for layers that"),
        ({"model": layers({}), "tp": 3}, "tp: got 3; allowed: a divisor"),
        ({"model": layers({}), "dtype": "int8"}, "dtype: got 'int8'; allowed: 'bf16'"),
        ({"kernels": SPEC}, "kernels: got "),
        ({"kernels": []}, "kernels: got none; allowed: (KernelSpec, Shape), or several"),
        ({"kernels": [(SHAPE, SPEC)]}, "kernels: got (Shape"),
        ({"kernels": (SPEC, Shape(1, 2, 2, 1, 8))}, "allowed: a shape with 4 query heads per kv head"),
        ({"kernels": (SPEC, Shape(1, 4, 1, 1, 8, 4))}, "allowed: a window in both or in neither"),
        ({"kernels": (SPEC, SHAPE), "training": True}, "training: got True; allowed: this only with a model"),
        ({"kernels": (SPEC, SHAPE), "tp": 2}, "tp: got 2; allowed: this only with a model"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        target(**arguments)
    assert message in str(error.value)


def test_exactly_one_is_given() -> None:
    only_one(model=1, calls=None)
    with pytest.raises(ArgumentError, match="model, calls: got none of them; allowed: one of them"):
        only_one(model=None, calls=None)
    with pytest.raises(ArgumentError, match="model, calls: got model and calls"):
        only_one(model=1, calls=2)


@pytest.mark.parametrize("mode", [True, False])
def test_batch_invariant_layers_and_the_mode(mode: bool, tmp_path: Path) -> None:
    """Layers say it themselves; layers that do not, and folders, follow the process's mode."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    with parallax_gen.batch_invariant(mode):
        kinds = models_of_module(layers({}, {"batch_invariant": True}, {"batch_invariant": False}))
        of_folder = target(tmp_path)
    assert sorted((kind.batch_invariant, kind.layers) for kind in kinds) == sorted([(mode, 2), (not mode, 1)])
    assert {spec.batch_invariant for spec, _ in of_folder.kernels} == {mode}
    assert any(spec.op == "decode" for spec, _ in of_folder.kernels) != mode
