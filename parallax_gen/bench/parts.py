"""The parts of an op that `bench` times: the forward, the backward and both for a training step, else the one call."""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.problem.workloads import STEP, TRAINING

GRADIENTS = ("dq", "dr", "dk", "dv")


@dataclass(frozen=True)
class Part:
    """One timed part of an op.

    heading   its column's heading in a table
    kernels   our kernels that run in the part, in order
    results   the results whose largest error is the part's error
    parallax_work  its matmuls relative to Parallax's forward; a backward counts as the 8 matmuls that one kernel for
                   all gradients needs, even if several kernels compute it
    softmax_work   the same for softmax attention, whose backward has 5 matmuls
    """

    heading: str
    kernels: tuple[str, ...]
    results: tuple[str, ...]
    parallax_work: float
    softmax_work: float


PARTS: dict[str, dict[str, Part]] = {
    "forward": {"forward": Part("fwd", ("forward",), ("out",), 1.0, 0.5)},
    "decode": {"decode": Part("decode", ("decode",), ("out",), 1.0, 1.0)},  # in bytes: softmax reads the same cache
    TRAINING: {
        "forward": Part("fwd", STEP[:1], ("out",), 1.0, 0.5),
        "backward": Part("bwd", STEP[1:], GRADIENTS, 2.0, 1.25),
        "step": Part("step", STEP, ("out", *GRADIENTS), 3.0, 1.75),
    },
}


def kernels_in(op: str, part: str) -> tuple[str, ...]:
    """Our kernels that run in a part; the op itself for a part that is not in PARTS, as a file may have."""
    known_part = PARTS.get(op, {}).get(part)
    return known_part.kernels if known_part else (op,)
