"""The versions of Triton and its ptxas: the same as Triton reports, without importing it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallax_gen.memory import toolchain

cuda_version = toolchain.cuda_version.__wrapped__  # without the cache, as in a new process


def assembler(path: Path, release: str, *, status: int = 0) -> Path:
    """A fake ptxas: it prints a version like a real one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    message = f"Copyright (c) 2005-2026\nCuda compilation tools, release {release}, V{release}.93\nBuild cuda_{release}"
    path.write_text(f"#!/bin/sh\ncat <<.\n{message}\n.\nexit {status}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed Triton's assemblers."""
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(name, raising=False)
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path / "triton")])
    monkeypatch.setattr(toolchain, "find_spec", lambda name: package if name == "triton" else None)
    return tmp_path / "triton" / "backends" / "nvidia" / "bin"


def test_versions_are_those_that_triton_reports() -> None:
    from triton import knobs

    tools = [getattr(knobs.nvidia, name) for name in ("ptxas", "ptxas_blackwell") if hasattr(knobs.nvidia, name)]
    assert cuda_version() == "/".join(tool.version for tool in tools)


def test_the_version_of_each_ptxas_is_read(triton: Path) -> None:
    assert cuda_version() == ""
    assembler(triton / "ptxas", "12.8")
    assert cuda_version() == "12.8"  # as in Triton 3.5
    assembler(triton / "ptxas-blackwell", "13.1")
    assert cuda_version() == "12.8/13.1"


def test_a_ptxas_from_the_environment_is_used(triton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembler(triton / "ptxas", "12.8")
    assembler(triton / "ptxas-blackwell", "13.1")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(assembler(tmp_path / "mine", "13.0")))
    assert cuda_version() == "13.0/13.1"
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(tmp_path / "mine"))
    assert cuda_version() == "13.0/13.0"


def test_a_ptxas_that_does_not_run_is_skipped_as_triton_does(
    triton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembler(triton / "ptxas", "12.8")
    for path in (tmp_path / "missing", tmp_path, assembler(tmp_path / "failing", "13.0", status=1)):
        monkeypatch.setenv("TRITON_PTXAS_PATH", str(path))
        assert cuda_version() == "12.8"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    assert cuda_version() == ""


def test_reading_the_versions_does_not_import_triton() -> None:
    program = """
import sys
from parallax_gen.memory.toolchain import Toolchain
print(Toolchain.here().cuda, sorted({"torch", "triton"} & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True, env=environment
    )
    assert done.stdout == f"{toolchain.cuda_version()} []\n"


@pytest.mark.parametrize(
    ("one", "other", "like"),
    [
        (("3.9.0", "13.4"), ("3.9.1", "13.4"), True),
        (("3.9.0", "13.4"), ("3.9", "13.4"), True),  # old records have short versions
        (("3.9.0", "13.4"), ("3.10.0", "13.4"), False),
        (("3.9.0", "13.4"), ("3.9.0", "13.3"), False),
        (("3.9.0", ""), ("3.9.0", ""), False),  # the ptxas is unknown
    ],
)
def test_which_toolchains_compile_the_same_programs(one: tuple[str, str], other: tuple[str, str], like: bool) -> None:
    assert toolchain.Toolchain(*one).compiles_like(toolchain.Toolchain(*other)) == like


@pytest.mark.parametrize(
    ("version", "newer"),
    [("3.5.1", False), ("3.9.7", False), ("3.10.0", True), ("4.0.0+git12ab", True), ("main", False)],
)
def test_a_triton_newer_than_was_tested_is_named(version: str, newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "triton_version", lambda: version)
    message = toolchain.newer_than_tested()
    assert message.startswith(f"Triton {version} is newer than 3.9, the newest that ") if newer else message == ""


def test_the_newest_tested_triton_is_in_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    newest = ".".join(map(str, toolchain.NEWEST_TESTED))
    assert f"Triton 3.5 or newer (tested up to {newest}" in readme


def test_the_toolchain_of_this_process() -> None:
    from triton import __version__

    here = toolchain.Toolchain.here()
    assert here.triton.split("+")[0] == __version__.split("+")[0]
    assert here.compiles_like(here)


@pytest.mark.parametrize(
    ("version", "capability", "fits"),
    [
        ("3.5.1", (9, 0), True),
        ("3.5.1", (10, 0), True),
        ("3.5.1", (10, 3), False),
        ("3.5.1", (12, 1), False),
        ("3.6.0", (12, 1), True),
        ("main", (12, 1), True),
    ],
)
def test_a_triton_too_old_for_a_card_is_named(
    version: str, capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From compiling with Triton 3.5: its ptxas does not know sm_103a and sm_121a."""
    monkeypatch.setattr(toolchain, "triton_version", lambda: version)
    dotted = ".".join(map(str, capability))
    expected = f"Triton {version} compiles no kernels for compute capability {dotted}: install 3.6 or newer"
    assert toolchain.too_old_for(capability) == ("" if fits else expected)
