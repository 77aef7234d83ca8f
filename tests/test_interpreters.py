"""The package on the other Pythons of this machine: it compiles, and renders the kernels that this one renders; where
torch can be installed for them (slow), the kernels run in the interpreter and compile ahead of time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
OLDEST = 10  # of Python 3, as requires-python says
PURE = ("jinja2", "markupsafe", "platformdirs")  # what rendering takes; other Pythons can import this one's copies


def other_pythons() -> dict[str, Path]:
    """Pythons of other versions than this one, by version: of the PATH, and of pyenv."""
    found: dict[str, Path] = {}
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for minor in range(OLDEST, OLDEST + 20):
        name = f"python3.{minor}"
        paths = [shutil.which(name), *sorted(versions.glob(f"3.{minor}.*/bin/{name}"))]
        for path in filter(None, paths):
            if minor != sys.version_info.minor and "shims" not in Path(path).parts:
                found.setdefault(f"3.{minor}", Path(path))
    return found


PYTHONS = other_pythons()

# Compiles every file, with warnings as errors; imports every module that takes no other package, and prints kernels.
SMOKE = """
import importlib, pathlib, sys
top = pathlib.Path(sys.argv[1])
imported = 0
for path in sorted(top.glob("parallax_gen/**/*.py")):
    compile(path.read_text(encoding="utf-8"), str(path), "exec")
    name = ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__")
    try:
        if not name.endswith("__main__"):
            importlib.import_module(name)
            imported += 1
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] in (*sys.stdlib_module_names, "parallax_gen"):
            raise
from parallax_gen import KernelSpec, Shape
from parallax_gen.codegen.render import render
from parallax_gen.memory.shipped import load_shipped
from parallax_gen.memory.store import Store
from parallax_gen.ops.space import default_config
from parallax_gen.problem.hardware import gpu_by_name

with Store(read_only=True) as store:
    print(imported, len(load_shipped("h200")), len(store.all()))
for op, group, rows in (("forward", 1, 512), ("dkdv", 1, 512), ("decode", 4, 1)):
    spec, gpu = KernelSpec(op, 128, "bf16", group=group), gpu_by_name("h200")
    print(render(spec, default_config(spec, Shape(1, 8, 8 // group, rows, 512), gpu), gpu).text)
"""


def smoke(python: Path, folder: Path) -> str:
    """What SMOKE prints with a Python that has only the packages in `folder`."""
    done = subprocess.run(
        [python, "-B", "-S", "-W", "error", "-c", SMOKE, TOP],  # -S: without its own packages
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{TOP}:{folder}", "PARALLAX_GEN_DB": str(folder / "no.db")},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for name in PURE:
        shutil.copytree(str(metadata.distribution(name).locate_file(name)), folder / name)
    return folder


@pytest.fixture(scope="module")
def rendered_here(folder: Path) -> str:
    return smoke(Path(sys.executable), folder)


@pytest.mark.skipif(not PYTHONS, reason="there is no other Python here")
@pytest.mark.parametrize("version", PYTHONS)
def test_another_python_renders_the_same(version: str, folder: Path, rendered_here: str) -> None:
    assert "def launch(" in rendered_here
    assert smoke(PYTHONS[version], folder) == rendered_here


# An attention call in Triton's interpreter, against the formula, and a kernel compiled ahead of time.
RUN = """
import os
import torch
from parallax_gen import KernelSpec, Shape
from parallax_gen.codegen.build import compile_for, load
from parallax_gen.codegen.render import render
from parallax_gen.ops.space import default_config
from parallax_gen.oracle.reference import reference_forward
from parallax_gen.problem.hardware import gpu_by_name

spec, gpu, shape = KernelSpec("forward", 64, "fp16", causal=True), gpu_by_name("a100"), Shape(1, 2, 2, 50, 50)
config = default_config(spec, shape, gpu)
source = render(spec, config, gpu)
if os.environ["TRITON_INTERPRET"] == "1":
    q, r, k, v = (torch.randn(1, 50, 2, 64, dtype=torch.float16) for _ in range(4))
    out = torch.empty_like(q)
    load(source).launch(q=q, r=r, k=k, v=v, out=out, softmax_scale=0.125)
    expected = reference_forward(q, r, k, v, causal=True).out
    assert (out - expected).norm() < 1e-3 * expected.norm()  # fp16 rounds by up to 5e-4
else:
    assert compile_for(source, spec, config, shape, gpu).registers > 0
print("good")
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHONS, reason="there is no other Python here")
@pytest.mark.parametrize("version", PYTHONS)
def test_kernels_run_and_compile_on_another_python(version: str, tmp_path: Path) -> None:
    """Where its torch, of this one's version, and Triton can be installed."""
    python = tmp_path / "bin" / "python"
    subprocess.run([PYTHONS[version], "-m", "venv", tmp_path], check=True)
    torch = f"torch=={metadata.version('torch').partition('+')[0]}"
    for asked in ([torch, "numpy"], [str(TOP)]):
        done = subprocess.run([python, "-m", "pip", "install", "-q", *asked], capture_output=True, encoding="utf-8")
        if done.returncode:
            pytest.skip(f"pip cannot install {asked[0]} for Python {version}: {done.stderr.strip()[-200:]}")
    for interpret in ("1", "0"):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TRITON_INTERPRET": interpret}
        done = subprocess.run([python, "-c", RUN], env=environment, capture_output=True, encoding="utf-8", cwd=tmp_path)
        assert done.stdout == "good\n", done.stderr
