"""What works without the extra `tune`, and the one line of what does not. Its packages cannot be imported here."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from parallax_gen.errors import TUNE_EXTRA, install_command
from parallax_gen.memory.store import Store

TOP = Path(__file__).parents[1]
OLD = TOP / "tests" / "data" / "same" / "of_431f796.db"  # its schema takes migrations

# Without numpy, too: Optuna brought it, and torch does not need it.
HIDE = """
import sys
from importlib.machinery import PathFinder
def find_spec(name, path=None, target=None, find=PathFinder.find_spec):
    return None if name.partition(".")[0] in {packages} else find(name, path, target)
PathFinder.find_spec = find_spec
"""
ALL = {*TUNE_EXTRA, "numpy"}

COMMAND = "import runpy; sys.argv[0] = 'parallax-gen'; runpy.run_module('parallax_gen', run_name='__main__')"

CALLS = """
import json, os, torch
import parallax_gen
from parallax_gen import *
from parallax_gen.codegen.render import render
from parallax_gen.memory.descriptions import open_memory
from parallax_gen.ops.space import default_config
from parallax_gen.problem.hardware import gpu_by_name

q, r = (torch.randn(2, 16, 4, 32, requires_grad=True) for _ in range(2))
k, v = (torch.randn(2, 16, 2, 32) for _ in range(2))
with record("calls.jsonl"):
    out = parallax_attn_func(q, r, k, v, causal=True)
out.sum().backward()
offsets = torch.tensor([0, 16], dtype=torch.int32)
packed = parallax_attn_varlen_func(q[0], r[0], k[0], v[0], offsets, offsets, 16, 16, causal=True)
lengths = torch.tensor([16, 16], dtype=torch.int32)
with torch.no_grad():
    step = parallax_attn_with_kvcache(q[:, -1:], r[:, -1:], k, v, cache_seqlens=lengths)
layer = nn.ParallaxAttention(64, 4, 2)
spec, shape, card = KernelSpec("decode", 128, "bf16", group=4), Shape(8, 32, 8, 1, 4096), gpu_by_name("h200")
locked = lock("lock.jsonl", kernels=(spec, shape), gpu="h200")
use_lock("lock.jsonl")
use_lock(None)
memory = open_memory()
print(json.dumps({
    "near": [bool(torch.allclose(out[0], packed, atol=1e-5)), bool(torch.allclose(out[:, -1:], step, atol=1e-5))],
    "gradient": q.grad is not None,
    "layer": list(layer(torch.randn(2, 8, 64)).shape),
    "locked": len(locked.kernels),
    "rendered": "def launch(" in render(spec, default_config(spec, shape, card), card).text,
    "shipped": len(memory.all("h200", "decode")) - len(memory.store.all("h200", "decode")),
    "own": len(memory.store.all()),
    "loaded": sorted({"sqlite_utils", "click", "optuna", "rich", "sqlalchemy", "numpy"} & set(sys.modules)),
}))
"""

ERRORS = """
import json
import parallax_gen
from parallax_gen import KernelSpec, Shape
from parallax_gen.errors import ParallaxGenError
from parallax_gen.memory.store import Store
from parallax_gen.report.sources import Sources
from parallax_gen.tuning.search.importances import importances

kernels = (KernelSpec("decode", 128, "bf16", group=4), Shape(8, 32, 8, 1, 4096))
def write():
    with Store("new/tuning.db"):
        pass
def write_old():
    with Store("old.db"):
        pass
def report():
    sources = Sources()
    sources._indices["x = 1"] = 0
    sources.packed()
calls = {
    "tune": lambda: parallax_gen.tune(kernels=kernels),
    "prepare": lambda: parallax_gen.prepare(kernels=kernels, gpu="h200"),
    "tune_first_calls": lambda: parallax_gen.tune_first_calls(),
    "write": write,
    "write old": write_old,
    "report": report,
    "importances": lambda: importances(kernels[0], []),
}
lines = {}
for name, call in calls.items():
    try:
        call()
    except ParallaxGenError as error:
        lines[name] = [type(error).__name__, str(error)]
print(json.dumps(lines))
"""


def python(code: str, *arguments: str, folder: Path, hidden: set[str] = ALL) -> CompletedProcess[str]:
    """Run code in a process of its own, in which packages cannot be imported."""
    environment = os.environ | {"PYTHONPATH": str(TOP), "PARALLAX_GEN_DB": "old.db", "PARALLAX_GEN_QUIET": "1"}
    environment |= {"PARALLAX_GEN_CACHE_DIR": "cache", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter takes numpy
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(packages=sorted(hidden)) + code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a database that takes migrations before its rows can be read."""
    shutil.copy(OLD, tmp_path / "old.db")
    return tmp_path


def test_calls_run_and_records_are_read(folder: Path) -> None:
    done = python(CALLS, folder=folder)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    with Store(OLD, read_only=True) as store, closing(sqlite3.connect(f"{OLD.as_uri()}?mode=ro", uri=True)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (1,)
        assert 0 < results["own"] == len(store.all()) <= raw.execute("SELECT count(*) FROM results").fetchone()[0]
    assert results["shipped"] > 100
    assert results["near"] == [True, True]
    assert results["gradient"]
    assert results["rendered"]
    assert results["layer"] == [2, 8, 64]
    assert results["locked"] == 1
    assert results["loaded"] == []
    assert (folder / "old.db").read_bytes() == OLD.read_bytes()
    assert (folder / "calls.jsonl").exists()


def test_what_needs_the_extra_says_so_in_one_line(folder: Path) -> None:
    done = python(ERRORS, folder=folder)
    assert done.returncode == 0, done.stderr
    install = install_command("tune")
    assert json.loads(done.stdout) == {
        "tune": ["MachineError", f"parallax_gen.tune needs Optuna: {install}"],
        "prepare": ["MachineError", f"parallax_gen.prepare needs Optuna: {install}"],
        "tune_first_calls": ["MachineError", f"parallax_gen.tune_first_calls needs rich: {install}"],
        "write": ["StoreError", f"writing the tuning database new/tuning.db needs sqlite-utils: {install}"],
        "write old": ["StoreError", f"writing the tuning database old.db needs sqlite-utils: {install}"],
        "report": ["MachineError", f"the report needs Pygments: {install}"],
        "importances": ["MachineError", f"the importance of knobs needs Optuna: {install}"],
    }
    assert not (folder / "new").exists()
    assert (folder / "old.db").read_bytes() == OLD.read_bytes()


@pytest.mark.parametrize(
    ("hidden", "arguments", "line"),
    [
        ("click", "--version", "the command line needs click"),
        ("rich", "tune --op decode --head-dim 64 --gpu h200", "this command needs rich"),
        ("optuna", "replay sweep.jsonl", "this command needs Optuna"),
        ("sqlite_utils", "db import old.db", "writing the tuning database mine.db needs sqlite-utils"),
    ],
)
def test_a_command_says_so_in_one_line(folder: Path, hidden: str, arguments: str, line: str) -> None:
    (folder / "sweep.jsonl").touch()
    code = f"import os; os.environ['PARALLAX_GEN_DB'] = 'mine.db'\n{COMMAND}"
    done = python(code, *arguments.split(), folder=folder, hidden={hidden})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {line}: {install_command('tune')}\n"
    assert (folder / "mine.db").exists() == (hidden == "rich")  # which is imported later than the database is opened


def test_the_integration_of_transformers_names_its_extra(folder: Path) -> None:
    code = "import parallax_gen.integrations.transformers as module"
    done = python(code, folder=folder, hidden={"transformers"})
    assert done.returncode == 1
    line = f"parallax_gen.integrations.transformers needs transformers: {install_command('transformers')}"
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {line}"


def test_doctor_says_what_is_missing(folder: Path) -> None:
    code = "from parallax_gen.cli import main; main(['doctor'])"
    versions = "from importlib import metadata\nknown = metadata.version\n"
    versions += "def version(name):\n    if name == 'optuna': raise metadata.PackageNotFoundError(name)\n"
    versions += "    return known(name)\nmetadata.version = version\n"
    done = python(versions + code, folder=folder, hidden={"optuna"})
    assert done.returncode == 1
    assert f"versions  broken  tuning needs Optuna: {install_command('tune')}" in done.stdout
