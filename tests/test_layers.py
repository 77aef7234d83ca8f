"""Imports go one way, and each outside package has one user. Read from the source, so nothing is imported.

    problem <- ops <- codegen <- oracle, memory <- tuning, memory <- runtime <- distributed,
    runtime <- hub, runtime <- integrations <- compat, tuning and runtime <- api, bench <- report, all <- cli

A subpackage may import all those to its left; integrations import only problem, oracle and runtime.

An import inside a function or under TYPE_CHECKING counts, and so does a module's name in a string.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "parallax_gen"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

# Everything may import errors.py, environment.py, files.py and the version in parallax_gen itself. describe.py and
# tables.py are below everything that shows configs.
BELOW = {"errors", "environment", "files"}
MAY_IMPORT = {
    "errors": set(),
    "environment": {"errors"},
    "files": {"errors"},
    "problem": BELOW,
    "ops": BELOW | {"problem"},
    "describe": {"problem", "ops"},
    "tables": set(),
    "codegen": BELOW | {"problem", "ops", "describe"},
    "oracle": BELOW | {"problem", "ops", "codegen"},
    "memory": BELOW | {"problem", "ops", "codegen"},
    "tuning": BELOW | {"problem", "ops", "describe", "tables", "codegen", "oracle", "memory"},
    "runtime": BELOW | {"problem", "ops", "describe", "codegen", "oracle", "memory"},
    "hub": BELOW | {"problem", "ops", "codegen", "memory", "runtime"},
    "distributed": BELOW | {"problem", "ops", "codegen", "oracle", "memory", "runtime"},
    "integrations": BELOW | {"problem", "oracle", "runtime"},
    "compat": {"integrations"},
    "api": BELOW | {"problem", "describe", "tables", "ops", "codegen", "memory", "tuning", "runtime"},
    "bench": BELOW | {"problem", "ops", "describe", "codegen", "oracle", "memory", "tuning", "runtime"},
    "report": BELOW | {"problem", "ops", "describe", "tables", "codegen", "memory", "tuning", "bench"},
    "cli": BELOW
    | {"problem", "ops", "describe", "tables", "codegen", "memory", "tuning", "runtime", "hub", "bench", "report"},
}
# Outside packages, and the only files or subpackages that use them.
ONLY_IN: dict[str, str | tuple[str, ...]] = {
    "jinja2": ("codegen/render.py", "report/page.py"),  # the page escapes its data
    "sqlite3": "memory/store.py",  # reads
    "sqlite_utils": "memory/store.py",  # writes
    # Samplers, storages that hosts share, and importances of knobs.
    "optuna": ("tuning/search/search.py", "tuning/claims.py", "tuning/search/importances.py"),
    "sqlalchemy": "tuning/claims.py",  # comes with Optuna's storages, to recognise their errors
    "pygments": "report/sources.py",
    "click": "cli/",
    "rich": ("cli/", "tuning/progress.py"),
    "transformers": "integrations/transformers/",
    "vllm": "integrations/vllm/",
    "sglang": "integrations/sglang/",
}


def imports_of(text: str, module: str) -> set[str]:
    """Dotted names of a module's imports; `from a import b` gives a.b, whether or not b is a module."""
    result: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # One dot is the module's own package, such as parallax_gen.ops for parallax_gen.ops.base.
            base = [] if node.level == 0 else module.split(".")[: -node.level]
            base += [node.module] if node.module else []
            result |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            result |= {node.value} if re.fullmatch(r"parallax_gen(\.\w+)+", node.value) else set()
    return result


def subpackage_of(name: str) -> str | None:
    """The subpackage or module of parallax_gen of a dotted name; None for its version and for outside names.

    The package's lazily loaded public names, and nn.py, belong to runtime.
    """
    parts = name.split(".")
    if parts[0] != "parallax_gen" or len(parts) == 1 or parts[1].startswith("__"):
        return None
    return parts[1] if parts[1] != "nn" and f"parallax_gen.{parts[1]}" in MODULES else "runtime"


IMPORTS = {module: imports_of(path.read_text(encoding="utf-8"), module) for module, path in MODULES.items()}


@pytest.mark.parametrize(
    ("text", "imported"),
    [
        ("import a.b as c, d", {"a.b", "d"}),
        ("from a.b import c, d", {"a.b.c", "a.b.d"}),
        ("from .b import c", {"parallax_gen.runtime.b.c"}),
        ("from ..tuning import c", {"parallax_gen.tuning.c"}),
        ("from .. import tuning", {"parallax_gen.tuning"}),
        ("def f():\n    import a", {"a"}),
        ("if TYPE_CHECKING:\n    import a", {"a"}),
        ("try:\n    import a\nexcept ImportError:\n    a = None", {"a"}),
        ("load('parallax_gen.tuning.tuner')", {"parallax_gen.tuning.tuner"}),
        ("'see parallax_gen.tuning'", set()),
    ],
)
def test_every_kind_of_import_is_parsed(text: str, imported: set[str]) -> None:
    assert imports_of(text, "parallax_gen.runtime.dispatch") == imported


def test_every_module_has_a_place() -> None:
    assert {subpackage_of(module) for module in MODULES} - {None} == set(MAY_IMPORT)


@pytest.mark.parametrize("subpackage", MAY_IMPORT)
def test_imports_go_one_way(subpackage: str) -> None:
    allowed = MAY_IMPORT[subpackage] | {subpackage, None}
    wrong = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        if subpackage_of(module) == subpackage
        for name in sorted(names)
        if subpackage_of(name) not in allowed
    ]
    assert wrong == []


def module_of(name: str) -> str:
    """The module of a dotted name; "" for outside names and for the package itself."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return "" if name == "parallax_gen" else name


def test_there_are_no_import_cycles() -> None:
    """A module started as a child process by name counts as an import: shared code belongs in a third module."""
    pending = {module: {module_of(name) for name in names} - {"", module} for module, names in IMPORTS.items()}
    pending.pop("parallax_gen")
    while ready := [module for module, names in pending.items() if not names & set(pending)]:
        for module in ready:
            del pending[module]
    assert pending == {}


@pytest.mark.parametrize(("package", "place"), ONLY_IN.items())
def test_an_outside_package_has_one_user(package: str, place: str | tuple[str, ...]) -> None:
    users = {
        MODULES[module].relative_to(PACKAGE).as_posix()
        for module, names in IMPORTS.items()
        if package in {name.split(".")[0] for name in names}
    }
    assert [user for user in users if not user.startswith(place)] == []


def test_problem_uses_no_device_and_no_disk() -> None:
    forbidden = {"triton", "os", "io", "pathlib", "shutil", "tempfile", "subprocess", "platformdirs"}
    for module, names in IMPORTS.items():
        if subpackage_of(module) == "problem":
            assert not forbidden & {name.split(".")[0] for name in names}, module
            for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
                assert not (isinstance(node, ast.Name) and node.id == "open"), module
                assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"), module
            assert not [name for name in names if name.startswith("torch.cuda")], module


# Prints the modules that an import loads, and the files other than Python's that it opens.
PRINT_IMPORTS = """
import json, sys
opened = []
def look(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
        opened.append(str(arguments[0]))
    elif event in ("sqlite3.connect", "os.mkdir", "os.rename", "socket.connect", "subprocess.Popen"):
        opened.append(event)
sys.addaudithook(look)
before = set(sys.modules)
import {module}
print(json.dumps([sorted(set(sys.modules) - before), opened]))
"""


def loaded_by(module: str) -> tuple[set[str], list[str]]:
    """The modules loaded and the files opened when a fresh interpreter imports a module."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", PRINT_IMPORTS.replace("{module}", module)],
        cwd=PACKAGE.parent,
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=60,
    )
    modules, opened = json.loads(done.stdout)
    return set(modules), opened


def test_importing_the_package_loads_no_other_module() -> None:
    modules, opened = loaded_by("parallax_gen")
    assert {name for name in modules if name.startswith("parallax_gen")} == {"parallax_gen"}
    assert not {"torch", "triton", "numpy", "jinja2", "optuna", "sqlite3", "sqlite_utils"} & modules
    assert opened == []


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engines_plug_in_loads_neither_torch_nor_engine(engine: str) -> None:
    """The engine imports it in every process, whether or not a model needs it."""
    modules, _ = loaded_by(f"parallax_gen.integrations.{engine}")
    assert not {name for name in modules if name.split(".")[0] in ("torch", "triton", "vllm", "sglang")}


def test_importing_the_integrations_loads_no_library() -> None:
    modules, _ = loaded_by("parallax_gen.integrations")
    assert {name for name in modules if name.startswith("parallax_gen")} == {
        "parallax_gen",
        "parallax_gen.integrations",
    }
    assert not {"torch", "transformers"} & modules


def test_importing_the_baselines_loads_no_torch() -> None:
    modules, _ = loaded_by("parallax_gen.bench.baselines")
    assert not {"torch", "triton", "flash_attn", "parallax", "fla"} & modules


def test_running_kernels_loads_no_tuner() -> None:
    modules, _ = loaded_by("parallax_gen.runtime.functional")
    assert "parallax_gen.codegen.render" in modules
    assert not [
        name
        for name in modules
        if name.startswith(
            ("optuna", "parallax_gen.tuning", "parallax_gen.bench", "parallax_gen.report", "parallax_gen.cli")
        )
    ]


def test_the_tuning_process_loads_no_torch() -> None:
    """Only its children do: a CUDA context in the parent would die with the first illegal access, and end the tune."""
    modules, _ = loaded_by("parallax_gen.tuning.tuner")
    assert "parallax_gen.tuning.workers.worker" in modules
    assert not {"torch", "triton"} & modules


def test_files_are_short() -> None:
    """Split or shorten a longer file. The limit for the command line is on all its files together."""
    root = PACKAGE.parent
    lines = {
        str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (*PACKAGE.rglob("*.py"), *(root / "templates").rglob("*.j2"))
    }
    assert {path: count for path, count in lines.items() if count > 400} == {}
    assert sum(count for path, count in lines.items() if path.startswith("parallax_gen/cli/")) < 2800


def test_few_lines_branch_on_the_op() -> None:
    """What depends on the op belongs in the op's file: see ops/base.py."""
    asks = re.compile(r"\.op (==|!=|in|not in)|isinstance\([a-z_.]*config|\.ragged")
    lines = [line for path in MODULES.values() for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(bool(asks.search(line)) for line in lines) <= 12
