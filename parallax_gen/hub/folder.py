"""Writes a hub package: the sources that kernel-builder builds, and the build itself, which `kernels` loads."""

from __future__ import annotations

import base64
import hashlib
import json
import keyword
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallax_gen.environment import LOCK
from parallax_gen.errors import ArgumentError, ParallaxGenError
from parallax_gen.hub.records import PackageRecords
from parallax_gen.hub.sources import python_files
from parallax_gen.hub.texts import CONFTEST, FIRST_LINE, FLAKE, VERSION, build_toml, card, test_file
from parallax_gen.memory.shipped import Memory
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

REPO_ID = "your-name/parallax-attn"
_NAME = r"[a-z][-a-z0-9]*[a-z0-9]"  # as kernel-builder takes it
_REPO_ID = re.compile(rf"[\w.-]+/({_NAME})")
_EARLIER = re.compile(rf'^name = "({_NAME})"$', re.MULTILINE)  # in build.toml
_NEEDED = {"torch", "triton"}  # no package may hide what it imports
BACKEND = "cuda"


@dataclass(frozen=True)
class HubPackage:
    """A package that was written.

    folder   of build.toml
    module   the name of its Python package, in torch-ext/
    kernels  how many rendered files it has
    """

    folder: Path
    module: str
    specs: tuple[KernelSpec, ...]
    kernels: int

    @property
    def build(self) -> Path:
        """What `kernels.get_local_kernel` loads."""
        return self.folder / "build" / f"torch-{BACKEND}"

    @property
    def lines(self) -> list[str]:
        """What was written, for people."""
        specs = [f"    {spec}" for spec in self.specs]
        build = f"{self.build}: the build, which kernels.get_local_kernel loads"
        return [f"{self.folder}: {self.kernels} kernels of", *specs, build]

    def to_json(self) -> dict[str, Any]:
        specs = [spec.to_dict() for spec in self.specs]
        return {"folder": str(self.folder), "build": str(self.build), "specs": specs, "kernels": self.kernels}


def write_package(
    folder: Path,
    calls: Sequence[tuple[KernelSpec, Shape]],
    gpus: Sequence[Gpu],
    memory: Memory,
    repo_id: str | None = None,
) -> HubPackage:
    """Write the package of some kernels, for these cards, into a folder.

    calls    the kernels; shapes only choose windows: a package has the kernels of all other sizes, and with a kernel
             that writes statistics, as the forward does for gradients, the one without
    repo_id  owner/name in the hub; REPO_ID if it is not known yet

    Replaces the files of an earlier export, whatever its name was. Raises ArgumentError for another repo_id than
    owner/name, for a name that cannot be imported, for an AMD GPU, and if a lock is on; ParallaxGenError for a folder
    with something else; ConfigError for a kernel that does not fit a card.
    """
    repo_id = repo_id or REPO_ID
    match = _REPO_ID.fullmatch(repo_id)
    if match is None:
        allowed = "owner/name; the name has two or more lower-case letters, digits and hyphens, the first a letter"
        raise ArgumentError("repo_id", repr(repo_id), allowed)
    name, module = match[1], _module(match[1])
    if keyword.iskeyword(module) or module in _NEEDED | sys.stdlib_module_names:
        allowed = f"another name: {module} is Python's, or what the package imports"
        raise ArgumentError("repo_id", repr(repo_id), allowed)
    if lock := os.environ.get(LOCK):
        raise ArgumentError(LOCK, lock, "not set: a package has kernels of all sizes, which no lock has")
    if amd := [gpu.title for gpu in gpus if gpu.is_amd]:
        raise ArgumentError("gpu", ", ".join(amd), f"NVIDIA GPUs: hub packages are for {BACKEND}")
    earlier = _earlier_module(folder) or module
    without_stats = [(replace(spec, stats=False), shape) for spec, shape in calls if spec.stats]
    records = PackageRecords([*calls, *without_stats], gpus, memory)
    rendered = records.rendered
    code = python_files()
    code |= {f"rendered/{name}.py": text for name, text in rendered.items()} | {"rendered/__init__.py": ""}
    code |= {f"configs/{name}": _json(data) for name, data in records.files.items()}
    files = {
        "build.toml": build_toml(name, repo_id),
        "flake.nix": FLAKE,
        "CARD.md": card(repo_id, records.specs, gpus),
        ".gitignore": "build/\n",
        "tests/conftest.py": CONFTEST,
        f"tests/test_{module}.py": test_file(module),
    }
    package = HubPackage(folder, module, records.specs, len(rendered))
    try:
        for path in (*(folder / "torch-ext" / old for old in (earlier, module)), package.build):
            shutil.rmtree(path, ignore_errors=True)
        if earlier != module:
            (folder / "tests" / f"test_{earlier}.py").unlink(missing_ok=True)
        _write(folder, files)
        _write(folder / "torch-ext" / module, code)
        _write(package.build, built(code, name))
    except OSError as error:
        raise ParallaxGenError(f"cannot write to {folder}: {error}") from error
    return package


def built(code: dict[str, str], name: str) -> dict[str, str]:
    """The files of a build: the code, the namespace of its operators, and what `kernels` reads of it.

    As kernel-builder makes them for a package of Python files, except for its own provenance.
    """
    digest = hashlib.sha256("".join(f"{path}\n{text}" for path, text in sorted(code.items())).encode()).hexdigest()
    unique = f"_{name.replace('-', '_')}_{BACKEND}_{digest[:7]}"
    files = {**code, "_ops.py": _OPS.replace("NAME", unique)}
    hashes = {
        path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for path, text in sorted(files.items())
    }
    metadata = {
        "name": name,
        "id": unique,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": BACKEND},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    return {**files, "metadata.json": json.dumps(metadata, indent=2) + "\n"}


_OPS = '''import torch

ops = torch.ops.NAME


def add_op_namespace_prefix(op_name: str) -> str:
    """The name of an operator of this build."""
    return f"NAME::{op_name}"
'''


def _module(name: str) -> str:
    """The Python package of a package of this name."""
    return name.replace("-", "_")


def _earlier_module(folder: Path) -> str | None:
    """The Python package that an earlier export wrote into a folder; None if it is missing or empty.

    Raises ParallaxGenError if the folder has something else.
    """
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return None
        text = (folder / "build.toml").read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise ParallaxGenError(f"cannot read {folder}: {error}") from error
    if not text.startswith(FIRST_LINE):
        raise ParallaxGenError(f"{folder} is not empty, and is not a package that was exported: choose another folder")
    name = _EARLIER.search(text)
    return _module(name[1]) if name else None


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _json(data: object) -> str:
    """JSON with each innermost list on one line."""
    text = json.dumps(data, indent=1)
    return re.sub(r"\[[^][{}]*]", lambda match: " ".join(match[0].split()), text) + "\n"
