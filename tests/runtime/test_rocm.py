"""Calls with a ROCm build of torch, by stand-ins for torch's answers: which kernels they launch, and how."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from parallax_gen import parallax_attn_func
from parallax_gen.codegen import device
from parallax_gen.errors import UnknownGpuError
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.hardware import GPUS
from parallax_gen.runtime import attention, direct_launch, requests
from parallax_gen.runtime import plan as plan_module
from parallax_gen.runtime.dispatch import Dispatcher, UntunedWarning
from parallax_gen.runtime.plan import PlanCache
from parallax_gen.runtime.recording import CallCounts


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The properties of CUDA device 0 of a ROCm build of torch: an MI300X's. They have no opt-in shared memory."""
    properties = SimpleNamespace(
        name="AMD Instinct MI300X",
        major=9,
        minor=4,
        multi_processor_count=304,
        total_memory=205822885888,
        gcnArchName="gfx942:sramecc+:xnack-",
    )
    monkeypatch.setattr(torch.version, "hip", "7.0.51831")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device.gpu_of_device.cache_clear()
    yield properties
    device.gpu_of_device.cache_clear()


def test_the_card_is_recognised_by_its_architecture(rocm: SimpleNamespace) -> None:
    assert device.gpu_of_device(0) is GPUS["mi300x"]


def test_a_card_of_another_architecture_is_refused(rocm: SimpleNamespace) -> None:
    rocm.name, rocm.gcnArchName = "AMD Instinct MI250X", "gfx90a:sramecc+:xnack-"
    with pytest.raises(UnknownGpuError, match="MI250X has the architecture gfx90a; of AMD's, kernels run on gfx942"):
        device.gpu_of_device(0)


def test_every_call_goes_through_triton(rocm: SimpleNamespace) -> None:
    """Its compiled kernels depend on more than a plan knows, and its launcher in C takes other arguments."""
    module, calls = ModuleType("rendered"), []
    module.launch = lambda *arguments: calls.append(arguments)  # type: ignore[attr-defined]
    assert direct_launch.launch_by_jit(module, (torch.zeros(4),), (0.5,)) is None
    ((x, scale),) = calls
    assert (x.shape, scale) == ((4,), 0.5)


@pytest.mark.parametrize(("gfx", "rounds"), [("gfx942", True), ("gfx950", False)])
def test_fp32_stays_fp32_where_there_is_no_tf32(rocm: SimpleNamespace, gfx: str, rounds: bool) -> None:
    rocm.gcnArchName = gfx
    q: Any = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=torch.device("cuda", 0))
    assert requests.dtype_name(q) == "fp32"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert requests.dtype_name(q) == ("tf32" if rounds else "fp32")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_call_launches_the_default_for_its_card(rocm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With records of an H200 at hand, none of which it uses."""
    launched: list[ModuleType] = []
    dispatcher = Dispatcher(Memory())
    monkeypatch.setattr(attention, "host_plan", lambda *_: None)
    monkeypatch.setattr(attention, "_forwards", PlanCache())
    monkeypatch.setattr(plan_module, "default_dispatcher", lambda: dispatcher)
    monkeypatch.setattr(plan_module, "call_counts", CallCounts)
    monkeypatch.setattr(plan_module, "_current_device", lambda: None)  # as the index of a CPU tensor's device
    monkeypatch.setattr(plan_module, "_current_stream", lambda _: 0)
    monkeypatch.setattr(plan_module, "launch_by_jit", lambda module, *_: launched.append(module))
    x = torch.zeros(1, 4096, 16, 128, dtype=torch.bfloat16)
    with pytest.warns(
        UntunedWarning, match=r"default config is used\. Kernels for AMD GPUs are compiled, not measured"
    ):
        parallax_attn_func(x, x, x, x)
    (module,) = launched
    with open(str(module.__file__), encoding="utf-8") as file:
        text = file.read()
    assert "\ngpu        AMD Instinct MI300X\n" in text
    assert not any(word in text for word in ("inline_asm", "TensorDescriptor", "maxnreg"))
