"""What a C program needs to launch an exported kernel: cubins, a header, the launch parameters, and a sample program.

It compiles in this process, for a card that need not be in this machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallax_gen.codegen.render import KernelSource
from parallax_gen.describe import describe
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig, config_to_dict, op_of
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from parallax_gen.codegen.c_header import CLaunch


def write_for_c(
    path: Path, source: KernelSource, spec: KernelSpec, config: KernelConfig, shape: Shape, gpu: Gpu
) -> tuple[Path, ...]:
    """Write the files for C beside an exported kernel: NAME.h, NAME.json, NAME_main.c, and a cubin for each kernel.

    path   of the exported kernel, NAME.py
    shape  the sizes that it is compiled for: strides that Triton compiles in, or as multiples of 16, are theirs

    Raises BuildError if the kernel does not compile or a C program could not launch it, MachineError if this machine
    cannot compile, and OSError if a file cannot be written.
    """
    launch = _compile(path.stem, source, spec, config, shape, gpu)
    parameters = {
        "gpu": gpu.name,
        "arch": launch.kernels[0].arch,
        "triton": Toolchain.here().triton,
        "ptxas": Toolchain.here().cuda,
        "spec": spec.to_dict(),
        "config": config_to_dict(config),
        "tensors": {name: {"shape": x.shape, "stride": x.stride} for name, x in launch.tensors.items()},
        "scalars": {name: c_type for name, (c_type, _) in launch.scalars.items()},
        "kernels": [{"cubin": launch.cubin_name(kernel), **kernel.to_json()} for kernel in launch.kernels],
    }
    texts = {
        path.with_suffix(".h"): launch.header,
        path.with_suffix(".json"): json.dumps(parameters, indent=1) + "\n",
        path.with_name(f"{path.stem}_main.c"): launch.main,
    }
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    cubins = {path.with_name(launch.cubin_name(kernel)): kernel.cubin for kernel in launch.kernels}
    for file, cubin in cubins.items():
        file.write_bytes(cubin)
    return (*texts, *cubins)


def _compile(
    name: str, source: KernelSource, spec: KernelSpec, config: KernelConfig, shape: Shape, gpu: Gpu
) -> CLaunch:
    """The launch of a kernel in C."""
    from parallax_gen.codegen.abi import empty_inputs, prepare
    from parallax_gen.codegen.build import compile_launches, load
    from parallax_gen.codegen.c_header import CLaunch, SampleTensor
    from parallax_gen.codegen.compiled_launch import compiled_launches

    op = op_of(spec)
    arguments: tuple[Any, ...] = prepare(spec, config, empty_inputs(spec, shape, "meta")).arguments(spec.head_dim**-0.5)
    tensors = dict(zip(op.tensors(spec, config), arguments, strict=False))  # scalars come after them
    launches = compile_launches(source, spec, config, shape, gpu)
    module = load(source)
    kernels = compiled_launches(module, launches, {name: x.dim() for name, x in tensors.items()})
    types: dict[str, str] = dict.fromkeys(op.scales_taken(spec), "double")
    types |= dict.fromkeys(op.sizes(spec), "int64_t")
    scalars = {
        name: (c_type, value) for (name, c_type), value in zip(types.items(), arguments[len(tensors) :], strict=True)
    }
    here = Toolchain.here()
    about = [
        f"{spec}",
        f"config     {describe(config)}",
        f"gpu        {gpu.title}: cubins of {kernels[0].arch}",
        f"compiled   for {shape}, by Triton {here.triton}, ptxas {here.cuda}",
        "",
        *(module.launch.__doc__ or "").strip().splitlines(),
    ]
    samples = {name: SampleTensor(x.shape, x.stride(), x.numel() * x.element_size()) for name, x in tensors.items()}
    return CLaunch(name, about, samples, scalars, kernels)
