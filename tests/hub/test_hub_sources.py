"""The files of a hub package: what they import, their syntax, their kernels, and what `kernels` reads of them."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hub_samples import DECODE, H200, KV_HEADS, SPECS, calls_of, limit_sizes

from parallax_gen.codegen.render import render
from parallax_gen.environment import LOCK
from parallax_gen.errors import ArgumentError, ParallaxGenError
from parallax_gen.hub import package as stand_ins
from parallax_gen.hub.folder import HubPackage, write_package
from parallax_gen.hub.package import ops as packaged_ops
from parallax_gen.hub.sources import python_files
from parallax_gen.memory import guard
from parallax_gen.memory.ranking import Tier
from parallax_gen.memory.shipped import Memory
from parallax_gen.ops import base, decode_varlen, descriptors
from parallax_gen.ops.base import config_from_dict
from parallax_gen.problem.spec import KernelSpec

ALLOWED = {*sys.stdlib_module_names, "torch", "triton"}
TYPES = {"None", "int", "float", "str", "bool", "Tensor", "torch.Tensor"}
NEW_IN_310 = {"pairwise", "EllipsisType", "TypeAlias", "ParamSpec", "aclosing"}


def code_of(package: HubPackage) -> dict[str, str]:
    """Every Python file: path -> text."""
    folder = package.folder / "torch-ext" / package.module
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}


def test_code_imports_the_standard_library_torch_and_triton_only(package: HubPackage) -> None:
    code = code_of(package)
    for path, text in code.items():
        depth = path.count("/") + 1
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, path
                names += [node.module] if node.level == 0 and node.module else []
            assert {name.partition(".")[0] for name in names} <= ALLOWED, path


def test_the_package_has_no_code_that_needs_more() -> None:
    """What renders, ranks records, tunes or measures stays out, and so do unused modules."""
    files = python_files()
    assert {path.partition("/")[0] for path in files if "/" in path} == {
        "codegen",
        "memory",
        "oracle",
        "problem",
        "runtime",
    }
    assert {path for path in files if path.startswith(("codegen/", "memory/"))} == {
        "codegen/__init__.py",
        "codegen/abi.py",
        "codegen/device.py",
        "codegen/intercept.py",
        "memory/__init__.py",
        "memory/toolchain.py",
    }
    here = {path.name for path in Path(stand_ins.__file__).parent.glob("*.py")} - {"public.py"}
    assert here <= set(files)


def test_code_has_the_syntax_of_python_39(package: HubPackage) -> None:
    for path, text in code_of(package).items():
        tree = ast.parse(text, feature_version=(3, 9))
        # Annotations are not evaluated with this import, so they may have newer syntax of types.
        annotations = {
            id(inner)
            for node in ast.walk(tree)
            for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
            if part is not None and "from __future__ import annotations" in text
            for inner in ast.walk(part)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                options = {keyword.arg for keyword in node.keywords}
                assert not options & {"strict", "kw_only", "slots"}, (path, node.lineno)
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and id(node) not in annotations:
                assert not TYPES & {ast.unparse(side) for side in (node.left, node.right)}, (path, node.lineno)
            if isinstance(node, ast.ImportFrom):
                assert not NEW_IN_310 & {alias.name for alias in node.names}, path


def test_kernels_are_what_render_gives_to_the_letter(package: HubPackage) -> None:
    folder = package.folder / "torch-ext" / package.module
    data = json.loads((folder / "configs" / "kernels.json").read_text(encoding="utf-8"))
    files = set()
    for entry in data["specs"]:
        spec = KernelSpec(**entry["spec"])
        for kernel in entry["kernels"]:
            config = config_from_dict(spec.op, kernel["config"])
            path = folder / "rendered" / f"{kernel['file']}.py"
            assert path.read_text(encoding="utf-8") == render(spec, config, H200).text
            files.add(path)
    assert {KernelSpec(**entry["spec"]) for entry in data["specs"]} == set(SPECS)
    assert {*(folder / "rendered").glob("*.py")} - {folder / "rendered" / "__init__.py"} == files
    assert package.kernels == len(files) > len(SPECS)


def test_constants_are_those_of_the_modules_that_stand_ins_replace() -> None:
    from parallax_gen.hub.package import dispatch

    ours = packaged_ops
    assert (ours.PADDED_TO, ours.LARGEST_BLOCK) == (base.PADDED_TO, base.LARGEST_BLOCK)
    assert (ours.ALIGNED_TO, ours.STRIDE_LIMIT) == (descriptors.ALIGNED_TO, descriptors.STRIDE_LIMIT)
    assert decode_varlen.DecodeVarlenOp.spare_split_every == ours.SPARE_SPLIT_EVERY
    assert guard.MAX_EXTRA_SPILLS == dispatch.MAX_EXTRA_SPILLS
    assert (Tier.MEASURED_HERE, Tier.DEFAULT) == (dispatch.MEASURED_HERE, dispatch.DEFAULT)
    assert guard.NOT_BORROWED == (Tier.MEASURED_HERE, Tier.DEFAULT)


def files_of(folder: Path) -> dict[str, Path]:
    """A folder's files by their paths in it, without the modules that Python compiled when it imported them."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if "__pycache__" not in path.parts}


def test_the_folder_is_a_project_of_kernel_builder(package: HubPackage) -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    build = tomllib.loads((package.folder / "build.toml").read_text(encoding="utf-8"))
    assert build["general"] == {
        "name": "parallax-attn",
        "version": 1,
        "edition": 5,
        "license": "Apache-2.0",
        "backends": ["cuda"],
        "hub": {"repo-id": "me/parallax-attn"},
    }
    assert build["torch-noarch"] == {"pyext": ["json", "py"]}
    suffixes = {path.suffix for path in files_of(package.folder / "torch-ext").values()}
    assert suffixes == {".json", ".py"}
    card = (package.folder / "CARD.md").read_text(encoding="utf-8")
    assert all(f"- {spec}\n" in card for spec in SPECS)
    assert "{{" not in card  # kernel-builder renders it
    tests = (package.folder / "tests" / "test_parallax_attn.py").read_text(encoding="utf-8")
    compile(tests, "tests", "exec")  # tests marked slow run it
    assert "pytest.mark.kernels_ci" in tests
    assert '"kernels_ci: ' in (package.folder / "tests" / "conftest.py").read_text(encoding="utf-8")
    assert "import parallax_attn as" in tests
    assert (package.folder / "flake.nix").exists()


def test_the_build_is_the_code_with_its_metadata(package: HubPackage) -> None:
    source, built = package.folder / "torch-ext" / package.module, package.build
    files = files_of(built)
    metadata = json.loads(files.pop("metadata.json").read_text(encoding="utf-8"))
    hashes = {
        name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for name, path in files.items()
    }
    assert metadata["digest"] == {"algorithm": "sha256", "files": hashes}
    assert metadata["id"].startswith("_parallax_attn_cuda_")
    assert f'"{metadata["id"]}::' in files.pop("_ops.py").read_text(encoding="utf-8")
    assert {name: path.read_bytes() for name, path in files.items()} == {
        name: path.read_bytes() for name, path in files_of(source).items()
    }


def test_a_later_export_replaces_the_code_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_sizes(monkeypatch, kv_rows=KV_HEADS, longest=128)
    folder = tmp_path / "attention"
    first = write_package(folder, calls_of([DECODE]), [H200], Memory())
    (folder / "NOTES.md").write_text("mine", encoding="utf-8")
    stale = folder / "torch-ext" / first.module / "rendered" / "old.py"
    stale.write_text("", encoding="utf-8")
    write_package(folder, calls_of([DECODE]), [H200], Memory())
    assert not stale.exists()
    assert (folder / "NOTES.md").read_text(encoding="utf-8") == "mine"


def test_a_package_for_training_has_the_forward_without_gradients_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is evaluated as well: then calls want no statistics."""
    limit_sizes(monkeypatch, kv_rows=KV_HEADS, longest=128)
    forward = next(spec for spec in SPECS if spec.op == "forward" and spec.stats)
    package = write_package(tmp_path / "attention", calls_of([forward]), [H200], Memory())
    assert set(package.specs) == {forward, replace(forward, stats=False)}


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "build.toml").write_text("[general]\n", encoding="utf-8")
    with pytest.raises(ParallaxGenError, match="is not a package that was exported"):
        write_package(folder, calls_of([DECODE]), [H200], Memory())
    assert [path.name for path in folder.iterdir()] == ["build.toml"]


def test_an_export_under_another_name_leaves_nothing_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_sizes(monkeypatch, kv_rows=KV_HEADS, longest=128)
    folder = tmp_path / "attention"
    write_package(folder, calls_of([DECODE]), [H200], Memory())
    (folder / "tests" / "test_mine.py").write_text("", encoding="utf-8")
    package = write_package(folder, calls_of([DECODE]), [H200], Memory(), "me/second-name")
    assert package.module == "second_name"
    assert [path.name for path in (folder / "torch-ext").iterdir()] == ["second_name"]
    assert {path.name for path in (folder / "tests").iterdir()} == {
        "conftest.py",
        "test_mine.py",
        "test_second_name.py",
    }


@pytest.mark.parametrize("repo_id", ["parallax-attn", "me/Parallax", "me/parallax_attn", "me/p/q", "me/p", "me/p-"])
def test_a_name_that_the_hub_does_not_allow(tmp_path: Path, repo_id: str) -> None:
    with pytest.raises(ArgumentError, match=r"repo_id: got .* allowed: owner/name; the name has two or more"):
        write_package(tmp_path, calls_of([DECODE]), [H200], Memory(), repo_id)


@pytest.mark.parametrize("name", ["class", "torch", "triton", "json"])
def test_a_name_that_python_takes_for_another(tmp_path: Path, name: str) -> None:
    """Its tests would import that, or not compile."""
    with pytest.raises(ArgumentError, match=f"repo_id: got 'me/{name}'; allowed: another name: {name} is Python's"):
        write_package(tmp_path / "attention", calls_of([DECODE]), [H200], Memory(), f"me/{name}")
    assert not (tmp_path / "attention").exists()


def test_a_lock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCK, "kernels.lock")
    with pytest.raises(ArgumentError, match=f"{LOCK}: got kernels.lock"):
        write_package(tmp_path, calls_of([DECODE]), [H200], Memory())
