"""Times ours and its peers on the same inputs in the same process, and says how far from the oracle each is."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallax_gen.cli.contenders import OURS, Contender, Prepared, contenders
from parallax_gen.cli.text import rate
from parallax_gen.codegen.calling import Inputs
from parallax_gen.problem.accuracy import errors, gradient_sizes
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.measure import time_call
from parallax_gen.tuning.model import bound_by_matmuls
from parallax_gen.tuning.usual import TRAINING
from parallax_gen.tuning.verify import Expected, oracle, random_inputs_of

ROUNDS = 3  # each contender is timed so often, in turn: what drifts, drifts for all
TIMED_MS = 60.0
EAGER_CALLS = 20  # of what no CUDA graph can capture

GRADIENTS = ("dq", "dr", "dk", "dv")


@dataclass(frozen=True)
class Part:
    """What is timed of an op: which results it gives, and its matmuls beside those of Parallax's forward.

    Of Parallax and of softmax. A backward is counted with the 8 matmuls that one kernel for all gradients would do (5
    of softmax), however many kernels do it.
    """

    results: tuple[str, ...]
    parallax: float
    softmax: float


PARTS: dict[str, dict[str, Part]] = {
    "forward": {"forward": Part(("out",), 1.0, 0.5)},
    "decode": {"decode": Part(("out",), 1.0, 1.0)},  # counted in bytes: the same cache is read
    TRAINING: {
        "forward": Part(("out",), 1.0, 0.5),
        "backward": Part(GRADIENTS, 2.0, 1.25),
        "step": Part(("out", *GRADIENTS), 3.0, 1.75),
    },
}


@dataclass(frozen=True)
class Row:
    """One contender at one shape, and one part of what it does there.

    op        "forward", "decode" or TRAINING
    part      of PARTS[op]
    spec      the forward's or the decode's
    time_us   median of the rounds' medians, by tuning/measure.py's protocol; None where it does not run
    rate      TFLOP/s, GB/s for decode, of the work of Parallax (of softmax for a softmax peer)
    error     ||found - oracle|| / ||oracle|| of the output, or the largest of the gradients'; None for softmax peers
    note      why there is no time, or what is unlike others in how it was timed
    """

    contender: str
    op: str
    part: str
    spec: KernelSpec
    shape: Shape
    time_us: float | None = None
    rate: float | None = None
    error: float | None = None
    note: str = ""


def compare(op: str, spec: KernelSpec, shape: Shape, only: Sequence[str] = ()) -> list[Row]:
    """Every contender, or those in `only`, on fresh random inputs of a shape; ours first. spec: as of Row."""
    inputs, expected = _inputs_and_oracle(op, spec, shape)
    ready: dict[str, Prepared] = {}
    found: list[Row] = []
    chosen = [contender for contender in contenders(op) if not only or contender.name in only]
    with _precision(spec):
        for contender in chosen:
            rows = [Row(contender.name, op, part, spec, shape) for part in PARTS[op]]
            try:
                prepared = contender.prepare(spec, inputs)
                results = prepared.results()  # also of softmax, whose errors are no matter: does it run?
                wrong = _errors(results, expected, inputs) if contender.parallax else {}
            except Exception as failure:  # a peer's failure, of whatever type, is a result of the comparison
                if contender.name == OURS:
                    raise
                found += [replace(row, note=_why_not(failure)) for row in rows]
            else:
                ready[contender.name] = prepared
                found += [replace(row, error=_error(PARTS[op][row.part], wrong)) for row in rows]
        times = _times(ready, from_rest=bound_by_matmuls(spec.op))
    torch.cuda.empty_cache()
    return [_timed(row, chosen, times) for row in found]


def _inputs_and_oracle(op: str, spec: KernelSpec, shape: Shape, device: str = "cuda") -> tuple[Inputs, Expected]:
    of_inputs = spec.of("dqdr") if op == TRAINING else spec
    inputs = random_inputs_of(of_inputs, shape, seed=random.randrange(2**31), device=device, full=True)
    expected = {"out": oracle(spec, inputs)["out"]}
    if op == TRAINING:
        expected |= oracle(spec.of("dqdr"), inputs) | oracle(spec.of("dkdv"), inputs)
    return inputs, expected


def _errors(results: dict[str, Tensor], expected: Expected, x: Inputs) -> dict[str, float]:
    """Of each result the relative error, by name."""
    sizes: dict[str, float] = {}
    if x.do is not None:
        sizes = {n: float(size) for n, size in gradient_sizes(x.q, x.r, x.k, x.v, x.do)._asdict().items()}
    return {name: errors(found, expected[name], sizes.get(name)).relative for name, found in results.items()}


def _error(part: Part, wrong: dict[str, float]) -> float | None:
    return max((wrong[name] for name in part.results), default=None) if wrong else None


def _why_not(failure: Exception) -> str:
    if isinstance(failure, ImportError):
        return "not installed"
    if isinstance(failure, NotImplementedError):
        return f"not supported: {failure}"
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]


def _times(ready: dict[str, Prepared], *, from_rest: bool) -> dict[tuple[str, str], tuple[float, str]]:
    """By contender and part: the median of the rounds, and a note on how it was timed."""
    calls = {(name, part): call for name, prepared in ready.items() for part, call in prepared.parts.items()}
    rounds = [{which: _time(call, from_rest) for which, call in calls.items()} for _ in range(ROUNDS)]
    return {which: (statistics.median(r[which][0] for r in rounds), rounds[-1][which][1]) for which in calls}


def _time(call: Callable[[], object], from_rest: bool) -> tuple[float, str]:
    try:
        return time_call(call, timed_ms=TIMED_MS, from_rest=from_rest).median_us, ""
    except RuntimeError:  # it ran before: a CUDA graph cannot capture it
        torch.cuda.synchronize()
        return _time_eagerly(call), "without a CUDA graph"


def _time_eagerly(call: Callable[[], object]) -> float:
    """Microseconds a call, the host's time in it where that is longer."""
    call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(EAGER_CALLS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    times: list[float] = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return 1000 * statistics.median(times)


def _timed(row: Row, chosen: list[Contender], times: dict[tuple[str, str], tuple[float, str]]) -> Row:
    timing = times.get((row.contender, row.part))
    if timing is None:
        return row
    time_us, note = timing
    parallax = next(contender.parallax for contender in chosen if contender.name == row.contender)
    part = PARTS[row.op][row.part]
    work = part.parallax if parallax else part.softmax
    return replace(row, time_us=time_us, rate=work * rate(row.spec, row.shape, time_us), note=note)


@contextmanager
def _precision(spec: KernelSpec) -> Iterator[None]:
    """fp32 matmuls round to TF32 in here if the spec is of "tf32", and do not if it is not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if spec.dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
