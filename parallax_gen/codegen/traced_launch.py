"""The host code of a rendered kernel as C expressions: `launch` runs once on sizes that record what is computed.

So C code computes grids and arguments exactly as `launch` does, without a second description of them.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from types import ModuleType, SimpleNamespace
from typing import Any

_RENAMED = {"do": "do_"}


def c_name(name: str) -> str:
    """The name in C of an argument of `launch`."""
    return _RENAMED.get(name, name)


class Expression:
    """A number as a C expression. Sizes are not negative, so that C's division is Python's `//`."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: object) -> Expression:
        return Expression(f"({self} + {other})")

    def __radd__(self, other: object) -> Expression:
        return Expression(f"({other} + {self})")

    def __sub__(self, other: object) -> Expression:
        return Expression(f"({self} - {other})")

    def __mul__(self, other: object) -> Expression:
        return Expression(f"({self} * {other})")

    def __rmul__(self, other: object) -> Expression:
        return Expression(f"({other} * {self})")

    def __floordiv__(self, other: object) -> Expression:
        return Expression(f"({self} / {other})")

    def __truediv__(self, other: object) -> Expression:
        return Expression(f"({self} / (double){other})")

    def __gt__(self, other: object) -> Expression:
        return Expression(f"({self} > {other})")

    def __bool__(self) -> bool:
        raise TypeError(f"launch branches on {self}, which is known in the call alone")


class TracedTensor:
    """A tensor argument: its name in C, and its sizes and strides as expressions on a struct of C."""

    def __init__(self, name: str, rank: int):
        self.name = name
        self.shape = tuple(Expression(f"{name}->shape[{i}]") for i in range(rank))
        self._strides = tuple(Expression(f"{name}->stride[{i}]") for i in range(rank))

    def stride(self, dim: int | None = None) -> Any:
        return self._strides if dim is None else self._strides[dim]


@dataclass(frozen=True)
class TracedLaunch:
    """One launch of one kernel, by name. grid and arguments: C expressions, `NAME->data` for a tensor."""

    kernel: str
    grid: tuple[str, ...]
    arguments: tuple[str, ...]


def trace_launch(module: ModuleType, ranks: Mapping[str, int]) -> list[TracedLaunch]:
    """The launches of a rendered module's `launch`, in order. It launches nothing.

    ranks  how many dimensions each tensor that `launch` takes has, by name; its other arguments are numbers
    """
    from triton.runtime.jit import JITFunction

    launches: list[TracedLaunch] = []

    def recorder(name: str) -> _Recorder:
        return _Recorder(lambda grid, arguments: launches.append(TracedLaunch(name, grid, arguments)))

    names = {**vars(module), "triton": SimpleNamespace(cdiv=_cdiv), "max": _max, _CHOOSE: _choose}
    names |= {name: recorder(name) for name, value in names.items() if isinstance(value, JITFunction)}
    tree = _WithChoices().visit(ast.parse(inspect.getsource(module.launch)))
    exec(compile(ast.fix_missing_locations(tree), module.__name__, "exec"), names)
    arguments = inspect.signature(module.launch).parameters
    names["launch"](*[TracedTensor(c_name(n), ranks[n]) if n in ranks else Expression(n) for n in arguments])
    return launches


_CHOOSE = "_choose"


class _WithChoices(ast.NodeTransformer):
    """Turns `a if condition else b` into a call, because Python's own takes the truth of the condition."""

    def visit_IfExp(self, node: ast.IfExp) -> ast.Call:
        self.generic_visit(node)
        return ast.Call(ast.Name(_CHOOSE, ast.Load()), [node.test, node.body, node.orelse], [])


class _Recorder:
    """Stands for a kernel: `kernel[grid](*arguments, **options)` is recorded. Options are the compiled kernel's."""

    def __init__(self, record: Callable[[tuple[str, ...], tuple[str, ...]], None]):
        self._record = record

    def __getitem__(self, grid: tuple[object, ...]) -> Callable[..., None]:
        def launch(*arguments: object, **options: object) -> None:
            texts = [f"{x.name}->data" if isinstance(x, TracedTensor) else str(x) for x in arguments]
            self._record(tuple(map(str, grid)), tuple(texts))

        return launch


def _cdiv(x: Any, y: Any) -> Any:
    return (x + (y - 1)) // y


def _choose(condition: object, a: object, b: object) -> Expression:
    return Expression(f"({condition} ? {a} : {b})")


def _max(*values: Any) -> Any:
    return reduce(lambda a, b: _choose(Expression(f"{a} > {b}"), a, b), values)
