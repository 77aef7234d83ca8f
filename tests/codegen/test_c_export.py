"""Kernels exported for C: a C compiler takes the header, and a stand-in for the driver sees what a launch passes."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from c_launches import EXPORTED
from strategies import GOLDEN

from parallax_gen.codegen.render import render
from parallax_gen.errors import BuildError, ParallaxGenError
from parallax_gen.memory.place import place_of
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.steps import Call
from parallax_gen.runtime.export import ExportedKernel, write_kernels
from parallax_gen.runtime.export_for_c import write_for_c

ROOT = Path(__file__).parents[2]
CC = shutil.which("cc")
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic")

# A driver that prints. Its table of kernels has the bytes of each parameter, from the cubins.
DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>
struct kernel { const char *name; int count; int sizes[64]; };
static const struct kernel KERNELS[] = {TABLE};
static unsigned long long next = 0;
int cuInit(unsigned f) { (void)f; return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { (void)d; *c = 0; return 0; }
int cuCtxSetCurrent(void *c) { (void)c; return 0; }
int cuCtxSynchronize(void) { return 0; }
int cuMemAlloc_v2(unsigned long long *p, size_t n) { *p = next += 4096; printf("memory %zu\n", n); return 0; }
int cuMemsetD8_v2(unsigned long long p, unsigned char v, size_t n) { (void)p; (void)n; return v; }
int cuModuleLoadData(void **m, const void *image) { *m = 0; return memcmp(image, "\177ELF", 4); }
int cuModuleUnload(void *m) { (void)m; return 0; }
int cuModuleGetFunction(const void **f, void *m, const char *name)
{
    (void)m;
    for (size_t i = 0; i < sizeof KERNELS / sizeof *KERNELS; i++)
        if (!strcmp(KERNELS[i].name, name)) { *f = &KERNELS[i]; return 0; }
    return 500;
}
int cuFuncSetAttribute(const struct kernel *f, int attribute, int value)
{
    printf("attribute %s %d %d\n", f->name, attribute, value);
    return 0;
}
int cuLaunchKernel(const struct kernel *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, unsigned char **parameters, void **extra)
{
    (void)stream; (void)extra;
    printf("launch %s %u %u %u %u %u %u %u", f->name, gx, gy, gz, bx, by, bz, shared);
    for (int i = 0; i < f->count; i++) {
        printf(" ");
        for (int j = 0; j < f->sizes[i]; j++) printf("%02x", parameters[i][j]);
    }
    printf("\n");
    return 0;
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported kernels, and expected.json with what their launches pass."""
    folder = tmp_path_factory.mktemp("exported")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, ROOT / "tests" / "c_launches.py", folder], env=environment, check=True, timeout=240)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return result


def compile_c(*arguments: object, folder: Path, compiler: str | None = CC) -> None:
    if compiler is None:
        pytest.skip("no C compiler")
    command = [compiler, *STRICT, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr


def printed(program: Path) -> list[str]:
    done = subprocess.run([program], cwd=program.parent, capture_output=True, encoding="utf-8", timeout=20)
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


def test_expressions_in_c_are_what_launch_computes(folder: Path, expected: dict[str, Any]) -> None:
    """Every number that the launches of all golden kernels pass, at sizes that nothing divides."""
    compile_c("-O0", "expressions.c", "-o", "expressions", folder=folder)
    assert [float(line) for line in printed(folder / "expressions")] == expected["numbers"]


@pytest.fixture
def linked(folder: Path, expected: dict[str, Any]) -> Any:
    """Compiles a sample program with the stand-in for the driver, and runs it."""

    def run(name: str, program: str) -> list[str]:
        kernels = expected["exported"][name]["kernels"]
        rows = [(k["symbol"], len(k["sizes"]), ", ".join(map(str, k["sizes"]))) for k in kernels]
        table = ", ".join(f'{{"{symbol}", {count}, {{{sizes}}}}}' for symbol, count, sizes in rows)
        (folder / "driver.c").write_text(DRIVER.replace("TABLE", table), encoding="utf-8")
        (folder / "program.c").write_text(program, encoding="utf-8")
        compile_c("-O0", "program.c", "driver.c", "-o", "program", folder=folder)
        return printed(folder / "program")

    return run


@pytest.mark.parametrize("name", EXPORTED)
def test_a_launch_in_c_passes_what_triton_passes(
    name: str, folder: Path, expected: dict[str, Any], linked: Any
) -> None:
    """Parameters have the sizes of the cubin's own table, and the values of the launch in Python."""
    lines = linked(name, (folder / f"{name}_main.c").read_text(encoding="utf-8"))
    assert lines[-1] == "launched"
    kernels, tensors = expected["exported"][name]["kernels"], expected["exported"][name]["tensors"]
    addresses = {tensor: 4096 * (i + 1) for i, tensor in enumerate(tensors)}
    launches = [line.split()[1:] for line in lines if line.startswith("launch ")]
    attributes = [f"attribute {k['symbol']} 8 {k['shared']}" for k in kernels if k["shared"] > 48 * 1024]
    assert [line for line in lines if line.startswith("attribute ")] == attributes
    parameters = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["kernels"]
    for (symbol, *numbers), kernel, described in zip(launches, kernels, parameters, strict=True):
        grid = [*kernel["grid"], 1, 1][:3]
        assert [symbol, *map(int, numbers[:7])] == [kernel["symbol"], *grid, kernel["block"], 1, 1, kernel["shared"]]
        fixed = {argument["name"]: argument["equals"] for argument in described["fixed"]}
        assert fixed.items() <= kernel["arguments"].items()
        passed = {argument: value for argument, value in kernel["arguments"].items() if argument not in fixed}
        assert [parameter["name"] for parameter in described["parameters"]] == list(passed)
        values = [addresses.get(value, value) if isinstance(value, str) else value for value in passed.values()]
        values += [0] * described["scratch_pointers"]
        assert [bytes.fromhex(text) for text in numbers[7:]] == list(map(as_bytes, values, kernel["sizes"]))
        assert (folder / described["cubin"]).read_bytes().startswith(b"\x7fELF")


def as_bytes(value: float, size: int) -> bytes:
    return struct.pack("<f", value) if isinstance(value, float) else value.to_bytes(size, "little")


@pytest.mark.parametrize(
    ("name", "before_launch", "message"),
    [
        ("decode_merge_kernel", "q.stride[0] += 8", "q->stride[0] must be a multiple of 16 below 2^31"),
        ("decode_merge_kernel", "k_cache.data += 8", "k_cache->data must be a multiple of 16"),
        ("decode_merge_kernel", "v_cache.stride[1] <<= 32", "v_cache->stride[1] must be a multiple of 16 below 2^31"),
        ("forward_window_varlen_chunked", "k.stride[0] += 16", "k->stride[0] must be 192"),
    ],
)
def test_arguments_that_the_kernel_was_not_compiled_for_are_refused(
    name: str, before_launch: str, message: str, folder: Path, linked: Any
) -> None:
    program = (folder / f"{name}_main.c").read_text(encoding="utf-8")
    lines = linked(name, program.replace("    const char *why_not", f"    {before_launch};\n    const char *why_not"))
    assert lines[-1] == message
    assert not [line for line in lines if line.startswith("launch")]


def test_the_command_writes_the_files_and_names_them(folder: Path) -> None:
    name = "decode_d64_bf16_g2_rows8_kv128"
    files = {path.name for path in (folder / "command").iterdir()}
    cubins = [f"{name}.{kernel}.cubin" for kernel in ("decode_kernel", "merge_kernel")]
    assert files == {"README.md", f"{name}.py", f"{name}.h", f"{name}.json", f"{name}_main.c", *cubins}
    readme = (folder / "command" / "README.md").read_text(encoding="utf-8")
    assert f"- for C: {', '.join([f'{name}.h', f'{name}.json', f'{name}_main.c', *cubins])}\n" in readme
    described = json.loads((folder / "command" / f"{name}.json").read_text(encoding="utf-8"))
    assert described["arch"] == "sm_89"
    assert described["tensors"]["k_cache"]["shape"] == [3, 100, 2, 64]  # the sizes that were asked for
    compile_c("-c", f"{name}_main.c", "-o", "main.o", folder=folder / "command")
    (folder / "command" / "main.cpp").write_text(f'#include "{name}.h"\nint main() {{}}\n', encoding="utf-8")
    compile_c("-c", "main.cpp", "-o", "cpp.o", folder=folder / "command", compiler=shutil.which("c++"))


# -- what needs no compiled kernel


def exported(name: str, shape: Shape) -> ExportedKernel:
    kernel = GOLDEN[name]
    return ExportedKernel(kernel.spec, place_of("h200", kernel.spec, shape), kernel.config, "a test")


def test_kernels_with_descriptors_load_by_pointers() -> None:
    kernel = exported("forward_descriptors", Shape(1, 8, 8, 512, 512))
    assert "TensorDescriptor" in render(kernel.spec, kernel.config, GPUS["h200"]).text
    changed = kernel.by_pointers()
    assert "TensorDescriptor" not in render(changed.spec, changed.config, GPUS["h200"]).text
    assert changed.provenance.startswith("a test; loads by pointers")
    assert exported("dqdr_causal", Shape(1, 8, 8, 512, 512)).by_pointers().provenance == "a test"


def test_heads_that_would_share_a_file_are_refused(tmp_path: Path) -> None:
    shapes = (Shape(8, 8, 8, 1, 512), Shape(2, 32, 32, 1, 512))
    kernel = exported("decode_unsplit", shapes[0])
    calls = [Call(kernel.spec, shape, 1) for shape in shapes]
    with pytest.raises(ParallaxGenError, match="would be one file"):
        write_kernels([kernel], GPUS["h200"], tmp_path, calls)


@pytest.mark.interpreter
def test_the_interpreter_exports_no_cubin(tmp_path: Path) -> None:
    kernel, gpu = GOLDEN["decode_unsplit"], GPUS["h200"]
    source = render(kernel.spec, kernel.config, gpu)
    with pytest.raises(BuildError, match="TRITON_INTERPRET"):
        write_for_c(tmp_path / "kernel.py", source, kernel.spec, kernel.config, Shape(1, 1, 1, 1, 100), gpu)
    assert not list(tmp_path.iterdir())
