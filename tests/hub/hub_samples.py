"""A small hub package of a model with Qwen3-0.6B's heads, and imports of packages from their folders."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

from parallax_gen.hub import records
from parallax_gen.hub.folder import HubPackage, write_package
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

H200 = GPUS["h200"]
HEADS, KV_HEADS, HEAD_DIM, DTYPE = 16, 8, 128, "fp16"  # fp16: the interpreter's bf16 is wrong
FORWARD = KernelSpec("forward", HEAD_DIM, DTYPE, group=2, causal=True)
DECODE = KernelSpec("decode", HEAD_DIM, DTYPE, group=2)
OWN_LENGTHS = KernelSpec("decode_varlen", HEAD_DIM, DTYPE, group=2)
PAGED = KernelSpec("decode_varlen", HEAD_DIM, DTYPE, group=2, page_size=16)
TRAINING = tuple(FORWARD.for_op(op) for op in ("forward", "preprocess", "dkdv", "dqdr"))
SPECS = (FORWARD, *TRAINING, DECODE, OWN_LENGTHS, PAGED)


def calls_of(specs: Iterable[KernelSpec]) -> list[tuple[KernelSpec, Shape]]:
    """Each spec at some shape."""
    return [(spec, Shape(1, 8 * spec.group, 8, 1, 4096, 1024 * spec.window)) for spec in specs]


def limit_sizes(patch: pytest.MonkeyPatch, kv_rows: int, longest: int) -> None:
    """Leave the larger buckets out of packages: the whole takes seconds for each spec."""
    patch.setattr(records, "MOST_KV_ROWS", kv_rows)
    patch.setattr(records, "LONGEST", longest)


def small_package(folder: Path) -> HubPackage:
    """A package of SPECS for small sizes on an H200."""
    with pytest.MonkeyPatch.context() as patch:
        limit_sizes(patch, kv_rows=16, longest=256)
        return write_package(folder, calls_of(SPECS), [H200], Memory(), "me/parallax-attn")


def import_package(folder: Path, name: str) -> ModuleType:
    """The package in a folder, imported as the `kernels` library does: under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
