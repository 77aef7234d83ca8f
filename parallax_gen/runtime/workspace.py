"""Split-KV scratch: the states of splits, and arrival counters that are 0 before and after every launch.

Launches on one stream run in order and may share scratch. Launches on different streams may not, and a captured graph
may share with no other launch, because it may be replayed concurrently with any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallax_gen.ops.base import Scratch

# Captured launches get permanent slices of this many counters. They are zeroed before the capture, so a graph needs no
# memset. A split-KV launch needs a few dozen. Once all are taken, each graph zeroes its own.
CAPTURE_COUNTERS = 1 << 16


def workspace_bytes(scratch: Scratch) -> int:
    """Bytes of a caller's workspace: the counters, which are 0 before and after a launch, then the states of splits."""
    return _counter_bytes(scratch) + 4 * scratch.floats


def split_workspace(workspace: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The states of splits and the counters in a caller's uint8 workspace."""
    begin = _counter_bytes(scratch)
    states = workspace[begin : begin + 4 * scratch.floats].view(torch.float32)
    return states, workspace[: 4 * scratch.counters].view(torch.int32)


def workspace_for_one_launch(scratch: Scratch, device: torch.device) -> Tensor | None:
    """A temporary workspace for a launch inside a compiled graph; None if it needs none or is being captured.

    Inductor's CUDA graphs use their own memory pool, and nothing from that pool may outlive the call.
    """
    if not scratch.floats or torch.cuda.is_current_stream_capturing():
        return None
    workspace = torch.empty(workspace_bytes(scratch), dtype=torch.uint8, device=device)
    workspace[: _counter_bytes(scratch)].zero_()
    return workspace


def _counter_bytes(scratch: Scratch) -> int:
    return -(-scratch.counters // 4) * 16  # kernels may assume that the states begin at a multiple of 16 bytes


class Workspace:
    """Scratch on one device: one per stream, as large as the largest that a launch needed so far."""

    def __init__(self, device: torch.device):
        self._device = device
        self._by_stream: dict[int, tuple[Tensor, Tensor]] = {}
        self._graph_counters: Tensor | None = None
        self._counters_used = 0

    def get(self, floats: int, counters: int, stream: int) -> tuple[Tensor, Tensor]:
        """At least `floats` fp32 elements and `counters` int32 counters, for a launch on the current stream.

        stream  the handle of the current stream
        """
        if stream and torch.cuda.is_current_stream_capturing():  # the default stream, 0, cannot be captured
            return self._get_in_graph(floats, counters)
        scratch = self._by_stream.get(stream)
        if scratch is None or scratch[0].numel() < floats or scratch[1].numel() < counters:
            if self._graph_counters is None:
                self._graph_counters = torch.zeros(CAPTURE_COUNTERS, dtype=torch.int32, device=self._device)
                torch.cuda.current_stream(self._device).synchronize()  # synchronise once: a graph may run on any stream
            old_sizes = (0, 0) if scratch is None else (scratch[0].numel(), scratch[1].numel())
            scratch = (
                torch.empty(max(floats, old_sizes[0]), dtype=torch.float32, device=self._device),
                torch.zeros(max(counters, old_sizes[1]), dtype=torch.int32, device=self._device),
            )
            self._by_stream[stream] = scratch
        return scratch

    def _get_in_graph(self, floats: int, counters: int) -> tuple[Tensor, Tensor]:
        states = torch.empty(floats, dtype=torch.float32, device=self._device)  # the graph's own memory
        counters = -(-counters // 4) * 4  # kernels may assume that slices begin at multiples of 16 bytes
        end = self._counters_used + counters
        if self._graph_counters is None or end > CAPTURE_COUNTERS:
            return states, torch.zeros(counters, dtype=torch.int32, device=self._device)  # zeroed by every replay
        begin, self._counters_used = self._counters_used, end
        return states, self._graph_counters[begin:end]
