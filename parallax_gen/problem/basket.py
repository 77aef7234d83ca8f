"""A basket of models and of the calls that people make with them, with weights: coverage is counted on it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.models import Model
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import TRAINING, Flags, kernels

KINDS = ("training", "decode", "prompts in chunks")
_GIB = 2**30
_BYTES = 2  # of a key's or a value's element

# Field -> what it holds. Every number is 1 or more, except a page size, of which 0 means no pages.
_TRAINING: dict[str, type] = {"batch": list, "seqlen": list, "at_most_tokens": int}
_SERVING: dict[str, type] = {"batch": list, "kv_len": list, "page_size": list, "chunk": list, "chunk_batch": list}
_SERVING |= {"cache_gib_at_most": int, "chunk_tokens_at_most": int}
_MODEL: dict[str, type] = {"name": str, "heads": int, "kv_heads": int, "head_dim": int, "tp": list, "weight": int}


@dataclass(frozen=True)
class BasketCall:
    """A kernel at one shape, in one of KINDS; weight: how often it is met, roughly."""

    kind: str
    spec: KernelSpec
    shape: Shape
    weight: int


def basket_calls(data: object, source: str) -> list[BasketCall]:
    """The calls of a basket, from its JSON: of every model, split over each of its numbers of ranks (`tp`).

    training  batches x seqlen, of at most `at_most_tokens`: the kernels of a training step
    serving   decode with per-sequence lengths, batches x kv_len x page_size, whose caches take at most
              `cache_gib_at_most`; prompts in chunks over such caches, of at most `chunk_tokens_at_most` in a call
    models    heads, kv_heads, head_dim, tp, weight; windows: those of its layers, null for none

    Calls of several models are counted once each. source: the file, for errors. Raises ArgumentError, which names it.
    """
    fields = _checked(data, {"training": dict, "serving": dict, "models": list}, source)
    training = _checked(fields["training"], _TRAINING, f"{source}, training")
    serving = _checked(fields["serving"], _SERVING, f"{source}, serving")
    weights: Counter[tuple[str, KernelSpec, Shape]] = Counter()
    for number, entry in enumerate(fields["models"], 1):
        where = f"{source}, model {number}"
        found = _checked(entry, _MODEL, where)
        whole = Model(found["name"], found["heads"], found["kv_heads"], found["head_dim"])
        calls: dict[tuple[str, KernelSpec, Shape], None] = {}
        for ranks, window in itertools.product(found["tp"], _windows(entry, where)):
            model = whole.split(ranks)
            calls |= dict.fromkeys(_training(model, window, training))
            calls |= dict.fromkeys(_serving(model, window, serving))
        weights.update(dict.fromkeys(calls, found["weight"]))
    return [BasketCall(*call, weight) for call, weight in weights.items()]


def _training(model: Model, window: int | None, sizes: Mapping[str, Any]) -> Iterator[tuple[str, KernelSpec, Shape]]:
    for batch, seqlen in itertools.product(sizes["batch"], sizes["seqlen"]):
        if batch * seqlen <= sizes["at_most_tokens"]:
            shape = Shape(batch, model.heads, model.kv_heads, seqlen, seqlen)
            for spec, its_shape in kernels(TRAINING, model.head_dim, model.dtype, shape, Flags(window=window)):
                yield KINDS[0], spec, its_shape


def _serving(model: Model, window: int | None, sizes: Mapping[str, Any]) -> Iterator[tuple[str, KernelSpec, Shape]]:
    def cached(batch: int, queries: int, keys: int, flags: Flags) -> list[tuple[KernelSpec, Shape]]:
        bytes_of_cache = 2 * batch * keys * model.kv_heads * model.head_dim * _BYTES
        if bytes_of_cache > sizes["cache_gib_at_most"] * _GIB:
            return []
        shape = Shape(batch, model.heads, model.kv_heads, queries, keys)
        return kernels("decode", model.head_dim, model.dtype, shape, flags)

    for keys, page_size in itertools.product(sizes["kv_len"], sizes["page_size"]):
        for batch in sizes["batch"]:
            flags = Flags(per_sequence_lengths=True, window=window, page_size=page_size)
            for call in cached(batch, 1, keys, flags):
                yield KINDS[1], *call
        for batch, chunk in itertools.product(sizes["chunk_batch"], sizes["chunk"]):
            if chunk <= keys and batch * chunk <= sizes["chunk_tokens_at_most"]:
                for call in cached(batch, chunk, keys, Flags(varlen=True, window=window, page_size=page_size)):
                    yield KINDS[2], *call


def _windows(entry: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
    windows = entry.get("windows", [None])
    if not isinstance(windows, list) or not all(window is None or _is_number(window) for window in windows):
        raise ArgumentError(f"windows ({where})", f"{windows!r:.80}", "a list of whole numbers from 1, and null")
    return tuple(windows)


def _checked(data: object, fields: Mapping[str, type], where: str) -> Mapping[str, Any]:
    """An object with these fields, and lists of numbers in them. Raises ArgumentError."""
    if not isinstance(data, dict):
        raise ArgumentError("basket", f"{where}: {data!r:.80}", f"an object with {', '.join(fields)}")
    allowed = {dict: "an object", str: "a text", int: "a whole number from 1"}
    for name, kind in fields.items():
        value, least = data.get(name), 0 if name == "page_size" else 1
        what = "a list of models" if name == "models" else allowed.get(kind, f"a list of whole numbers from {least}")
        numbers = value if kind is list and name != "models" else [value] if kind is int else []
        if not isinstance(value, kind) or not all(_is_number(number, least) for number in numbers or []):
            raise ArgumentError(f"{name} ({where})", f"{value!r:.80}", what)
    return data


def _is_number(value: object, least: int = 1) -> bool:
    return type(value) is int and value >= least
