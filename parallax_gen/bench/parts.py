"""What `bench` times of an op: the parts of a training step, and a call as the one part of every other op."""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.problem.workloads import STEP, TRAINING

GRADIENTS = ("dq", "dr", "dk", "dv")


@dataclass(frozen=True)
class Part:
    """What is timed under one name.

    heading   of its column in a table
    kernels   of ours that run in it, in order
    results   whose errors are its error
    parallax  its matmuls beside those of Parallax's forward; a backward is counted with the 8 matmuls that one kernel
              for all gradients would do, however many kernels do it
    softmax   likewise, of softmax attention: 5 matmuls in the backward
    """

    heading: str
    kernels: tuple[str, ...]
    results: tuple[str, ...]
    parallax: float
    softmax: float


PARTS: dict[str, dict[str, Part]] = {
    "forward": {"forward": Part("fwd", ("forward",), ("out",), 1.0, 0.5)},
    "decode": {"decode": Part("decode", ("decode",), ("out",), 1.0, 1.0)},  # counted in bytes: the same cache is read
    TRAINING: {
        "forward": Part("fwd", STEP[:1], ("out",), 1.0, 0.5),
        "backward": Part("bwd", STEP[1:], GRADIENTS, 2.0, 1.25),
        "step": Part("step", STEP, ("out", *GRADIENTS), 3.0, 1.75),
    },
}


def kernels_in(op: str, part: str) -> tuple[str, ...]:
    """Of ours that run in a part; of a part that only some file has, the op itself."""
    known = PARTS.get(op, {}).get(part)
    return known.kernels if known else (op,)
