"""The timing protocol. Its version is `memory.result.PROTOCOL`: increase it with every change here."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from parallax_gen.tuning.workers.messages import Timing

# Protocol 1: a CUDA graph of several calls on one set of random inputs is replayed. Each replay is timed with events
# and divided by its number of calls; the result is the median. L2 is warm: it holds as much of the inputs as fits.
# Replays before the timed ones bring the clocks up.
#
# Kernels bound by matmuls (`work.bound_by_matmuls`) whose times are compared are timed in short bursts, each after an
# idle pause. A card that is busy with matmuls for longer reaches its power limit: an H100 after 30 to 90 ms, at
# random. From then on it runs 5 to 12 % slower, in steps. Before that the same kernel takes the same time within
# 0.5 %. A pause of a twentieth of a second is enough: on an H200 the forward, dkdv and dqdr took as long after pauses
# of 0.05, 0.1 and 0.2 s, within 0.3 %. Kernels bound by memory, decode and preprocess, are timed without pauses: they
# are far from the power limit, and their few microseconds suffer from clocks that fell during a pause.
#
# For decode_varlen one call launches with each of `ops.space.timed_lengths`; the result is the mean per launch.
#
# The driver clears freed memory in the background: for 50 to 100 ms after 10 to 30 GB were freed, kernels bound by
# memory took a fifth longer on an H100. Capturing a graph frees the memory of the check before it. So if that was much,
# the timing of kernels bound by memory waits.
#
# Bursts, several lengths per call and this wait were added without raising the version: a tune begins with its bucket's
# shipped configs, and its finals time the fastest config again, so that an old time never beats a new one.
CALLS_PER_GRAPH = 20
GRAPH_US = 2000.0  # a graph has fewer calls than CALLS_PER_GRAPH if these would take longer than this
WARM_MS = 5.0  # of replays before the timed ones
PAUSE_S = 0.05  # before each burst
BURST_MS = 20.0
MIN_REPLAYS, MAX_REPLAYS = 7, 200
ROUNDS = 3  # of an interleaved timing
SETTLE_BYTES = 2**30  # freed bytes after which a timing waits
SETTLE_S = 0.3


def time_call(
    call: Callable[[], object],
    *,
    timed_ms: float,
    give_up_us: float = float("inf"),
    in_bursts: bool = False,
    memory_bound: bool = True,
) -> Timing:
    """Time a call that launches work on the current stream and never synchronises, for about timed_ms.

    A call that takes longer than give_up_us is replayed only a few times: it cannot be the best.

    in_bursts     time in bursts, each after an idle pause
    memory_bound  the call is bound by memory
    """
    graph, pause_s = _Graph(call), PAUSE_S if in_bursts else 0.0
    if memory_bound:
        _settle()
    graph.warm(pause_s)
    if graph.call_us > give_up_us:
        return graph.timing(graph.times(MIN_REPLAYS))
    bursts = math.ceil(timed_ms / BURST_MS) if in_bursts else 1
    times = graph.times_of_burst(timed_ms, bursts)
    for _ in range(1, bursts):
        graph.warm(pause_s)
        times += graph.times_of_burst(timed_ms, bursts)
    return graph.timing(times)


def time_interleaved(
    calls: Sequence[Callable[[], object]], *, timed_ms: float, in_bursts: bool = False, memory_bound: bool = True
) -> list[Timing]:
    """Time several calls interleaved, each for about timed_ms in ROUNDS parts: A B C, A B C, A B C. See `time_call`."""
    graphs = [_Graph(call) for call in calls]
    if memory_bound:
        _settle()
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(ROUNDS):
        for graph, graph_times in zip(graphs, times, strict=True):
            graph.warm(PAUSE_S if in_bursts else 0.0)
            graph_times += graph.times_of_burst(timed_ms, ROUNDS)
    return [graph.timing(graph_times) for graph, graph_times in zip(graphs, times, strict=True)]


class _FreedMemory:
    """The bytes that this process had freed to the driver when it last timed something."""

    freed = 0


def _settle() -> None:
    """Wait until the driver has cleared freed memory, if much was freed."""
    freed = torch.cuda.memory_stats().get("reserved_bytes.all.freed", 0)
    if freed - _FreedMemory.freed >= SETTLE_BYTES:
        time.sleep(SETTLE_S)
    _FreedMemory.freed = freed


class _Graph:
    """Several calls captured in a CUDA graph, on a stream of its own."""

    def __init__(self, call: Callable[[], object]):
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            call()  # compile and allocate outside the graph
            (rough_us,) = event_times_us(call, 1)
            self._calls = max(1, min(CALLS_PER_GRAPH, int(GRAPH_US / max(rough_us, 1.0))))
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                for _ in range(self._calls):
                    call()
            self._graph.replay()
            (self.replay_us,) = event_times_us(self._graph.replay, 1)

    @property
    def call_us(self) -> float:
        """The time of one call, by the fastest replay so far."""
        return self.replay_us / self._calls

    def warm(self, pause_s: float) -> None:
        """Pause, bring the clocks up, and estimate the time of a replay again."""
        if pause_s:
            time.sleep(pause_s)
        with torch.cuda.stream(self._stream):
            for _ in range(max(1, int(WARM_MS * 1000 / self.replay_us))):
                self._graph.replay()
            self.replay_us = min(self.replay_us, *event_times_us(self._graph.replay, 1))

    def times_of_burst(self, timed_ms: float, bursts: int) -> list[float]:
        """The times of one burst; `bursts` of them take timed_ms together."""
        replays = int(timed_ms / bursts * 1000 / self.replay_us)
        return self.times(max(math.ceil(MIN_REPLAYS / bursts), min(MAX_REPLAYS, replays)))

    def times(self, replays: int) -> list[float]:
        """Microseconds per call, for each replay."""
        with torch.cuda.stream(self._stream):
            return [us / self._calls for us in event_times_us(self._graph.replay, replays)]

    def timing(self, times: list[float]) -> Timing:
        return _timing(times, self._calls)


def time_eagerly(call: Callable[[], object], calls: int) -> Timing:
    """Time a call whose capture has failed. It is launched from Python, so the host's time counts if it is longer."""
    _reset_generator()
    call()
    return _timing(event_times_us(call, calls), 1)


def _reset_generator() -> None:
    """Let torch draw random numbers on the card again: after a failed capture its generator still expects the graph,
    until another capture has succeeded."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.empty(1, device="cuda").zero_()


def event_times_us(call: Callable[[], object], count: int) -> list[float]:
    """Microseconds on the current stream that each of `count` back-to-back calls takes."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [float(a.elapsed_time(b)) * 1000 for a, b in itertools.pairwise(events)]


def _timing(times: list[float], calls_per_graph: int) -> Timing:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3], calls_per_graph, len(times))
