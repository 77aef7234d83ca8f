"""Scratch for kernels that merge splits: partial states, and counters that are 0 before and after every launch.

Launches on one stream follow each other and may share scratch; launches on two may not, nor a captured graph's
and anybody's else, since nobody knows beside what it will be replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallax_gen.ops.base import Scratch

# Counters that captured launches get slices of, each for good: zeroed before the capture, so that a graph needs no
# memset. A launch that merges has a few dozen; when all are taken, graphs zero their own.
CAPTURE_COUNTERS = 1 << 16


def bytes_of(scratch: Scratch) -> int:
    """Of a caller's own workspace: the counters, which are 0 before and after a launch, then the partials."""
    return _counter_bytes(scratch) + 4 * scratch.partials


def parts_of(workspace: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The partials and the counters of a caller's own workspace, uint8."""
    counters = _counter_bytes(scratch)
    partials = workspace[counters : counters + 4 * scratch.partials].view(torch.float32)
    return partials, workspace[: 4 * scratch.arrived].view(torch.int32)


def of_one_launch(scratch: Scratch, device: torch.device) -> Tensor | None:
    """A workspace that nobody keeps, for a launch within a compiled graph: None where it needs none, or is captured.

    Inductor's CUDA graphs run their calls in a memory pool of their own, of which nothing may outlive a call.
    """
    if not scratch.partials or torch.cuda.is_current_stream_capturing():
        return None
    workspace = torch.empty(bytes_of(scratch), dtype=torch.uint8, device=device)
    workspace[: _counter_bytes(scratch)].zero_()
    return workspace


def _counter_bytes(scratch: Scratch) -> int:
    return -(-scratch.arrived // 4) * 16  # what lies behind begins at a multiple of 16 bytes, as kernels may assume


class Workspace:
    """Scratch on one device. Grows to the largest request of each stream, and keeps that."""

    def __init__(self, device: torch.device):
        self._device = device
        self._of_stream: dict[int, tuple[Tensor, Tensor]] = {}
        self._for_graphs: Tensor | None = None
        self._taken = 0

    def get(self, partials: int, arrived: int, stream: int) -> tuple[Tensor, Tensor]:
        """fp32 scratch of at least `partials` numbers and int32 counters, for a launch on the current stream.

        stream  its handle
        """
        if torch.cuda.is_current_stream_capturing():
            return self._get_in_graph(partials, arrived)
        found = self._of_stream.get(stream)
        if found is None or found[0].numel() < partials or found[1].numel() < arrived:
            if self._for_graphs is None:
                self._for_graphs = torch.zeros(CAPTURE_COUNTERS, dtype=torch.int32, device=self._device)
                torch.cuda.current_stream(self._device).synchronize()  # once: a graph may run on any stream
            before = (0, 0) if found is None else (found[0].numel(), found[1].numel())
            found = (
                torch.empty(max(partials, before[0]), dtype=torch.float32, device=self._device),
                torch.zeros(max(arrived, before[1]), dtype=torch.int32, device=self._device),
            )
            self._of_stream[stream] = found
        return found

    def _get_in_graph(self, partials: int, arrived: int) -> tuple[Tensor, Tensor]:
        scratch = torch.empty(partials, dtype=torch.float32, device=self._device)  # the graph's own memory
        arrived = -(-arrived // 4) * 4  # slices begin at multiples of 16 bytes, as kernels may assume
        end = self._taken + arrived
        if self._for_graphs is None or end > CAPTURE_COUNTERS:
            return scratch, torch.zeros(arrived, dtype=torch.int32, device=self._device)  # zeroed by every replay
        counters = self._for_graphs[self._taken : end]
        self._taken = end
        return scratch, counters
