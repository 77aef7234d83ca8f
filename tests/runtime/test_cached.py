"""Attention against a KV cache without a GPU: accepted and refused arguments, and the results of CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_close
from cache_samples import HEAD_DIM, HEADS, cache_arguments, combined, expected_of_each, random_sequences
from torch import Tensor

from parallax_gen import GraphedDecode, State, kvcache_workspace_size, merge_states, parallax_attn_with_kvcache
from parallax_gen.errors import ArgumentError
from parallax_gen.oracle.reference import Reference, reference_forward
from parallax_gen.runtime.cache_checks import check_workspace

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")

LENGTHS = (9, 0, 5, 1)
BEFORE = (0, 4, 7, 2)
F8 = torch.float8_e4m3fn


def check(result: State, expected: Reference, dtype: str) -> None:
    assert_close(result.out, expected.out, dtype)
    assert_close(result.v_mean, expected.v_mean, dtype)
    assert_close(result.lse, expected.lse, "fp32")
    assert_close(result.t_mean, expected.t_mean, "fp32")
    assert result.lse.dtype == result.t_mean.dtype == torch.float32


# Results of CPU tensors


LAYOUTS = [
    pytest.param({}, id="lengths"),
    pytest.param({"before": BEFORE}, id="left padding"),
    *(pytest.param({"page_size": size}, id=f"pages of {size}") for size in (1, 3, 16)),
    pytest.param({"before": BEFORE, "page_size": 3}, id="left padding in pages"),
]
OPTIONS = [
    pytest.param({}, id="full"),
    pytest.param({"causal": True}, id="causal"),
    pytest.param({"causal": True, "window_size": 1}, id="window of 1"),
    pytest.param({"causal": True, "window_size": 3, "softmax_scale": 0.3}, id="window of 3"),
    pytest.param({"causal": True, "window_size": 10**9}, id="window of all"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("queries", [1, 3])
def test_a_sequence_in_a_cache_has_the_result_of_the_sequence(
    queries: int, layout: dict[str, Any], options: dict[str, Any]
) -> None:
    """The cache is NaN outside of the sequences. The third sequence's window begins before its first key."""
    parts = random_sequences(LENGTHS, queries)
    arguments = cache_arguments(parts, **layout)
    result = parallax_attn_with_kvcache(**arguments, **options, return_state=True)
    check(result, combined(expected_of_each(parts, **options)), "fp32")
    assert torch.equal(parallax_attn_with_kvcache(**arguments, **options), result.out)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_queries_attend_to_their_own_sequences(layout: dict[str, Any], options: dict[str, Any]) -> None:
    parts = random_sequences(LENGTHS, (4, 2, 7, 0))
    result = parallax_attn_with_kvcache(**cache_arguments(parts, packed=True, **layout), **options, return_state=True)
    assert result.out.shape == result.v_mean.shape == (13, HEADS, HEAD_DIM)
    assert result.lse.shape == result.t_mean.shape == (HEADS, 13)
    check(result, combined(expected_of_each(parts, **options), packed=True), "fp32")


@pytest.mark.parametrize(
    ("k_scale", "v_scale"),
    [
        (None, None),
        (0.5, 3),
        (torch.tensor([0.5]), None),
        (torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.25])),
        (torch.tensor([0.5, 2.0]), torch.tensor([3.0])),
        (0.5, torch.tensor([3.0, 0.25])),
    ],
    ids=["none", "numbers", "one for all heads", "one a head", "both kinds", "a number and one a head"],
)
@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")], ids=["bf16", "fp16"])
def test_fp8_caches_of_cpu_tensors(
    dtype: torch.dtype, name: str, cache: torch.dtype, k_scale: Any, v_scale: Any
) -> None:
    parts = random_sequences(LENGTHS, 2, dtype, cache)
    arguments = cache_arguments(parts, page_size=4)
    result = parallax_attn_with_kvcache(**arguments, causal=True, k_scale=k_scale, v_scale=v_scale, return_state=True)
    scales = {key: 1.0 if x is None else x for key, x in (("k_scale", k_scale), ("v_scale", v_scale))}
    check(result, combined(expected_of_each(parts, causal=True, **scales)), name)
    assert result.out.dtype == result.v_mean.dtype == dtype


def test_a_changed_scale_takes_effect() -> None:
    """Scales are not part of a plan."""
    parts = random_sequences(LENGTHS, 1, torch.bfloat16, F8)
    arguments = cache_arguments(parts)
    for scale in (0.5, 2.0):
        result = parallax_attn_with_kvcache(**arguments, v_scale=scale)
        assert_close(result, combined(expected_of_each(parts, v_scale=scale)).out, "bf16")


@pytest.mark.parametrize(("queries", "lengths"), [(1, (6, 0, 3)), (3, (6, 3, 4))])
def test_a_shared_prefix_merged_with_each_sequences_rest_equals_the_whole(
    queries: int, lengths: tuple[int, ...]
) -> None:
    """Cascade attention: all queries as one sequence over the prefix, then each query over its own keys."""
    prefix, suffix = random_sequences((8,))[0], random_sequences(lengths, queries)
    packed = cache_arguments(suffix, packed=True)
    together = {name: packed[name][None] for name in ("q", "r")}
    shared = parallax_attn_with_kvcache(**together, k_cache=prefix.k[None], v_cache=prefix.v[None], return_state=True)
    rest = parallax_attn_with_kvcache(**packed, causal=True, return_state=True)
    joined = merge_states(State(*(x[0] for x in shared)), rest)
    whole_ones = [part._replace(k=torch.cat([prefix.k, part.k]), v=torch.cat([prefix.v, part.v])) for part in suffix]
    check(joined, combined(expected_of_each(whole_ones, causal=True), packed=True), "fp32")


def test_two_merged_halves_of_a_cache_equal_the_whole() -> None:
    """The left padding of the second half is the first half; one query per sequence sees both halves entirely."""
    arguments = cache_arguments(random_sequences((9, 2, 6)))
    ends = arguments.pop("cache_seqlens")
    middle = torch.tensor([4, 0, 6], dtype=torch.int32)
    first = parallax_attn_with_kvcache(**arguments, cache_seqlens=middle, return_state=True)
    second = parallax_attn_with_kvcache(**arguments, cache_seqlens=ends, cache_leftpad=middle, return_state=True)
    check(merge_states(first, second), combined(expected_of_each(random_sequences((9, 2, 6)))), "fp32")


@pytest.mark.parametrize("length", [0, 3, 12])
def test_lengths_as_tensor_and_as_int_agree(length: int) -> None:
    arguments = cache_arguments(random_sequences((9, 9), 2))
    arguments["k_cache"][:, length:] = arguments["v_cache"][:, length:] = float("nan")
    del arguments["cache_seqlens"]
    if length > 9:
        arguments = {
            **arguments,
            "k_cache": arguments["k_cache"].nan_to_num(1.0),
            "v_cache": arguments["v_cache"].nan_to_num(1.0),
        }
    lengths = torch.full((2,), length, dtype=torch.int32)
    by_tensor = parallax_attn_with_kvcache(**arguments, cache_seqlens=lengths, causal=True)
    by_int = parallax_attn_with_kvcache(**arguments, cache_seqlens=length, causal=True)
    assert torch.equal(by_tensor, by_int)
    assert torch.isfinite(by_tensor).all()
    assert bool(by_tensor.any()) == (length > 0)


def test_out_is_written_and_returned() -> None:
    arguments = cache_arguments(random_sequences(LENGTHS))
    out = torch.full((4, 1, HEADS, HEAD_DIM), float("nan"))
    assert parallax_attn_with_kvcache(**arguments, out=out) is out
    assert torch.equal(out, parallax_attn_with_kvcache(**arguments))
    state = parallax_attn_with_kvcache(**arguments, out=out, return_state=True)
    assert state.out is out


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("case", ["int 0", "lengths of 0", "a table without pages", "no keys in the cache"])
def test_without_keys_the_output_is_zero(case: str, return_state: bool) -> None:
    arguments = cache_arguments(random_sequences(LENGTHS, 2), page_size=4 * (case == "a table without pages"))
    arguments["cache_seqlens"] = 0 if case == "int 0" else torch.zeros(4, dtype=torch.int32)
    if case == "a table without pages":
        arguments["page_table"] = arguments["page_table"][:, :0]
    elif case == "no keys in the cache":
        arguments = {**arguments, **{name: arguments[name][:, :0] for name in ("k_cache", "v_cache")}}
    result = parallax_attn_with_kvcache(**arguments, return_state=return_state)
    out = result.out if return_state else result
    assert torch.equal(out, torch.zeros(4, 2, HEADS, HEAD_DIM))
    if return_state:
        assert torch.equal(result.lse, torch.full((4, HEADS, 2), -torch.inf))
        assert not result.t_mean.any()
        assert not result.v_mean.any()


def test_no_queries_give_an_empty_output() -> None:
    arguments = cache_arguments(random_sequences(LENGTHS, 0))
    assert parallax_attn_with_kvcache(**arguments).shape == (4, 0, HEADS, HEAD_DIM)
    packed = cache_arguments(random_sequences(LENGTHS, 0), packed=True)
    state = parallax_attn_with_kvcache(**packed, return_state=True)
    assert (state.out.shape, state.lse.shape) == ((0, HEADS, HEAD_DIM), (HEADS, 0))


@pytest.mark.parametrize("head_dim", [8, 72, 96, 256])
def test_head_dims(head_dim: int) -> None:
    draw = torch.Generator().manual_seed(head_dim)
    q, k = torch.randn(2, 3, 2, head_dim, generator=draw), torch.randn(2, 5, 1, head_dim, generator=draw)
    result = parallax_attn_with_kvcache(q, q / 8, k, k, causal=True)
    assert_close(result, reference_forward(q, q / 8, k, k, causal=True).out, "fp32")


def test_cpu_tensors_need_no_workspace() -> None:
    for layout in ({}, {"before": BEFORE, "page_size": 3}):
        arguments = cache_arguments(random_sequences(LENGTHS, 3), **layout)
        assert kvcache_workspace_size(**arguments, causal=True, window_size=2, return_state=True) == 0
    with pytest.raises(ArgumentError, match=r"^cache_seqlens: got "):
        kvcache_workspace_size(**{**arguments, "cache_seqlens": None})


# Refused arguments


def dense() -> dict[str, Any]:
    """Two sequences in a cache of 7 keys."""
    names = {"q": "q", "r": "r", "k_cache": "k", "v_cache": "v"}
    parts = random_sequences((7, 7), 2)
    return {name: torch.stack([getattr(part, of) for part in parts]) for name, of in names.items()}


def paged_arguments() -> dict[str, Any]:
    return cache_arguments(random_sequences((7, 5), 2), page_size=2)


def packed() -> dict[str, Any]:
    """Sequences of 3 and 1 queries."""
    return cache_arguments(random_sequences((7, 5), (3, 1)), packed=True)


def fp8_arguments() -> dict[str, Any]:
    return cache_arguments(random_sequences((7, 5), 2, torch.bfloat16, F8))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


REFUSED_DENSE = [
    ({"q": 3}, "q"),
    ({"q": torch.zeros(2, 4, 16)}, "q"),
    ({"q": torch.zeros(2, 2, 4, 16, dtype=torch.float64)}, "q"),
    ({"q": torch.zeros(2, 2, 16, 4).transpose(2, 3)}, "q"),
    ({"q": torch.zeros(2, 2, 4, 12), "r": torch.zeros(2, 2, 4, 12)}, "q"),
    ({"r": None}, "r"),
    ({"r": torch.zeros(2, 1, 4, 16)}, "r"),
    ({"r": torch.zeros(2, 2, 4, 16, dtype=torch.float16)}, "r"),
    ({"k_cache": torch.zeros(2, 7, 3, 16)}, "k_cache"),
    ({"k_cache": torch.zeros(2, 7, 2, 8)}, "k_cache"),
    (dict.fromkeys(("k_cache", "v_cache"), torch.zeros(3, 7, 2, 16)), "k_cache"),
    ({"k_cache": torch.zeros(7, 2, 16)}, "k_cache"),
    ({"k_cache": torch.zeros(2, 7, 2, 16, dtype=torch.bfloat16)}, "k_cache"),
    ({"k_cache": torch.zeros(2, 7, 2, 16).to(F8)}, "k_cache"),  # with fp32 queries
    ({"k_cache": torch.zeros(2, 7, 2, 16, device="meta"), "softmax_scale": 0.7}, "k_cache"),  # a call without a plan
    ({"k_cache": torch.zeros(2, 7, 2, 16, requires_grad=True)}, "k_cache"),
    ({"v_cache": torch.zeros(2, 9, 2, 16)}, "v_cache"),
    ({"v_cache": torch.zeros(2, 7, 2, 16, dtype=torch.float16)}, "v_cache"),
    ({"v_cache": torch.zeros(2, 7, 2, 16, requires_grad=True)}, "v_cache"),
    ({"cache_seqlens": 8}, "cache_seqlens"),
    ({"cache_seqlens": -1}, "cache_seqlens"),
    ({"cache_seqlens": True}, "cache_seqlens"),
    ({"cache_seqlens": [1, 2]}, "cache_seqlens"),
    ({"cache_seqlens": torch.tensor([1, 2])}, "cache_seqlens"),
    ({"cache_seqlens": int32(1)}, "cache_seqlens"),
    ({"cache_seqlens": int32(1, 0, 2, 0)[::2]}, "cache_seqlens"),
    ({"cache_seqlens": int32(1, 2).to("meta")}, "cache_seqlens"),
    ({"cache_leftpad": 1}, "cache_leftpad"),
    ({"cache_leftpad": torch.tensor([1.0, 2.0])}, "cache_leftpad"),
    ({"cache_leftpad": int32(1, 2, 3)}, "cache_leftpad"),
    ({"max_seqlen_q": 2}, "max_seqlen_q"),  # without cu_seqlens_q
    ({"causal": 1}, "causal"),
    ({"window_size": 3}, "window_size"),
    ({"window_size": 0, "causal": True}, "window_size"),
    ({"window_size": True, "causal": True}, "window_size"),
    ({"softmax_scale": 0.0}, "softmax_scale"),
    ({"softmax_scale": "1"}, "softmax_scale"),
    ({"k_scale": 2.0}, "k_scale"),  # a scale for a 16-bit cache
    ({"v_scale": torch.ones(1)}, "v_scale"),
    ({"return_state": 1}, "return_state"),
    ({"out": 1}, "out"),
    ({"out": torch.zeros(2, 1, 4, 16)}, "out"),
    ({"out": torch.zeros(2, 2, 4, 16, dtype=torch.float16)}, "out"),
]
REFUSED_PAGED = [
    ({"cache_seqlens": None}, "cache_seqlens"),
    ({"cache_seqlens": 3}, "cache_seqlens"),
    ({"page_table": [[0], [1]]}, "page_table"),
    ({"page_table": torch.zeros(2, 5)}, "page_table"),
    ({"page_table": torch.zeros(3, 5, dtype=torch.int32)}, "page_table"),
    ({"page_table": torch.zeros(2, dtype=torch.int32)}, "page_table"),
    ({"page_table": torch.zeros(5, 2, dtype=torch.int32).T}, "page_table"),
    ({"k_cache": torch.zeros(12, 2, 3, 16)}, "k_cache"),
    ({"v_cache": torch.zeros(12, 3, 2, 16)}, "v_cache"),
    ({"v_cache": torch.zeros(12, 2, 2, 32)[..., :16]}, "v_cache"),  # strides differ from k_cache
]
REFUSED_PACKED = [
    ({"q": torch.zeros(1, 4, 4, 16)}, "q"),
    ({"r": torch.zeros(5, 4, 16)}, "r"),
    ({"cu_seqlens_q": [0, 3, 4]}, "cu_seqlens_q"),
    ({"cu_seqlens_q": torch.tensor([0, 3, 4])}, "cu_seqlens_q"),
    ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_q"),
    ({"cu_seqlens_q": int32(0, 0, 3, 0, 4, 0)[::2]}, "cu_seqlens_q"),
    ({"cu_seqlens_q": int32(0, 4)}, "k_cache"),  # one sequence, but two in the cache
    ({"max_seqlen_q": None}, "max_seqlen_q"),
    ({"max_seqlen_q": -1}, "max_seqlen_q"),
    ({"max_seqlen_q": 3.0}, "max_seqlen_q"),
    ({"max_seqlen_q": torch.tensor(3)}, "max_seqlen_q"),
    ({"cache_seqlens": int32(7, 5, 1)}, "cache_seqlens"),
    ({"out": torch.zeros(4, 2, 16)}, "out"),
]
REFUSED_FP8 = [
    ({"v_cache": torch.zeros(2, 10, 2, 16).to(torch.float8_e5m2)}, "v_cache"),
    ({"v_cache": torch.zeros(2, 10, 2, 16, dtype=torch.bfloat16)}, "v_cache"),
    ({"v_cache": torch.zeros(2, 10, 2, 17).to(F8)[..., :16]}, "v_cache"),  # an odd head stride
    ({"k_cache": torch.zeros(2, 10, 2, 18).to(F8)[..., 1:17]}, "k_cache"),  # offset by one element
    ({"k_scale": 0.0}, "k_scale"),
    ({"k_scale": float("inf")}, "k_scale"),
    ({"k_scale": True}, "k_scale"),
    ({"k_scale": "1"}, "k_scale"),
    ({"k_scale": torch.ones(3)}, "k_scale"),
    ({"v_scale": torch.ones(2, dtype=torch.float16)}, "v_scale"),
    ({"v_scale": torch.ones(())}, "v_scale"),
    ({"v_scale": torch.ones(4)[::2]}, "v_scale"),
    ({"v_scale": torch.ones(2, device="meta")}, "v_scale"),
]
REFUSED = [
    pytest.param(arguments, change, argument, id=f"{arguments.__name__}-{n}-{argument}")
    for arguments, cases in (
        (dense, REFUSED_DENSE),
        (paged_arguments, REFUSED_PAGED),
        (packed, REFUSED_PACKED),
        (fp8_arguments, REFUSED_FP8),
    )
    for n, (change, argument) in enumerate(cases)
]


@pytest.mark.parametrize(("arguments", "change", "argument"), REFUSED)
def test_a_bad_argument_is_named(arguments: Any, change: dict[str, Any], argument: str) -> None:
    """Also right after a valid call with the same plan key."""
    parallax_attn_with_kvcache(**arguments())
    if arguments is dense:
        parallax_attn_with_kvcache(**arguments(), cache_seqlens=1)
    with pytest.raises(ArgumentError, match=r"got .*; allowed: ") as caught:
        parallax_attn_with_kvcache(**{**arguments(), **change})
    assert caught.value.argument == argument


@pytest.mark.parametrize("arguments", [dense, paged_arguments, packed, fp8_arguments])
def test_calls_are_valid_without_the_change(arguments: Any) -> None:
    """The refused calls above are valid without their change."""
    assert torch.isfinite(parallax_attn_with_kvcache(**arguments())).all()


def test_fp8_offsets_that_are_not_multiples_of_4_are_refused_in_every_call() -> None:
    """Also if a plan for these sizes and strides exists, since offsets are not part of its key."""
    cache = torch.zeros(2, 7, 2, 20).to(torch.float8_e4m3fn)
    q = torch.zeros(2, 1, 4, 16, dtype=torch.bfloat16)
    parallax_attn_with_kvcache(q, q, cache[..., :16], cache[..., :16])
    with pytest.raises(ArgumentError, match=r"k_cache: got strides .* from 2; allowed: multiples of 4"):
        parallax_attn_with_kvcache(q, q, cache[..., 2:18], cache[..., :16])


def test_with_no_sequences_padding_rows_are_zero() -> None:
    arguments = packed()
    rows, nothing = arguments["q"].shape, torch.zeros(1, dtype=torch.int32)
    arguments |= {
        "cu_seqlens_q": nothing,
        "cache_seqlens": nothing[:0],
        "page_table": torch.zeros(0, 3, dtype=torch.int32),
    }
    assert torch.equal(parallax_attn_with_kvcache(**arguments), torch.zeros(rows))


@pytest.mark.parametrize("layout", [{}, {"page_size": 4}], ids=["dense", "paged"])
@pytest.mark.parametrize("lowest", [-1, -(2**31)])
def test_a_length_below_0_counts_as_0(lowest: int, layout: dict[str, Any]) -> None:
    arguments = cache_arguments(random_sequences(LENGTHS, 1), **layout)
    arguments["cache_seqlens"] = torch.tensor([lowest, *LENGTHS[1:]], dtype=torch.int32)
    expected = arguments | {"cache_seqlens": arguments["cache_seqlens"].clamp(min=0)}
    for x, y in zip(*(parallax_attn_with_kvcache(**x, return_state=True) for x in (arguments, expected)), strict=True):
        assert torch.equal(x, y)


def test_the_error_for_an_unsupported_head_dim_lists_the_supported_ones() -> None:
    x = torch.zeros(1, 3, 2, 264)
    with pytest.raises(ArgumentError, match="q: got head_dim 264; allowed: a multiple of 8 from 8 to 256"):
        parallax_attn_with_kvcache(x, x, x, x)


def test_inputs_that_require_grad_are_accepted_under_no_grad() -> None:
    arguments = {name: tensor.requires_grad_() for name, tensor in dense().items()}
    with torch.no_grad():
        assert not parallax_attn_with_kvcache(**arguments).requires_grad


@pytest.mark.parametrize(
    "workspace",
    [
        16,
        torch.zeros(127, dtype=torch.uint8),
        torch.zeros(128, dtype=torch.int8),
        torch.zeros(256, dtype=torch.uint8)[::2],
        torch.zeros(256, dtype=torch.uint8)[1:],
        torch.zeros(128, dtype=torch.uint8, device="meta"),
    ],
    ids=["an int", "too small", "int8", "strided", "unaligned", "elsewhere"],
)
def test_an_unsuitable_workspace_is_refused(workspace: Any) -> None:
    q = dense()["q"]
    check_workspace(torch.zeros(128, dtype=torch.uint8), 128, q)
    with pytest.raises(ArgumentError, match=r"^workspace: got .*; allowed: a contiguous uint8 tensor of 128 bytes"):
        check_workspace(workspace, 128, q)


def test_graphed_decode_needs_cuda_tensors_and_no_workspace() -> None:
    with pytest.raises(ArgumentError, match=r"^q: got on cpu"):
        GraphedDecode(**dense())
    with pytest.raises(ArgumentError, match=r"^workspace: "):
        GraphedDecode(**dense(), workspace=torch.zeros(16, dtype=torch.uint8))
    with pytest.raises(ArgumentError, match=r"^window_size: "):
        GraphedDecode(**dense(), window_size=3)
