"""The Python files of a hub package: this package's own runtime, with relative imports and stand-ins for some modules.

A hub package may import only the standard library, torch and triton, and only relatively. So the modules that call
kernels are copied as they are, with all modules that they import. Where one needs records, templates or the tuner, a
module of hub/package/ stands in. Calls are hence checked, differentiated and launched by the same code as here.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import parallax_gen
from parallax_gen.errors import ParallaxGenError

_OWN, _HERE = "parallax_gen.", Path(__file__).parents[1]

# Module -> the module of a hub package that has its names.
STAND_INS = {
    "parallax_gen.ops.base": "ops",
    "parallax_gen.ops.descriptors": "ops",
    "parallax_gen.ops.tile_form": "ops",
    "parallax_gen.ops.tiles": "ops",
    "parallax_gen.codegen.build": "kernels",
    "parallax_gen.codegen.render": "kernels",
    "parallax_gen.runtime.dispatch": "dispatch",
    "parallax_gen.runtime.operators": "operators",
    "parallax_gen.runtime.plan": "interpreted",
    "parallax_gen.runtime.recording": "counts",
}
# The stand-in that wraps the module that it stands for.
_WRAPS = {"interpreted": "parallax_gen.runtime.plan"}
_PACKAGE = "parallax_gen.hub.package."
_FROM = re.compile(r"^( *)from parallax_gen\.([\w.]+) import (\w+)?", re.MULTILINE)
# zip has no `strict` in Python 3.9. It only checks; the arguments nest one pair of parentheses at most.
_STRICT = re.compile(r",\s*strict=\w+(\([^()]*\))?(?=,?\s*\))")


def python_files() -> dict[str, str]:
    """The files of a hub package, without its kernels: path -> text."""
    files = {}
    pending = ["__init__"]
    while pending:
        module = pending.pop()
        path = f"{module.replace('.', '/')}.py"
        if path in files:
            continue
        source = _source_of(module)
        text = source.read_text(encoding="utf-8")
        imported: list[str] = []
        text = _relative(text, module, imported)
        pending += imported
        origin = source.relative_to(_HERE.parent).as_posix()
        text = _STRICT.sub("", text).replace("from typing_extensions import", "from typing import")  # only for types
        files[path] = f"# From parallax_gen {parallax_gen.__version__}: {origin}\n{text}"
    for folder in {parent.as_posix() for path in files for parent in Path(path).parents if parent != Path(".")}:
        files.setdefault(f"{folder}/__init__.py", "")
    return files


def _source_of(module: str) -> Path:
    """The file of a module of a hub package here."""
    own = {"__init__": "public"}.get(module, module)
    stand_in = _HERE / "hub" / "package" / f"{own}.py"
    return stand_in if "." not in own and stand_in.exists() else _HERE / f"{own.replace('.', '/')}.py"


def _relative(text: str, module: str, imported: list[str]) -> str:
    """The text with relative imports; `imported` gets the modules of the hub package that it imports."""

    def rewrite(match: re.Match[str]) -> str:
        indent, target, name = match[1], f"{_OWN}{match[2]}", match[3]
        if name and _is_module(f"{target}.{name}"):  # from parallax_gen.runtime import plan
            base = target
            target = f"{target}.{name}"
        else:
            base = ""
        if target.startswith(_PACKAGE):
            inside = target.removeprefix(_PACKAGE)
        elif target in STAND_INS and target != _WRAPS.get(module):
            inside = STAND_INS[target]
        else:
            inside = target.removeprefix(_OWN)
        imported.append(inside)
        dots = "." * (module.count(".") + 1)
        if base:
            folder, _, last = inside.rpartition(".")
            return f"{indent}from {dots}{folder} import {last}"
        return f"{indent}from {dots}{inside} import {name or ''}"

    text = _FROM.sub(rewrite, text)
    for node in ast.walk(ast.parse(text)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if wrong := [name for name in names if name.partition(".")[0] == "parallax_gen"]:
            raise ParallaxGenError(f"{module}: cannot make the import of {wrong[0]} relative")
    return text


def _is_module(name: str) -> bool:
    path = _HERE.parent / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()
