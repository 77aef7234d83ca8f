"""Direct launches after one by the JIT, with fake compiled kernels that note their arguments."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import triton.compiler
import triton.runtime.jit

from parallax_gen.runtime.direct_launch import are_aligned, launch_by_jit, launch_directly

Launches = list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]]


class FakeKernel:
    def __init__(self, launches: Launches):
        self.noted = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.noted.append((grid, args, options))


class FakeJit:
    """Like Triton's JITFunction: indexing by a grid returns a launcher, which calls `run`."""

    def __init__(self, result: Any):
        self.result = result

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert not warmup
        return self.result

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.run(*args, grid=grid, warmup=False, **options)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    monkeypatch.setattr(triton.compiler, "CompiledKernel", FakeKernel)
    monkeypatch.setattr(triton.runtime.jit, "JITFunction", FakeJit)
    return []


def module_of(first: Any, second: Any) -> ModuleType:
    module = ModuleType("rendered")
    module.first, module.second = FakeJit(first), FakeJit(second)  # type: ignore[attr-defined]

    def launch(q: Any, r: Any, out: Any, scratch: Any, scale: float) -> None:
        module.first[(8,)](q, r, scratch, 64, scale, num_warps=4)  # type: ignore[attr-defined]
        module.second[(2, 3)](out, scratch, 7)  # type: ignore[attr-defined]

    module.launch = launch  # type: ignore[attr-defined]
    return module


def test_a_direct_launch_passes_new_tensors_to_the_compiled_kernels(launches: Launches) -> None:
    module = module_of(FakeKernel(launches), FakeKernel(launches))
    x = torch.zeros(4)
    launched = launch_by_jit(module, (x, x, torch.zeros(4), torch.zeros(4)), (0.5,))  # q and r are the same tensor
    assert launched is not None
    assert "run" not in vars(module.first)
    q, r, out, scratch = (torch.full((4,), float(i)) for i in range(4))
    launch_directly(launched, (q, r, out, scratch), stream=99)
    (grid_1, args_1, options_1), (grid_2, args_2, options_2) = launches
    assert (grid_1, grid_2) == ((8, 1, 1), (2, 3, 1))
    assert options_1 == options_2 == {"stream": 99}
    assert [id(a) for a in args_1[:3]] == [id(q), id(r), id(scratch)]
    assert args_1[3:] == (64, 0.5)
    assert [id(a) for a in args_2[:2]] == [id(out), id(scratch)]
    assert args_2[2:] == (7,)


def test_only_compiled_kernels_are_launched_directly(launches: Launches) -> None:
    x = torch.zeros(4)
    assert launch_by_jit(module_of(FakeKernel(launches), None), (x, x, x, x), (0.5,)) is None


def test_methods_are_restored_after_a_failed_launch(launches: Launches) -> None:
    module = module_of(FakeKernel(launches), FakeKernel(launches))
    with pytest.raises(TypeError):
        launch_by_jit(module, (torch.zeros(4),), (0.5,))
    assert "run" not in vars(module.first)


def test_are_aligned() -> None:
    x = torch.zeros(64)
    assert are_aligned((x, x[4:]))
    assert not are_aligned((x, x[1:]))
