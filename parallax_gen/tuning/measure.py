"""How a kernel is timed. The protocol has a version, `memory.keys.PROTOCOL`: a change here raises it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Protocol 1: a CUDA graph of several calls on one set of random inputs is replayed; each replay is timed with events
# and divided by its calls; the median counts. L2 is warm: it holds what fits of the inputs. Replays before the timed
# ones bring the clocks up.
#
# Where times are compared with each other's, the timing of what is bound by matmuls (tuning/model.py) starts from
# rest: a card that was just busy with matmuls is at its power limit and runs slower, and whoever comes second would
# pay for it. What is bound by memory, decode and preprocess, does not: it is far from that limit, and its few
# microseconds suffer from clocks that fell in the rest.
CALLS_A_GRAPH = 20
GRAPH_US = 2000.0  # calls longer than GRAPH_US / CALLS_A_GRAPH share a graph with fewer others
WARM_MS = 10.0
REST_S = 0.2
FEWEST_REPLAYS, MOST_REPLAYS = 7, 200


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, and the 20th and 80th percentile over `replays` replays of a graph."""

    median_us: float
    p20_us: float
    p80_us: float
    calls_a_graph: int
    replays: int


def time_call(
    call: Callable[[], object], *, timed_ms: float, give_up_us: float = float("inf"), from_rest: bool = False
) -> Timing:
    """Time a call that launches work on the current stream and never synchronises, for about timed_ms.

    A call that takes longer than give_up_us is replayed a few times only: it has lost already.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compile and allocate outside the graph
        rough_us = _elapsed_us(call)
        calls = max(1, min(CALLS_A_GRAPH, int(GRAPH_US / max(rough_us, 1.0))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
        graph.replay()
        replay_us = _elapsed_us(graph.replay)
        if from_rest:
            time.sleep(REST_S)
        for _ in range(max(1, int(WARM_MS * 1000 / replay_us))):
            graph.replay()
        lost = min(replay_us, _elapsed_us(graph.replay)) / calls > give_up_us
        replays = FEWEST_REPLAYS if lost else int(timed_ms * 1000 / replay_us)
        replays = max(FEWEST_REPLAYS, min(MOST_REPLAYS, replays))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        stream.synchronize()
    times = sorted(a.elapsed_time(b) * 1000 / calls for a, b in itertools.pairwise(marks))
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3], calls, replays)


def _elapsed_us(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000
