"""Batch-invariant decode in Triton's CPU interpreter: a sequence's bits are those it has alone, in every layout.

tests/gpu/test_batch_invariance_gpu.py checks the same through the public functions, and training, on a card.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from cache_samples import SequenceTensors, cache_arguments, first_kv_head, random_sequences
from torch import Tensor

from parallax_gen.codegen.abi import Inputs
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.ops.base import op_of
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.oracle import verify
from parallax_gen.oracle.inputs import softmax_scale
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton")]

GPU = GPUS["h200"]
CACHES = {"": None, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ONE_QUERY = KernelSpec("decode_varlen", 16, "fp16", group=2, batch_invariant=True)
CONFIG = DecodeConfig(BLOCK_N=16, BLOCK_H=8, NUM_SPLITS=4, merge="last", num_warps=1, num_stages=2)


def results(
    spec: KernelSpec, config: DecodeConfig, parts: list[SequenceTensors], window: int, before: list[int] | None
) -> list[tuple[Tensor, ...]]:
    """What the kernel writes for each sequence."""
    spec = replace(spec, leftpad=before is not None)
    given = cache_arguments(parts, packed=spec.varlen, page_size=spec.page_size, before=before)
    given["k"], given["v"] = given.pop("k_cache"), given.pop("v_cache")
    if spec.cache_dtype:
        given |= {"k_scale": torch.tensor([0.5]), "v_scale": torch.tensor([3.0])}
    inputs = Inputs(**given, window_size=window, softcap=5.0 if spec.softcap else None)
    call = verify.poisoned_call(spec, config, inputs)
    load(render(spec, config, GPU)).launch(*call.arguments(softmax_scale(spec)))
    assert all(not scratch.any() for scratch in call.scratch[1:])  # arrival counters are 0 again
    if not spec.varlen:
        return list(zip(*call.written.values(), strict=True))
    ends = given["cu_seqlens_q"].tolist()
    rows = [(ends[b], ends[b + 1]) for b in range(len(parts))]
    return [
        tuple(x[begin:end] if x.dim() == 3 else x[:, begin:end] for x in call.written.values()) for begin, end in rows
    ]


def is_equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x.nan_to_num(nan=-7), y.nan_to_num(nan=-7)) for x, y in zip(a, b, strict=True))


def check_random_batch(seed: int) -> None:
    """Every sequence of a random batch in a random layout, against itself alone in a cache without pages or padding."""
    draw = random.Random(seed)
    many = draw.random() < 0.5
    spec = replace(
        ONE_QUERY,
        multi_token=many,
        varlen=many and draw.random() < 0.7,
        stats=draw.random() < 0.3,
        softcap=draw.random() < 0.2,
        page_size=draw.choice((0, 0, 1, 8, 16, 48, 64)),
        cache_dtype=draw.choice(("", "", "e4m3", "e5m2")),
    )
    windowed = draw.random() < 0.4
    spec = replace(spec, causal=windowed or (many and draw.random() < 0.8), window=windowed)
    config = replace(
        CONFIG,
        BLOCK_N=draw.choice((16, 32)),
        BLOCK_H=draw.choice((8, 16)) if many else 8,
        NUM_SPLITS=draw.choice((1, 3, 4, 8)),
        merge="last" if many else draw.choice(("last", "kernel")),
    )
    window = draw.randint(1, 300) if spec.window else 0
    lengths = [draw.choice((0, 1, 15, 16, 130, 257, 400)) + draw.randint(0, 9) for _ in range(draw.randint(2, 5))]
    queries: Any = [draw.randint(0, 12) for _ in lengths] if spec.varlen else draw.randint(2, 9) if many else 1
    parts = first_kv_head(random_sequences(lengths, queries, torch.float16, CACHES[spec.cache_dtype]))
    before = [draw.randint(0, 70) for _ in lengths] if draw.random() < 0.5 else None
    together = results(spec, config, parts, window, before)
    for part, result in zip(parts, together, strict=True):
        (alone,) = results(replace(spec, page_size=0), config, [part], window, None)
        assert is_equal(result, alone), (seed, spec, config, lengths, queries, before, window)


@pytest.mark.parametrize("seed", range(24))
def test_a_sequence_has_the_bits_it_has_alone(seed: int) -> None:
    check_random_batch(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 600, 50))
def test_500_random_batches(first: int) -> None:
    for seed in range(first, first + 50):
        check_random_batch(seed)


def test_the_usual_schedule_fails_this_test() -> None:
    """Without the flag a long sequence's splits follow the batch, and so do its bits."""
    usual = replace(ONE_QUERY, batch_invariant=False)
    parts = first_kv_head(random_sequences([400, 20, 30, 40], 1, torch.float16))
    together, (alone,) = (results(usual, CONFIG, each, 0, None) for each in (parts, parts[:1]))
    assert not is_equal(together[0], alone)


def test_scratch_is_for_sequences_that_are_split() -> None:
    """With packed queries a sequence has splits for few tiles: NUM_SPLITS states, however long the prompts are."""
    spec = replace(ONE_QUERY, multi_token=True, causal=True, varlen=True)
    form = render(spec, CONFIG, GPU)
    assert "work_items_per_seq" in form.text
    scratch = [verify.poisoned_call(spec, CONFIG, _packed(queries)).scratch[0].numel() for queries in (3, 300)]
    assert scratch[0] == scratch[1] == 2 * CONFIG.NUM_SPLITS * CONFIG.BLOCK_H * (2 * 16 + 4)


def _packed(queries: int) -> Inputs:
    parts = first_kv_head(random_sequences([400, 500], queries, torch.float16))
    given = cache_arguments(parts, packed=True)
    given["k"], given["v"] = given.pop("k_cache"), given.pop("v_cache")
    return Inputs(**given)


def test_the_default_number_of_splits_depends_on_the_kernel_alone() -> None:
    op = op_of(ONE_QUERY)
    shapes = [Shape(1, 16, 8, 1, 8192), Shape(64, 16, 8, 1, 1024)]
    splits = {op.defaults(replace(ONE_QUERY, head_dim=128), shape, GPU)[0].NUM_SPLITS for shape in shapes}
    assert splits == {16}
