"""Training steps in CUDA graphs on a card, captured by hand and by torch.compile: the bits of eager steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from training_inputs import leaves

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.runtime.plan import LaunchPlan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_in_a_cuda_graph(packed: bool) -> None:
    inputs = leaves((600,), (600,)) if packed else leaves((2, 300), (2, 300))
    starts = torch.tensor([0, 300, 600], device="cuda", dtype=torch.int32)
    do = torch.randn_like(inputs[0])

    def step() -> tuple[Tensor, ...]:
        if packed:
            out = parallax_attn_varlen_func(*inputs, starts, starts, 300, 300, causal=True)
        else:
            out = parallax_attn_func(*inputs, causal=True)
        assert isinstance(out, Tensor)
        return (out.detach(), *torch.autograd.grad(out, inputs, do))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for middle in (300, 320, 500):
        with torch.no_grad():
            for x in (*inputs, do):
                x.copy_(torch.randn_like(x) / 4)
        starts[1] = middle if middle <= 300 else 300
        graph.replay()
        for result, expected in zip(captured, step(), strict=True):
            assert torch.equal(result, expected)


@pytest.fixture
def launched_on(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stream of every launch: its handle, where it is being captured, else 0."""
    streams: list[int] = []
    launch = LaunchPlan.launch

    def note_stream(self: LaunchPlan, *arguments: Any, **options: Any) -> None:
        captured = torch.cuda.is_current_stream_capturing()
        streams.append(torch.cuda.current_stream().cuda_stream if captured else 0)
        launch(self, *arguments, **options)

    monkeypatch.setattr(LaunchPlan, "launch", note_stream)
    return streams


def test_a_captured_backward_runs_dqdr_on_a_second_stream(launched_on: list[int]) -> None:
    """In every layer, in every capture, and with the bits of eager steps."""
    inputs = leaves((2, 300), (2, 300))
    do = torch.randn_like(inputs[0])

    def step() -> tuple[Tensor, ...]:
        first = parallax_attn_func(*inputs, causal=True)
        second = parallax_attn_func(first, *inputs[1:], causal=True)
        assert isinstance(second, Tensor)
        return torch.autograd.grad(second, inputs, do)

    step()
    assert set(launched_on) == {0}
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        launched_on.clear()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream):
            grads = step()
        graphs.append((graph, grads))
        here = stream.cuda_stream
        beside = launched_on[4]
        assert beside not in (0, here)
        assert launched_on == [here, here, *[here, here, beside] * 2]  # two forwards; preprocess, dkdv, dqdr twice
    for graph, grads in graphs * 2:
        with torch.no_grad():
            for x in (*inputs, do):
                x.copy_(torch.randn_like(x) / 4)
        graph.replay()
        for result, expected in zip(grads, step(), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.filterwarnings("ignore")  # warnings of torch's compiler
def test_a_compiled_step_is_captured_with_its_backward(launched_on: list[int]) -> None:
    """mode="reduce-overhead": torch captures forward and backward in graphs of its own."""
    torch._dynamo.reset()
    inputs = leaves((2, 300), (2, 300))
    do = torch.randn_like(inputs[0])

    def attend(*x: Tensor) -> Tensor:
        out = parallax_attn_func(*x, causal=True)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(attend, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):  # the first compile, warm up and capture
        with torch.no_grad():
            for x in (*inputs, do):
                x.copy_(torch.randn_like(x) / 4)
        torch.compiler.cudagraph_mark_step_begin()
        grads = [x.clone() for x in torch.autograd.grad(compiled(*inputs), inputs, do)]
        for result, expected in zip(grads, torch.autograd.grad(attend(*inputs), inputs, do), strict=True):
            assert torch.equal(result, expected)
    assert len({*launched_on} - {0}) == 2
    torch._dynamo.reset()
