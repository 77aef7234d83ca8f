"""How a kernel is timed. The protocol has a version, `memory.result.PROTOCOL`: a change here raises it."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from parallax_gen.tuning.workers.messages import Timing

# Protocol 1: a CUDA graph of several calls on one set of random inputs is replayed; each replay is timed with events
# and divided by its calls; the median counts. L2 is warm: it holds what fits of the inputs. Replays before the timed
# ones bring the clocks up.
#
# Where times are compared with each other's, the timing of what is bound by matmuls (search/cost_model.py) is in short
# bursts, each from rest. A card that is busy with matmuls for longer meets its power limit: an H100 after 30 to 90 ms,
# at random, and from then on it runs 5 to 12 % slower, in steps. Until then the same kernel takes the same time within
# 0.5 %. A twentieth of a second of rest is enough: on an H200 the forward, dkdv and dqdr took as long after 0.05, 0.1
# and 0.2 s of it, within 0.3 %. What is bound by memory, decode and preprocess, does not rest: it is far from that
# limit, and its few microseconds suffer from clocks that fell in the rest.
#
# Of ragged decode a call launches on each of the batches of `ops.space.timed_lengths`, and its mean counts.
#
# Memory that is given back to the driver is cleared in the background: for 50 to 100 ms after 10 to 30 GB of it, what
# is bound by memory took a fifth longer on an H100. The capture of a graph gives back what the check before it took. So
# where much was, the timing of what is bound by memory waits.
#
# None of these three raised the version: a tune begins with the configs that ship for its bucket, and its finals time
# whoever leads again, so that no time of before decides against one of now.
CALLS_A_GRAPH = 20
GRAPH_US = 2000.0  # calls longer than GRAPH_US / CALLS_A_GRAPH share a graph with fewer others
WARM_MS = 5.0
REST_S = 0.05
BURST_MS = 20.0
FEWEST_REPLAYS, MOST_REPLAYS = 7, 200
TURNS = 3
MUCH_FREED = 2**30  # bytes
SETTLE_S = 0.3


def time_call(
    call: Callable[[], object],
    *,
    timed_ms: float,
    give_up_us: float = float("inf"),
    from_rest: bool = False,
    by_memory: bool = True,
) -> Timing:
    """Time a call that launches work on the current stream and never synchronises, for about timed_ms.

    A call that takes longer than give_up_us is replayed a few times only: it has lost already. by_memory: whether
    memory bounds it.
    """
    graph, rest_s = _Graph(call), REST_S if from_rest else 0.0
    if by_memory:
        _settle()
    graph.warm(rest_s)
    if graph.call_us > give_up_us:
        return graph.timing(graph.times(FEWEST_REPLAYS))
    bursts = math.ceil(timed_ms / BURST_MS) if from_rest else 1
    times = graph.times_of_burst(timed_ms, bursts)
    for _ in range(1, bursts):
        graph.warm(rest_s)
        times += graph.times_of_burst(timed_ms, bursts)
    return graph.timing(times)


def time_in_turns(
    calls: Sequence[Callable[[], object]], *, timed_ms: float, from_rest: bool = False, by_memory: bool = True
) -> list[Timing]:
    """Time calls such as `time_call`'s, each for about timed_ms in TURNS parts: A B C, A B C, A B C."""
    graphs = [_Graph(call) for call in calls]
    if by_memory:
        _settle()
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(TURNS):
        for graph, its_times in zip(graphs, times, strict=True):
            graph.warm(REST_S if from_rest else 0.0)
            its_times += graph.times_of_burst(timed_ms, TURNS)
    return [graph.timing(its_times) for graph, its_times in zip(graphs, times, strict=True)]


class _Settled:
    """What this process had given back to the driver, in bytes, when it last timed something."""

    freed = 0


def _settle() -> None:
    freed = torch.cuda.memory_stats().get("reserved_bytes.all.freed", 0)
    if freed - _Settled.freed >= MUCH_FREED:
        time.sleep(SETTLE_S)
    _Settled.freed = freed


class _Graph:
    """Several calls captured in a CUDA graph, on a stream of its own."""

    def __init__(self, call: Callable[[], object]):
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            call()  # compile and allocate outside the graph
            (rough_us,) = marks_us(call, 1)
            self._calls = max(1, min(CALLS_A_GRAPH, int(GRAPH_US / max(rough_us, 1.0))))
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                for _ in range(self._calls):
                    call()
            self._graph.replay()
            (self.replay_us,) = marks_us(self._graph.replay, 1)

    @property
    def call_us(self) -> float:
        """Of one call, by the fastest replay that was looked at so far."""
        return self.replay_us / self._calls

    def warm(self, rest_s: float) -> None:
        """Rest, bring the clocks up, and look once more how long a replay takes."""
        if rest_s:
            time.sleep(rest_s)
        with torch.cuda.stream(self._stream):
            for _ in range(max(1, int(WARM_MS * 1000 / self.replay_us))):
                self._graph.replay()
            self.replay_us = min(self.replay_us, *marks_us(self._graph.replay, 1))

    def times_of_burst(self, timed_ms: float, bursts: int) -> list[float]:
        """One of so many bursts that take timed_ms together."""
        replays = int(timed_ms / bursts * 1000 / self.replay_us)
        return self.times(max(math.ceil(FEWEST_REPLAYS / bursts), min(MOST_REPLAYS, replays)))

    def times(self, replays: int) -> list[float]:
        """Microseconds a call, of each of so many replays."""
        with torch.cuda.stream(self._stream):
            return [us / self._calls for us in marks_us(self._graph.replay, replays)]

    def timing(self, times: list[float]) -> Timing:
        return _timing(times, self._calls)


def time_eagerly(call: Callable[[], object], calls: int) -> Timing:
    """Time a call that no graph can capture as Python makes it, the host's time in it where that is longer."""
    call()
    return _timing(marks_us(call, calls), 1)


def marks_us(call: Callable[[], object], count: int) -> list[float]:
    """Microseconds of the current stream between so many calls, one behind the other."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    return [float(a.elapsed_time(b)) * 1000 for a, b in itertools.pairwise(marks)]


def _timing(times: list[float], calls_a_graph: int) -> Timing:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3], calls_a_graph, len(times))
