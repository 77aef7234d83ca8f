"""Random sequences, and KV caches that hold them and are NaN everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallax_gen.oracle.reference import Reference, reference_forward

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
NO_PAGE = 1 << 30  # a page table entry without a page


class SequenceTensors(NamedTuple):
    """One sequence: q and r (queries, heads, head_dim), k and v (keys, kv_heads, head_dim)."""

    q: Tensor
    r: Tensor
    k: Tensor
    v: Tensor


def random_sequences(
    lengths: Sequence[int],
    queries: Sequence[int] | int = 1,
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
) -> list[SequenceTensors]:
    """Sequences of these numbers of keys and queries. cache: the dtype of keys and values, if not `dtype`."""
    draw = torch.Generator().manual_seed(sum(lengths))
    of_each = [queries] * len(lengths) if isinstance(queries, int) else queries

    def normal(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, HEAD_DIM, generator=draw)

    return [
        SequenceTensors(
            normal(many, HEADS).to(dtype),
            (normal(many, HEADS) / 4).to(dtype),
            normal(length, KV_HEADS).to(cache or dtype),
            normal(length, KV_HEADS).to(cache or dtype),
        )
        for length, many in zip(lengths, of_each, strict=True)
    ]


def first_kv_head(parts: Sequence[SequenceTensors]) -> list[SequenceTensors]:
    """The sequences with their first kv head and its query heads only."""
    group = HEADS // KV_HEADS
    return [SequenceTensors(part.q[:, :group], part.r[:, :group], part.k[:, :1], part.v[:, :1]) for part in parts]


def cache_arguments(
    parts: Sequence[SequenceTensors], *, before: Sequence[int] | None = None, page_size: int = 0, packed: bool = False
) -> dict[str, Any]:
    """Arguments of `parallax_attn_with_kvcache`, with a cache larger than the sequences, NaN outside of them.

    before  the left padding of each sequence, in keys
    packed  whether queries are packed
    """
    starts = [0] * len(parts) if before is None else before
    ends = [start + len(part.k) for start, part in zip(starts, parts, strict=True)]
    arguments: dict[str, Any] = {"cache_seqlens": _ints(ends)}
    if before is not None:
        arguments["cache_leftpad"] = _ints(before)
    for name in ("q", "r"):
        rows = [getattr(part, name) for part in parts]
        arguments[name] = torch.cat(rows) if packed else torch.stack(rows)
    if packed:
        counts = [len(part.q) for part in parts]
        arguments["cu_seqlens_q"] = _ints([sum(counts[:b]) for b in range(len(parts) + 1)])
        arguments["max_seqlen_q"] = max(counts)
    seqlen = max(ends) + 3
    for name, of_part in (("k_cache", "k"), ("v_cache", "v")):
        cache = nan_cache(parts[0].k, len(parts), seqlen)
        for b, part in enumerate(parts):
            cache[b, starts[b] : ends[b]] = getattr(part, of_part)
        arguments[name] = cache
    if page_size:
        arguments.update(_in_pages(arguments, page_size, list(zip(starts, ends, strict=True))))
    return arguments


def nan_cache(like: Tensor, *sizes: int) -> Tensor:
    """A cache (*sizes, kv_heads, head_dim) of NaN."""
    return torch.full((*sizes, *like.shape[1:]), float("nan"), dtype=torch.float32).to(like.dtype)


def expected_of_each(
    parts: Sequence[SequenceTensors], *, k_scale: Tensor | float = 1.0, v_scale: Tensor | float = 1.0, **options: Any
) -> list[Reference]:
    """`reference_forward` of each sequence by itself. k_scale, v_scale: a number, or one for each kv head."""

    def scaled(x: Tensor, scale: Tensor | float) -> Tensor:
        kv_heads = x.shape[1]
        factors = torch.as_tensor(scale, dtype=torch.float64).expand(kv_heads)
        return torch.stack([x[:, head].double() * factors[head] for head in range(kv_heads)], dim=1)[None]

    return [
        reference_forward(part.q[None], part.r[None], scaled(part.k, k_scale), scaled(part.v, v_scale), **options)
        for part in parts
    ]


def combined(result: Sequence[Reference], *, packed: bool = False) -> Reference:
    """The results of `expected_of_each` in the layout of the function's outputs."""
    rows = [torch.cat([sequence[i] for sequence in result], dim=1 if packed else 0) for i in (0, 3)]
    stats = [torch.cat([sequence[i] for sequence in result], dim=2 if packed else 0) for i in (1, 2)]
    out, lse, t_mean, v_mean = rows[0], *stats, rows[1]
    return Reference(*(x[0] for x in (out, lse, t_mean, v_mean))) if packed else Reference(out, lse, t_mean, v_mean)


def _in_pages(arguments: dict[str, Any], page_size: int, spans: list[tuple[int, int]]) -> dict[str, Tensor]:
    """The caches as shuffled pages. Table entries of pages without a key of the sequence are NO_PAGE."""
    batch, seqlen = arguments["k_cache"].shape[:2]
    most = -(-seqlen // page_size)
    table = torch.full((batch, most), NO_PAGE, dtype=torch.int32)
    places = torch.randperm(batch * most + 2, generator=torch.Generator().manual_seed(1)).tolist()
    pages = {name: nan_cache(arguments[name][0], batch * most + 2, page_size) for name in ("k_cache", "v_cache")}
    for b, (start, end) in enumerate(spans):
        for n in range(start, end):
            page = n // page_size
            if table[b, page] == NO_PAGE:
                table[b, page] = places.pop()
            for name, cache in pages.items():
                cache[table[b, page], n % page_size] = arguments[name][b, n]
    return {**pages, "page_table": table}


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
