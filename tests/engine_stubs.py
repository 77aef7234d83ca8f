"""Puts stand-ins for serving engines in place of their modules, and batches of requests to run through them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax_gen import parallax_attn_func


@contextmanager
def engine(stub: ModuleType) -> Iterator[None]:
    """The modules of a stub's engine are its stand-ins, and ours that import them are imported anew."""
    name = next(iter(stub.MODULES)).partition(".")[0]
    ours = f"parallax_gen.integrations.{name}."
    with pytest.MonkeyPatch.context() as patch:
        for module, contents in stub.MODULES.items():
            parts = module.split(".")
            for depth in range(1, len(parts) + 1):
                package = ".".join(parts[:depth])
                if package not in sys.modules:
                    made = ModuleType(package)
                    made.__path__ = []
                    patch.setitem(sys.modules, package, made)
                    if depth > 1:
                        setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], made)
            named: Mapping[str, Any] = contents if isinstance(contents, dict) else {x.__name__: x for x in contents}
            vars(sys.modules[module]).update(named)
        try:
            yield
        finally:
            for module in [module for module in sys.modules if module.startswith(ours)]:
                del sys.modules[module]


def imported(module: str) -> Any:
    return importlib.import_module(f"parallax_gen.integrations.{module}")


@dataclass
class Requests:
    """Requests with random q, r, k and v for all their tokens; lengths: how many of them are in the cache."""

    totals: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        def rows(heads: int) -> list[Tensor]:
            return [torch.randn(total, heads * self.head_dim) for total in self.totals]

        self.q, self.r = rows(self.heads), rows(self.heads)
        self.k, self.v = rows(self.kv_heads), rows(self.kv_heads)
        self.lengths = [0] * len(self.totals)

    def advance(self, counts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next `counts` tokens of each request, packed: q, r, k, v."""
        parts = [slice(length, length + count) for length, count in zip(self.lengths, counts, strict=True)]
        self.lengths = [part.stop for part in parts]
        q, r, k, v = (
            torch.cat([x[part] for x, part in zip(rows, parts, strict=True)])
            for rows in (self.q, self.r, self.k, self.v)
        )
        return q, r, k, v

    def expected(self, counts: tuple[int, ...], **options: Any) -> Tensor:
        """The outputs of the last `counts` tokens, by causal attention over each request alone."""
        outs = []
        for i, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            q, r, k, v = (
                rows[i][:length].view(1, length, -1, self.head_dim) for rows in (self.q, self.r, self.k, self.v)
            )
            outs.append(parallax_attn_func(q, r, k, v, causal=True, **options)[0, length - count :].flatten(1))
        return torch.cat(outs)


STEPS = ((20, 3, 1), (5, 1, 9), (1, 1, 1), (1, 1, 1))  # chunks of prompts, and decode steps among them
TOTALS = tuple(map(sum, zip(*STEPS, strict=True)))


def assert_overrides_fit(ours: type, base: type) -> None:
    """Every method of ours that overrides one of the base's takes its arguments, in its order."""
    overridden = [name for name in vars(ours) if inspect.isroutine(vars(base).get(name)) and name in vars(base)]
    assert len(overridden) > 1
    for name in overridden:
        theirs = [
            p.name for p in inspect.signature(getattr(base, name)).parameters.values() if p.kind is not p.VAR_KEYWORD
        ]
        taken = list(inspect.signature(getattr(ours, name)).parameters.values())
        assert [p.name for p in taken[: len(theirs)]] == theirs, name
        assert all(p.default is not p.empty for p in taken[len(theirs) :]), name


def signatures(module: ModuleType) -> dict[str, list[str]]:
    """The names of the parameters of all functions and methods of a stub, by module and name."""
    found = {}
    for path, contents in module.MODULES.items():
        for thing in contents if isinstance(contents, tuple) else ():
            if is_dataclass(thing) or (inspect.isclass(thing) and issubclass(thing, Enum)):
                continue  # no functions of their own
            members = vars(thing) if inspect.isclass(thing) else {"": thing}
            for name, member in members.items():
                function = getattr(member, "__func__", member)
                if inspect.isfunction(function):
                    found[f"{path}:{thing.__name__}{name and '.'}{name}"] = list(inspect.signature(function).parameters)
    return found
