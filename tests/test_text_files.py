"""Text is read and written as UTF-8: no call leaves the encoding to the locale.

The calls are read from the source of the package, the tests and the examples. ruff's rule for this (PLW1514) sees no
`text=True` of subprocess, and no method of a path whose type it cannot tell.
"""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from parallax_gen.cli import main
from parallax_gen.codegen.render import KernelSource

TOP = Path(__file__).parents[1]
FILES = [path for folder in ("parallax_gen", "tests", "examples") for path in sorted((TOP / folder).rglob("*.py"))]

MODULES = {"io", "gzip", "codecs", "click"}  # their `open` takes a file before the mode, unlike Path.open
NO_FILES = {"os", "webbrowser", "Image"}  # their `open` opens no text file
BINARY_BY_DEFAULT = {"gzip.open", "NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"}
ENCODING_AT = {"read_text": 0, "write_text": 1}


def leaves_it_to_the_locale(call: ast.Call) -> bool:
    """Whether a call reads or writes text without an encoding."""
    function, owner = call.func, ""
    if isinstance(function, ast.Attribute):
        name, owner = function.attr, ast.unparse(function.value)
    else:
        name = ast.unparse(function)
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in named or owner in NO_FILES - {"os"} or (owner, name) == ("os", "open"):
        return False
    if any(ast.unparse(named[flag]) == "True" for flag in ("text", "universal_newlines") if flag in named):
        return True
    if name in ENCODING_AT:
        return len(call.args) <= ENCODING_AT[name]
    if name not in ("open", "open_file", "fdopen", "NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"):
        return False
    at = {"NamedTemporaryFile": 0, "TemporaryFile": 0}.get(name, int(not owner or owner in MODULES or name != "open"))
    mode = named.get("mode", call.args[at] if len(call.args) > at else None)
    if mode is None:
        return not {name, f"{owner}.{name}"} & BINARY_BY_DEFAULT
    return "t" in ast.unparse(mode) if owner == "gzip" else "b" not in ast.unparse(mode)


@pytest.mark.parametrize(
    ("text", "leaves"),
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, 'utf-8')", False),
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, 'rb')", False),
        ("open(path, mode='wb')", False),
        ("path.open()", True),
        ("path.open('a')", True),
        ("path.open('rb')", False),
        ("io.open(path, 'w')", True),
        ("click.open_file('-', 'rb')", False),
        ("gzip.open(path)", False),
        ("gzip.open(path, 'wt')", True),
        ("os.fdopen(3, 'w')", True),
        ("os.fdopen(3, 'wb')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("tempfile.NamedTemporaryFile()", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, encoding='utf-8')", False),
        ("subprocess.Popen(command, universal_newlines=True)", True),
        ("subprocess.run(command)", False),
    ],
)
def test_every_kind_of_call_is_checked(text: str, leaves: bool) -> None:
    (statement,) = ast.parse(text).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    assert leaves_it_to_the_locale(statement.value) is leaves


def test_no_text_is_left_to_the_locale() -> None:
    result = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and leaves_it_to_the_locale(node):
                result.append(f"{path.relative_to(TOP)}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert result == []


RENDER = ["render", "--gpu", "h200", "--op", "decode", "--head-dim", "128", "--ragged", "--cache-dtype", "e4m3"]


def test_a_kernel_is_the_same_file_in_an_ascii_locale() -> None:
    here = CliRunner().invoke(main, RENDER)
    assert here.exit_code == 0
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "parallax_gen", *RENDER]
    done = subprocess.run(command, env=os.environ | ascii_alone, capture_output=True, cwd=TOP)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == here.stdout_bytes


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_commands_print_utf8_in_any_locale(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are ASCII today. What commands print need not be."""
    output, text = io.BytesIO(), "λ = 1  # p·t\n"
    monkeypatch.setattr("parallax_gen.codegen.render.render", lambda *_: KernelSource("kernel", text, "0"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
    main.main(RENDER, standalone_mode=False)
    sys.stdout.flush()
    assert output.getvalue() == text.encode()
