"""The kernels' sources for the page: each text once, highlighted, and compressed together."""

from __future__ import annotations

import base64
import json
import zlib
from itertools import groupby

from pygments.lexers.python import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, String, _TokenType

from parallax_gen.codegen.render import render
from parallax_gen.errors import ConfigError
from parallax_gen.memory.result import Result
from parallax_gen.problem.hardware import Gpu

# Highlighted tokens and their CSS classes.
KINDS: tuple[tuple[_TokenType, str], ...] = (
    (Comment, "c"),
    (String, "s"),
    (Keyword, "k"),
    (Number, "n"),
    (Name.Decorator, "d"),
    (Name.Function, "f"),
)


class Sources:
    """Collects sources and assigns each an index."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def place(self, result: Result, gpu: Gpu) -> int | None:
        """The index of a result's kernel rendered with today's templates; None if its config is no longer valid."""
        try:
            text = render(result.place.spec, result.config, gpu).text
        except ConfigError:
            return None
        return self._places.setdefault(text, len(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def packed(self) -> str:
        """Base64 of zlib of a JSON list: a source is a list of class, text, class, text, ..."""
        document = json.dumps([_coloured(text) for text in self._places], separators=(",", ":"))
        return base64.b64encode(zlib.compress(document.encode(), 9)).decode()


def _coloured(text: str) -> list[str]:
    tokens = ((_class(kind), part) for kind, part in PythonLexer(stripnl=False).get_tokens(text))
    parts: list[str] = []
    for name, group in groupby(tokens, key=lambda token: token[0]):
        parts += [name, "".join(part for _, part in group)]
    return parts


def _class(kind: _TokenType) -> str:
    return next((name for family, name in KINDS if kind in family), "")
