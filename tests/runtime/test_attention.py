"""The launches of the public functions: kernels in Triton's CPU interpreter, and fakes that record launches."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from assertions import assert_close
from attention_samples import Sample, dense, packed, padded
from torch import Tensor

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.ops.base import Scratch
from parallax_gen.ops.space import default_config
from parallax_gen.oracle.reference import reference_forward, reference_varlen_forward
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime import attention
from parallax_gen.runtime.plan import HostPlan, LaunchPlan, PlanCache

Launch = tuple[KernelSpec, Shape, tuple[float, ...], list[tuple[Tensor, ...]]]


class RecordingPlan(LaunchPlan):
    """A plan that records each launch's tensors, and launches in the interpreter if it has a module."""

    def __init__(self, module: Any, spec: KernelSpec, scalars: tuple[float, ...], launched: list[tuple[Tensor, ...]]):
        super().__init__(module, spec, scalars, 0, Scratch())
        self.launched = launched

    def launch(self, request: object, written: tuple[Tensor, ...], workspace: Tensor | None = None) -> None:
        tensors = self.launch_tensors(request, written)
        self.launched.append(tensors)
        self._module.launch(*tensors, *self._scalars)


def plan_on_cpu(monkeypatch: pytest.MonkeyPatch, interpret: bool) -> list[Launch]:
    """Plan calls with CPU tensors as with CUDA tensors, and record the plans."""
    plans: list[Launch] = []

    def plan_launch(spec: KernelSpec, shape: Shape, scalars: tuple[float, ...], device: object) -> LaunchPlan:
        launched: list[tuple[Tensor, ...]] = []
        plans.append((spec, shape, scalars, launched))
        module: Any = SimpleNamespace(launch=lambda *_: None)
        if interpret:
            module = load(render(spec, default_config(spec, shape, GPUS["h200"]), GPUS["h200"]))
        return RecordingPlan(module, spec, scalars, launched)

    def host_plan(q: Tensor, k: Tensor) -> HostPlan | None:
        return None if q.numel() and k.numel() else HostPlan(is_empty=True)

    monkeypatch.setattr(attention, "plan_launch", plan_launch)
    monkeypatch.setattr(attention, "host_plan", host_plan)
    monkeypatch.setattr(attention, "_forwards", PlanCache())
    monkeypatch.setattr(attention, "_backwards", PlanCache())
    return plans


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    return plan_on_cpu(monkeypatch, interpret=False)


def attend(sample: Sample, **options: Any) -> Any:
    function: Any = parallax_attn_varlen_func if sample.lengths else parallax_attn_func
    return function(*sample.inputs, *sample.lengths, **options)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton")
@pytest.mark.parametrize(
    ("make", "recompute_v_mean", "options"),
    [
        (dense, False, {}),
        (dense, True, {"causal": True, "window_size": 2, "softmax_scale": 0.4}),
        (packed, False, {"causal": True}),
        (packed, True, {"causal": True, "window_size": 3}),
        (padded, False, {"causal": True}),
        (padded, True, {}),
    ],
)
def test_kernels_agree_with_the_definition_and_its_gradients(
    make: Any, recompute_v_mean: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_on_cpu(monkeypatch, interpret=True)
    sample = make()
    oracle: Any = reference_varlen_forward if sample.lengths else reference_forward
    expected = oracle(*sample.inputs, *sample.lengths[:2], **options)
    result = attend(sample, **options, recompute_v_mean=recompute_v_mean, return_stats=True)
    for x, target in zip(result, expected, strict=True):
        assert_close(x.exp() if x is result[1] else x, target.exp() if x is result[1] else target, "fp32")
    do = torch.randn(2, *result[0].shape).transpose(0, 1)[:, 0]  # unusual strides
    grads = torch.autograd.grad(result[0], sample.inputs, do)
    for grad, target in zip(grads, torch.autograd.grad(expected.out, sample.inputs, do.double()), strict=True):
        assert_close(grad, target.double(), "fp32")
    with torch.no_grad():
        assert_close(attend(sample, **options), expected.out, "fp32")


def ops_of(plans: list[Launch]) -> list[str]:
    return [spec.op for spec, *_ in plans]


def test_only_kernels_of_needed_gradients_are_launched(recorded: list[Launch]) -> None:
    sample = dense()
    out = attend(sample)
    torch.autograd.grad(out.sum(), sample.inputs[0], retain_graph=True)
    torch.autograd.grad(out.sum(), sample.inputs)
    assert ops_of(recorded) == [
        "forward",
        "preprocess",
        "dkdv",
        "dqdr",
    ]  # both backward kernels, since torch goes by requires_grad
    assert recorded[0][0].stats
    del recorded[:]
    for x in sample.inputs[2:]:
        x.requires_grad_(False)
    attend(sample).sum().backward()
    assert ops_of(recorded) == ["preprocess", "dqdr"]
    del recorded[:]
    for place, x in enumerate(sample.inputs):
        x.requires_grad_(place == 3)
    attend(sample).sum().backward()
    assert ops_of(recorded) == ["preprocess", "dkdv"]
    for x in sample.inputs:
        x.requires_grad_(False)
    del recorded[:]
    attend(sample)
    assert not recorded[0][0].stats


def test_a_plan_is_reused_for_equal_sizes(recorded: list[Launch]) -> None:
    for _ in range(3):
        sample = packed()
        attend(sample, causal=True).sum().backward()
    assert ops_of(recorded) == ["forward", "preprocess", "dkdv", "dqdr"]
    assert [len(launched) for *_, launched in recorded] == [3] * 4


def test_a_new_packing_with_the_same_total_reuses_the_plan(recorded: list[Launch]) -> None:
    sample = packed()
    for end in (2, 4, 9):
        starts = sample.lengths[0].clamp(max=end)  # type: ignore[union-attr,misc]
        attend(Sample(sample.inputs, (starts, *sample.lengths[1:])))  # type: ignore[arg-type]
    assert len(recorded) == 1


def test_the_spec_and_launch_arguments_of_packed_sequences(recorded: list[Launch]) -> None:
    sample = packed()
    attend(sample, causal=True, window_size=3, softmax_scale=0.5).sum().backward()
    forward, preprocess, dkdv, dqdr = recorded
    spec = KernelSpec("forward", 16, "fp32", group=2, causal=True, stats=True, window=True, varlen=True)
    shape = Shape(5, 4, 2, 5, 7, 3)
    assert forward[:3] == (spec, shape, (0.5, 3, 5))
    assert dkdv[:3] == (spec.for_op("dkdv"), shape, (0.5, 3, 7))
    assert dqdr[:3] == (spec.for_op("dqdr"), shape, (0.5, 3, 5))
    assert preprocess[:3] == (KernelSpec("preprocess", 16, "fp32", varlen=True), Shape(5, 4, 4, 5, 5), (0.5, 5))
    do, out, v_mean, lse, t_mean, rows, starts = preprocess[3][0]
    assert do.shape == out.shape == v_mean.shape == (9, 4, 16)
    assert lse.shape == t_mean.shape == (4, 9)
    assert rows.shape == (4, 4, 128 + 5 * 128)  # with padding for each sequence
    assert torch.equal(starts, sample.lengths[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(("window_size", "window"), [(6, 6), (7, 0), (100, 0), (None, 0)])
def test_a_window_of_all_keys_uses_the_kernel_without_a_window(
    recorded: list[Launch], window_size: int | None, window: int
) -> None:
    attend(dense(), causal=True, window_size=window_size)
    spec, shape, scalars, _ = recorded[0]
    assert (spec.window, shape.window) == (window > 0, window)
    assert scalars == (0.25, window)[: 1 + (window > 0)]


def test_tensors_without_elements_launch_nothing(recorded: list[Launch]) -> None:
    for sizes in ((0, 7), (5, 0)):
        attend(dense(*sizes)).sum().backward()
    inputs, (starts, *_) = packed()
    attend(Sample(inputs, (starts, torch.zeros_like(starts), 5, 0))).sum().backward()
    assert recorded == []


def test_a_batch_of_no_sequences_launches_nothing(recorded: list[Launch]) -> None:
    """cu_seqlens has one entry, so all rows are padding, like those after a last sequence."""
    inputs, (starts, *_) = packed()
    result = attend(Sample(inputs, (starts[:1], starts[:1], 5, 7)), return_stats=True)
    for name, x, filled in zip(("out", "lse", "t_mean", "v_mean"), result, (0, -torch.inf, 0, 0), strict=True):
        assert torch.equal(x, torch.full_like(x, filled)), name
    for grad in torch.autograd.grad(result[0].sum(), inputs):
        assert not grad.any()
    assert recorded == []


# torch's three switches, oldest first, and whether they allow TF32 in fp32 matmuls. The newest is last, because torch
# refuses to read the others once it was set.
SWITCHES = {
    "pass": False,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "torch.backends.cuda.matmul.allow_tf32 = False": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('highest')": False,
    "torch.set_float32_matmul_precision('medium')": True,
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.cuda.matmul.fp32_precision = 'none'": False,
    "torch.backends.fp32_precision = 'tf32'": True,
}


def test_fp32_uses_tf32_if_torch_allows_it() -> None:
    lines = ["import torch", "from types import SimpleNamespace as S"]
    lines += ["from parallax_gen.runtime.requests import rounds_to_tf32"]
    for switch in SWITCHES:
        lines += [switch, "print(*[rounds_to_tf32(S(dtype=d, is_cuda=True)) for d in (torch.float32, torch.half)])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines() == [f"{rounds} False" for rounds in SWITCHES.values()]
