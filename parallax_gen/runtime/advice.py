"""Says what a call's kernel rests on where that is less than a measurement of it here, and what would mend that."""

from __future__ import annotations

import logging
import sys
import warnings
from types import FrameType

from parallax_gen.environment import QUIET, STRICT, is_on
from parallax_gen.errors import UntunedError
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Candidate, Known, Tier, best
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import representative

_LOG = logging.getLogger(__name__)


class UntunedWarning(UserWarning):
    """A call runs a kernel that was not measured on this GPU with this Triton."""


class Adviser:
    """Says it once, of the first such kernel: one for each dispatcher."""

    def __init__(self) -> None:
        self._told = False

    def check(self, place: Place, gpu: Gpu, known: Known) -> None:
        """Refuse a call of which nothing was measured here, if that is asked for: before anything is compiled for it.

        Raises UntunedError with PARALLAX_GEN_STRICT=1, which allows no other kernels than those measured here, and
        ArgumentError where that or PARALLAX_GEN_QUIET is neither on nor off, whatever is known.
        """
        strict, _ = is_on(STRICT), is_on(QUIET)
        if strict and best(place, gpu, known).tier != Tier.MEASURED_HERE:
            raise UntunedError(f"{STRICT} is on, and {_nothing_counts(place)}. {_mended_by(place)}")

    def tell(self, place: Place, candidate: Candidate) -> None:
        """Tell, by Python's warnings and the log, that a call's kernel was not measured here.

        Silent with PARALLAX_GEN_QUIET=1, and in all processes of torch.distributed but rank 0.
        """
        quiet = is_on(QUIET)
        if candidate.tier == Tier.MEASURED_HERE:
            return
        if self._told or quiet or not _first_rank():
            return
        self._told = True  # before it is told: where warnings are errors, the next call runs
        told = f"{_nothing_counts(place)}: {_instead(candidate)}. {_mended_by(place)}"
        told += f" This is said once a process; {QUIET}=1 silences it."
        _LOG.warning("%s", told)
        warnings.warn(told, UntunedWarning, stacklevel=level_of_user())


def level_of_user() -> int:
    """The stacklevel with which a warning of the function that asks names the user's line.

    That is the innermost one outside this package and torch. Code that torch generates may lie between: it is of a
    module of torch's, or of none. On autograd's threads there may be no such line; then it is the outermost.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 0
    while frame is not None:
        level += 1
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("", "parallax_gen", "torch"):
            break
        frame = frame.f_back
    return level


def _nothing_counts(place: Place) -> str:
    return f"no measurement counts of {place.spec}; {place.bucket} on {place.gpu} with {Toolchain.here()}"


def _instead(candidate: Candidate) -> str:
    record = candidate.record
    if record is None:
        return "its default config is used"
    of = f"{record.place.bucket}" if candidate.tier == Tier.NEIGHBOUR else record.place.gpu
    return f"a record of {of} with {record.evidence.measured_with} is used"


def _mended_by(place: Place) -> str:
    return f"`{tune_command(place)}` makes one."


def _first_rank() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def tune_command(place: Place) -> str:
    """The command that tunes a place on the card that it runs on."""
    spec, shape = place.spec, representative(place.bucket, place.spec.group)
    heads = f"{shape.heads}" if spec.group == 1 else f"{shape.heads}/{shape.kv_heads}"
    one_length = shape.seqlen_q == (1 if spec.family == "decode" else shape.seqlen_kv)
    lengths = f"{shape.seqlen_kv}" if one_length else f"{shape.seqlen_q}x{shape.seqlen_kv}"
    words = ["parallax-gen", "tune", "--op", spec.family]
    words += ["--head-dim", f"{spec.head_dim}", "--dtype", spec.dtype, "--shape", f"{shape.batch},{heads},{lengths}"]
    if spec.window:  # one of all keys would be none; a key less rounds to the same bucket
        words += ["--window", f"{min(shape.window, shape.seqlen_kv - 1)}"]
    elif not spec.causal and (spec.many_queries or spec.family in ("forward", "dkdv", "dqdr")):
        words.append("--full")
    words += [f"--{name}" for name in ("varlen", "stats", "ragged", "leftpad") if spec.flat()[name]]
    words += ["--page-size", f"{spec.page_size}"] if spec.page_size else []
    words += ["--cache-dtype", spec.cache_dtype] if spec.cache_dtype else []
    return " ".join(words)
