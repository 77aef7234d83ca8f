"""The timing protocol on a simulated device, whose clock advances only with launched work."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from parallax_gen.tuning.workers import measure
from parallax_gen.tuning.workers.measure import (
    BURST_MS,
    CALLS_PER_GRAPH,
    MAX_REPLAYS,
    MIN_REPLAYS,
    PAUSE_S,
    ROUNDS,
    SETTLE_BYTES,
    SETTLE_S,
    WARM_MS,
)


class Device:
    """A fake of the parts of torch.cuda that measure.py uses. Calls run in launch order and take the given times."""

    def __init__(self) -> None:
        self.now_us = 0.0
        self.captured: list[Callable[[], None]] | None = None
        self.replays: list[str] = []  # names of the captured work
        self.rests: list[float] = []
        self.rested_at_us = 0.0
        self.freed = 0  # bytes freed to the driver so far

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.rested_at_us = self.now_us

    def work(self, name: str, us: Callable[[], float]) -> Callable[[], None]:
        """A callable that launches work of the given duration."""

        def call() -> None:
            if self.captured is None:
                self.now_us += us()
            else:
                self.captured.append(call)

        call.__name__ = name
        return call


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

        def synchronize(self) -> None:
            pass

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at_us = device.now_us

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return (end.at_us - self.at_us) / 1000

    class Graph:
        calls: list[Callable[[], None]]

        def replay(self) -> None:
            device.replays.append(self.calls[0].__name__)
            for call in self.calls:
                call()

    @contextmanager
    def capturing(graph: Graph, stream: Stream) -> Iterator[None]:
        device.captured = []
        yield
        graph.calls, device.captured = device.captured, None

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        yield

    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capturing,
        "stream": on,
        "current_stream": Stream,
        "memory_stats": lambda: {"reserved_bytes.all.freed": device.freed},
    }.items():
        monkeypatch.setattr(measure.torch.cuda, name, value)
    monkeypatch.setattr(measure.time, "sleep", device.rest)
    monkeypatch.setattr(measure._FreedMemory, "freed", 0)
    return device


@pytest.mark.parametrize(
    ("us", "calls", "replays"),
    [
        (5.0, CALLS_PER_GRAPH, MAX_REPLAYS),  # 40 ms would hold 400
        (50.0, CALLS_PER_GRAPH, 40),
        (500.0, 4, 20),
        (9000.0, 1, MIN_REPLAYS),  # 40 ms would hold four
    ],
)
def test_calls_per_graph_and_number_of_replays(device: Device, us: float, calls: int, replays: int) -> None:
    timing = measure.time_call(device.work("a", lambda: us), timed_ms=40.0)
    assert (timing.calls_per_graph, timing.replays) == (calls, replays)
    assert (timing.median_us, timing.p20_us, timing.p80_us) == pytest.approx((us, us, us))
    assert device.rests == []


def test_median_and_percentiles_are_over_replays(device: Device) -> None:
    chance, took = random.Random(0), []

    def cost() -> float:
        took.append(chance.uniform(3000.0, 4000.0))  # too long for two calls in a graph
        return took[-1]

    timing = measure.time_call(device.work("a", cost), timed_ms=110.0)
    timed = torch.tensor(took[-timing.replays :], dtype=torch.float64)
    assert timing.calls_per_graph == 1
    assert len(timed) > 20
    expected = torch.quantile(timed, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    assert [timing.median_us, timing.p20_us, timing.p80_us] == pytest.approx(expected)


def test_a_timing_waits_until_freed_memory_is_cleared(device: Device) -> None:
    call = device.work("call", lambda: 100.0)
    device.freed = SETTLE_BYTES
    measure.time_call(call, timed_ms=1.0)
    assert device.rests == [SETTLE_S]
    device.freed += SETTLE_BYTES // 2
    measure.time_call(call, timed_ms=1.0)
    assert device.rests == [SETTLE_S]
    device.freed += SETTLE_BYTES
    measure.time_interleaved([call, call], timed_ms=1.0)
    assert device.rests == 2 * [SETTLE_S]


def test_a_timing_waits_if_its_capture_frees_memory(device: Device) -> None:
    """torch frees cached memory to the driver during a capture."""

    def cost() -> float:
        device.freed = SETTLE_BYTES
        return 100.0

    measure.time_call(device.work("call", cost), timed_ms=1.0)
    assert device.rests == [SETTLE_S]


def test_burst_timing_does_not_wait_for_freed_memory(device: Device) -> None:
    call = device.work("call", lambda: 100.0)
    device.freed = SETTLE_BYTES
    measure.time_call(call, timed_ms=1.0, memory_bound=False)
    measure.time_interleaved([call, call], timed_ms=1.0, memory_bound=False)
    assert device.rests == []


def test_clear_losers_have_few_replays(device: Device) -> None:
    assert measure.time_call(device.work("a", lambda: 100.0), timed_ms=40.0, give_up_us=99.0).replays == MIN_REPLAYS
    assert measure.time_call(device.work("a", lambda: 100.0), timed_ms=40.0, give_up_us=101.0).replays == 20


@pytest.mark.parametrize(("timed_ms", "bursts"), [(10.0, 1), (60.0, 3)])
def test_burst_timing_rests_before_each_burst(device: Device, timed_ms: float, bursts: int) -> None:
    timing = measure.time_call(device.work("a", lambda: 100.0), timed_ms=timed_ms, in_bursts=True)
    assert device.rests == [PAUSE_S] * bursts
    assert timing.replays == max(MIN_REPLAYS, timed_ms / 2)  # replays of 20 calls, 2 ms each


def test_a_card_that_slows_under_load_is_timed_before_it_does(device: Device) -> None:
    """An H100 throttles at the earliest 30 ms after a pause, so the timing does not depend on throttling."""

    def cost() -> float:
        return 1000.0 if device.now_us - device.rested_at_us < 30e3 else 1100.0

    timing = measure.time_call(device.work("a", cost), timed_ms=60.0, in_bursts=True)
    assert WARM_MS + BURST_MS < 30.0
    assert (timing.median_us, timing.p80_us) == pytest.approx((1000.0, 1000.0))
    without = measure.time_call(device.work("a", cost), timed_ms=60.0)
    assert without.median_us == pytest.approx(1100.0)


def test_interleaving_cancels_drift(device: Device) -> None:
    """The card slows down with every call: timed sequentially, the second config would seem half a percent slower."""
    drift = 1.0

    def slowing(us: float) -> Callable[[], float]:
        def cost() -> float:
            nonlocal drift
            drift *= 1.00002
            return us * drift

        return cost

    works = [device.work("a", slowing(101.0)), device.work("b", slowing(100.0))]
    first, second = (measure.time_call(work, timed_ms=60.0) for work in works)
    assert first.median_us < second.median_us
    device.replays.clear()
    timings = measure.time_interleaved(works, timed_ms=60.0, in_bursts=True)
    assert timings[1].median_us < timings[0].median_us
    assert device.rests == [PAUSE_S] * 2 * ROUNDS
    assert [timing.replays for timing in timings] == [timings[0].replays] * 2
    turns = [name for n, name in enumerate(device.replays) if n == 0 or device.replays[n - 1] != name]
    assert turns[-2 * ROUNDS :] == ["a", "b"] * ROUNDS


def test_uncapturable_calls_are_timed_eagerly(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_reset_generator", lambda: None)  # tests/gpu/test_bench_runs.py has it on a card
    costs = iter([900.0, 30.0, 10.0, 20.0])  # the first call compiles
    timing = measure.time_eagerly(device.work("a", lambda: next(costs)), 3)
    assert (timing.median_us, timing.calls_per_graph, timing.replays) == (pytest.approx(20.0), 1, 3)
    assert device.replays == []
