"""The kernels and configs of batch-invariant calls: chosen by nothing of the batch, once for all layouts and sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dispatched_kernels import recorded_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func, parallax_attn_with_kvcache
from parallax_gen.codegen.render import render
from parallax_gen.memory.lock import LockedKernel, read_lock, write_lock
from parallax_gen.memory.place import place_of
from parallax_gen.memory.ranking import RecordTable, default_of, evidence_of
from parallax_gen.memory.result import Result
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import Dispatcher
from parallax_gen.runtime.recording import CallCounts

pytestmark = pytest.mark.filterwarnings("ignore")  # that these are CPU tensors, and that kernels were not measured here

TRAINING = {"forward", "preprocess", "dkdv", "dqdr"}
GPU = gpu_by_name("h200")


def places_of(launched: Any) -> set[Any]:
    return {place_of("h200", spec, bucket) for spec, bucket in launched}


@st.composite
def training_call(draw: st.DrawFn, window: int | None) -> set[Any]:
    """The places of a call and its backward, of a random batch."""
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seqlen_q, seqlen_k = draw(st.integers(1, 100)), draw(st.integers(1, 100))
    heads, options = 2 * kv_heads, {"causal": window is not None, "window_size": window, "batch_invariant": True}
    sizes = [(batch, seqlen_q, heads, 16)] * 2 + [(batch, seqlen_k, kv_heads, 16)] * 2
    inputs = [torch.zeros(size).requires_grad_() for size in sizes]
    with recorded_kernels() as launched:
        if draw(st.booleans()):
            starts = [torch.arange(batch + 1, dtype=torch.int32) * n for n in (seqlen_q, seqlen_k)]
            flat = [x.flatten(0, 1) for x in inputs]
            parallax_attn_varlen_func(*flat, *starts, seqlen_q, seqlen_k, **options).sum().backward()
        else:
            parallax_attn_func(*inputs, **options).sum().backward()
    return places_of(launched)


@pytest.mark.parametrize("window", [None, 1, 70])
@settings(max_examples=15)
@given(data=st.data())
def test_the_places_of_a_step_are_the_same_in_every_batch(window: int | None, data: st.DataObject) -> None:
    one, two = (data.draw(training_call(window)) for _ in range(2))
    assert one == two
    assert {place.spec.op for place in one} == TRAINING


@st.composite
def decode_call(draw: st.DrawFn, chunk: bool, options: dict[str, Any]) -> set[Any]:
    batch, kv_heads, keys = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 90))
    queries = draw(st.integers(2, 5)) if chunk else 1
    q = torch.zeros(batch, queries, 2 * kv_heads, 16)
    arguments = dict(options)
    page_size = draw(st.sampled_from([0, 1, 16, 48]))
    if page_size:
        pages = -(-keys // page_size)
        cache = torch.zeros(batch * pages, page_size, kv_heads, 16)
        arguments["page_table"] = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    else:
        cache = torch.zeros(batch, keys, kv_heads, 16)
    if page_size or draw(st.booleans()):
        arguments["cache_seqlens"] = torch.full((batch,), keys, dtype=torch.int32)
    if draw(st.booleans()):
        arguments["cache_leftpad"] = torch.zeros(batch, dtype=torch.int32)
    if chunk and draw(st.booleans()):
        arguments["cu_seqlens_q"] = torch.arange(batch + 1, dtype=torch.int32) * queries
        arguments["max_seqlen_q"] = queries + draw(st.integers(0, 3))
        q = q.flatten(0, 1)
    with recorded_kernels() as launched:
        parallax_attn_with_kvcache(
            q, q, cache, cache, **arguments, return_state=draw(st.booleans()), batch_invariant=True
        )
    return places_of(launched)


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window_size": 50}, {"softcap": 2.0}])
@pytest.mark.parametrize("chunk", [False, True])
@settings(max_examples=15)
@given(data=st.data())
def test_the_place_of_a_decode_step_is_the_same_in_every_batch(
    chunk: bool, options: dict[str, Any], data: st.DataObject
) -> None:
    one, two = (data.draw(decode_call(chunk, options)) for _ in range(2))
    assert one == two
    (place,) = one
    assert (place.spec.op, place.spec.multi_token) == ("decode_varlen", chunk)


def test_recorded_calls_keep_the_flag() -> None:
    counts = CallCounts()
    spec = KernelSpec("decode_varlen", 64, "bf16", page_size=16, batch_invariant=True)
    counts.of(spec, Shape(1, 1, 1, 1, 300)).calls += 2
    ((kernel, calls),) = counts.totals().items()
    assert (kernel[0], calls) == (spec, 2)


# -- The dispatcher.

FORWARD = KernelSpec("forward", 64, "bf16", group=4, causal=True, batch_invariant=True)
LAYOUTS = [
    FORWARD,
    replace(FORWARD, stats=True),
    replace(FORWARD, varlen=True),
    replace(FORWARD, stats=True, varlen=True),
]
SHAPES = [Shape(1, 4, 1, 100, 100), Shape(64, 32, 8, 4096, 4096)]


def records() -> list[Result]:
    """For each size another config is the best that was measured, also at the place of batch-invariant calls."""
    found = []
    for i, sizes in enumerate([*map(bucket_of, SHAPES), place_of("h200", FORWARD, SHAPES[0]).bucket]):
        place = place_of("h200", replace(FORWARD, stats=True, batch_invariant=False), sizes)
        config: Any = replace(default_of(place, GPU), GROUP_HEADS=2**i)  # type: ignore[call-arg]
        found.append(Result(place, evidence_of(render(place.spec, config, GPU)), config, "ok", time_us=1.0))
    return found


def by_lock(folder: Path) -> Dispatcher:
    record = records()[-1]
    write_lock(folder / "kernels.lock", [LockedKernel.here(record.place, record.config, GPU)])
    return Dispatcher(RecordTable([]), read_lock(folder / "kernels.lock"))


@pytest.mark.parametrize("dispatcher_of", [lambda _: Dispatcher(RecordTable(records())), by_lock])
def test_all_layouts_and_sizes_share_a_config(dispatcher_of: Callable[[Path], Dispatcher], tmp_path: Path) -> None:
    """That of their place; each layout has its own kernel."""
    dispatcher, config = dispatcher_of(tmp_path), records()[-1].config
    assert isinstance(config, ForwardConfig)
    assert config.LOADS == "descriptors"
    for shape in SHAPES:
        for spec in LAYOUTS:
            choice, module = dispatcher.kernel(spec, shape, GPU)
            assert choice.candidate.config == config
            # Descriptors cannot load packed sequences.
            assert choice.config == (replace(config, LOADS="pointers") if spec.varlen else config)
            assert module.__file__ is not None
            assert Path(module.__file__).read_text(encoding="utf-8") == render(spec, choice.config, GPU).text


def test_other_calls_keep_their_own_config() -> None:
    dispatcher = Dispatcher(RecordTable(records()))
    for shape, record in zip(SHAPES, records(), strict=False):
        spec = replace(FORWARD, stats=True, batch_invariant=False)
        assert dispatcher.kernel(replace(spec, batch_invariant=True), shape, GPU)[0].config == records()[-1].config
        assert dispatcher.kernel(spec, shape, GPU)[0].config == record.config


def test_a_place_is_tuned_once_and_keeps_its_choice() -> None:
    """The first call of one layout tunes the place of all; those of other layouts do not change its config."""
    dispatcher, asked = Dispatcher(RecordTable(records())), []
    dispatcher.on_first_call = lambda spec, *_: bool(asked.append(spec))  # type: ignore[func-returns-value]
    for spec in LAYOUTS * 2:
        dispatcher.kernel(spec, SHAPES[1], GPU)
    assert asked == LAYOUTS[:1]
