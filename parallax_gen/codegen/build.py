"""Imports rendered source as a module, and compiles it for a GPU that need not be in this machine."""

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
from parallax_gen.codegen.intercept import Launch, watch_launches
from parallax_gen.codegen.render import KernelSource
from parallax_gen.codegen.resources import Resources, resources_of
from parallax_gen.errors import BuildError, MachineError, gist, machine_error
from parallax_gen.files import cache_dir, fallback_dir, replace_file, try_to_write
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


def write(source: KernelSource) -> Path:
    """The file of the source, written if it is missing. Its name has a hash of its content, so it is never stale.

    Raises MachineError if it cannot be written.
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
    return _import_file(write(source))


def _import_file(path: Path, *, alone: bool = False) -> ModuleType:
    """Import a kernel file as a module under its name. alone: a private module that is not put into sys.modules."""
    name = f"parallax_gen_kernels_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if not alone:
        sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # any error means that the file does not import
        if not alone:
            del sys.modules[name]
        raise machine_error(error) or BuildError(f"{path} does not import: {error}") from error
    return module


def compile_for(source: KernelSource, spec: KernelSpec, config: KernelConfig, shape: Shape, gpu: Gpu) -> Resources:
    """Compile every kernel of the source for `gpu`, as `compile_launches` does. Returns the resources."""
    return resources_of([launch.compiled for launch in compile_launches(source, spec, config, shape, gpu)])


def compile_launches(
    source: KernelSource, spec: KernelSpec, config: KernelConfig, shape: Shape, gpu: Gpu
) -> list[Launch]:
    """Compile every kernel of the source for `gpu`, which need not be in this machine. Returns the launches, in order.

    `launch` runs on meta tensors with launching disabled, so Triton compiles and caches the same program as for the
    same call on the GPU. Raises BuildError if the config does not compile, and MachineError if this machine cannot
    compile.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise BuildError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if triton.knobs.cache.manager_class is None:
        triton_cache()
    module = load(source)
    launches: list[Launch] = []
    with _driver_without_device(gpu), watch_launches(module, launches.append, compile_only=True):
        try:
            module.launch(*prepare(spec, config, empty_inputs(spec, shape, "meta")).arguments(1.0))
        except Exception as error:  # Triton's stages raise many types; any of them means: no program
            raise machine_error(error) or BuildError(gist(error)) from error
    return launches


def compile_here(source: KernelSource, spec: KernelSpec, config: KernelConfig, shape: Shape) -> Resources:
    """Compile as the same call would on the current device, without launching. Returns the driver's resource counts.

    Needs a CUDA device. Triton caches the program, so the call need not compile again. Raises BuildError if the config
    does not compile or the device refuses the program, and MachineError if the machine is at fault.
    """
    module = _import_file(write(source), alone=True)  # this module must not launch, so no call may use it
    launches: list[Launch] = []
    with watch_launches(module, launches.append, compile_only=True):
        try:
            module.launch(*prepare(spec, config, empty_inputs(spec, shape, "meta")).arguments(1.0))
            first = launches[0].compiled
            first.run  # noqa: B018 - loads the program, which sets n_regs and n_spills
        except Exception as error:  # Triton's stages raise many types; any of them means: no program
            raise machine_error(error) or BuildError(gist(error)) from error
    return Resources(int(first.n_regs), 4 * int(first.n_spills), int(first.metadata.shared))


class _DriverWithoutDevice:
    """The methods that Triton's JIT calls on a driver before it compiles."""

    def __init__(self, gpu: Gpu):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("hip" if gpu.is_amd else "cuda", gpu.arch, gpu.warp_size)
        self.name = f"{gpu.target}, absent"

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.name  # a key of Triton's caches, unlike any present device's

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _driver_without_device(gpu: Gpu) -> Iterator[None]:
    from triton.runtime import driver

    try:
        before = driver.active
    except RuntimeError:  # no GPU here: there is nothing to restore
        before = None
    driver.set_active(_DriverWithoutDevice(gpu))
    try:
        yield
    finally:
        driver.set_active(before)


@cache
def ensure_triton_cache() -> None:
    """Make sure that Triton has a writable cache folder: without one it compiles nothing.

    If its own cannot be written, or needs a home folder that does not exist, set $TRITON_CACHE_DIR to a folder in the
    fallback of `cache_dir`, with a warning. For calls on tensors; commands report the problem instead.
    """
    import triton

    if triton.knobs.runtime.interpret or triton.knobs.cache.manager_class is not None:
        return
    try:
        try_to_write(triton_cache())
    except (MachineError, OSError) as error:
        problem = f"Triton cannot keep its programs: {error}"
        os.environ["TRITON_CACHE_DIR"] = str(fallback_dir(problem, error) / "triton")


def triton_cache() -> Path:
    """Triton's cache folder. Raises MachineError if it needs a home folder that does not exist."""
    import triton

    folder = Path(triton.knobs.cache.dir)
    if folder.parts[:1] == ("~",):  # not expanded: Triton would create a folder "~" in the working directory
        raise MachineError("this user has no home folder: set TRITON_CACHE_DIR to an absolute path")
    return folder
