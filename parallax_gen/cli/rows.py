"""`bench`'s rows: one contender at one shape, and where and how its figures were taken; to text, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from parallax_gen.cli.lengths import from_text, to_text
from parallax_gen.cli.text import rate_unit
from parallax_gen.errors import ArgumentError
from parallax_gen.memory.bounds import check_number
from parallax_gen.problem.shapes import Shape, within_bounds
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.usual import TRAINING

OURS = "parallax_gen"
SOFTMAX = ("SDPA flash", "SDPA cuDNN", "flash-attn 2", "flash-attn 3", "flash-attn 4")
CONTENDERS = (OURS, *SOFTMAX, "official CuTeDSL", "official Triton", "official Helion", "fla")


@dataclass(frozen=True)
class Effort:
    """How much time is spent on figures.

    rounds    each contender is timed so often, in turn: what drifts, drifts for all
    timed_ms  about so long in each round
    oracle    "whole": errors are of everything; "sample": of the first and last sequence and kv head; "none"
    hasty     slow peers are timed once, with few calls, and Triton's autotuners try each config with a few calls
    quick     fewer shapes: figures to look at, not to quote
    """

    rounds: int = 3
    timed_ms: float = 60.0
    oracle: str = "whole"
    hasty: bool = False
    quick: bool = False


WITH_CARE = Effort()
A_GRID = Effort(rounds=1, timed_ms=30.0, oracle="sample", hasty=True)
QUICK = Effort(rounds=1, timed_ms=10.0, oracle="sample", hasty=True, quick=True)


@dataclass(frozen=True)
class Conditions:
    """Where and how figures were taken. An old figure stands for a new one where all but the command is the same."""

    gpu: str
    card: str
    parallax_gen: str
    torch: str
    triton: str
    cuda: str
    effort: Effort
    command: str = field(default="", compare=False)

    @property
    def versions(self) -> str:
        return f"parallax_gen {self.parallax_gen}, torch {self.torch}, Triton {self.triton}, CUDA {self.cuda}"

    def flat(self) -> dict[str, Any]:
        """Every field in one level, the effort's among them."""
        return {**{name: value for name, value in vars(self).items() if name != "effort"}, **asdict(self.effort)}


@dataclass(frozen=True)
class Row:
    """One contender at one shape, and one part of what it does there.

    op             "forward", "decode" or TRAINING
    part           what was timed, of compare.PARTS[op]
    spec           the forward's or the decode's
    time_us        median of the rounds' medians, by tuning/measure.py's protocol; None where it does not run
    p20_us, p80_us likewise, of the rounds' 20th and 80th percentiles
    rate           TFLOP/s, GB/s for decode, of the work of Parallax (of softmax for a softmax peer)
    error          ||found - oracle|| / ||oracle|| of the output, or the largest of the gradients'; None for softmax
                   peers, and where none was asked for
    checked        pairs of a sequence and a kv head that the error is of
    note           why there is no time, or what is unlike others in how it was timed
    package        the contender's packages and their versions; of ours the kernels' hash
    conditions     None while they are not yet known
    lengths        of ragged decode, the keys of each sequence; () where all have as many as the shape says
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
    p20_us: float | None = None
    p80_us: float | None = None
    checked: int = 0
    package: str = ""
    conditions: Conditions | None = None
    lengths: tuple[int, ...] = ()

    @property
    def what(self) -> tuple[object, ...]:
        """What contenders are compared at."""
        return self.op, self.part, self.spec, self.shape, self.lengths


_OWN = [f.name for f in fields(Row) if f.name not in ("spec", "shape", "conditions")]  # not nested


def to_json(row: Row) -> dict[str, Any]:
    conditions = {} if row.conditions is None else row.conditions.flat()
    own = {name: getattr(row, name) for name in _OWN} | {"lengths": to_text(row.lengths)}
    sizes = {"spec": row.spec.to_dict(), "shape": row.shape.to_dict()}
    return {**own, **sizes, "rate_unit": rate_unit(row.spec.op), **conditions}


def to_flat(row: Row) -> dict[str, Any]:
    """In one level, with every field in every row. The window is a number, that of the shape; op is the row's."""
    document = to_json(row)
    del document["spec"], document["shape"]
    return {**asdict(row.spec), **asdict(row.shape), **document}


_READ: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
    "tuple[int, ...]": from_text,
    "bool": lambda text: {"True": True, "False": False}[text],
}


def from_flat(texts: Mapping[str, str]) -> Row:
    """The row that `to_flat` wrote, from its fields as text. Raises KeyError, ValueError or TypeError.

    Times are within the bounds of memory/bounds.py, so that rates and ratios of them are numbers.
    """

    def read(kind: type[Any], **known: Any) -> Any:
        """The fields that are not nested in others, each by its type; `known` are those that need no reading."""
        simple = {f.name: str(f.type) for f in fields(kind) if f.name not in known}
        return kind(**{name: _READ[of_type](texts[name]) for name, of_type in simple.items()}, **known)

    shape = within_bounds(read(Shape))
    op = "forward" if texts["op"] == TRAINING else texts["op"]
    spec = read(KernelSpec, op=op, window=shape.window > 0)
    row: Row = read(Row, spec=spec, shape=shape, conditions=read(Conditions, effort=read(Effort)))
    for time_us in (row.time_us, row.p20_us, row.p80_us):
        if time_us is not None:
            check_number("time_us", time_us)
    if row.rate is not None and not 0 <= row.rate < math.inf:
        raise ArgumentError("rate", row.rate, "a number of 0 or more")
    return row
