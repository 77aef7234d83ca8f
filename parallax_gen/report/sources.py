"""The kernels' sources for the page: each text once, highlighted, and compressed together."""

from __future__ import annotations

import base64
import json
import zlib
from itertools import groupby

from parallax_gen.codegen.render import render
from parallax_gen.errors import ConfigError, tune_extra
from parallax_gen.memory.result import Result
from parallax_gen.problem.hardware import Gpu

# Highlighted tokens, by the first names of their types in Pygments, and their CSS classes.
KINDS = (
    (("Comment",), "c"),
    (("Literal", "String"), "s"),
    (("Keyword",), "k"),
    (("Literal", "Number"), "n"),
    (("Name", "Decorator"), "d"),
    (("Name", "Function"), "f"),
)


class Sources:
    """Collects sources, each text once, and assigns each an index."""

    def __init__(self) -> None:
        self._indices: dict[str, int] = {}

    def add(self, result: Result, gpu: Gpu) -> int | None:
        """Render a result's kernel with today's templates. Returns the source's index; None for an invalid config."""
        try:
            text = render(result.place.spec, result.config, gpu).text
        except ConfigError:
            return None
        return self._indices.setdefault(text, len(self._indices))

    def __len__(self) -> int:
        return len(self._indices)

    @tune_extra("the report")
    def packed(self) -> str:
        """Base64 of zlib of a JSON list: a source is a list of class, text, class, text, ..."""
        document = json.dumps([_highlighted(text) for text in self._indices], separators=(",", ":"))
        return base64.b64encode(zlib.compress(document.encode(), 9)).decode()


def _highlighted(text: str) -> list[str]:
    from pygments.lexers.python import PythonLexer

    tokens = ((_class(kind), part) for kind, part in PythonLexer(stripnl=False).get_tokens(text))
    parts: list[str] = []
    for name, group in groupby(tokens, key=lambda token: token[0]):
        parts += [name, "".join(part for _, part in group)]
    return parts


def _class(kind: tuple[str, ...]) -> str:
    return next((name for names, name in KINDS if kind[: len(names)] == names), "")
