"""Batch-invariant calls on a card: a sequence's bits are those that it has alone, forward, backward and over a cache.

tests/codegen/test_batch_invariant_kernels.py does the same with cached keys in Triton's interpreter.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import parallax_gen
from parallax_gen import parallax_attn_func, parallax_attn_varlen_func, parallax_attn_with_kvcache
from parallax_gen.oracle.accuracy import tolerance
from parallax_gen.oracle.kvcache import reference_cached_forward

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("batch_invariant")]

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128
CACHES = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}


@pytest.fixture
def batch_invariant() -> Any:
    with parallax_gen.batch_invariant():
        yield


def normal(draw: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, device="cuda", generator=draw).bfloat16()


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


# -- training


def step(x: list[Tensor], do: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """out and the gradients of q, r, k and v, of a dense batch."""
    x = [t.detach().clone().requires_grad_() for t in x]
    out = parallax_attn_func(*x, causal=True, **options)
    return (out.detach(), *torch.autograd.grad(out, x, do))


def packed_step(x: list[Tensor], do: Tensor, lengths: list[int], **options: Any) -> tuple[Tensor, ...]:
    x = [t.detach().clone().requires_grad_() for t in x]
    ends = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device="cuda")
    most = max(lengths)
    out = parallax_attn_varlen_func(*x, ends, ends, most, most, causal=True, **options)
    return (out.detach(), *torch.autograd.grad(out, x, do))


@pytest.mark.parametrize("options", [{}, {"window_size": 100}, {"softcap": 20.0}], ids=["causal", "window", "softcap"])
@pytest.mark.parametrize("seqlen", [77, 1024, 3000])
def test_a_training_step(seqlen: int, options: dict[str, Any]) -> None:
    """A sequence in a dense batch, at each place of a packed one between others, and alone."""
    draw, heads = generator(seqlen), (HEADS, HEADS, KV_HEADS, KV_HEADS, HEADS)
    *x, do = (normal(draw, 5, seqlen, h, HEAD_DIM) for h in heads)
    together = step(x, do, **options)
    alone = step([t[2:3] for t in x], do[2:3], **options)
    for of_all, of_one in zip(together, alone, strict=True):
        assert torch.equal(of_all[2:3], of_one)
    with torch.no_grad():  # another kernel, which writes no statistics
        assert torch.equal(parallax_attn_func(*x, causal=True, **options), together[0])
    lengths = [17, seqlen, 300, seqlen, 1]
    *y, dy = (normal(draw, sum(lengths), h, HEAD_DIM) for h in heads)
    places = [slice(17, 17 + seqlen), slice(317 + seqlen, 317 + 2 * seqlen)]
    for place in places:
        for t, of_x in zip((*y, dy), (*x, do), strict=True):
            t[place] = of_x[2]
    for of_all, of_one in zip(packed_step(y, dy, lengths, **options), alone, strict=True):
        for place in places:
            assert torch.equal(of_all[place], of_one[0])


def test_a_prompt_without_statistics_is_the_same_packed() -> None:
    draw = generator(1)
    x = [normal(draw, 700, h, HEAD_DIM) for h in (HEADS, HEADS, KV_HEADS, KV_HEADS)]
    dense = parallax_attn_func(*(t[None, 200:500] for t in x), causal=True)[0]
    ends = torch.tensor([0, 200, 500, 700], dtype=torch.int32, device="cuda")
    assert torch.equal(parallax_attn_varlen_func(*x, ends, ends, 300, 300, causal=True)[200:500], dense)


# -- over a cache


class Sequence:
    """q and r (queries, heads, head_dim), k and v (keys, kv_heads, head_dim)."""

    def __init__(self, draw: torch.Generator, queries: int, keys: int, cache: torch.dtype):
        self.q, self.r = (normal(draw, queries, HEADS, HEAD_DIM) for _ in range(2))
        self.k, self.v = (normal(draw, keys, KV_HEADS, HEAD_DIM).to(cache) for _ in range(2))


def arguments(
    sequences: list[Sequence], *, packed: bool, page_size: int = 0, pads: list[int] | None = None, spare: int = 0
) -> dict[str, Any]:
    """Of parallax_attn_with_kvcache. Whatever is not a sequence's key is NaN, and pages are in random order."""
    starts = pads or [0] * len(sequences)
    ends = [start + len(s.k) for start, s in zip(starts, sequences, strict=True)]
    found: dict[str, Any] = {"cache_seqlens": torch.tensor(ends, dtype=torch.int32, device="cuda")}
    if pads is not None:
        found["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32, device="cuda")
    for name in ("q", "r"):
        rows = [getattr(s, name) for s in sequences]
        found[name] = torch.cat(rows) if packed else torch.stack(rows)
    if packed:
        counts = [len(s.q) for s in sequences]
        totals = [sum(counts[:i]) for i in range(len(counts) + 1)]
        found["cu_seqlens_q"] = torch.tensor(totals, dtype=torch.int32, device="cuda")
        found["max_seqlen_q"] = max(*counts, 1)
    batch, seqlen, page = len(sequences), max(ends) + spare + 1, page_size or max(ends) + spare + 1
    most = -(-seqlen // page)
    table = torch.randperm(batch * most, device="cuda").view(batch, most)
    for name in ("k", "v"):
        like = getattr(sequences[0], name)
        cache = torch.full((batch * most, page, KV_HEADS, HEAD_DIM), float("nan"), device="cuda").to(like.dtype)
        bits = cache.view(torch.uint8) if like.element_size() == 1 else cache
        for b, (s, start, end) in enumerate(zip(sequences, starts, ends, strict=True)):
            at = torch.arange(start, end, device="cuda")
            of_sequence = getattr(s, name)
            of_sequence = of_sequence.view(torch.uint8) if like.element_size() == 1 else of_sequence
            bits[table[b, at // page], at % page] = of_sequence
        found[f"{name}_cache"] = cache if page_size else cache[table[:, 0]]
    return found | ({"page_table": table.int()} if page_size else {})


def rows_of(out: Tensor, sequences: list[Sequence], packed: bool) -> list[Tensor]:
    return list(out.split([len(s.q) for s in sequences])) if packed else list(out)


def check_batch(seed: int) -> None:
    pick, draw = random.Random(seed), generator(seed)
    cache = CACHES[pick.choice(("bf16", "bf16", "e4m3"))]
    packed = pick.random() < 0.4
    windowed = pick.random() < 0.3
    options: dict[str, Any] = {"causal": packed or windowed}
    options |= {"window_size": pick.choice((17, 300, 1000))} if windowed else {}
    options |= {"k_scale": 0.5, "v_scale": 2.0} if cache != torch.bfloat16 else {}
    sequences = [
        Sequence(
            draw, pick.randint(0, 40) if packed else 1, pick.choice((1, 40, 500, 2000)) + pick.randint(0, 99), cache
        )
        for _ in range(pick.choice((2, 5, 9, 33)))
    ]
    pads = [pick.randint(0, 90) for _ in sequences] if pick.random() < 0.4 else None
    layout: dict[str, Any] = {"page_size": pick.choice((0, 1, 16, 64)), "pads": pads, "spare": pick.choice((0, 3000))}
    given = arguments(sequences, packed=packed, **layout)
    together = parallax_attn_with_kvcache(**given, **options)
    chosen = pick.sample(range(len(sequences)), 2)
    for i in chosen:
        alone = parallax_attn_with_kvcache(**arguments([sequences[i]], packed=packed), **options)
        (expected,) = rows_of(alone, [sequences[i]], packed)
        assert torch.equal(rows_of(together, sequences, packed)[i], expected), (seed, i)
    if seed % 50 == 0:
        given.pop("max_seqlen_q", None)
        exact = reference_cached_forward(**given, **options).out
        assert (together.double() - exact).norm() <= tolerance("bf16") * exact.norm()


@pytest.mark.parametrize("first", range(0, 500, 50))
def test_500_random_batches_over_a_cache(first: int) -> None:
    for seed in range(first, first + 50):
        check_batch(seed)


def test_a_dense_cache_of_one_length() -> None:
    """Calls without lengths, which otherwise are another kernel's."""
    draw = generator(3)
    sequences = [Sequence(draw, 1, 1500, torch.bfloat16) for _ in range(12)]
    given = arguments(sequences, packed=False)
    dense = {name: given[name] for name in ("q", "r")}
    dense |= {name: given[name][:, :1500] for name in ("k_cache", "v_cache")}
    for call in (dense, dense | {"cache_seqlens": 1500}):
        assert torch.equal(parallax_attn_with_kvcache(**call), parallax_attn_with_kvcache(**given))
    one = {name: x[7:8] for name, x in dense.items()}
    assert torch.equal(parallax_attn_with_kvcache(**one)[0], parallax_attn_with_kvcache(**dense)[7])


def test_a_prompt_chunked_twice_with_the_same_borders() -> None:
    """Its chunks beside different other prompts, in pages of different sizes."""
    draw = generator(4)
    prompt, other = (Sequence(draw, 900, 900, torch.bfloat16) for _ in range(2))
    results = []
    for page_size, beside in ((0, 0), (16, 100), (64, 700)):
        rows, done = [], 0
        for border in (300, 512, 900):
            part, rest = Sequence(draw, 0, 0, torch.bfloat16), Sequence(draw, 0, 0, torch.bfloat16)
            part.q, part.r, part.k, part.v = (
                prompt.q[done:border],
                prompt.r[done:border],
                prompt.k[:border],
                prompt.v[:border],
            )
            rest.q, rest.r, rest.k, rest.v = (
                other.q[:beside],
                other.r[:beside],
                other.k[: beside + 1],
                other.v[: beside + 1],
            )
            both = [rest, part] if beside else [part]
            given = arguments(both, packed=True, page_size=page_size)
            rows.append(rows_of(parallax_attn_with_kvcache(**given, causal=True), both, True)[-1])
            done = border
        results.append(torch.cat(rows))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_return_state_has_the_same_out() -> None:
    draw = generator(5)
    given = arguments([Sequence(draw, 1, keys, torch.bfloat16) for keys in (9, 900, 3000)], packed=False, page_size=16)
    assert torch.equal(parallax_attn_with_kvcache(**given, return_state=True).out, parallax_attn_with_kvcache(**given))
