"""decode_varlen in Triton's CPU interpreter, on hand-made sequences.

tests/codegen/test_interpreter.py draws random kernels; here are cases that random draws seldom hit.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from cache_samples import SequenceTensors, cache_arguments, combined, expected_of_each, first_kv_head, random_sequences
from torch import Tensor

from parallax_gen.codegen.abi import Call, Inputs
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.oracle import verify
from parallax_gen.oracle.inputs import random_inputs_of, softmax_scale
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

# For a row without keys the kernels divide by zero and take log2(0). The GPU is silent, the interpreter warns.
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton")]

GPU = GPUS["h200"]
CONFIG = DecodeConfig(BLOCK_N=16, BLOCK_H=8, NUM_SPLITS=3, merge="last", num_warps=1, num_stages=2)
ONE_QUERY = KernelSpec("decode_varlen", 16, "fp16", group=2, stats=True)
MULTI_TOKEN = replace(ONE_QUERY, multi_token=True, causal=True)
PACKED = replace(MULTI_TOKEN, varlen=True)
WINDOW = replace(PACKED, window=True)
CACHES = {"": None, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCALES = {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([3.0, 0.25])}

# One long sequence among short ones, some without keys.
SKEWED = (0, 3, 500, 0, 40)


def parts_of(spec: KernelSpec, lengths: tuple[int, ...], queries: Any = 1) -> list[SequenceTensors]:
    return random_sequences(lengths, queries, torch.float16, CACHES[spec.cache_dtype])


def inputs_of(spec: KernelSpec, parts: list[SequenceTensors], window: int = 0, **layout: Any) -> Inputs:
    given = cache_arguments(parts, packed=spec.varlen, page_size=spec.page_size, **layout)
    given["k"], given["v"] = given.pop("k_cache"), given.pop("v_cache")
    scales = SCALES if spec.cache_dtype else {}
    return Inputs(**given, **scales, window_size=window)


def expected_of(spec: KernelSpec, parts: list[SequenceTensors], window: int = 0) -> dict[str, Tensor]:
    options: dict[str, Any] = {"causal": spec.causal, "window_size": window or None}
    options |= SCALES if spec.cache_dtype else {}
    return combined(expected_of_each(parts, **options), packed=spec.varlen)._asdict()


def launch(source: KernelSource, call: Call) -> None:
    load(source).launch(*call.arguments(softmax_scale(call.spec)))


def check(
    spec: KernelSpec, config: DecodeConfig, parts: list[SequenceTensors], *, window: int = 0, before: Any = None
) -> None:
    """Launch twice on the same scratch, then with the sequences reversed. Check the results and that counters are 0.

    The interpreter runs programs one by one, so tests with many sequences or tiles have one kv head.
    """
    source = render(spec, config, GPU)
    layout = {} if before is None else {"before": before}
    call = verify.poisoned_call(spec, config, inputs_of(spec, parts, window, **layout))
    padded_scratch = tuple(torch.cat([x, x.new_full((64,), 7)]) for x in call.scratch)
    call.scratch = tuple(x[:-64] for x in padded_scratch)
    launch(source, call)
    assert verify.judge(call, expected_of(spec, parts, window)).wrong is None
    parts = parts[::-1]
    call.inputs = inputs_of(spec, parts, window, **{name: starts[::-1] for name, starts in layout.items()})
    for tensor in call.written.values():
        tensor.fill_(float("nan"))
    launch(source, call)
    assert verify.judge(call, expected_of(spec, parts, window)).wrong is None
    assert len(call.scratch) == 1 + (config.merge == "last")
    assert all((x[-64:] == 7).all() for x in padded_scratch)  # nothing is written past the scratch


@pytest.mark.parametrize(("splits", "page_size"), [(1, 0), (3, 0), (16, 0), (3, 16), (3, 48)])
def test_one_long_sequence_among_short_ones(splits: int, page_size: int) -> None:
    spec = replace(ONE_QUERY, page_size=page_size)
    parts = parts_of(spec, SKEWED)
    check(spec, replace(CONFIG, NUM_SPLITS=splits), first_kv_head(parts) if page_size or splits > 3 else parts)


@pytest.mark.parametrize(
    "more", [{}, {"causal": True, "window": True}, {"leftpad": True, "page_size": 48}], ids=["", "window", "padding"]
)
def test_a_second_kernel_merges(more: dict[str, Any]) -> None:
    """With one split a sequence on average, and with several."""
    spec = replace(ONE_QUERY, **more)
    parts = first_kv_head(parts_of(spec, SKEWED))
    before = (0, 3, 50, 7, 100) if spec.leftpad else None
    for splits in (1, 6):
        config = replace(CONFIG, NUM_SPLITS=splits, merge="kernel")
        check(spec, config, parts, window=200 * spec.window, before=before)


def test_long_sequences_get_many_programs_and_short_ones_one() -> None:
    """The written entries of the split-KV scratch show who worked on what: the long sequence has 32 of 36 blocks."""
    spec, config = replace(ONE_QUERY, stats=False), replace(CONFIG, NUM_SPLITS=3)
    call = verify.poisoned_call(spec, config, inputs_of(spec, parts_of(spec, SKEWED)))
    launch(render(spec, config, GPU), call)
    entries = call.scratch[0].view(-1, 2, spec.group * (2 * spec.head_dim + 4))  # by work item and kv head
    written = (~entries.isnan()).any(dim=-1)
    assert torch.equal(written[:, 0], written[:, 1])
    long_entries = int(written[:, 0].sum())  # short sequences need no scratch
    assert torch.equal(
        written[:, 0].nonzero().flatten(), torch.arange(2, 2 + long_entries)
    )  # after the work items of two other sequences
    assert 6 <= long_entries <= 8  # its fraction of two work items a sequence, plus a spare one


@pytest.mark.parametrize(
    ("spec", "batch"), [(replace(ONE_QUERY, stats=False), 131), (PACKED, 67)], ids=["one query", "packed"]
)
def test_more_sequences_than_the_schedule_scans_at_a_time(spec: KernelSpec, batch: int) -> None:
    """One sequence in forty has enough keys for several programs; every third packed sequence has no query."""
    lengths = tuple(b % 7 if b % 40 else 400 + b for b in range(batch))
    queries = [b % 3 for b in range(batch)] if spec.varlen else 1
    config = replace(CONFIG, BLOCK_N=32, NUM_SPLITS=1)
    parts = first_kv_head(parts_of(spec, lengths, queries))
    call = verify.poisoned_call(spec, config, inputs_of(spec, parts))
    launch(render(spec, config, GPU), call)
    assert verify.judge(call, expected_of(spec, parts)).wrong is None
    assert not call.scratch[0].isnan().all()  # some were split


@pytest.mark.parametrize("splits", [1, 3, 16])
def test_several_queries_in_some_sequences_and_none_in_others(splits: int) -> None:
    """The fourth sequence has more queries than keys; the last has no key."""
    parts = parts_of(PACKED, (300, 9, 40, 5, 0), (3, 0, 4, 7, 2))
    check(PACKED, replace(CONFIG, NUM_SPLITS=splits), first_kv_head(parts) if splits > 1 else parts)


def test_no_sequence_has_a_query() -> None:
    parts = parts_of(PACKED, (30, 9), (0, 0))
    inputs = inputs_of(PACKED, parts)
    inputs.max_seqlen_q = 4
    call = verify.poisoned_call(PACKED, CONFIG, inputs)
    launch(render(PACKED, CONFIG, GPU), call)
    assert not call.scratch[1].any()
    assert call.scratch[0].isnan().all()


def test_padding_rows_are_filled() -> None:
    """Two padding rows before the first sequence, and enough after the last one that every program fills some."""
    parts = parts_of(PACKED, (300, 9), (3, 2))
    inputs = inputs_of(PACKED, parts)
    for name in ("q", "r"):
        padding = torch.full((90, 4, 16), torch.nan, dtype=torch.float16)
        setattr(inputs, name, torch.cat([padding[:2], getattr(inputs, name), padding[2:]]))
    assert inputs.cu_seqlens_q is not None
    inputs.cu_seqlens_q += 2
    call = verify.poisoned_call(PACKED, CONFIG, inputs)
    launch(render(PACKED, CONFIG, GPU), call)
    for name, x in call.written.items():
        by_row = x.transpose(0, 1) if name in ("lse", "t_mean") else x
        filled = torch.cat([by_row[:2], by_row[7:]])
        assert torch.equal(filled, torch.full_like(filled, -torch.inf if name == "lse" else 0.0)), name
    expected = expected_of(PACKED, parts)
    inputs.cu_seqlens_q -= 2
    call.written = {name: x[..., 2:7] if name in ("lse", "t_mean") else x[2:7] for name, x in call.written.items()}
    assert verify.judge(call, expected).wrong is None


@pytest.mark.parametrize("spec", [ONE_QUERY, PACKED], ids=["one query", "packed"])
def test_a_length_below_0_counts_as_0(spec: KernelSpec) -> None:
    """However negative: work is divided by the total number of key blocks."""
    parts = parts_of(spec, (300, 0, 40, 0), (2, 1, 1, 3) if spec.varlen else (1, 1, 1, 1))
    inputs = inputs_of(spec, parts)
    inputs.cache_seqlens = torch.tensor([300, -(2**31), 40, -1], dtype=torch.int32)
    call = verify.poisoned_call(spec, CONFIG, inputs)
    launch(render(spec, CONFIG, GPU), call)
    assert verify.judge(call, expected_of(spec, parts)).wrong is None


@pytest.mark.parametrize("full", [False, True], ids=["causal", "full"])
@pytest.mark.parametrize("block_h", [8, 16])
def test_equal_numbers_of_queries(block_h: int, full: bool) -> None:
    """10 (query, head) pairs: a little more than a tile of 8, or most of a tile of 16."""
    spec = replace(MULTI_TOKEN, causal=not full)
    check(spec, replace(CONFIG, BLOCK_H=block_h), first_kv_head(parts_of(spec, (0, 3, 200, 33), 5)))


@pytest.mark.parametrize(("window", "page_size"), [(1, 0), (20, 0), (20, 16), (1, 48)])
def test_windows(window: int, page_size: int) -> None:
    spec = replace(WINDOW, page_size=page_size)
    parts = parts_of(spec, (300, 9, 40, 5, 0), (3, 1, 4, 7, 2))
    check(spec, CONFIG, first_kv_head(parts), window=window)


@pytest.mark.parametrize("window", [1, 20])
def test_a_window_of_a_single_query(window: int) -> None:
    spec = replace(ONE_QUERY, causal=True, window=True)
    check(spec, CONFIG, first_kv_head(parts_of(spec, SKEWED)), window=window)


@pytest.mark.parametrize("page_size", [0, 16, 48], ids=["", "pages of 16", "pages of 48"])
@pytest.mark.parametrize("spec", [ONE_QUERY, WINDOW], ids=["one query", "packed queries, a window"])
def test_left_padding(spec: KernelSpec, page_size: int) -> None:
    spec = replace(spec, leftpad=True, page_size=page_size)
    queries = (3, 1, 0, 7) if spec.varlen else 1
    window = 20 if spec.window else 0
    parts = first_kv_head(parts_of(spec, (200, 9, 17, 5), queries))
    check(spec, CONFIG, parts, before=(5, 31, 48, 100), window=window)


@pytest.mark.parametrize("page_size", [0, 16, 48], ids=["", "pages of 16", "pages of 48"])
def test_left_padding_past_the_end_leaves_no_key(page_size: int) -> None:
    """All values are NaN, and all page table entries are out of range."""
    spec = replace(ONE_QUERY, leftpad=True, page_size=page_size)
    inputs = inputs_of(spec, parts_of(spec, (0, 0, 0)), before=(3, 20, 50))
    assert inputs.cache_leftpad is not None
    inputs.cache_leftpad += torch.tensor([0, 1, 10**6], dtype=torch.int32)
    call = verify.poisoned_call(spec, CONFIG, inputs)
    launch(render(spec, CONFIG, GPU), call)
    assert (call.out == 0).all()
    assert (call.written["v_mean"] == 0).all()
    assert (call.written["t_mean"] == 0).all()
    assert (call.written["lse"] == -torch.inf).all()


# For pages of 8: ends inside a page, at the end of a page or block, one key past it; no key; several blocks a program.
PAGE_ENDS = (0, 1, 8, 9, 13, 16, 24, 31, 32, 33, 64, 65, 203)


@pytest.mark.parametrize("block_n", [16, 32, 64], ids=lambda n: f"{n // 8} pages")
@pytest.mark.parametrize("cache", ["", "e4m3"])
def test_blocks_of_several_whole_pages(cache: str, block_n: int) -> None:
    """Past the end, values in the last page are NaN and table entries are out of range."""
    spec = replace(ONE_QUERY, page_size=8, cache_dtype=cache)
    config = replace(CONFIG, BLOCK_N=block_n, NUM_SPLITS=2)
    assert "page_1 = " in render(spec, config, GPU).text
    check(spec, config, first_kv_head(parts_of(spec, PAGE_ENDS)) if not cache else parts_of(spec, PAGE_ENDS))


@pytest.mark.parametrize("block_n", [16, 64], ids=lambda n: f"{n // 8} pages")
@pytest.mark.parametrize("spec", [ONE_QUERY, replace(ONE_QUERY, causal=True, window=True), PACKED, WINDOW])
def test_blocks_of_whole_pages_with_left_padding(spec: KernelSpec, block_n: int) -> None:
    """All keys may lie in the first page, with NaN on both sides."""
    spec = replace(spec, leftpad=True, page_size=8)
    config = replace(CONFIG, BLOCK_N=block_n, NUM_SPLITS=2)
    assert "page_1 = " in render(spec, config, GPU).text
    queries = [1 + b % 4 for b in range(len(PAGE_ENDS))] if spec.varlen else 1
    before = [5 * b % 23 for b in range(len(PAGE_ENDS))]
    parts = first_kv_head(parts_of(spec, PAGE_ENDS, queries))
    check(spec, config, parts, before=before, window=20 if spec.window else 0)


@pytest.mark.parametrize("cache", ["e4m3", "e5m2"])
@pytest.mark.parametrize(
    "spec", [ONE_QUERY, replace(ONE_QUERY, page_size=16), WINDOW], ids=["one query", "pages", "window"]
)
def test_fp8_caches(spec: KernelSpec, cache: str) -> None:
    """head_dim 16, which tiles of packed int32 pad to 64, with a scale for each kv head."""
    spec = replace(spec, cache_dtype=cache)
    parts = parts_of(spec, (200, 9, 17, 0), (3, 1, 0, 5) if spec.varlen else 1)
    check(spec, replace(CONFIG, NUM_SPLITS=2), parts, window=20 if spec.window else 0)


@pytest.mark.parametrize("cache", ["e4m3", "e5m2"])
def test_every_fp8_value_is_read_exactly(cache: str) -> None:
    """With one key the output is its value: 254 sequences cover all values, including subnormals and both zeros."""
    spec = replace(ONE_QUERY, stats=False, cache_dtype=cache, group=1)
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[numbers.view(CACHES[cache]).float().isfinite()]
    rows = -(-len(numbers) // 16)
    v = torch.nn.functional.pad(numbers, (0, rows * 16 - len(numbers))).view(CACHES[cache])
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(rows, 1, 1, 16, generator=draw).to(torch.float16)
    inputs = Inputs(q, q / 8, torch.zeros_like(v).view(rows, 1, 1, 16), v.view(rows, 1, 1, 16))
    inputs.cache_seqlens = torch.ones(rows, dtype=torch.int32)
    inputs.k_scale, inputs.v_scale = torch.ones(1), torch.ones(1)
    call = verify.poisoned_call(spec, CONFIG, inputs)
    launch(render(spec, CONFIG, GPU), call)
    assert torch.equal(call.out.flatten().float(), v.float())


def far_apart(x: Tensor, dim: int, stride: int) -> Tensor:
    """x with this stride along `dim`. Reserves gigabytes of address space and touches few pages."""
    strides = list(torch.empty([1 if d == dim else size for d, size in enumerate(x.shape)], device="meta").stride())
    strides[dim] = stride
    reach = 1 + sum((size - 1) * step for size, step in zip(x.shape, strides, strict=True))
    return torch.empty(reach, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize(
    ("spec", "block", "at_once"),
    [
        pytest.param(KernelSpec("decode", 16, "fp16", group=2), 128, 128, id="even"),
        pytest.param(ONE_QUERY, 128, 128, id="ragged"),
        pytest.param(replace(ONE_QUERY, page_size=256), 128, 128, id="a block in a page"),
        pytest.param(replace(ONE_QUERY, page_size=48), 16, 16, id="a block in a page of 48"),
        pytest.param(replace(ONE_QUERY, page_size=16), 128, 16, id="pages in a block"),
        pytest.param(replace(ONE_QUERY, page_size=3), 16, 1, id="neither"),
        pytest.param(replace(ONE_QUERY, cache_dtype="e4m3"), 64, 64, id="e4m3"),
        pytest.param(replace(ONE_QUERY, cache_dtype="e5m2", page_size=16), 32, 16, id="pages of e5m2"),
    ],
)
def test_the_largest_allowed_strides_of_keys(spec: KernelSpec, block: int, at_once: int) -> None:
    """With one element more, 32-bit offsets would not reach the last of the `at_once` keys of a block."""
    inputs = random_inputs_of(spec, Shape(2, 4, 2, 1, 150), seed=1, device="cpu", full=True)
    expected = verify.oracle(spec, inputs)
    reach = 2**33 if spec.cache_dtype else 2**31
    stride = (reach - spec.head_dim) // (at_once - 1) // 4 * 4 if at_once > 1 else 2**30
    inputs.k, inputs.v = (far_apart(x, 1, stride) for x in (inputs.k, inputs.v))
    config = replace(CONFIG, BLOCK_N=block)
    assert verify.launch_and_check(render(spec, config, GPU), spec, config, inputs, expected).wrong is None


@pytest.mark.parametrize(
    ("spec", "merge", "dim", "stride"),
    [
        pytest.param(ONE_QUERY, "kernel", 2, (2**31 - 1) // 3, id="heads of one query"),
        pytest.param(MULTI_TOKEN, "last", 2, 2**31 - 1, id="heads of a group of two"),
        pytest.param(MULTI_TOKEN, "last", 1, 2**30, id="rows"),
    ],
)
def test_the_largest_allowed_strides_of_outputs(spec: KernelSpec, merge: str, dim: int, stride: int) -> None:
    """Queries too, whose strides may be larger. Four heads in two groups."""
    inputs = random_inputs_of(spec, Shape(1, 4, 2, 5 if spec.multi_token else 1, 150), seed=1, device="cpu")
    config, expected = replace(CONFIG, merge=merge), verify.oracle(spec, inputs)
    inputs.q, inputs.r = (far_apart(x, dim, stride) for x in (inputs.q, inputs.r))
    call = verify.poisoned_call(spec, config, inputs)
    for name in ("out", "v_mean"):
        call.written[name] = far_apart(call.written[name], dim, stride)
    launch(render(spec, config, GPU), call)
    assert verify.judge(call, expected).wrong is None


# Faults that the checks above must detect: (spec, original text, faulty text), run on these sequences.
SEQUENCES = ((200, 9, 40, 5, 0), (3, 0, 5, 6, 2))
FAULTS = [
    (ONE_QUERY, "tl.exp2(m_splits - m_new)", "m_splits * 0.0 + 1.0", "splits not rescaled"),
    (ONE_QUERY, "(offs_n >= start_n) & ", "", "keys of a block moved back taken twice"),
    (ONE_QUERY, "block_start = tl.minimum(start_n, last_block_start)", "block_start = start_n", "a key behind the end"),
    (ONE_QUERY, "tl.store(arrival_counters_ptr + first_state, 0)", "pass", "counters not set back"),
    (
        ONE_QUERY,
        "is_query = offs_stack < STACK_ROWS",
        "is_query = offs_stack >= STACK_ROWS",
        "queries and probes swapped",
    ),
    (ONE_QUERY, "for head in range(GROUP)", "for head in range(1)", "one head merged"),
    (ONE_QUERY, "kv_heads * SPLIT_FLOATS, tile_splits", "SPLIT_FLOATS, tile_splits", "another kv head's splits merged"),
    (ONE_QUERY, "(work_item - split) * kv_heads + kv_head", "work_item * kv_heads + kv_head", "a counter each"),
    (ONE_QUERY, "seq += tl.sum(is_before.to(tl.int32), 0)", "seq += 0", "the first sequence alone"),
    (
        ONE_QUERY,
        "tl.maximum(tl.cdiv(seq_blocks, blocks_per_split), 1)",
        "tl.cdiv(seq_blocks, blocks_per_split)",
        "no split without keys",
    ),
    (
        PACKED,
        "ends = num_work_items + tl.cumsum(work_items, 0)",
        "ends = tl.cumsum(work_items + 1, 0)",
        "items miscounted",
    ),
    (
        PACKED,
        "offs_n[None, :] <= query_positions[:, None]",
        "offs_n[None, :] < query_positions[:, None]",
        "its own key unseen",
    ),
    (
        PACKED,
        "query_positions = seqlen_kv - seqlen_q",
        "query_positions = seqlen_kv - seqlen_q * 0",
        "queries begin at the last key",
    ),
    (
        PACKED,
        "last_query = tl.minimum(",
        "last_query = tl.minimum(start_m // GROUP, ",
        "a tile ends with its first query",
    ),
    (PACKED, "offs_m < seqlen_q * GROUP", "offs_m < seqlen_q * GROUP - 1", "the last row of a sequence"),
    (PACKED, "range(tl.minimum(seqlen_q * GROUP - start_m, BLOCK_H))", "range(1)", "one row merged"),
    (WINDOW, "(distance < window_size)", "(distance <= window_size)", "a key too many"),
    (WINDOW, "GROUP + 1 - window_size", "GROUP + 2 - window_size", "a key too few"),
    (replace(ONE_QUERY, leftpad=True), "tl.load(cache_leftpad_ptr", "0 * tl.load(cache_leftpad_ptr", "padding seen"),
    (
        replace(ONE_QUERY, page_size=8),
        "clamped_slot = tl.minimum(slot, last_slot)",
        "clamped_slot = slot",
        "keys behind the end of a page read",
    ),
    (
        replace(ONE_QUERY, page_size=8),
        "page_in_block == 1, page_1, page_0",
        "page_in_block == 1, page_0, page_1",
        "a block's pages swapped",
    ),
    (
        replace(ONE_QUERY, page_size=8, leftpad=True),
        "tl.maximum(slot, first_slot)",
        "slot",
        "keys before the first read",
    ),
    (
        replace(ONE_QUERY, page_size=8, leftpad=True),
        "< keys_left, 0, final_slot",
        "< keys_left, 0, 0",
        "poison for want of a second page",
    ),
    (replace(ONE_QUERY, cache_dtype="e4m3"), "* k_scale * v_scale", "* v_scale", "a scale left out"),
    (replace(ONE_QUERY, cache_dtype="e4m3"), "scale_log2 * k_scale", "scale_log2", "scores not scaled"),
    (replace(ONE_QUERY, cache_dtype="e4m3"), "d2 *= k_scale", "d2 *= 1.0", "r·k not scaled"),
]


@pytest.mark.parametrize(("spec", "right", "faulty"), [pytest.param(*kernel, id=what) for *kernel, what in FAULTS])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # a faulty kernel may compute anything
def test_checks_detect_a_faulty_kernel(spec: KernelSpec, right: str, faulty: str) -> None:
    config = replace(CONFIG, NUM_SPLITS=2)
    text = render(spec, config, GPU).text
    assert right in text
    text = text.replace(right, faulty)
    source = KernelSource("wrong", text, hashlib.sha256(text.encode()).hexdigest())
    lengths, queries = SEQUENCES
    parts = parts_of(spec, lengths, queries if spec.varlen else 1)
    parts = first_kv_head(parts) if spec.varlen else parts
    window = 20 if spec.window else 0
    inputs = inputs_of(spec, parts, window, **({"before": (5, 31, 0, 1, 3)} if spec.leftpad else {}))
    assert verify.launch_and_check(source, spec, config, inputs, expected_of(spec, parts, window)).wrong is not None
