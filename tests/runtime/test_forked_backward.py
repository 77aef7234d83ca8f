"""Which backwards run dqdr beside dkdv, and in which order streams launch and wait. No test needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_samples import Sample, packed
from torch import Tensor

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.dqdr import DqDrConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.preprocess import PreprocessConfig
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime import attention
from parallax_gen.runtime import plan as plan_module
from parallax_gen.runtime.plan import PlanCache
from parallax_gen.runtime.recording import CallCounts

# dkdv's programs own 64 keys. An H200 has 132 multiprocessors, so 264 programs are two for each.
CONFIGS = {
    "forward": ForwardConfig(64, 32, 1, 4, 2),
    "preprocess": PreprocessConfig(32, 4),
    "dkdv": DkDvConfig(32, 64, 1, 4, 2),
    "dqdr": DqDrConfig(64, 32, 1, 4, 2),
}
IN_ORDER = ["A: preprocess", "A: dkdv", "A: dqdr"]
FORKED = ["A: preprocess", "A1 waits for A", "A: dkdv", "A1: dqdr", "A waits for A1"]


class Card:
    """A fake card, its current stream, and what its streams do. Launches fail of the op `failing`."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.log: list[str] = []
        self.current = FakeStream(self, "A")
        self.capturing = True
        self.failing = ""

    def new_stream(self, device: Any) -> FakeStream:
        """A new stream: A1 is the first that is made while A is current."""
        assert device == self.current.device
        self.current.made += 1
        return FakeStream(self, f"{self.current.name}{self.current.made}")

    @contextmanager
    def use(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def launch(self, op: str) -> None:
        if op == self.failing:
            raise RuntimeError(op)
        self.log.append(f"{self.current.name}: {op}")


class FakeStream:
    def __init__(self, card: Card, name: str):
        self.card, self.name, self.device, self.made = card, name, torch.device("cuda", 0), 0

    def wait_stream(self, other: FakeStream) -> None:
        self.card.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """An H200 whose current stream, A, is being captured. Calls with CPU tensors are planned as for it."""
    card = Card(GPUS["h200"])

    def kernel(spec: KernelSpec, *_: object) -> Any:
        return SimpleNamespace(config=CONFIGS[spec.op]), SimpleNamespace(launch=lambda *_: card.launch(spec.op))

    monkeypatch.setattr(attention, "host_plan", lambda *_: None)
    monkeypatch.setattr(attention, "_forwards", PlanCache())
    monkeypatch.setattr(attention, "_backwards", PlanCache())
    monkeypatch.setattr(plan_module, "default_dispatcher", lambda: SimpleNamespace(kernel=kernel))
    monkeypatch.setattr(plan_module, "call_counts", CallCounts)
    monkeypatch.setattr(plan_module, "gpu_of_device", lambda _: card.gpu)
    monkeypatch.setattr(plan_module, "_current_device", lambda: None)  # as the index of a CPU tensor's device
    monkeypatch.setattr(plan_module, "_current_stream", lambda _: 0)
    monkeypatch.setattr(plan_module, "launch_by_jit", lambda module, *_: module.launch())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: card.current)
    monkeypatch.setattr(torch.cuda, "Stream", card.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", card.use)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    return card


def dense(kv_heads: int, seqlen: int) -> Sample:
    """One sequence with two query heads per kv head."""
    q, r = (torch.zeros(1, seqlen, 2 * kv_heads, 8, requires_grad=True) for _ in range(2))
    k, v = (torch.zeros(1, seqlen, kv_heads, 8, requires_grad=True) for _ in range(2))
    return Sample((q, r, k, v))


def launches(card: Card, sample: Sample, wanted: str = "qrkv") -> list[str]:
    """What a backward does on the card's streams. wanted: the inputs that need gradients."""
    for name, x in zip("qrkv", sample.inputs, strict=True):
        x.requires_grad_(name in wanted)
    function: Any = parallax_attn_varlen_func if sample.lengths else parallax_attn_func
    out: Tensor = function(*sample.inputs, *sample.lengths)
    card.log.clear()
    out.sum().backward()
    return card.log


def test_a_captured_backward_launches_dqdr_on_a_second_stream(card: Card) -> None:
    assert launches(card, dense(2, 100)) == FORKED


def test_an_eager_backward_launches_in_order(card: Card) -> None:
    card.capturing = False
    assert launches(card, dense(2, 100)) == IN_ORDER


@pytest.mark.parametrize(
    ("kv_heads", "seqlen", "gpu", "forks"),
    [(33, 512, "h200", True), (33, 513, "h200", False), (34, 512, "h200", False), (33, 512, "a100", False)],
)
def test_dkdv_may_have_two_programs_per_multiprocessor(
    card: Card, kv_heads: int, seqlen: int, gpu: str, forks: bool
) -> None:
    card.gpu = GPUS[gpu]
    assert launches(card, dense(kv_heads, seqlen)) == (FORKED if forks else IN_ORDER)


@pytest.mark.parametrize(("longest", "forks"), [(26 * 64, True), (27 * 64, False)])
def test_packed_sequences_count_as_the_longest(card: Card, longest: int, forks: bool) -> None:
    """Five sequences of two kv heads."""
    inputs, (starts_q, starts_k, *_) = packed()
    assert launches(card, Sample(inputs, (starts_q, starts_k, 5, longest))) == (FORKED if forks else IN_ORDER)


def test_a_large_backward_does_not_ask_whether_it_is_captured(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", pytest.fail)
    assert launches(card, dense(33, 513)) == IN_ORDER


@pytest.mark.parametrize(("wanted", "op"), [("q", "dqdr"), ("r", "dqdr"), ("kv", "dkdv")])
def test_one_kernel_alone_stays_on_the_current_stream(card: Card, wanted: str, op: str) -> None:
    assert launches(card, dense(2, 100), wanted) == ["A: preprocess", f"A: {op}"]


def test_every_captured_stream_has_one_other_beside_it(card: Card) -> None:
    """Two captures at once would fail if one waited for the other's streams."""
    for captured in (card.current, FakeStream(card, "B")) * 2:
        card.current = captured
        assert launches(card, dense(2, 100)) == [line.replace("A", captured.name) for line in FORKED]


@pytest.mark.parametrize("op", ["dkdv", "dqdr"])
def test_a_failed_launch_is_joined_too(card: Card, op: str) -> None:
    card.failing = op
    with pytest.raises(RuntimeError, match=op):
        launches(card, dense(2, 100))
    assert card.log[-1] == "A waits for A1"
