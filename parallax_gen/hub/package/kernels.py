"""Imports this package's rendered kernels, and compiles one without launching it."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from parallax_gen.codegen.abi import empty_inputs, prepare
from parallax_gen.codegen.intercept import Launch, watch_launches
from parallax_gen.errors import BuildError
from parallax_gen.hub.package.records import ROOT, packaged
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class KernelSource:
    """A rendered kernel. name: its module in rendered/"""

    name: str


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes. spills: bytes per thread"""

    spills: int
    shared_bytes: int


def render(spec: KernelSpec, config: Any, gpu: Gpu) -> KernelSource:
    """The rendered kernel of a config."""
    return KernelSource(packaged(spec).kernel(config).file)


@cache
def load(source: KernelSource) -> ModuleType:
    """The imported kernel file."""
    return importlib.import_module(_module_name(source))


def compile_here(source: KernelSource, spec: KernelSpec, config: Any, shape: Shape) -> Resources:
    """Compile as the same call would on the current device, without launching. Raises BuildError if that fails."""
    found = importlib.util.find_spec(_module_name(source))
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)  # of its own: this one must not launch
    launches: list[Launch] = []
    try:
        found.loader.exec_module(module)
        with watch_launches(module, launches.append, compile_only=True):
            module.launch(*prepare(spec, config, empty_inputs(spec, shape, "meta")).arguments(1.0))
        first = launches[0].compiled
        first.run  # noqa: B018 - loads the program, which sets n_spills
    except Exception as error:  # Triton's stages raise many types; any of them means: no program
        raise BuildError(str(error)) from error
    return Resources(4 * int(first.n_spills), int(first.metadata.shared))


def _module_name(source: KernelSource) -> str:
    return f"{ROOT}.rendered.{source.name}"
