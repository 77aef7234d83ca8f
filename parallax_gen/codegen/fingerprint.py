"""The identity of a rendered kernel: a hash of what its file does, whatever its names, comments and layout are.

The file's syntax tree is written out by a serialisation of our own, node types and the fields that are set, so that
it is the same on every Python. Left out are docstrings, comments, where things stand, and the texts of errors. Names
that the file itself binds are numbers, in the order of their first use in their scope; where a decorator's strings or
the keywords of a call name parameters of the file's own functions, they are numbers, too. All other names are part of
what the file does and stay: attributes, builtins, imports, keywords of other people's functions.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from parallax_gen.errors import MachineError
from parallax_gen.files import cache_dir, replace_file

# Raised when the serialisation changes: fingerprints of two versions are not compared.
VERSION = 1

DIGITS = 32  # hex digits of a fingerprint, and of a text's hash

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_NEW_SCOPE = (ast.FunctionDef, ast.Lambda, *_COMPREHENSIONS)

# Fields that say what another one says already, or nothing that runs.
_LEFT_OUT = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


def below_header(text: str) -> str:
    '''A kernel's file without the docstring that it begins with, which holds no """ of its own.'''
    mark = '"""'
    return text.split(mark, 2)[2] if text.startswith(mark) else text


def text_hash(text: str) -> str:
    """32 hex digits of the text below a kernel's header: where they are equal, so are the fingerprints."""
    return _digest(below_header(text))


def fingerprint(text: str) -> str:
    """32 hex digits of what a kernel's file does. Takes 10 ms for a long one.

    Raises SyntaxError where it is no Python, and ValueError on what binds names in ways that no kernel needs: classes,
    `global`, `match`, `except`, `:=`, `async`.
    """
    module = ast.parse(text)
    pieces: list[str] = []
    _Writer(_Scope(module), pieces).body(module)
    return _digest("".join(pieces))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


@dataclass(eq=False)
class _Scope:
    """The names that a module, a function or a comprehension binds, numbered as they are met."""

    node: ast.AST
    outer: _Scope | None = None
    numbers: dict[str, int] = field(default_factory=dict)

    @cached_property
    def depth(self) -> int:
        return 0 if self.outer is None else self.outer.depth + 1

    @cached_property
    def bound(self) -> frozenset[str]:
        """Parameters, what is assigned, and functions that are defined; no imports, which mean the same everywhere."""
        names = set(_parameters(self.node))
        for node in _inside(self.node):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                names.add(node.id)
            elif isinstance(node, ast.FunctionDef):
                names.add(node.name)
        return frozenset(names)

    @cached_property
    def parameters(self) -> dict[str, list[str]]:
        """Those of each function that it defines, by its name."""
        return {node.name: _parameters(node) for node in _inside(self.node) if isinstance(node, ast.FunctionDef)}

    def number(self, name: str) -> str:
        """How a name of its own is written."""
        return f"{self.depth}.{self.numbers.setdefault(name, len(self.numbers))}"

    def of(self, name: str) -> _Scope | None:
        """The scope that a name means here; None of a builtin or an import."""
        scope: _Scope | None = self
        while scope is not None and name not in scope.bound:
            scope = scope.outer
        return scope


def _parameters(node: ast.AST) -> list[str]:
    """Of a function, in their order; of anything else none."""
    if not isinstance(node, ast.FunctionDef | ast.Lambda):
        return []
    given = node.args
    starred = (argument for argument in (given.vararg, given.kwarg) if argument is not None)
    return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, *starred)]


def _inside(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may bind names of a scope: all of it but other scopes' insides."""
    if isinstance(scope, _COMPREHENSIONS):
        waiting: list[ast.AST] = [generator.target for generator in scope.generators]
    else:
        waiting = list(scope.body) if isinstance(scope, ast.Module | ast.FunctionDef) else []
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, _NEW_SCOPE):
            waiting.extend(ast.iter_child_nodes(node))


class _Writer:
    """Writes what stands in a scope, in pieces whose join is unambiguous: each node is closed by its bracket."""

    def __init__(self, scope: _Scope, pieces: list[str]) -> None:
        self.scope = scope
        self.pieces = pieces
        self.put = pieces.append

    def within(self, node: ast.AST) -> _Writer:
        """That of a scope in this one."""
        return _Writer(_Scope(node, self.scope), self.pieces)

    def body(self, node: ast.Module | ast.FunctionDef) -> None:
        """Its statements but texts that stand alone, which docstrings are."""
        self.put("[")
        for statement in node.body:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
                self.write(statement)
        self.put("]")

    def write(self, value: object) -> None:
        """A node, a list of them, or what a field holds beside nodes."""
        if isinstance(value, ast.AST):
            _SPECIAL.get(type(value), _Writer.node)(self, value)
        elif isinstance(value, list):
            self.put("[")
            for one in value:
                self.write(one)
            self.put("]")
        else:
            self.put(_constant(value))

    def node(self, node: ast.AST, but: tuple[str, ...] = ()) -> None:
        """Its type and the fields that are set."""
        self.put(f"({type(node).__name__}")
        for name in node._fields:
            value = getattr(node, name, None)
            if value is not None and value != [] and name not in _LEFT_OUT and name not in but:
                self.put(f" {name}=")
                self.write(value)
        self.put(")")

    def fields(self, node: ast.AST, *names: str) -> None:
        """Those of these fields that are set, and that this Python has."""
        for name in names:
            if value := getattr(node, name, None):
                self.put(f" {name}=")
                self.write(value)

    def name(self, name: str) -> None:
        scope = self.scope.of(name)
        self.put(f"({name})" if scope is None else f"({scope.number(name)})")

    def constant(self, node: ast.Constant) -> None:
        self.put(_constant(node.value))

    def function(self, node: ast.FunctionDef) -> None:
        inner = self.within(node)
        self.put("(FunctionDef")
        self.name(node.name)
        inner.parameters(node.args, self)
        decorating = _Decorating(self.scope, self.pieces, inner.scope)
        for decorator in node.decorator_list:
            self.put(" @")
            decorating.write(decorator)
        inner.fields(node, "returns", "type_params")
        inner.body(node)
        self.put(")")

    def lambda_(self, node: ast.Lambda) -> None:
        inner = self.within(node)
        self.put("(Lambda")
        inner.parameters(node.args, self)
        inner.write(node.body)
        self.put(")")

    def parameters(self, given: ast.arguments, around: _Writer) -> None:
        """Each kind in its order, by number and annotation; defaults are of the scope around."""
        kinds = (
            ("/", given.posonlyargs),
            ("", given.args),
            ("*", [given.vararg]),
            ("=", given.kwonlyargs),
            ("**", [given.kwarg]),
        )
        for kind, arguments in kinds:
            for argument in arguments:
                if argument is not None:
                    self.put(f" {kind}{self.scope.number(argument.arg)}")
                    self.fields(argument, "annotation")
        around.fields(given, "defaults", "kw_defaults")

    def comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        """What it goes over first is of the scope around it; its targets are met before what it makes of them."""
        inner = self.within(node)
        self.put(f"({type(node).__name__}")
        for number, generator in enumerate(node.generators):
            self.put(" for ")
            (inner if number else self).write(generator.iter)
            inner.write(generator.target)
            inner.write(generator.ifs)
        inner.node(node, ("generators",))
        self.put(")")

    def call(self, node: ast.Call) -> None:
        """Keywords of the file's own functions, called as f(...) or f[grid](...), are numbered like parameters."""
        called = node.func.value if isinstance(node.func, ast.Subscript) else node.func
        order: list[str] = []
        if isinstance(called, ast.Name) and (scope := self.scope.of(called.id)) is not None:
            order = scope.parameters.get(called.id, [])
        self.put("(Call")
        self.write(node.func)
        self.write(node.args)
        for keyword in node.keywords:
            named = keyword.arg or "**"
            self.put(f" {order.index(named) if named in order else named}=")
            self.write(keyword.value)
        self.put(")")

    def error(self, node: ast.Raise) -> None:
        """Which error is raised, not what it says."""
        self.put("(Raise")
        if node.exc is not None:
            self.write(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
        self.put(")")

    def refused(self, node: ast.AST) -> None:
        raise ValueError(f"line {getattr(node, 'lineno', 0)}: a kernel's file has no {type(node).__name__}")


class _Decorating(_Writer):
    """What decorates a function: its strings may name parameters, as Triton's do_not_specialize does."""

    def __init__(self, scope: _Scope, pieces: list[str], function: _Scope) -> None:
        super().__init__(scope, pieces)
        self.function_scope = function

    def constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value in _parameters(self.function_scope.node):
            self.put(f"({self.function_scope.number(node.value)})")
        else:
            super().constant(node)


# Nodes that bind names or mean what the file binds, or that hold texts of errors; any other is its type and its fields.
_SPECIAL: dict[type[ast.AST], Callable[[_Writer, Any], None]] = {
    ast.Name: lambda writer, node: writer.name(node.id),
    ast.Constant: lambda writer, node: writer.constant(node),  # `_Decorating` has its own
    ast.FunctionDef: _Writer.function,
    ast.Lambda: _Writer.lambda_,
    **dict.fromkeys(_COMPREHENSIONS, _Writer.comprehension),
    ast.Call: _Writer.call,
    ast.Raise: _Writer.error,
    ast.Assert: lambda writer, node: writer.node(node, ("msg",)),
    **dict.fromkeys(
        (ast.ClassDef, ast.Global, ast.Nonlocal, ast.Match, ast.ExceptHandler, ast.NamedExpr), _Writer.refused
    ),
    **dict.fromkeys((ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith), _Writer.refused),
}


def _constant(value: object) -> str:
    """A number or a text; whatever else a syntax tree holds has one repr on every Python."""
    return json.dumps(value) if isinstance(value, str) else f"<{type(value).__name__} {value!r}>"


# -- Fingerprints by the hash of a kernel's text, so that no text is parsed twice: what is known is kept in a folder.

# By the text's hash: what this process or an earlier one found.
_FOUND: dict[str, str] = {}


def found(text: str, hashed: str) -> str:
    """The fingerprint of a kernel's file, whose text below the header has this hash."""
    if hashed not in _FOUND:
        _FOUND[hashed] = _kept(hashed) or _keep(hashed, fingerprint(text))
    return _FOUND[hashed]


def _path(hashed: str) -> Path:
    return cache_dir() / f"fingerprints-{VERSION}" / hashed


def _kept(hashed: str) -> str | None:
    """What an earlier process found; None where none did, or what is there is damaged."""
    with contextlib.suppress(OSError, UnicodeDecodeError, MachineError):
        kept = _path(hashed).read_text(encoding="utf-8")
        if re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", kept):
            return kept
    return None


def _keep(hashed: str, kernel: str) -> str:
    """For later processes; where there is no room for it, they find it out again."""
    with contextlib.suppress(OSError, MachineError):
        replace_file(_path(hashed), kernel)
    return kernel
