"""The C header of compiled kernels, which loads and launches them by CUDA's driver API, and a program that uses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from parallax_gen.codegen.compiled_launch import CompiledLaunch, Parameter
from parallax_gen.codegen.traced_launch import c_name

_DEFAULT_SHARED = 48 << 10  # a block gets more dynamic shared memory only if the function's attribute allows it

# What the header and the program take from cuda.h, for compiling where the CUDA toolkit is not installed.
_DECLARATIONS = """\
#if defined(__has_include)
#if __has_include(<cuda.h>)
#include <cuda.h>
#endif
#endif
#if !defined(CUDA_VERSION) && !defined(PARALLAX_CUDA_DECLARED)
#define PARALLAX_CUDA_DECLARED /* the declarations of cuda.h that are used here */
#ifdef __cplusplus
extern "C" {
#endif
typedef unsigned long long CUdeviceptr;
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef enum { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 } CUresult;
typedef enum { CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 } CUfunction_attribute;
#define cuMemAlloc cuMemAlloc_v2
#define cuMemsetD8 cuMemsetD8_v2
CUresult cuInit(unsigned flags);
CUresult cuDeviceGet(CUdevice *device, int ordinal);
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device);
CUresult cuCtxSetCurrent(CUcontext context);
CUresult cuCtxSynchronize(void);
CUresult cuMemAlloc(CUdeviceptr *pointer, size_t bytes);
CUresult cuMemsetD8(CUdeviceptr pointer, unsigned char value, size_t count);
CUresult cuModuleLoadData(CUmodule *module, const void *image);
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name);
CUresult cuModuleUnload(CUmodule module);
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value);
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void **parameters,
                        void **extra);
#ifdef __cplusplus
}
#endif
#endif

#ifndef PARALLAX_TENSOR_DEFINED
#define PARALLAX_TENSOR_DEFINED
/* A tensor on the device: its address, and its sizes and strides in elements, as in torch. */
typedef struct {
    CUdeviceptr data;
    int64_t shape[4];
    int64_t stride[4];
} parallax_tensor;

static inline int parallax_fits(int64_t value, int64_t multiple_of)
{
    return value == (int32_t)value && value % multiple_of == 0;
}
#endif"""

_LOAD = """\
/* Load the kernels into the current context. images: the contents of the files @NAME@_cubins, in their order. */
static inline CUresult @NAME@_load(@NAME@_kernels *kernels, const void *const *images)
{
    static const char *const symbols[] = {@SYMBOLS@};
    static const int shared_bytes[] = {@SHARED@};
    for (int i = 0; i < @COUNT@; i++) {
        CUresult result = cuModuleLoadData(&kernels->modules[i], images[i]);
        if (result == CUDA_SUCCESS)
            result = cuModuleGetFunction(&kernels->functions[i], kernels->modules[i], symbols[i]);
        if (result == CUDA_SUCCESS && shared_bytes[i] > @LIMIT@)
            result = cuFuncSetAttribute(kernels->functions[i], CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                        shared_bytes[i]);
        if (result != CUDA_SUCCESS)
            return result;
    }
    return CUDA_SUCCESS;
}"""

_MAIN = """\
/* Launch the kernels of @NAME@.h once, on tensors of zeros:

       cc @NAME@_main.c -lcuda -o @NAME@ && ./@NAME@

   Run it in the folder of the cubins, on a card of their architecture. */
#include "@NAME@.h"

#include <stdio.h>
#include <stdlib.h>

static void check(CUresult result, const char *what)
{
    if (result != CUDA_SUCCESS) {
        fprintf(stderr, "%s: CUDA error %d\\n", what, (int)result);
        exit(1);
    }
}

static void *content(const char *path)
{
    FILE *file = fopen(path, "rb");
    long size = file != NULL && fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
    char *bytes = size > 0 ? (char *)malloc((size_t)size) : NULL;
    if (bytes == NULL || fseek(file, 0, SEEK_SET) != 0 || fread(bytes, 1, (size_t)size, file) != (size_t)size) {
        fprintf(stderr, "cannot read %s\\n", path);
        exit(1);
    }
    fclose(file);
    return bytes;
}

static void allocate(parallax_tensor *tensor, size_t bytes)
{
    check(cuMemAlloc(&tensor->data, bytes), "cuMemAlloc");
    check(cuMemsetD8(tensor->data, 0, bytes), "cuMemsetD8");
}

int main(void)
{
    CUdevice device;
    CUcontext context;
    check(cuInit(0), "cuInit");
    check(cuDeviceGet(&device, 0), "cuDeviceGet");
    check(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    check(cuCtxSetCurrent(context), "cuCtxSetCurrent");

    const void *images[@COUNT@];
    for (int i = 0; i < @COUNT@; i++)
        images[i] = content(@NAME@_cubins[i]);
    @NAME@_kernels kernels;
    check(@NAME@_load(&kernels, images), "load");

@TENSORS@
    const char *why_not = @NAME@_why_not(@ARGUMENTS@);
    if (why_not != NULL) {
        fprintf(stderr, "%s\\n", why_not);
        return 1;
    }
    check(@NAME@_launch(&kernels, NULL, @ARGUMENTS@), "launch");
    check(cuCtxSynchronize(), "cuCtxSynchronize");
    check(@NAME@_unload(&kernels), "unload");
    puts("launched");
    return 0;
}
"""


@dataclass(frozen=True)
class SampleTensor:
    """A tensor of the exported sizes. bytes: of its storage"""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class CLaunch:
    """A `launch` in C.

    name      of the header without its ending, and the prefix of its names
    about     lines for the comment at its top
    tensors   that `launch` takes, by name, in order, with the sizes that were compiled for
    scalars   that it takes after them, by name: the C type, and a sample value
    kernels   in the order of their launches
    """

    name: str
    about: Sequence[str]
    tensors: Mapping[str, SampleTensor]
    scalars: Mapping[str, tuple[str, float]]
    kernels: Sequence[CompiledLaunch]

    def cubin_name(self, kernel: CompiledLaunch) -> str:
        return f"{self.name}.{kernel.symbol}.cubin"

    @property
    def header(self) -> str:
        """The text of NAME.h: in C99 and C++, `NAME_load`, `NAME_why_not`, `NAME_launch` and `NAME_unload`."""
        name, count = self.name, len(self.kernels)
        cubins = ",\n    ".join(f'"{self.cubin_name(kernel)}"' for kernel in self.kernels)
        parts = [
            "/* " + "\n   ".join(self.about).replace("\n   \n", "\n\n") + "\n*/",
            f"#ifndef {name}_h\n#define {name}_h\n\n#include <stddef.h>\n#include <stdint.h>",
            _DECLARATIONS,
            f"typedef struct {{\n    CUmodule modules[{count}];\n    CUfunction functions[{count}];\n}} "
            f"{name}_kernels;",
            f"static const char *const {name}_cubins[] = {{\n    {cubins}}};",
            self._filled(_LOAD),
            f"static inline CUresult {name}_unload({name}_kernels *kernels)\n{{\n"
            f"    CUresult result = CUDA_SUCCESS;\n    for (int i = 0; i < {count} && result == CUDA_SUCCESS; i++)\n"
            "        result = cuModuleUnload(kernels->modules[i]);\n    return result;\n}",
            self._why_not(),
            self._launch(),
            "#endif",
        ]
        return "\n\n".join(parts) + "\n"

    @property
    def main(self) -> str:
        """The text of NAME_main.c."""
        lines = []
        for name, tensor in self.tensors.items():
            shape, stride = (", ".join(map(str, numbers)) for numbers in (tensor.shape, tensor.stride))
            lines.append(f"    parallax_tensor {c_name(name)} = {{0, {{{shape}}}, {{{stride}}}}};")
            lines.append(f"    allocate(&{c_name(name)}, {max(tensor.bytes, 1)});")
        arguments = [f"&{c_name(name)}" for name in self.tensors] + [str(value) for _, value in self.scalars.values()]
        text = self._filled(_MAIN).replace("@TENSORS@", "\n".join(lines))
        return text.replace("@ARGUMENTS@", ", ".join(arguments))

    def _filled(self, text: str) -> str:
        symbols = ", ".join(f'"{kernel.symbol}"' for kernel in self.kernels)
        shared = ", ".join(str(kernel.shared_bytes) for kernel in self.kernels)
        values = {"SYMBOLS": symbols, "SHARED": shared, "COUNT": str(len(self.kernels)), "LIMIT": str(_DEFAULT_SHARED)}
        for placeholder, value in {"NAME": self.name, **values}.items():
            text = text.replace(f"@{placeholder}@", value)
        return text

    @property
    def _declared(self) -> str:
        """The parameters of `NAME_why_not`, and the last ones of `NAME_launch`."""
        tensors = [f"const parallax_tensor *{c_name(name)}" for name in self.tensors]
        return ",\n    ".join([*tensors, *(f"{c_type} {name}" for name, (c_type, _) in self.scalars.items())])

    def _why_not(self) -> str:
        checks = dict.fromkeys(check for kernel in self.kernels for check in _checks(kernel))
        lines = [f'    if (!({condition}))\n        return "{message}";' for condition, message in checks]
        unused = [f"    (void){name};" for name in (*map(c_name, self.tensors), *self.scalars)]
        return "\n".join(
            [
                "/* The first reason why these arguments cannot be passed, or NULL: the kernels are compiled for",
                "   strides and addresses with these properties. */",
                f"static inline const char *{self.name}_why_not(\n    {self._declared})\n{{",
                *unused,
                *lines,
                "    return NULL;\n}",
            ]
        )

    def _launch(self) -> str:
        arguments = ", ".join((*map(c_name, self.tensors), *self.scalars))
        blocks = [
            "/* Launch the kernels on a stream. CUDA_ERROR_INVALID_VALUE if `why_not` has a reason. */",
            f"static inline CUresult {self.name}_launch(\n    const {self.name}_kernels *kernels, CUstream stream,",
            f"    {self._declared})\n{{",
            "    CUdeviceptr no_scratch = 0; /* Triton appends pointers to memory that these kernels do not need */",
            "    CUresult result = CUDA_SUCCESS;",
            f"    if ({self.name}_why_not({arguments}) != NULL)\n        return CUDA_ERROR_INVALID_VALUE;",
        ]
        for index, kernel in enumerate(self.kernels):
            blocks += _launch_lines(index, kernel)
        return "\n".join([*blocks, "    (void)no_scratch;", "    return result;\n}"])


def _checks(kernel: CompiledLaunch) -> Iterator[tuple[str, str]]:
    """Conditions on the arguments of a kernel, and what each requires."""
    for fixed in kernel.fixed:
        yield f"{fixed.value} == {fixed.equals}", f"{fixed.value} must be {fixed.equals}"
    for parameter in kernel.parameters:
        value, multiple = parameter.value, parameter.multiple_of
        if parameter.c_type == "int32_t":
            requirement = f"a multiple of {multiple} below 2^31" if multiple > 1 else "below 2^31"
            yield f"parallax_fits({value}, {multiple})", f"{value} must be {requirement}"
        elif multiple > 1:
            yield f"{value} % {multiple} == 0", f"{value} must be a multiple of {multiple}"


def _launch_lines(index: int, kernel: CompiledLaunch) -> Iterator[str]:
    grid = [f"(unsigned){size}" if size.isidentifier() else f"(unsigned)({size})" for size in kernel.grid]
    yield "    if (result == CUDA_SUCCESS) {"
    # Names of their own: some parameters have the names of what they are computed from.
    for parameter in kernel.parameters:
        yield f"        {parameter.c_type} {_local(parameter)} = ({parameter.c_type}){parameter.value};"
    pointers = [f"&{_local(parameter)}" for parameter in kernel.parameters]
    pointers += ["&no_scratch"] * kernel.scratch_pointers
    yield "        void *parameters[] = {\n            " + ",\n            ".join(pointers) + "};"
    sizes = ", ".join([*grid, "1", "1"][:3])
    yield f"        /* {kernel.symbol} */"
    yield f"        result = cuLaunchKernel(kernels->functions[{index}], {sizes}, {kernel.threads}, 1, 1,"
    yield f"                                {kernel.shared_bytes}, stream, parameters, NULL);"
    yield "    }"


def _local(parameter: Parameter) -> str:
    return f"{parameter.name}_value"
