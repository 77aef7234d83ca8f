"""Which tensors a kernel that loads by descriptors is launched on, and what other tensors get."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax_gen.ops.base import Scratch
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.dqdr import DqDrConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime import described, plan
from parallax_gen.runtime.described import DescribedTensors, described_tensors

GPU = GPUS["h200"]
DKDV = DkDvConfig(32, 64, 1, num_warps=4, num_stages=2, LOADS="descriptors")
HEAD_DIM = 64
SIZE = (2, 8, 3, HEAD_DIM)


def unused() -> Any:
    raise AssertionError("not loaded before it is needed")


def allowed(*tensors: Tensor, stacked: bool = False) -> bool:
    return DescribedTensors(tuple(range(len(tensors))), stacked, unused).allow(tensors)


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (normal(*SIZE), True),
        (normal(2, 3, 8, HEAD_DIM).transpose(1, 2), True),
        (normal(2, 8, 3, 4 * HEAD_DIM)[..., HEAD_DIM : 2 * HEAD_DIM], True),
        (normal(2, 8, 3, HEAD_DIM + 8)[..., 8:], True),  # 16 bytes
        (normal(2, 8, 3, HEAD_DIM + 8)[..., 4 : HEAD_DIM + 4], False),  # starts at 8 bytes
        (normal(2, 8, 3, HEAD_DIM + 4)[..., :HEAD_DIM], False),  # heads 8 bytes off
        (normal(2, 8, 1, HEAD_DIM).expand(SIZE), False),  # heads at one address
        (normal(1, 8, 3, HEAD_DIM).expand(SIZE), False),
    ],
    ids=["contiguous", "heads first", "a slice", "16 bytes in", "8 bytes in", "odd heads", "one head", "one sequence"],
)
def test_a_start_and_strides_of_16_bytes(tensor: Tensor, expected: bool) -> None:
    assert allowed(tensor) is expected
    assert allowed(normal(*SIZE), tensor) is expected


def test_a_stride_below_the_limit() -> None:
    far = torch.empty(1, dtype=torch.bfloat16, device="meta").as_strided((2, 8, 3, HEAD_DIM), (2**39, 192, 64, 1))
    assert not allowed(far)
    assert allowed(far.as_strided(far.shape, (2**38, 192, 64, 1)))


def test_q_and_r_in_one_descriptor_need_equal_strides_and_q_at_the_lower_address() -> None:
    q, r = torch.stack([normal(*SIZE), normal(*SIZE)])
    assert allowed(q, r, stacked=True)
    assert not allowed(r, q, stacked=True)
    assert not allowed(q, q, stacked=True)
    assert not allowed(q, r.transpose(1, 2).contiguous().transpose(1, 2), stacked=True)
    assert allowed(r, q)


@pytest.mark.parametrize(
    ("spec", "config", "names", "stacked"),
    [
        (KernelSpec("forward", 64, "bf16"), ForwardConfig(64, 64, 1, 4, 2, LOADS="descriptors"), "k v", False),
        (KernelSpec("dqdr", 96, "bf16"), DqDrConfig(64, 64, 1, 4, 2, "chunked", LOADS="descriptors"), "k v", False),
        (KernelSpec("dkdv", 64, "bf16"), DKDV, "q r do", False),
        (KernelSpec("dkdv", 64, "bf16"), replace(DKDV, QR_TILE="stacked"), "q r do", True),
    ],
    ids=["forward", "dqdr", "dkdv", "dkdv, stacked"],
)
def test_which_tensors_are_described(spec: KernelSpec, config: Any, names: str, stacked: bool) -> None:
    found = described_tensors(spec, config, GPU)
    order = ("q", "r", "k", "v", "do")
    assert found is not None
    assert [order[i] for i in found.positions] == names.split()
    assert found.stacked is stacked
    assert "TensorDescriptor" not in vars(found.by_pointers())  # the module of the same config with pointers


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (KernelSpec("forward", 64, "bf16"), ForwardConfig(64, 64, 1, 4, 2)),
        (KernelSpec("preprocess", 64, "bf16"), PreprocessConfig(8, 4)),
    ],
    ids=["pointers", "no blocks"],
)
def test_kernels_without_descriptors_take_any_tensor(spec: KernelSpec, config: Any) -> None:
    assert described_tensors(spec, config, GPU) is None


def test_a_plan_launches_the_kernel_with_pointers_where_descriptors_are_not_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decided in each call: tensors of the same sizes and strides may start elsewhere."""
    monkeypatch.setattr(plan, "_current_device", lambda: 0)
    monkeypatch.setattr(plan, "_current_stream", lambda device: 0)
    launched: list[str] = []
    modules = {
        name: SimpleNamespace(launch=lambda *arguments, name=name: launched.append(name))
        for name in ("tma", "pointers")
    }
    monkeypatch.setattr(plan, "launch_by_jit", lambda module, tensors, scalars: module.launch(*tensors, *scalars))
    tensors = DescribedTensors((2, 3), False, lambda: modules["pointers"])  # type: ignore[arg-type, return-value]
    spec = KernelSpec("forward", HEAD_DIM, "bf16")
    launch_plan = plan.LaunchPlan(modules["tma"], spec, (1.0,), 0, Scratch(), described=tensors)  # type: ignore[arg-type]
    storage = normal(2 * 8 * 3 * HEAD_DIM + 8)
    for start in (0, 4, 8):
        x = storage[start : start + 2 * 8 * 3 * HEAD_DIM].view(SIZE)
        launch_plan.launch(SimpleNamespace(q=x, r=x, k=x, v=x), (x,))
    assert launched == ["tma", "pointers", "tma"]


def test_the_alignment_is_that_of_triton() -> None:
    """TensorDescriptor itself refuses what `allow` refuses, so that no check of ours is looser than Triton's."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tensor = normal(2 * 8 * 3 * HEAD_DIM + 8)
    for start in range(9):
        x = tensor[start : start + 2 * 8 * 3 * HEAD_DIM].view(SIZE)
        try:
            TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 8, 1, HEAD_DIM])
            accepted = True
        except AssertionError:
            accepted = False
        assert accepted is allowed(x) is described._can_be_described(x)
