"""Kernels exported for C, and what their launches pass, computed apart from the C code.

Run as a program with a folder. It is a separate process because the tests' own process runs kernels in the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from strategies import GOLDEN, Kernel

from parallax_gen.cli import main
from parallax_gen.codegen.abi import empty_inputs, prepare
from parallax_gen.codegen.build import compile_launches, load
from parallax_gen.codegen.intercept import Launch
from parallax_gen.codegen.render import render
from parallax_gen.codegen.resources import cuobjdump
from parallax_gen.codegen.traced_launch import c_name, trace_launch
from parallax_gen.ops.base import op_of
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.runtime.export_for_c import write_for_c

GPU = GPUS["h200"]
# Two kernels; constants among the arguments, and scalars with a parameter's name; a tensor whose name is a word of C.
EXPORTED = {
    "decode_merge_kernel": Shape(2, 4, 4, 1, 700),
    "forward_window_varlen_chunked": Shape(3, 4, 2, 100, 100, 90),
    "preprocess": Shape(2, 6, 6, 200, 200),
}
COMMAND = ("export", "--gpu", "rtx4090", "--op", "decode", "--head-dim", "64", "--shape", "3,4/2,100", "--cubin")


def arguments_of(kernel: Kernel, shape: Shape) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors and the scalars that `launch` takes, by name."""
    op = op_of(kernel.spec)
    arguments: tuple[Any, ...] = prepare(
        kernel.spec, kernel.config, empty_inputs(kernel.spec, shape, "meta")
    ).arguments(kernel.spec.head_dim**-0.5)
    names = (*op.tensors(kernel.spec, kernel.config), *op.scales_taken(kernel.spec), *op.sizes(kernel.spec))
    named = dict(zip(names, arguments, strict=True))
    tensors = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
    return tensors, {name: x for name, x in named.items() if name not in tensors}


def numbers_of(launch: Launch, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A launch as Triton got it: the grid, and each argument of the kernel, a tensor's by its name in `launch`."""
    positions = {id(x): name for name, x in tensors.items()}
    arguments = [positions.get(id(x), x) for x in launch.arguments]
    return {"grid": launch.grid, "arguments": dict(zip(launch.kernel.arg_names, arguments, strict=True))}


def exported(name: str, folder: Path) -> dict[str, Any]:
    kernel, shape = GOLDEN[name], EXPORTED[name]
    source = render(kernel.spec, kernel.config, GPU)
    write_for_c(folder / f"{name}.py", source, kernel.spec, kernel.config, shape, GPU)
    tensors, scalars = arguments_of(kernel, shape)
    launches = launched(kernel, tensors, scalars)
    compiled = compile_launches(source, kernel.spec, kernel.config, shape, GPU)  # from Triton's cache
    return {
        "tensors": list(tensors),
        "kernels": [
            numbers_of(launch, tensors)
            | {"symbol": one.compiled.name, "sizes": parameter_sizes(one.compiled.asm["cubin"])}
            | {"block": 32 * one.options["num_warps"], "shared": one.compiled.metadata.shared}
            for launch, one in zip(launches, compiled, strict=True)
        ],
    }


def parameter_sizes(cubin: bytes) -> list[int]:
    """The bytes of each parameter, by the machine code's own table."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run(
            [str(cuobjdump()), "-elf", file.name], capture_output=True, encoding="utf-8", check=True
        ).stdout
    found = re.findall(r"Ordinal : (0x\w+)\s+Offset  : 0x\w+\s+Size    : (0x\w+)", dump)
    return [size for _, size in sorted((int(ordinal, 16), int(size, 16)) for ordinal, size in found)]


def launched(kernel: Kernel, tensors: dict[str, torch.Tensor], scalars: dict[str, float]) -> list[Launch]:
    """What the module's own `launch` passes to its kernels, which are replaced by recorders."""
    module = load(render(kernel.spec, kernel.config, GPU))
    launches: list[Launch] = []
    jit = {name: value for name, value in vars(module).items() if type(value).__name__ == "JITFunction"}

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: launches.append(Launch(self.kernel, grid, arguments, options, None))

    try:
        for name, value in jit.items():
            setattr(module, name, Recorder(value))
        module.launch(*tensors.values(), *scalars.values())
    finally:
        for name, value in jit.items():
            setattr(module, name, value)
    return launches


def expressions(
    name: str, kernel: Kernel, tensors: dict[str, torch.Tensor], scalars: dict[str, float]
) -> list[tuple[str, float]]:
    """Each C expression of a golden kernel's launches, and the number that `launch` computes."""
    module = load(render(kernel.spec, kernel.config, GPU))
    pairs: list[tuple[str, float]] = []
    traced = trace_launch(module, {tensor: x.dim() for tensor, x in tensors.items()})
    for launch, trace in zip(launched(kernel, tensors, scalars), traced, strict=True):
        values = (*launch.grid, *launch.arguments)
        for text, value in zip((*trace.grid, *trace.arguments), values, strict=True):
            if isinstance(value, torch.Tensor):
                assert text == f"{c_name(next(n for n, x in tensors.items() if x is value))}->data", (name, text)
            else:
                pairs.append((text, value))
    return pairs


def program(kernels: dict[str, Kernel]) -> tuple[str, list[float]]:
    """A C program that prints the value of every expression, and the numbers that it must print."""
    lines, wanted = [], []
    for name, kernel in kernels.items():
        seqlen_q = 1 if kernel.spec.public_op == "decode" and not kernel.spec.multi_token else 77
        shape = Shape(3, 5 * kernel.spec.group, 5, seqlen_q, 333, 50 * kernel.spec.window)
        tensors, scalars = arguments_of(kernel, shape)
        lines.append("{")
        for tensor, x in tensors.items():
            sizes, strides = (", ".join(map(str, numbers)) for numbers in (x.shape, x.stride()))
            lines.append(f"struct tensor {c_name(tensor)}_ = {{{{{sizes}}}, {{{strides}}}}};")
            lines.append(f"const struct tensor *{c_name(tensor)} = &{c_name(tensor)}_; (void){c_name(tensor)};")
        for scalar, x in scalars.items():
            kind = "double" if isinstance(x, float) else "int64_t"
            lines.append(f"{kind} {scalar} = {x}; (void){scalar};")
        for text, value in expressions(name, kernel, tensors, scalars):
            lines.append(f'printf("%.17g\\n", (double)({text}));')
            wanted.append(float(value))
        lines.append("}")
    start = "#include <stdint.h>\n#include <stdio.h>\nstruct tensor { int64_t shape[4]; int64_t stride[4]; };\n"
    return f"{start}int main(void) {{\n" + "\n".join(lines) + "\n}\n", wanted


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pointers = {n: kernel for n, kernel in GOLDEN.items() if getattr(kernel.config, "LOADS", "") != "descriptors"}
    text, wanted = program(pointers)
    (folder / "expressions.c").write_text(text, encoding="utf-8")
    result = {"numbers": wanted, "exported": {name: exported(name, folder) for name in EXPORTED}}
    (folder / "expected.json").write_text(json.dumps(result), encoding="utf-8")
    main([*COMMAND, "-o", str(folder / "command")], standalone_mode=False)
