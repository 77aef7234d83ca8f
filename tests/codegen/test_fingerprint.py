"""The fingerprint of a rendered kernel: which edits keep it, and that every change of the program changes it.

tests/golden/fingerprints.json has the fingerprints of the golden kernels, the same on every Python: see test_render.py.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import GOLDEN

from parallax_gen.codegen.fingerprint import fingerprint, text_hash
from parallax_gen.codegen.render import render
from parallax_gen.problem.hardware import GPUS

STORED = Path(__file__).parents[1] / "golden" / "fingerprints.json"
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)
NAMES = st.sampled_from(sorted(GOLDEN))


@cache
def text_of(name: str) -> str:
    return render(GOLDEN[name].spec, GOLDEN[name].config, GPUS["h200"]).text


@cache
def fingerprint_of_golden(name: str) -> str:
    return fingerprint(text_of(name))


def test_no_rendered_file_binds_a_name_inside_an_expression() -> None:
    """A fingerprint does not look for `:=`."""
    assert not any(isinstance(node, ast.NamedExpr) for name in GOLDEN for node in ast.walk(ast.parse(text_of(name))))


def test_fingerprints_of_golden_kernels_are_as_stored(request: pytest.FixtureRequest) -> None:
    now = {name: fingerprint_of_golden(name) for name in sorted(GOLDEN)}
    if request.config.getoption("--regenerate-golden"):
        STORED.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    assert json.loads(STORED.read_text(encoding="utf-8")) == now
    assert len(set(now.values())) == len(now)


# -- edits that keep the fingerprint


@pytest.mark.parametrize("name", GOLDEN)
def test_layout_and_docstrings_keep_it(name: str) -> None:
    tree = ast.parse(text_of(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Expr(ast.Constant("Other words."))
    other = ast.unparse(ast.fix_missing_locations(tree))
    assert fingerprint(other) == fingerprint_of_golden(name)
    assert text_hash(other) != text_hash(text_of(name))


@EXAMPLES
@given(name=NAMES, data=st.data())
def test_comments_and_empty_lines_keep_it(name: str, data: st.DataObject) -> None:
    lines = text_of(name).splitlines()
    first = lines.index("import torch")
    at = data.draw(st.integers(first, len(lines) - 1))
    assume(not lines[at].endswith('"""'))
    inside = any(
        node.lineno <= at + 1 <= (node.end_lineno or 0)
        for node in ast.walk(ast.parse(text_of(name)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.lineno != node.end_lineno
    )
    assume(not inside)
    lines[at] += "  # other words"
    lines.insert(at, "")
    assert fingerprint("\n".join(lines)) == fingerprint_of_golden(name)


@EXAMPLES
@given(name=NAMES, data=st.data())
def test_a_rename_keeps_it(name: str, data: st.DataObject) -> None:
    """Rename one name of a function or of the file, in all places with the same binding."""
    tree = ast.parse(text_of(name))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    function = data.draw(st.sampled_from(functions))
    locals_of = {f.name: names_of(f) for f in functions}
    if data.draw(st.booleans()):
        renamed = rename_local(tree, function, data.draw(st.sampled_from(sorted(locals_of[function.name]))))
    else:
        of_file = [f.name for f in functions]
        of_file += [n.id for s in tree.body if isinstance(s, ast.Assign) for n in s.targets if isinstance(n, ast.Name)]
        renamed = rename_everywhere(tree, data.draw(st.sampled_from(of_file)))
    other = ast.unparse(renamed)
    assert "other_name" in other
    assert fingerprint(other) == fingerprint_of_golden(name)


def test_swapping_two_names_keeps_it() -> None:
    """Names are numbered, so swapped names give the same numbers, and the program is the same."""
    text = "def f(a, b):\n    c = a - b\n    return c\n"
    assert fingerprint("def f(b, a):\n    c = b - a\n    return c\n") == fingerprint(text)
    assert fingerprint("def f(b, a):\n    c = a - b\n    return c\n") != fingerprint(text)


def test_error_messages_keep_it() -> None:
    text = "def f(x):\n    assert x, 'none'\n    raise ValueError('none')\n"
    assert fingerprint(text.replace("none", "no x")) == fingerprint(text)
    assert fingerprint(text.replace("ValueError", "TypeError")) != fingerprint(text)


def names_of(function: ast.FunctionDef) -> set[str]:
    """Parameters and assigned names."""
    names = {argument.arg for argument in function.args.args}
    return names | {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def rename_local(tree: ast.Module, function: ast.FunctionDef, old: str) -> ast.Module:
    """Rename in the function, in its decorators, and in the keywords of calls to it."""
    for node in ast.walk(function):  # includes its decorators
        if isinstance(node, ast.Name) and node.id == old:
            node.id = "other_name"
        elif isinstance(node, ast.arg) and node.arg == old:
            node.arg = "other_name"
        elif isinstance(node, ast.Constant) and node.value == old:
            node.value = "other_name"
    for call in calls_of(tree, function.name):
        for keyword in call.keywords:
            if keyword.arg == old:
                keyword.arg = "other_name"
    return tree


def rename_everywhere(tree: ast.Module, old: str) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == old:
            node.id = "other_name"
        elif isinstance(node, ast.FunctionDef) and node.name == old:
            node.name = "other_name"
    return tree


def calls_of(tree: ast.Module, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.value if isinstance(node.func, ast.Subscript) else node.func
            if isinstance(called, ast.Name) and called.id == name:
                yield node


# -- edits that change the fingerprint. Each function below yields the possible edits of one kind.

Change = Callable[[], Any]


def swapped_arguments(tree: ast.Module) -> Iterator[Change]:
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for i in range(len(call.args) - 1):
            if ast.dump(call.args[i]) != ast.dump(call.args[i + 1]):
                yield lambda args=call.args, i=i: args.insert(i, args.pop(i + 1))


def swapped_parameters(tree: ast.Module) -> Iterator[Change]:
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        given = function.args.args
        for i in range(len(given) - 1):
            yield lambda given=given, i=i: given.insert(i, given.pop(i + 1))


def constants(tree: ast.Module) -> Iterator[Change]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            other = not node.value if isinstance(node.value, bool) else node.value * 2 + 1
            yield lambda node=node, other=other: setattr(node, "value", other)


def types_of_constants(tree: ast.Module) -> Iterator[Change]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            yield lambda node=node: setattr(node, "value", float(node.value))


def constexpr_values(tree: ast.Module) -> Iterator[Change]:
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant):
            yield lambda value=node.value: setattr(value, "value", value.value * 2)


def launch_options(tree: ast.Module) -> Iterator[Change]:
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("num_warps", "num_stages", "maxnreg"):
            assert isinstance(node.value, ast.Constant)
            yield lambda value=node.value: setattr(value, "value", value.value * 2)


def grids(tree: ast.Module) -> Iterator[Change]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            assert isinstance(node.func.slice, ast.Tuple)
            one = node.func.slice
            yield lambda one=one: one.elts.append(ast.Constant(2))
            yield lambda one=one: one.elts.__setitem__(0, ast.BinOp(one.elts[0], ast.Mult(), ast.Constant(2)))


def operators(tree: ast.Module) -> Iterator[Change]:
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            yield lambda node=node, other=other: setattr(node, "op", other)
        if isinstance(node, ast.Compare):
            flipped = ast.LtE() if isinstance(node.ops[0], ast.Lt) else ast.Lt()
            yield lambda node=node, flipped=flipped: setattr(node, "ops", [flipped])


def attributes(tree: ast.Module) -> Iterator[Change]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            other = {"max": "min", "maximum": "minimum", "zeros": "empty"}.get(node.attr, node.attr + "_other")
            yield lambda node=node, other=other: setattr(node, "attr", other)


def names_that_are_read(tree: ast.Module) -> Iterator[Change]:
    """Replace a read of one variable by another variable of the function."""
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        names = sorted(names_of(function))
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names and len(names) > 1:
                other = names[names.index(node.id) - 1]
                yield lambda node=node, other=other: setattr(node, "id", other)


def statements(tree: ast.Module) -> Iterator[Change]:
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for i in range(1, len(function.body)):
            yield lambda body=function.body, i=i: body.pop(i)


@pytest.mark.parametrize(
    "changes",
    [
        swapped_arguments,
        swapped_parameters,
        constants,
        types_of_constants,
        constexpr_values,
        launch_options,
        grids,
        operators,
        attributes,
        names_that_are_read,
        statements,
    ],
)
@settings(EXAMPLES, max_examples=12)
@given(name=NAMES, data=st.data())
def test_a_change_of_the_program_changes_it(
    changes: Callable[[ast.Module], Iterator[Change]], name: str, data: st.DataObject
) -> None:
    tree = ast.parse(text_of(name))
    possible = list(changes(tree))
    assume(possible)
    data.draw(st.sampled_from(possible))()
    assert fingerprint(ast.unparse(ast.fix_missing_locations(tree))) != fingerprint_of_golden(name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("forward_causal_stats", {"num_stages": 2}),
        ("forward_causal_stats", {"GROUP_HEADS": 2}),
        ("forward_causal_stats", {"SOFTMAX": "fixed_reference"}),
        ("dkdv_narrow_maxnreg", {"maxnreg": 0}),
    ],
)
def test_each_config_field_changes_it(name: str, change: dict[str, Any]) -> None:
    """As the templates write it."""
    kernel = GOLDEN[name]
    other = replace(kernel.config, **change)
    assert other != kernel.config
    assert fingerprint(render(kernel.spec, other, GPUS["h200"]).text) != fingerprint_of_golden(name)


@pytest.mark.parametrize(
    "text",
    ["class A: ...", "def f():\n    global x", "try: ...\nexcept OSError: ...", "async def f(): ...", "(x := 1)"],
)
def test_unsupported_syntax_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^line \d: a kernel's file has no "):
        fingerprint(text)


def test_scopes() -> None:
    """A name resolves as in Python: to the nearest scope that binds it."""
    text = (
        "import torch\nN = 2\ndef f(x):\n    y = [N * a for a in x if a]\n    return sorted(y, key=lambda a: a + N)\n"
    )
    renamed = (
        "import torch\nM = 2\ndef g(b):\n    c = [M * d for d in b if d]\n    return sorted(c, key=lambda e: e + M)\n"
    )
    assert fingerprint(renamed) == fingerprint(text)
    for old, new in (
        ("key=", "reverse="),
        ("torch", "numpy"),
        ("sorted", "list"),
        ("N * a", "N * x"),
        ("if a", "if x"),
    ):
        assert fingerprint(text.replace(old, new)) != fingerprint(text), new
