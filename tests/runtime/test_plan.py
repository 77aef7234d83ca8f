"""Which calls share a plan, and what a plan launches in its first and in later calls. No test needs a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from parallax_gen.ops.base import Scratch
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime import plan as plan_module
from parallax_gen.runtime.direct_launch import DirectLaunch
from parallax_gen.runtime.plan import LaunchPlan, plan_key
from parallax_gen.runtime.workspace import Workspace, split_workspace, workspace_bytes

SPEC = KernelSpec("decode_varlen", 64, "bf16", group=2)
DEVICE, STREAM = 3, 77


def tensors(**changed: Tensor) -> tuple[Tensor, ...]:
    q = torch.zeros(2, 1, 4, 8)
    k = torch.zeros(2, 6, 2, 8)
    given = {"q": q, "r": q.clone(), "k": k, "v": k.clone(), "lengths": torch.zeros(2, dtype=torch.int32)} | changed
    return tuple(given.values())


def test_calls_with_equal_properties_have_equal_keys() -> None:
    assert plan_key(*tensors(), None, True, 3, 0.5) == plan_key(*tensors(), None, True, 3, 0.5)


@pytest.mark.parametrize("name", ["q", "r", "k", "v", "lengths"])
def test_every_property_of_every_tensor_is_in_the_key(name: str) -> None:
    x = dict(zip(("q", "r", "k", "v", "lengths"), tensors(), strict=True))[name]
    with FakeTensorMode():
        on_a_card = torch.empty(x.shape, dtype=x.dtype, device="cuda")
    others = [
        x.new_zeros(3, *x.shape[1:]),
        x.to(torch.float16),
        x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2],
        on_a_card,
    ]
    keys = {plan_key(*tensors()), *(plan_key(*tensors(**{name: other})) for other in others)}
    assert len(keys) == 1 + len(others)
    parameter = torch.nn.Parameter(x, requires_grad=False)
    assert plan_key(*tensors(**{name: parameter})) == plan_key(*tensors())


def test_strides_of_dimensions_of_size_1_are_not_in_the_key() -> None:
    other = torch.zeros(2, 5, 4, 8)[:, :1].as_strided((2, 1, 4, 8), (32, 1000, 8, 1))
    assert plan_key(*tensors(q=other)) == plan_key(*tensors())
    assert plan_key(*tensors(q=torch.zeros(2, 5, 4, 8)[:, :1])) != plan_key(*tensors())


def test_numbers_of_different_types_have_different_keys() -> None:
    others: list[Any] = [None, False, True, 0, 1, 0.0, 1.0]
    assert len({plan_key(*tensors(), x) for x in others}) == len(others)


@pytest.mark.parametrize("unusable", [[1], "1", torch.float32, object()])
def test_an_argument_of_any_other_type_never_has_a_known_key(unusable: Any) -> None:
    """So its call is checked, and refused, each time. A list has no hash."""
    assert plan_key(*tensors(), unusable) != plan_key(*tensors(), unusable)


class FakeModule:
    """In place of a rendered module. Notes the arguments of `launch`."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def launch(self, *arguments: Any) -> None:
        self.launched.append(arguments)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """The streams and addresses of direct launches; the device is current, and its current stream is STREAM."""
    launched: list[tuple[int, list[int]]] = []

    def launch_by_jit(module: Any, tensors: Any, scalars: Any) -> tuple[DirectLaunch, ...]:
        module.launch(*tensors, *scalars)
        return (
            DirectLaunch(pytest.fail, (), (), (), lambda stream, addresses: launched.append((stream, [*addresses]))),
        )

    monkeypatch.setattr(plan_module, "launch_by_jit", launch_by_jit)
    monkeypatch.setattr(plan_module, "_current_device", lambda: DEVICE)
    monkeypatch.setattr(plan_module, "_current_stream", lambda device: STREAM + device - DEVICE)
    monkeypatch.setattr(plan_module, "shared_workspace", lambda _: Workspace(torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    return launched


def request() -> SimpleNamespace:
    """16-byte aligned tensors by the field names of decode_varlen."""
    names = ("q", "r", "k", "v", "cache_seqlens")
    return SimpleNamespace(**{name: torch.zeros(8) for name in names})


def addresses(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


def test_the_first_call_goes_through_the_jit_and_later_ones_pass_their_own_addresses(
    direct: list[tuple[int, list[int]]],
) -> None:
    module: Any = FakeModule()
    plan = LaunchPlan(module, SPEC, (0.5,), DEVICE, Scratch(16, 4))
    first, second, out = request(), request(), torch.zeros(8)
    plan.launch(first, (out,))
    (arguments,) = module.launched
    assert direct == []
    given = (first.q, first.r, first.k, first.v, out, first.cache_seqlens)
    assert all(x is y for x, y in zip(arguments, given, strict=False))
    states, counters, scale = arguments[6:]
    assert (states.numel(), counters.numel(), scale) == (16, 4, 0.5)
    plan.launch(second, (out,))
    given = (second.q, second.r, second.k, second.v, out, second.cache_seqlens, states, counters)
    assert direct == [(STREAM, addresses(*given))]
    assert len(module.launched) == 1


def test_unaligned_tensors_always_go_through_the_jit(direct: list[tuple[int, list[int]]]) -> None:
    module: Any = FakeModule()
    plan = LaunchPlan(module, SPEC, (0.5,), DEVICE, Scratch())
    for k in (torch.zeros(8), torch.zeros(9)[1:]):
        unaligned = request()
        unaligned.k = k
        plan.launch(unaligned, (torch.zeros(8),))
    assert len(module.launched) == 2
    assert direct == []


def test_a_callers_workspace_is_used_in_place_of_the_shared_one(direct: list[tuple[int, list[int]]]) -> None:
    module: Any = FakeModule()
    scratch = Scratch(16, 4)
    plan = LaunchPlan(module, SPEC, (0.5,), DEVICE, scratch)
    workspace = torch.zeros(workspace_bytes(scratch), dtype=torch.uint8)
    for _ in range(2):
        plan.launch(request(), (torch.zeros(8),), workspace)
    parts = addresses(*split_workspace(workspace, scratch))
    assert addresses(*module.launched[0][6:8]) == parts
    assert direct[0][1][6:] == parts


def test_a_launch_on_another_device_makes_it_current(
    direct: list[tuple[int, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    current = DEVICE + 1

    def device(index: int) -> Any:
        nonlocal current
        current = index
        return nullcontext()

    monkeypatch.setattr(plan_module, "_current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    module: Any = FakeModule()
    LaunchPlan(module, SPEC, (0.5,), DEVICE, Scratch()).launch(request(), (torch.zeros(8),))
    assert current == DEVICE
    assert len(module.launched) == 1
