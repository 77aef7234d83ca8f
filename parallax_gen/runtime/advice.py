"""Says what a call's kernel rests on where that is less than a measurement of it here, and what would mend that."""

from __future__ import annotations

import logging
import warnings

from parallax_gen.environment import QUIET, STRICT, is_on
from parallax_gen.errors import UntunedError
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Candidate, Tier
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.problem.shapes import representative

_LOG = logging.getLogger(__name__)


class UntunedWarning(UserWarning):
    """A call runs a kernel that was not measured on this GPU with this Triton."""


def check(place: Place, candidate: Candidate, *, warn: bool) -> bool:
    """Whether it was told, by Python's warnings and the log, that a call's kernel was not measured here.

    Silent where `warn` is not asked for, with PARALLAX_GEN_QUIET=1, and in all processes of torch.distributed but rank
    0. Raises UntunedError with PARALLAX_GEN_STRICT=1, which allows no other kernels than those measured here, and
    ArgumentError where one of the two is neither on nor off, whatever the call's kernel rests on.
    """
    strict, quiet = is_on(STRICT), is_on(QUIET)
    if candidate.tier == Tier.MEASURED_HERE:
        return False
    if strict:
        raise UntunedError(f"{STRICT} is on, and {_told(place, candidate)}")
    if not warn or quiet or not _first_rank():
        return False
    told = f"{_told(place, candidate)} This is said once a process; {QUIET}=1 silences it."
    _LOG.warning("%s", told)
    warnings.warn(told, UntunedWarning, stacklevel=2)
    return True


def _told(place: Place, candidate: Candidate) -> str:
    record = candidate.record
    if record is None:
        instead = "its default config is used"
    else:
        of = f"{record.place.bucket}" if candidate.tier == Tier.NEIGHBOUR else record.place.gpu
        instead = f"a record of {of} with {record.evidence.toolchain} is used"
    return (
        f"no measurement counts of {place.spec}; {place.bucket} on {place.gpu} with {Toolchain.here()}: {instead}. "
        f"`{tune_command(place)}` makes one."
    )


def _first_rank() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def tune_command(place: Place) -> str:
    """The command that tunes a place on the card that it runs on."""
    spec, shape = place.spec, representative(place.bucket, place.spec.group)
    heads = f"{shape.heads}" if spec.group == 1 else f"{shape.heads}/{shape.kv_heads}"
    one_length = shape.seqlen_q == (1 if spec.op == "decode" else shape.seqlen_kv)
    lengths = f"{shape.seqlen_kv}" if one_length else f"{shape.seqlen_q}x{shape.seqlen_kv}"
    words = ["parallax-gen", "tune", "--op", spec.op]
    words += ["--head-dim", f"{spec.head_dim}", "--dtype", spec.dtype, "--shape", f"{shape.batch},{heads},{lengths}"]
    if spec.window:
        words += ["--window", f"{shape.window}"]
    elif not spec.causal and (spec.many_queries or spec.op in ("forward", "dkdv", "dqdr")):
        words.append("--full")
    words += [f"--{name}" for name in ("varlen", "stats", "ragged", "leftpad") if getattr(spec, name)]
    words += ["--page-size", f"{spec.page_size}"] if spec.page_size else []
    words += ["--cache-dtype", spec.cache_dtype] if spec.cache_dtype else []
    return " ".join(words)
