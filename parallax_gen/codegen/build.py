"""From rendered source to an imported module, and to machine code for a GPU that need not be there."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from parallax_gen.codegen.abi import empty_inputs, prepare
from parallax_gen.codegen.intercept import Launch, watching
from parallax_gen.codegen.render import KernelSource
from parallax_gen.codegen.resources import Resources, resources_of
from parallax_gen.errors import BuildError, MachineError, gist, machine_error
from parallax_gen.files import cache_dir, fallback_dir, replace_file, try_to_write
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


def write(source: KernelSource) -> Path:
    """The file that holds the source, written if it is not there: named by its content, so never stale.

    Raises MachineError where it cannot be written.
    """
    path = cache_dir() / "kernels" / f"{source.name}_{source.sha256[:16]}.py"
    try:
        if path.read_text(encoding="utf-8") == source.text:
            return path
    except (OSError, UnicodeDecodeError):
        pass  # missing or damaged: write it
    try:
        replace_file(path, source.text)
    except OSError as error:
        raise MachineError(f"cannot write the kernel {path}: {error}") from error
    return path


@cache
def load(source: KernelSource) -> ModuleType:
    """The imported kernel file. Its `launch` compiles on first use, through Triton's own cache."""
    return _imported(write(source))


def _imported(path: Path, *, alone: bool = False) -> ModuleType:
    """A kernel file as a module, under its name; `alone`: one of its own that nobody else gets to see."""
    name = f"parallax_gen_kernels_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if not alone:
        sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever it raised: it does not import
        if not alone:
            del sys.modules[name]
        raise machine_error(error) or BuildError(f"{path} does not import: {error}") from error
    return module


def compile_for(source: KernelSource, spec: KernelSpec, config: KernelConfig, shape: Shape, gpu: Gpu) -> Resources:
    """Compile every kernel of the source for `gpu`, which need not be there, and say what it needs.

    The launch is run on tensors that have sizes but no memory, with launching switched off: what Triton
    compiles, and puts in its cache, is what the same call compiles on the GPU. Raises BuildError where this config has
    no program, and MachineError where this machine cannot compile.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise BuildError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if triton.knobs.cache.manager_class is None:
        triton_cache()
    module = load(source)
    launches: list[Launch] = []
    with _driver_without_device(gpu), watching(module, launches.append, compile_only=True):
        try:
            module.launch(*prepare(spec, config, empty_inputs(spec, shape, "meta")).arguments(1.0))
        except Exception as error:  # Triton's stages raise many types; any of them means: no program
            raise machine_error(error) or BuildError(gist(error)) from error
    return resources_of([launch.compiled for launch in launches])


def compile_here(source: KernelSource, spec: KernelSpec, config: KernelConfig, shape: Shape) -> Resources:
    """Compile what the same call compiles on the current device, launch nothing, and say what the driver makes of it.

    Needs a CUDA device. Triton keeps the program, so that the call compiles no more. Raises BuildError where the config
    has no program or the device refuses it, and MachineError where the machine is at fault.
    """
    module = _imported(write(source), alone=True)  # launching is switched off in it: no call may have the same
    launches: list[Launch] = []
    with watching(module, launches.append, compile_only=True):
        try:
            module.launch(*prepare(spec, config, empty_inputs(spec, shape, "meta")).arguments(1.0))
            first = launches[0].compiled
            first.run  # noqa: B018 - loads it, and with that finds out
        except Exception as error:  # Triton's stages raise many types; any of them means: no program
            raise machine_error(error) or BuildError(gist(error)) from error
    return Resources(int(first.n_regs), 4 * int(first.n_spills), int(first.metadata.shared))


class _DriverWithoutDevice:
    """What Triton's JIT asks of a driver before it compiles."""

    def __init__(self, gpu: Gpu):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", gpu.arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"sm_{self.target.arch}, absent"  # keys Triton's caches: kept apart from a device that is there

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _driver_without_device(gpu: Gpu) -> Iterator[None]:
    from triton.runtime import driver

    try:
        before = driver.active
    except RuntimeError:  # no GPU here: there is nothing to put back
        before = None
    driver.set_active(_DriverWithoutDevice(gpu))
    try:
        yield
    finally:
        driver.set_active(before)


@cache
def give_triton_a_cache() -> None:
    """See to it that Triton can keep what it compiles: without a folder for it, it compiles nothing.

    Where its own cannot be written, or lies in a home folder and there is none, $TRITON_CACHE_DIR is set to one in the
    directory that `cache_dir` falls back to, with a warning. For calls on tensors; a command says what is wrong.
    """
    import triton

    if triton.knobs.runtime.interpret or triton.knobs.cache.manager_class is not None:
        return
    try:
        try_to_write(triton_cache())
    except (MachineError, OSError) as error:
        told = f"Triton cannot keep its programs: {error}"
        os.environ["TRITON_CACHE_DIR"] = str(fallback_dir(told, error) / "triton")


def triton_cache() -> Path:
    """Triton's folder. Raises MachineError where it lies in a home folder, and there is none."""
    import triton

    folder = Path(triton.knobs.cache.dir)
    if folder.parts[:1] == ("~",):  # not expanded: Triton would make a folder of this name wherever the process is
        raise MachineError("this user has no home folder: set TRITON_CACHE_DIR to an absolute path")
    return folder
