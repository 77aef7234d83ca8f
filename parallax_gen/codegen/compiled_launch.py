"""A compiled kernel as a driver launches it: symbol, grid, block, shared memory, and parameters in order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from parallax_gen.codegen.intercept import Launch
from parallax_gen.codegen.traced_launch import TracedLaunch, trace_launch
from parallax_gen.errors import BuildError

# Triton's type of a kernel argument -> its type in C, and in PTX.
_POINTER = ("CUdeviceptr", "u64")
_TYPES = {"i32": ("int32_t", "u32"), "i64": ("int64_t", "u64"), "fp32": ("float", "f32")}
# What a launch must not need: an attribute of the compiled kernel, the value without the need, and its name.
_UNSUPPORTED = (
    ("num_ctas", 1, "clusters of programs"),
    ("global_scratch_size", 0, "global scratch memory in each launch"),
    ("profile_scratch_size", 0, "profiler memory in each launch"),
    ("launch_cooperative_grid", False, "a cooperative grid"),
    ("launch_pdl", False, "programmatic dependent launch"),
)


@dataclass(frozen=True)
class Parameter:
    """A parameter that the caller passes.

    name         the kernel's
    c_type       CUdeviceptr, int32_t, int64_t or float
    value        its value as a C expression of the tensors' sizes and strides and of the scalars of `launch`
    multiple_of  Triton compiled the kernel for multiples of this; 1 for any value
    """

    name: str
    c_type: str
    value: str
    multiple_of: int


@dataclass(frozen=True)
class FixedArgument:
    """An argument that is compiled in, and not passed: `value`, a C expression, must be `equals`."""

    name: str
    value: str
    equals: int


@dataclass(frozen=True)
class CompiledLaunch:
    """One kernel of a `launch`.

    symbol            its name in the cubin
    arch              of the cubin, such as sm_90a
    grid              of programs, as C expressions: x alone, or x, y, z
    threads           of a block
    shared_bytes      dynamic shared memory of a block
    parameters        in order
    scratch_pointers  how many pointers Triton appends to the parameters; the kernel uses none of them, so pass 0
    fixed             arguments that are compiled in
    """

    symbol: str
    arch: str
    grid: tuple[str, ...]
    threads: int
    shared_bytes: int
    parameters: tuple[Parameter, ...]
    scratch_pointers: int
    fixed: tuple[FixedArgument, ...]
    cubin: bytes

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["cubin"]
        return fields


def compiled_launches(module: ModuleType, launches: Sequence[Launch], ranks: Mapping[str, int]) -> list[CompiledLaunch]:
    """How to launch the compiled kernels of a module.

    launches  of its `launch`, from `build.compile_launches`
    ranks     how many dimensions each tensor has that `launch` takes, by name

    Raises BuildError for a kernel that a C program cannot launch by its parameters alone.
    """
    traced = trace_launch(module, ranks)
    return [_compiled_launch(*pair) for pair in zip(launches, traced, strict=True)]


def _compiled_launch(launch: Launch, traced: TracedLaunch) -> CompiledLaunch:
    compiled, names = launch.compiled, launch.kernel.arg_names
    metadata, source = compiled.metadata, compiled.src
    for field, plain, need in _UNSUPPORTED:
        if getattr(metadata, field, plain) != plain:
            raise BuildError(f"{metadata.name} needs {need}, which this export does not provide")
    hints = {index: dict(map(tuple, attributes)) for (index,), attributes in source.attrs.items()}
    constants = {index[0]: value for index, value in source.constants.items()}
    parameters, fixed, types = [], [], []
    for index, (name, value) in enumerate(zip(names, traced.arguments, strict=True)):
        kind = source.signature[name]
        if kind == "constexpr":
            fixed.append(FixedArgument(name, value, int(constants[index])))
            continue
        if not kind.startswith("*") and kind not in _TYPES:
            raise BuildError(f"{metadata.name} takes {name} of type {kind}, which this export does not pass")
        c_type, ptx_type = _POINTER if kind.startswith("*") else _TYPES[kind]
        parameters.append(Parameter(name, c_type, value, hints.get(index, {}).get("tt.divisibility", 1)))
        types.append(ptx_type)
    ptx = compiled.asm["ptx"]
    declared = _declared_types(ptx, metadata.name)
    appended = declared[len(types) :]
    if declared[: len(types)] != types or set(appended) - {"u64"}:
        raise BuildError(f"{metadata.name} has the parameters {declared}, but Triton's signature gives {types}")
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert arch is not None
    return CompiledLaunch(
        symbol=metadata.name,
        arch=arch[1],
        grid=traced.grid,
        threads=metadata.num_warps * metadata.target.warp_size,
        shared_bytes=metadata.shared,
        parameters=tuple(parameters),
        scratch_pointers=len(appended),
        fixed=tuple(fixed),
        cubin=compiled.asm["cubin"],
    )


def _declared_types(ptx: str, symbol: str) -> list[str]:
    """The types of a kernel's parameters in PTX, in order."""
    entry = re.search(rf"\.entry {re.escape(symbol)}\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None
    return re.findall(r"\.param \.(\w+) ", entry[1])
