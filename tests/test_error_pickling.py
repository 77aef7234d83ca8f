"""The package's errors can be pickled and copied with type, message, fields and notes."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import multiprocessing
import pickle
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import parallax_gen
from parallax_gen.errors import ArgumentError, MachineError, ParallaxGenError

PACKAGE = Path(parallax_gen.__file__).parent


@cache
def error_classes() -> list[type[Exception]]:
    """Every exception class that a module of the package defines, found by the names of base classes."""
    result: list[type[Exception]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and re.search(
                "(Error|Exception)\\b", " ".join(map(ast.unparse, node.bases))
            ):
                module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
                result.append(getattr(importlib.import_module(module), node.name))
    return result


def instance_of(cls: type[Exception]) -> Exception:
    """An error of the class with a distinct value for every constructor parameter, including keyword-only ones."""
    if not inspect.isfunction(cls.__init__):  # Python's constructor takes any arguments
        return cls("a message")
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    assert not [
        parameter for parameter in parameters if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    named = {
        parameter.name: f"{parameter.name} µ" for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY
    }
    return cls(*(f"{parameter.name} µ" for parameter in parameters if parameter.name not in named), **named)


class KeywordOnlyError(ParallaxGenError):
    """The hardest constructor to pickle: `args` is empty."""

    def __init__(self, *, where: str, count: int):
        super().__init__(f"{count} at {where}")
        self.where, self.count = where, count


def pickled(protocol: int) -> Callable[[Exception], Exception]:
    return lambda error: pickle.loads(pickle.dumps(error, protocol))


ROUND_TRIPS: dict[str, Callable[[Exception], Exception]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {protocol}": pickled(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("trip", ROUND_TRIPS)
def test_every_error_of_the_package_round_trips(trip: str) -> None:
    classes = error_classes()
    assert {ArgumentError, MachineError} <= set(classes)
    assert all(issubclass(cls, ParallaxGenError) for cls in classes)
    for cls in [*classes, KeywordOnlyError]:
        error = instance_of(cls)
        error.__notes__ = ["a note"]  # as set by add_note of Python 3.11
        back = ROUND_TRIPS[trip](error)
        assert type(back) is cls
        assert str(back) == str(error)
        assert back.args == error.args
        assert vars(back) == vars(error)


def raise_argument_error(_: int) -> None:
    raise ArgumentError("q", "head_dim 12", "a multiple of 8")


def test_an_error_in_a_child_process_reaches_its_parent() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        answer = pool.map_async(raise_argument_error, [0])
        with pytest.raises(ArgumentError, match="q: got head_dim 12; allowed: a multiple of 8") as caught:
            answer.get(timeout=60)
    assert (caught.value.argument, caught.value.got, caught.value.allowed) == ("q", "head_dim 12", "a multiple of 8")
