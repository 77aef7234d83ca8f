"""The identity of a rendered kernel: a hash of its program, independent of names, comments and layout.

The file's syntax tree is serialised in a format of our own, node types and the fields that are set, so that it is the
same on every Python. Docstrings, comments, positions and the texts of errors are left out. Names that the file binds
are replaced by numbers, in the order of first use in their scope. So are parameters of the file's own functions that a
decorator's strings or the keywords of a call name. All other names are part of the program and stay: attributes,
builtins, imports, keywords of other functions.
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

# Increase when the serialisation changes: fingerprints of different versions are not compared.
VERSION = 1

DIGITS = 32  # hex digits of a fingerprint, and of a text's hash

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_NEW_SCOPE = (ast.FunctionDef, ast.Lambda, *_COMPREHENSIONS)

_LOAD = ast.Load()

# Fields that repeat another field, or do not affect execution.
_LEFT_OUT = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


def below_header(text: str) -> str:
    '''A kernel's file without its leading docstring, which contains no """.'''
    mark = '"""'
    return text.split(mark, 2)[2] if text.startswith(mark) else text


def text_hash(text: str) -> str:
    """The hash of the text below a kernel's header: equal texts have equal fingerprints."""
    return _digest(below_header(text))


def fingerprint(text: str) -> str:
    """The fingerprint of a kernel's file, DIGITS hex digits. Takes 10 ms for a long file.

    Raises SyntaxError if it is not Python, and ValueError on syntax that kernels do not use: classes, `global`,
    `match`, `except`, `:=`, `async`.
    """
    module = ast.parse(text)
    pieces: list[str] = []
    _Serialiser(_Scope(module), pieces).body(module)
    return _digest("".join(pieces))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


@dataclass(eq=False)
class _Scope:
    """The names that a module, function or comprehension binds, numbered in the order of first use."""

    node: ast.AST
    outer: _Scope | None = None
    numbers: dict[str, int] = field(default_factory=dict)

    @cached_property
    def depth(self) -> int:
        return 0 if self.outer is None else self.outer.depth + 1

    @cached_property
    def bound(self) -> frozenset[str]:
        """Parameters, assigned names and defined functions; not imports, which mean the same in every file."""
        names = set(_parameters(self.node))
        for node in _inside(self.node):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                names.add(node.id)
            elif isinstance(node, ast.FunctionDef):
                names.add(node.name)
        return frozenset(names)

    @cached_property
    def parameters(self) -> dict[str, list[str]]:
        """The parameters of each function that the scope defines, by the function's name."""
        return {node.name: _parameters(node) for node in _inside(self.node) if isinstance(node, ast.FunctionDef)}

    def number(self, name: str) -> str:
        """The text that replaces one of the scope's own names."""
        return f"{self.depth}.{self.numbers.setdefault(name, len(self.numbers))}"

    def of(self, name: str) -> _Scope | None:
        """The scope that binds a name; None for a builtin or an import."""
        scope: _Scope | None = self
        while scope is not None and name not in scope.bound:
            scope = scope.outer
        return scope


def _parameters(node: ast.AST) -> list[str]:
    """The parameters of a function, in order; none for other nodes."""
    if not isinstance(node, ast.FunctionDef | ast.Lambda):
        return []
    given = node.args
    starred = (argument for argument in (given.vararg, given.kwarg) if argument is not None)
    return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, *starred)]


def _inside(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may bind names of a scope: statements and targets, without those of inner scopes.

    Not the targets of `:=`, which rendered files do not have: to look for them in every expression takes as long again.
    """
    if isinstance(scope, _COMPREHENSIONS):
        waiting: list[ast.AST] = [generator.target for generator in scope.generators]
    else:
        waiting = list(scope.body) if isinstance(scope, ast.Module | ast.FunctionDef) else []
    while waiting:
        node = waiting.pop()
        yield node
        read = isinstance(node, ast.expr) and isinstance(getattr(node, "ctx", _LOAD), ast.Load)
        if not read and not isinstance(node, _NEW_SCOPE):
            waiting.extend(ast.iter_child_nodes(node))


class _Serialiser:
    """Serialises the nodes of a scope. The joined pieces are unambiguous: brackets enclose each node."""

    def __init__(self, scope: _Scope, pieces: list[str]) -> None:
        self.scope = scope
        self.pieces = pieces
        self.put = pieces.append

    def within(self, node: ast.AST) -> _Serialiser:
        """The serialiser of a scope inside this one."""
        return _Serialiser(_Scope(node, self.scope), self.pieces)

    def body(self, node: ast.Module | ast.FunctionDef) -> None:
        """Write the statements of a body, except bare strings, such as docstrings."""
        self.put("[")
        for statement in node.body:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
                self.write(statement)
        self.put("]")

    def write(self, value: object) -> None:
        """Write a node, a list of nodes, or another value of a field."""
        if isinstance(value, ast.AST):
            _SPECIAL.get(type(value), _Serialiser.node)(self, value)
        elif isinstance(value, list):
            self.put("[")
            for one in value:
                self.write(one)
            self.put("]")
        else:
            self.put(_constant(value))

    def node(self, node: ast.AST, but: tuple[str, ...] = ()) -> None:
        """Write a node's type and the fields that are set, except `but`."""
        self.put(f"({type(node).__name__}")
        for name in node._fields:
            value = getattr(node, name, None)
            if value is not None and value != [] and name not in _LEFT_OUT and name not in but:
                self.put(f" {name}=")
                self.write(value)
        self.put(")")

    def fields(self, node: ast.AST, *names: str) -> None:
        """Write those of these fields that this Python has and that are set."""
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
        decorating = _DecoratorSerialiser(self.scope, self.pieces, inner.scope)
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

    def parameters(self, given: ast.arguments, around: _Serialiser) -> None:
        """Write parameters, kind by kind, with number and annotation; defaults belong to the scope around."""
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
        """The first iterable belongs to the scope around. Targets are numbered before the element that uses them."""
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
        """Keywords of the file's own functions, called as f(...) or f[grid](...), are replaced by parameter numbers."""
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
        """Write which error is raised, without its text."""
        self.put("(Raise")
        if node.exc is not None:
            self.write(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
        self.put(")")

    def unsupported(self, node: ast.AST) -> None:
        raise ValueError(f"line {getattr(node, 'lineno', 0)}: a kernel's file has no {type(node).__name__}")


class _DecoratorSerialiser(_Serialiser):
    """Serialises decorators: their strings may name parameters, as in Triton's do_not_specialize."""

    def __init__(self, scope: _Scope, pieces: list[str], function: _Scope) -> None:
        super().__init__(scope, pieces)
        self.function_scope = function

    def constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value in _parameters(self.function_scope.node):
            self.put(f"({self.function_scope.number(node.value)})")
        else:
            super().constant(node)


# Nodes that bind or refer to names, or hold texts of errors. Other nodes are written as type and fields.
_SPECIAL: dict[type[ast.AST], Callable[[_Serialiser, Any], None]] = {
    ast.Name: lambda writer, node: writer.name(node.id),
    ast.Constant: lambda writer, node: writer.constant(node),  # `_DecoratorSerialiser` has its own
    ast.FunctionDef: _Serialiser.function,
    ast.Lambda: _Serialiser.lambda_,
    **dict.fromkeys(_COMPREHENSIONS, _Serialiser.comprehension),
    ast.Call: _Serialiser.call,
    ast.Raise: _Serialiser.error,
    ast.Assert: lambda writer, node: writer.node(node, ("msg",)),
    **dict.fromkeys(
        (ast.ClassDef, ast.Global, ast.Nonlocal, ast.Match, ast.ExceptHandler, ast.NamedExpr), _Serialiser.unsupported
    ),
    **dict.fromkeys((ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith), _Serialiser.unsupported),
}


def _constant(value: object) -> str:
    """A constant's text. Constants other than strings have the same repr on every Python."""
    return json.dumps(value) if isinstance(value, str) else f"<{type(value).__name__} {value!r}>"


# -- A cache of fingerprints by the hash of a kernel's text, in memory and on disk, so that no text is parsed twice.

# Hash of the text -> fingerprint.
_CACHED: dict[str, str] = {}


def cached_fingerprint(text: str, hashed: str) -> str:
    """The fingerprint of a kernel's file, cached. hashed: the hash of its text below the header."""
    if hashed not in _CACHED:
        _CACHED[hashed] = _read_cached(hashed) or _write_cached(hashed, fingerprint(text))
    return _CACHED[hashed]


def _path(hashed: str) -> Path:
    return cache_dir() / f"fingerprints-{VERSION}" / hashed


def _read_cached(hashed: str) -> str | None:
    """The fingerprint that an earlier process stored; None if there is none or the file is damaged."""
    with contextlib.suppress(OSError, UnicodeDecodeError, MachineError):
        kept = _path(hashed).read_text(encoding="utf-8")
        if re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", kept):
            return kept
    return None


def _write_cached(hashed: str, kernel: str) -> str:
    """Store a fingerprint for later processes. If it cannot be written, they compute it again."""
    with contextlib.suppress(OSError, MachineError):
        replace_file(_path(hashed), kernel)
    return kernel
