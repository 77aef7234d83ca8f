"""Direct launches after one by the JIT, with fake compiled kernels that note their arguments."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton.compiler
import triton.runtime.jit
from triton.backends.nvidia.driver import CudaLauncher
from triton.tools.tensor_descriptor import TensorDescriptor

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
    launch_directly(launched, (q, r, out, scratch), [0, 0, 0, 0], stream=99)
    (grid_1, args_1, options_1), (grid_2, args_2, options_2) = launches
    assert (grid_1, grid_2) == ((8, 1, 1), (2, 3, 1))
    assert options_1 == options_2 == {"stream": 99}
    assert [id(a) for a in args_1[:3]] == [id(q), id(r), id(scratch)]
    assert args_1[3:] == (64, 0.5)
    assert [id(a) for a in args_2[:2]] == [id(out), id(scratch)]
    assert args_2[2:] == (7,)


def test_descriptors_are_made_of_the_tensors_of_each_launch(launches: Launches) -> None:
    """Of one tensor, and of q and r as the two parts of one, whose distance differs from launch to launch."""
    module = ModuleType("rendered")
    module.first = FakeJit(FakeKernel(launches))  # type: ignore[attr-defined]

    def launch(q: Any, r: Any, k: Any, out: Any, scale: float) -> None:
        distance = (r.data_ptr() - q.data_ptr()) // 2
        both = TensorDescriptor(q, [2, *q.shape], [distance, *q.stride()], [2, 1, 8, 1, 16])
        of_k = TensorDescriptor(k, k.shape, k.stride(), [1, 8, 1, 16])
        module.first[(8,)](both, of_k, k, out, 64, scale, num_warps=4)  # type: ignore[attr-defined]

    module.launch = launch  # type: ignore[attr-defined]

    def tensors(between: int) -> tuple[torch.Tensor, ...]:
        size = (1, 8, 2, 16)
        storage = torch.zeros(between + 2, *size, dtype=torch.bfloat16)
        return storage[0], storage[between + 1], *(torch.zeros(size, dtype=torch.bfloat16) for _ in range(2))

    first, second = tensors(0), tensors(3)
    launched = launch_by_jit(module, first, (0.5,))
    assert launched is not None
    launch_directly(launched, second, [x.data_ptr() for x in second], stream=99)
    ((grid, (both, of_k, k, out, *scalars), options),) = launches
    assert (grid, options, scalars) == ((8, 1, 1), {"stream": 99}, [64, 0.5])
    assert both.base is second[0]
    assert both.shape == [2, 1, 8, 2, 16]
    assert both.strides == [4 * 256, 256, 32, 16, 1]
    assert both.block_shape == [2, 1, 8, 1, 16]
    assert of_k.base is k is second[2]
    assert out is second[3]
    assert list(of_k.strides) == [256, 32, 16, 1]
    assert all(descriptor.template.base is None for descriptor in launched[0].descriptors)  # keeps no tensor alive


class LaunchedKernel(FakeKernel):
    """A compiled kernel with the installed Triton's own launcher, whose function in C is replaced by a list."""

    function, packed_metadata = 4660, (4, 1, 71680)

    def __init__(self, launches: Launches, **needs: Any):
        super().__init__(launches)
        self.calls: list[tuple[Any, ...]] = []
        self.run = object.__new__(CudaLauncher)
        settings = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": True, "gsan_enabled": False}
        settings |= {"arg_annotations": ["annotations"], "kernel_signature": b"signature"}
        for kind in ("global", "profile"):
            settings |= {f"{kind}_scratch_size": 0, f"{kind}_scratch_align": 1}
        vars(self.run).update(settings | {"launch": lambda *arguments: self.calls.append(arguments)} | needs)


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton finds no driver without a GPU. Its launcher only looks it up."""
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace())


TENSORS = tuple(torch.full((4,), float(i)) for i in range(4))
ADDRESSES = [x.data_ptr() for x in TENSORS]


def launched_by(first: FakeKernel, second: FakeKernel) -> Any:
    launched = launch_by_jit(module_of(first, second), tuple(torch.zeros(4) for _ in range(4)), (0.5,))
    assert launched is not None
    return launched


@pytest.mark.usefixtures("no_driver")
def test_addresses_reach_tritons_launcher_in_c_as_tensors_would(launches: Launches) -> None:
    first, second = LaunchedKernel(launches), LaunchedKernel(launches)
    launch_directly(launched_by(first, second), TENSORS, ADDRESSES, stream=99)
    q, r, out, scratch = ADDRESSES
    # The arguments of Triton's launcher in Python, which computes those in C.
    first.run(8, 1, 1, 99, 4660, (4, 1, 71680), None, None, None, q, r, scratch, 64, 0.5)
    second.run(2, 3, 1, 99, 4660, (4, 1, 71680), None, None, None, out, scratch, 7)
    for kernel in (first, second):
        direct, by_triton = kernel.calls
        assert direct == by_triton
    assert launches == []


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize("need", ["global_scratch_size", "profile_scratch_size", "gsan_enabled"])
def test_a_kernel_that_needs_memory_in_each_launch_is_launched_by_triton(launches: Launches, need: str) -> None:
    first, second = LaunchedKernel(launches, **{need: 1}), LaunchedKernel(launches)
    launch_directly(launched_by(first, second), TENSORS, ADDRESSES, stream=99)
    ((grid, arguments, options),) = launches
    assert (grid, options) == ((8, 1, 1), {"stream": 99})
    assert all(x is TENSORS[i] for x, i in zip(arguments, (0, 1, 3), strict=False))
    assert (len(first.calls), len(second.calls)) == (0, 1)


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize("replaced", [False, True], ids=["added", "in place of Triton's chain"])
@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_with_a_profilers_hook_triton_launches_and_calls_it(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, name: str, replaced: bool
) -> None:
    first, second = LaunchedKernel(launches), LaunchedKernel(launches)
    launched = launched_by(first, second)
    knobs = triton.knobs.runtime
    if replaced:
        monkeypatch.setattr(knobs, name, lambda _: None)
    else:
        monkeypatch.setattr(getattr(knobs, name), "calls", [lambda _: None])
    launch_directly(launched, TENSORS, ADDRESSES, stream=99)
    assert [grid for grid, *_ in launches] == [(8, 1, 1), (2, 3, 1)]
    monkeypatch.undo()
    launch_directly(launched, TENSORS, ADDRESSES, stream=99)
    assert len(launches) == 2
    assert (len(first.calls), len(second.calls)) == (1, 1)


def test_only_compiled_kernels_are_launched_directly(launches: Launches) -> None:
    x = torch.zeros(4)
    assert launch_by_jit(module_of(FakeKernel(launches), None), (x, x, x, x), (0.5,)) is None


def test_methods_are_restored_after_a_failed_launch(launches: Launches) -> None:
    module = module_of(FakeKernel(launches), FakeKernel(launches))
    with pytest.raises(TypeError):
        launch_by_jit(module, (torch.zeros(4),), (0.5,))
    assert "run" not in vars(module.first)


def test_are_aligned() -> None:
    assert are_aligned([1 << 40, 48])
    assert not are_aligned([1 << 40, 52, 64])
