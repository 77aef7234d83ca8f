"""The public functions and the layer under torch.compile: one graph, forward and backward, for every length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
from attention_samples import formula, normal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from parallax_gen import parallax_attn_func
from parallax_gen.nn import ParallaxAttention

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of torch's compiler


@pytest.fixture(autouse=True)
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any, backend: str) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def operators(counter: CompileCounterWithBackend) -> list[str]:
    """This package's operators in the graphs, in order."""
    names = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    return [name for name in names if name.startswith("parallax_gen")]


def agree(result: Tensor, expected: Tensor, layer: torch.nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(result, expected)
    leaves, do = [x, *layer.parameters()], torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(result, leaves, do), torch.autograd.grad(expected, leaves, do), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("aot_eager", {"window_size": 5, "qk_norm": True, "rope_theta": 1e4}),
        ("inductor", {}),
    ],
)
def test_one_graph_of_a_layer_for_every_length(backend: str, options: dict[str, Any]) -> None:
    layer = ParallaxAttention(32, 4, 2, **options)
    call, counter = compiled(layer, backend)
    for seqlen in (7, 9, 4, 2, 17):
        x = torch.randn(2, seqlen, 32, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 1)
        agree(call(x), layer(x), layer, x)
    assert counter.frame_count == 1


def test_one_graph_of_a_layer_for_every_packing() -> None:
    layer = ParallaxAttention(32, 4, 2, window_size=5, rope_theta=1e4)
    call, counter = compiled(layer, "aot_eager")
    graphs = set()
    for longest, lengths in ((4, (3, 0, 4)), (9, (9, 2, 3)), (7, (5, 6, 7)), (13, (1, 2, 13)), (6, (6, 0, 0))):
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        x = torch.randn(sum(lengths), 32, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        agree(call(x, starts, longest), layer(x, starts, longest), layer, x)
        graphs.add(counter.frame_count)
    assert max(graphs) <= 2  # torch specialises on the first max_seqlen, and generalises at the second


def test_without_gradients_only_out_is_computed() -> None:
    q, k = normal(2, 5, 4, 16), normal(2, 7, 2, 16)
    call, counter = compiled(lambda q, k: parallax_attn_func(q, q / 4, k, k, causal=True), "aot_eager")
    out = call(q, k)
    torch.testing.assert_close(out, parallax_attn_func(q, q / 4, k, k, causal=True))
    with torch.no_grad():
        call(q.requires_grad_(), k)
    assert set(operators(counter)) == {"parallax_gen.attention.default"}
    call(q, k)
    assert operators(counter)[-1] == "parallax_gen.attention_with_stats.default"


def test_out_and_statistics() -> None:
    q, k = normal(2, 5, 4, 16), normal(2, 7, 2, 16)
    call, _ = compiled(lambda out: parallax_attn_func(q, q / 4, k, k, out=out, return_stats=True), "aot_eager")
    out = torch.empty_like(q)
    result = call(out)
    for a, b in zip(result, parallax_attn_func(q, q / 4, k, k, return_stats=True), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(out, result[0])


def test_under_autocast() -> None:
    layer = ParallaxAttention(32, 4, 2, qk_norm=True)
    call, _ = compiled(layer, "aot_eager")
    x = torch.randn(2, 5, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = call(x), layer(x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert x.grad is not None


def test_tangents_and_transforms_in_a_graph() -> None:
    """Operators do not see tangents: fullgraph is refused where it would drop one; otherwise the graph breaks."""
    q, d = normal(2, 5, 4, 16), normal(2, 5, 4, 16)

    def attend(x: Tensor) -> Tensor:
        out: Tensor = parallax_attn_func(x, q / 4, q, q, causal=True)  # type: ignore[assignment]
        return out

    def wanted(x: Tensor) -> Tensor:
        return formula(x, q / 4, q, q, causal=True)

    call, _ = compiled(attend, "aot_eager")
    with fw.dual_level(), pytest.raises(Exception, match=r"forward-mode AD: got under torch\.compile"):
        call(fw.make_dual(q, d))
    call, _ = compiled(lambda x: torch.func.jvp(attend, (x,), (d,))[1], "aot_eager")
    with pytest.raises(Exception, match=r"under no other transform of torch"):
        call(q)
    batched, _ = compiled(torch.func.vmap(attend), "aot_eager")
    torch.testing.assert_close(batched(q[None])[0].double(), wanted(q), rtol=1e-5, atol=1e-5)
    broken = torch.compile(lambda x: torch.func.jvp(attend, (x,), (d,))[1], backend="aot_eager")
    tangent = torch.func.jvp(wanted, (q.double(),), (d.double(),))[1]
    torch.testing.assert_close(broken(q).double(), tangent, rtol=1e-5, atol=1e-5)
    per_sample = torch.compile(torch.func.vmap(torch.func.grad(lambda x: (attend(x) ** 2).sum())), backend="aot_eager")
    gradient = torch.func.grad(lambda x: (wanted(x) ** 2).sum())(q.double())
    torch.testing.assert_close(per_sample(q[None])[0].double(), gradient, rtol=1e-4, atol=1e-4)


def test_compiled_autograd_traces_the_backward() -> None:
    from torch._dynamo import compiled_autograd

    inputs = [normal(2, 5, heads, 16).requires_grad_() for heads in (4, 4, 2, 2)]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(parallax_attn_func(*inputs).sum(), inputs)  # type: ignore[union-attr]

    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        result = gradients()
    for a, b in zip(result, gradients(), strict=True):
        torch.testing.assert_close(a, b)
