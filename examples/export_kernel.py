"""Export a kernel as a source file, and import the file by itself: it needs torch and triton, not parallax_gen."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

from parallax_gen.codegen.render import render
from parallax_gen.ops.space import default_config
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    spec = KernelSpec("forward", head_dim=64, dtype="fp16", causal=True)
    gpu = gpu_by_name("h200")
    source = render(spec, default_config(spec, Shape(4, 16, 16, 4096, 4096), gpu), gpu)
    path = folder / f"{source.name}.py"
    path.write_text(source.text, encoding="utf-8")
    print(f"{path}: {len(source.text.splitlines())} lines")

    module_spec = importlib.util.spec_from_file_location(source.name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    print((module.launch.__doc__ or "").strip().splitlines()[0])


if __name__ == "__main__":
    main()
