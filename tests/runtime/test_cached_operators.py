"""Attention against a KV cache under tracing, FLOP counting, vmap or autodiff: one operator, or an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cache_samples import HEAD_DIM, HEADS, KV_HEADS, cache_arguments, random_sequences
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from parallax_gen import State, parallax_attn_varlen_func, parallax_attn_with_kvcache
from parallax_gen.errors import ArgumentError
from parallax_gen.runtime import kvcache as cached

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings about CPU tensors and of torch's compiler

LENGTHS = (9, 0, 5, 1)
BEFORE = (0, 4, 7, 2)
F8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any, backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def operators(graphs: list[Any]) -> set[str]:
    names = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    return {name for name in names if name.startswith("parallax_gen")}


def same(result: Any, expected: Any) -> None:
    assert type(result) is type(expected)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(batch: int, seqlen: int, queries: int = 1) -> tuple[Tensor, Tensor]:
    """q, and a cache used for keys and values."""
    draw = torch.Generator().manual_seed(seqlen)
    q = torch.randn(batch, queries, HEADS, HEAD_DIM, generator=draw)
    return q, torch.randn(batch, seqlen, KV_HEADS, HEAD_DIM, generator=draw)


# torch.compile


COMPILED_CALLS = [
    pytest.param(cache_arguments(random_sequences(LENGTHS, 3)), {"causal": True, "window_size": 2}, id="window"),
    pytest.param(cache_arguments(random_sequences(LENGTHS), before=BEFORE), {"softmax_scale": 0.3}, id="left padding"),
    pytest.param(
        cache_arguments(random_sequences(LENGTHS, 3), before=BEFORE, page_size=3), {"causal": True}, id="pages"
    ),
    pytest.param(
        cache_arguments(random_sequences(LENGTHS, (4, 2, 7, 0)), packed=True, page_size=3),
        {"causal": True},
        id="packed",
    ),
    pytest.param(
        cache_arguments(random_sequences(LENGTHS, 2, torch.bfloat16, F8), page_size=4),
        {"k_scale": 0.5, "v_scale": torch.tensor([3.0, 0.25])},
        id="eight bits",
    ),
    pytest.param({**cache_arguments(random_sequences((9, 9), 2)), "cache_seqlens": 8}, {"causal": True}, id="an int"),
    pytest.param({**cache_arguments(random_sequences((9, 9))), "cache_seqlens": None}, {}, id="all keys"),
]


@pytest.mark.parametrize(("arguments", "options"), COMPILED_CALLS)
def test_one_graph(arguments: dict[str, Any], options: dict[str, Any]) -> None:
    call, counter = compiled(
        lambda q: parallax_attn_with_kvcache(**{**arguments, "q": q}, **options, return_state=True)
    )
    result = call(arguments["q"])
    assert isinstance(result, State)
    expected = parallax_attn_with_kvcache(**arguments, **options, return_state=True)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)  # NaN for keys past the length
    assert operators(counter.graphs) == {"parallax_gen.attention_with_kvcache_state.default"}


def test_out_is_written_and_a_workspace_is_checked() -> None:
    inputs = cache_arguments(random_sequences(LENGTHS))
    call, counter = compiled(lambda out, space: parallax_attn_with_kvcache(**inputs, out=out, workspace=space))
    out = torch.full((4, 1, HEADS, HEAD_DIM), float("nan"))
    assert call(out, torch.zeros(64, dtype=torch.uint8)) is out
    torch.testing.assert_close(out, parallax_attn_with_kvcache(**inputs))
    assert operators(counter.graphs) == {"parallax_gen.attention_with_kvcache.default"}
    with pytest.raises(ArgumentError, match=r"^workspace: got torch.int8"):
        torch.compile(parallax_attn_with_kvcache, backend="eager")(
            **inputs, workspace=torch.zeros(64, dtype=torch.int8)
        )


def test_a_cache_that_grows_is_one_graph() -> None:
    call, counter = compiled(lambda q, k: parallax_attn_with_kvcache(q, q / 4, k, k, causal=True))
    for batch, seqlen, queries in ((2, 5, 3), (2, 6, 3), (3, 9, 2), (5, 31, 4)):
        q, k = dense(batch, seqlen, queries)
        for x, dims in ((q, (0, 1)), (k, (0, 1))):
            for dim in dims:
                torch._dynamo.mark_dynamic(x, dim)
        torch.testing.assert_close(call(q, k), parallax_attn_with_kvcache(q, q / 4, k, k, causal=True))
    assert counter.frame_count == 1


def test_one_graph_for_lengths_and_tables_of_any_batch() -> None:
    """Error messages with sizes are formatted only on errors: torch would specialise on the sizes."""
    call, counter = compiled(
        lambda q, k, n, pages: parallax_attn_with_kvcache(q, q, k, k, cache_seqlens=n, page_table=pages)
    )
    for batch, columns, page_size in ((2, 3, 4), (3, 2, 6), (5, 4, 8)):
        q, k = dense(batch, 1)[0], dense(9, page_size)[1]
        lengths, pages = ints(*range(batch)), torch.arange(batch * columns).view(batch, columns).int() % 9
        for x, dims in ((q, (0,)), (k, (0, 1)), (lengths, (0,)), (pages, (0, 1))):
            for dim in dims:
                torch._dynamo.mark_dynamic(x, dim)
        expected = parallax_attn_with_kvcache(q, q, k, k, cache_seqlens=lengths, page_table=pages)
        torch.testing.assert_close(call(q, k, lengths, pages), expected)
    assert counter.frame_count == 1


def test_an_int_length_and_max_seqlen_become_symbolic() -> None:
    q, k = dense(2, 9)
    call, counter = compiled(lambda n: parallax_attn_with_kvcache(q, q, k, k, cache_seqlens=n))
    for length in (3, 5, 7, 8):
        torch.testing.assert_close(call(length), parallax_attn_with_kvcache(q, q, k, k, cache_seqlens=length))
    assert counter.frame_count <= 2  # torch specialises on the first value, and generalises at the second
    inputs = cache_arguments(random_sequences(LENGTHS, (4, 2, 7, 0)), packed=True)
    del inputs["max_seqlen_q"]
    call, counter = compiled(lambda n: parallax_attn_with_kvcache(**inputs, max_seqlen_q=n))
    for longest in (7, 8, 9, 12):
        torch.testing.assert_close(call(longest), parallax_attn_with_kvcache(**inputs, max_seqlen_q=longest))
    assert counter.frame_count <= 2


def test_inductor() -> None:
    q, k = dense(2, 9, 3)
    call, _ = compiled(lambda q, n: parallax_attn_with_kvcache(q, q, k, k, cache_seqlens=n), "inductor")
    lengths = ints(5, 9)  # nothing else is in the graph, since compiling C++ takes seconds
    torch.testing.assert_close(call(q, lengths), parallax_attn_with_kvcache(q, q, k, k, cache_seqlens=lengths))


def test_invalid_arguments_are_refused_while_tracing() -> None:
    q, k = dense(2, 9)
    call = torch.compile(parallax_attn_with_kvcache, backend="eager")
    with pytest.raises(ArgumentError, match=r"^k_cache: got 3 kv heads; allowed: a divisor of q's 4 heads"):
        call(q, q, torch.zeros(2, 9, 3, HEAD_DIM), k)
    with pytest.raises(ArgumentError, match=r"^cache_seqlens: got torch.int32 of shape \(3,\)"):
        call(q, q, k, k, cache_seqlens=ints(1, 2, 3))
    with pytest.raises(ArgumentError, match=r"^q: got a tensor that needs gradients"):
        call(q.clone().requires_grad_(), q, k, k)


# torch.export


class Step(nn.Module):
    def forward(self, q: Tensor, k: Tensor, lengths: Tensor) -> State:
        result = parallax_attn_with_kvcache(q, q / 4, k, k, cache_seqlens=lengths, causal=True, return_state=True)
        assert isinstance(result, State)
        return result


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_step_accepts_other_sizes(strict: bool) -> None:
    batch, seqlen = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("seqlen", min=2, max=4096)
    sizes = ({0: batch}, {0: batch, 1: seqlen}, {0: batch})
    program = torch.export.export(Step(), (*dense(3, 9, 2), ints(2, 9, 5)), dynamic_shapes=sizes, strict=strict)
    assert operators([program.graph_module]) == {"parallax_gen.attention_with_kvcache_state.default"}
    inputs = (*dense(4, 30, 2), ints(30, 0, 7, 2))
    same([*program.module()(*inputs)], [*Step()(*inputs)])


class Packed(nn.Module):
    def forward(self, q: Tensor, starts: Tensor) -> Tensor:
        longest = q.shape[0]
        by_varlen = parallax_attn_varlen_func(q, q, q, q, starts, starts, longest, longest)
        keys = {"k_cache": q[None], "v_cache": q[None], "cu_seqlens_q": starts, "max_seqlen_q": longest}
        two = parallax_attn_with_kvcache(q, q, **keys)
        assert isinstance(by_varlen, Tensor)
        assert isinstance(two, Tensor)
        return by_varlen + two


def test_non_strict_export_handles_symbolic_sizes() -> None:
    """In non-strict export Python runs with SymInt sizes, which are no ints."""
    rows = torch.export.Dim("rows", min=2, max=64)
    inputs = torch.randn(5, HEADS, HEAD_DIM), ints(0, 5)
    program = torch.export.export(Packed(), inputs, dynamic_shapes=({0: rows}, None), strict=False)
    inputs = torch.randn(7, HEADS, HEAD_DIM), ints(0, 7)
    torch.testing.assert_close(program.module()(*inputs), Packed()(*inputs))


def test_operators_pass_opcheck_with_a_cache() -> None:
    q, k = dense(2, 9)
    inputs = (q, q, k, k, ints(3, 9), *[None] * 6, True, 3, None, 1.5, True)
    for name in ("attention_with_kvcache", "attention_with_kvcache_state"):
        torch.library.opcheck(getattr(torch.ops.parallax_gen, name).default, inputs)


def test_an_eager_call_bypasses_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(cached, "_attention", refuse)
    q, k = dense(2, 9)
    with forward_ad.dual_level(), torch.inference_mode():
        parallax_attn_with_kvcache(q, q, k, nn.Parameter(k, requires_grad=False))
    torch.func.vmap(lambda _: parallax_attn_with_kvcache(q, q, k, k))(q)  # unbatched inputs
    with pytest.raises(AssertionError), FlopCounterMode(display=False):
        parallax_attn_with_kvcache(q, q, k, k)


# FLOPs


@pytest.mark.parametrize(
    ("arguments", "options", "pairs"),
    [
        (cache_arguments(random_sequences(LENGTHS, 3)), {}, 3 * 15),
        (cache_arguments(random_sequences(LENGTHS), before=BEFORE), {"causal": True}, 15),
        (cache_arguments(random_sequences(LENGTHS), page_size=3), {"causal": True, "window_size": 4}, 4 + 0 + 4 + 1),
        (cache_arguments(random_sequences((9, 4), (2, 3)), packed=True), {}, 2 * 9 + 3 * 4),
        (
            cache_arguments(random_sequences((9, 4), 4)),
            {"causal": True, "return_state": True},
            4 * 5 + 4 * 4 / 2 + 4 * 4 / 2,
        ),
    ],
    ids=["lengths", "left padding", "window in pages", "packed", "causal"],
)
def test_flops(arguments: dict[str, Any], options: dict[str, Any], pairs: float) -> None:
    """4 matmuls of multiply-adds; causal squares count half."""
    with FlopCounterMode(display=False) as counter:
        result = parallax_attn_with_kvcache(**arguments, **options)
    assert counter.get_total_flops() == 4 * 2 * HEADS * HEAD_DIM * pairs
    same([*result], [*parallax_attn_with_kvcache(**arguments, **options)])


# Transforms


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(
    ("layout", "dims"),
    [
        ({}, {"q": 0, "r": 1, "k_cache": 0, "v_cache": 2, "cache_seqlens": 0}),
        ({"before": BEFORE}, {"q": 4, "k_cache": 0, "v_cache": 0}),
        ({}, {"q": 0, "r": 0}),
        ({"page_size": 3}, {"q": 0, "page_table": 0, "cache_seqlens": 1}),
    ],
    ids=["all", "some", "one cache for all", "pages"],
)
def test_vmap(layout: dict[str, Any], dims: dict[str, int], state: bool) -> None:
    samples = [cache_arguments(random_sequences(lengths, 2), **layout) for lengths in (LENGTHS, (9, 7, 5, 1))]
    samples = [{name: x.nan_to_num(1.0) for name, x in sample.items()} for sample in samples]
    samples[1] |= {name: x for name, x in samples[0].items() if name not in dims}
    names = list(samples[0])
    args = [torch.stack([s[n] for s in samples], dims[n]) if n in dims else samples[0][n] for n in names]

    def attend(*inputs: Tensor) -> Any:
        return parallax_attn_with_kvcache(**dict(zip(names, inputs, strict=True)), causal=True, return_state=state)

    result = torch.func.vmap(attend, in_dims=tuple(dims.get(name) for name in names))(*args)
    per_sample = [attend(*sample.values()) for sample in samples]
    expected = [torch.stack(parts) for parts in zip(*per_sample, strict=True)] if state else torch.stack(per_sample)
    same([*result], [*expected])


def test_vmap_over_lengths_only_and_over_nothing() -> None:
    q, k = dense(2, 9)
    lengths = ints(9, 4, 1, 0, 2, 7).view(3, 2)
    result = torch.func.vmap(lambda n: parallax_attn_with_kvcache(q, q, k, k, cache_seqlens=n))(lengths)
    for output, n in zip(result, lengths, strict=True):
        torch.testing.assert_close(output, parallax_attn_with_kvcache(q, q, k, k, cache_seqlens=n))
    nothing = torch.func.vmap(lambda q: parallax_attn_with_kvcache(q, q, k, k))(q[None][:0])
    assert nothing.shape == (0, *q.shape)


class Mixed(nn.Module):
    def forward(self, q: Tensor, k: Tensor, starts: Tensor) -> Tensor:
        result = parallax_attn_with_kvcache(q, q, k, k, cu_seqlens_q=starts, max_seqlen_q=3)
        assert isinstance(result, Tensor)
        return result


def test_an_export_keeps_the_number_of_packed_sequences_dynamic() -> None:
    batch, rows = torch.export.Dim("batch", min=1), torch.export.Dim("rows")
    sizes = ({0: rows}, {0: batch}, {0: batch + 1})
    q, k = torch.randn(5, HEADS, HEAD_DIM), dense(2, 9)[1]
    program = torch.export.export(Mixed(), (q, k, ints(0, 2, 5)), dynamic_shapes=sizes, strict=False)
    inputs = torch.randn(6, HEADS, HEAD_DIM), dense(3, 9)[1], ints(0, 2, 5, 6)
    torch.testing.assert_close(program.module()(*inputs), Mixed()(*inputs))


def test_scales_have_no_derivatives() -> None:
    q, k = dense(2, 9)
    cache, scale = k.to(F8), torch.ones(1)
    with pytest.raises(ArgumentError, match=r"^k_scale: got a tensor that needs gradients"):
        parallax_attn_with_kvcache(q.half(), q.half(), cache, cache, k_scale=torch.nn.Parameter(scale))
    with forward_ad.dual_level(), pytest.raises(ArgumentError, match=r"^v_scale: got a tensor with a tangent"):
        parallax_attn_with_kvcache(q.half(), q.half(), cache, cache, v_scale=forward_ad.make_dual(scale, scale))
    with torch.no_grad():
        parallax_attn_with_kvcache(q.half(), q.half(), cache, cache, k_scale=torch.nn.Parameter(scale))


def test_vmapped_inputs_that_require_grad_are_refused() -> None:
    q, k = dense(2, 9)
    samples = torch.stack([q, q]).requires_grad_()
    with pytest.raises(ArgumentError, match=r"^q: got a tensor that needs gradients"):
        torch.vmap(lambda q: parallax_attn_with_kvcache(q, q, k, k))(samples)


def test_derivatives_are_refused() -> None:
    q, k = dense(2, 9)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(k, k)
        with pytest.raises(ArgumentError, match=r"^v_cache: got a tensor with a tangent \(forward-mode AD\)"):
            parallax_attn_with_kvcache(q, q, k, dual)
        with (
            FlopCounterMode(display=False),
            pytest.raises(ArgumentError, match=r"^k_cache: got a tensor with a tangent"),
        ):
            parallax_attn_with_kvcache(q, q, dual, k)
        assert parallax_attn_with_kvcache(q, q, k, k).shape == q.shape
        call = torch.compile(lambda k: parallax_attn_with_kvcache(q, q, k, k), backend="eager")
        # The tracer falls back to the eager call, whose error names the tensor.
        with pytest.raises(ArgumentError, match=r"^k_cache: got a tensor with a tangent"):
            call(dual)
    assert call(k).shape == q.shape
    with pytest.raises(ArgumentError, match=r"^q: got a tensor with a tangent"):
        torch.func.jvp(lambda q: parallax_attn_with_kvcache(q, q, k, k), (q,), (q,))
    with pytest.raises(ArgumentError, match=r"^q: got a tensor that needs gradients"):
        torch.func.grad(lambda q: parallax_attn_with_kvcache(q, q, k, k).sum())(q)
