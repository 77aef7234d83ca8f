"""The shared and tensor memory that kernels need, without generating machine code: several times faster than compiling.

Run as a program, it reads pickled jobs and writes a line of JSON for each. It is a separate process because it patches
Triton for good, and because the tests' own process runs kernels in the interpreter. It leaves entries in Triton's cache
that are no kernels, so nothing else may use that folder.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """A kernel to lower for a GPU at a shape."""

    spec: KernelSpec
    config: KernelConfig
    gpu: Gpu
    shape: Shape


@dataclass(frozen=True)
class Needs:
    """The largest needs of the launch's kernels.

    shared_bytes    shared memory per block
    tensor_columns  columns of Blackwell's tensor memory
    error           why lowering failed, in a line; else empty
    """

    shared_bytes: int
    tensor_columns: int
    error: str


def needs(jobs: Sequence[Job], folder: Path) -> Iterator[Needs]:
    """The needs of each job, in order, from a child process that uses `folder` for its files."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "PARALLAX_GEN_CACHE_DIR": str(folder / "kernels"),
    }
    with subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        pickle.dump([(job.spec, job.config, job.gpu, job.shape) for job in jobs], child.stdin)
        child.stdin.close()
        for line in child.stdout:
            yield Needs(**json.loads(line))
    assert child.returncode == 0


class _MemoryAllocated(BaseException):
    """Raised once Triton has allocated shared memory; carries the passes up to there."""

    def __init__(self, passes: Any):
        self.passes = passes


def stop_after_memory_allocation() -> None:
    """Patch Triton's compilers to stop after the allocation of shared memory, before machine code."""
    from triton.backends.amd import compiler as amd
    from triton.backends.nvidia import compiler as nvidia

    _stop(nvidia.CUDABackend, nvidia.nvidia.passes.ttgpuir)
    nvidia.CUDABackend.make_ptx = lambda *_: ""
    nvidia.CUDABackend.make_cubin = lambda *_: b""
    _stop(amd.HIPBackend, amd.amd.passes.ttgpuir)
    amd.HIPBackend.make_amdgcn = staticmethod(lambda *_: "")
    amd.HIPBackend.make_hsaco = staticmethod(lambda *_: b"")


def _stop(backend: Any, lowering: Any) -> None:
    """Let a backend's stage "llir" end where machine code would begin. lowering: its passes."""
    whole, go_on = backend.make_llir, lowering.add_to_llvmir
    is_static = isinstance(vars(backend)["make_llir"], staticmethod)

    def stop(passes: Any, *_: Any) -> None:
        raise _MemoryAllocated(passes)

    def make_llir(*arguments: Any) -> str:
        src, metadata = arguments[:2] if is_static else arguments[1:3]
        lowering.add_to_llvmir = stop
        try:
            whole(*arguments)
        except _MemoryAllocated as placed:
            try:
                placed.passes.run(src, "make_llir")
            except TypeError:  # Triton 3.5 has no stage names
                placed.passes.run(src)
        finally:
            lowering.add_to_llvmir = go_on
        metadata["shared"] = src.get_int_attr("ttg.shared")
        metadata["tmem_size"] = src.get_int_attr("ttg.tensor_memory_size")
        metadata["name"] = "lowered"
        return ""

    backend.make_llir = staticmethod(make_llir) if is_static else make_llir


def main() -> None:
    from parallax_gen.codegen import build
    from parallax_gen.codegen.render import render
    from parallax_gen.codegen.resources import Resources
    from parallax_gen.errors import BuildError

    stop_after_memory_allocation()

    def most(compiled: Sequence[Any]) -> Resources:
        result.update(
            shared_bytes=max(kernel.metadata.shared for kernel in compiled),
            tensor_columns=max(kernel.metadata.tmem_size or 0 for kernel in compiled),
        )
        return Resources(0, 0, 0)

    build.resources_of = most
    known: dict[tuple[str, Gpu], dict[str, Any]] = {}
    for spec, config, gpu, shape in pickle.load(sys.stdin.buffer):
        source = render(spec, config, gpu)
        body = source.text.split('"' * 3, 2)[2]  # the text before it is prose
        result = known.setdefault((body, gpu), {"shared_bytes": 0, "tensor_columns": 0, "error": ""})
        if not result["shared_bytes"] and not result["error"]:
            try:
                build.compile_for(source, spec, config, shape, gpu)
            except BuildError as error:
                result["error"] = str(error)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
