"""Explains a call's kernel: the record it comes from, and why no closer record was used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallax_gen.codegen.build import write
from parallax_gen.codegen.render import render
from parallax_gen.describe import format_counts
from parallax_gen.memory.descriptions import ANOTHER_KERNEL, Origins
from parallax_gen.memory.lock import NO_CHECK, Lock
from parallax_gen.memory.ranking import MOST_LOSS, Candidate, Tier, comparable_here, is_rendered, ranked, why_not_chosen
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import config_to_dict
from parallax_gen.ops.space import why_invalid
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import DispatchChoice, choose

MAX_ALTERNATIVES = 3  # of each kind


@dataclass(frozen=True)
class Explanation:
    """The result of dispatch for one call.

    lock         that is on; None for none
    origin       "yours", "shipped", "default" or "lock"
    reason       why this config was chosen, in a sentence
    runners_up   the candidates ranked next, best first
    predicted    results of the place that were only predicted, best first
    unused       measured results of the place that calls never use, each with the reason
    """

    spec: KernelSpec
    shape: Shape
    choice: DispatchChoice
    lock: Lock | None
    file: Path
    origin: str
    reason: str
    runners_up: list[Candidate]
    predicted: list[Result]
    unused: list[tuple[Result, str]]


def explanation_of(
    spec: KernelSpec, shape: Shape, gpu: Gpu, memory: Memory, origins: Origins, lock: Lock | None = None
) -> Explanation:
    """What dispatch chooses for a call, and the alternatives. Raises LockError if the lock refuses the call."""
    choice = choose(spec, shape, gpu, memory, lock=lock)
    results = memory.results(choice.place)
    refused = [candidate for candidate, _ in choice.refused]
    refused_configs = {c.config for c in refused}
    ranking = list(ranked(choice.place, gpu, memory))
    candidates = [c for c in ranking if c != choice.candidate and c.config not in refused_configs]
    used = {c.record for c in ranking}
    unused = [(r, _why_unused(r, gpu, memory)) for r in results if r.measured and r not in used]
    return Explanation(
        spec=spec,
        shape=shape,
        choice=choice,
        lock=lock,
        file=write(render(spec, choice.config, gpu)),
        origin=_origin(choice, origins),
        reason=_reason(choice, results, candidates, unused) if lock is None else _reason_of_lock(choice, lock),
        runners_up=candidates[:MAX_ALTERNATIVES],
        predicted=[r for r in results if not r.outcome.tried][:MAX_ALTERNATIVES],
        unused=unused[:MAX_ALTERNATIVES],
    )


def to_json(explanation: Explanation, origins: Origins) -> dict[str, Any]:
    """An explanation as a JSON document."""
    place, record = explanation.choice.place, explanation.choice.record
    return {
        "gpu": place.gpu,
        "spec": explanation.spec.to_dict(),
        "shape": explanation.shape.to_dict(),
        "bucket": place.bucket.to_dict(),
        "config": config_to_dict(explanation.choice.config),
        "file": str(explanation.file),
        "from": explanation.origin,
        "tier": explanation.choice.candidate.source,
        "lock": None if explanation.lock is None else str(explanation.lock.path),
        "reason": explanation.reason,
        "checked": explanation.choice.checked,
        "refused": [{"why": reason, "config": config_to_dict(c.config)} for c, reason in explanation.choice.refused],
        "record": None if record is None else origins.to_json(record),
        "runners_up": [
            {"tier": c.tier.text, "record": origins.to_json(c.record)} for c in explanation.runners_up if c.record
        ],
        "predicted": [origins.to_json(r) for r in explanation.predicted],
        "unused": [{"why": reason, "record": origins.to_json(result)} for result, reason in explanation.unused],
    }


def _origin(choice: DispatchChoice, origins: Origins) -> str:
    if choice.record is not None:
        return origins.of(choice.record)
    return "lock" if choice.candidate.locked else "default"


def _reason_of_lock(choice: DispatchChoice, lock: Lock) -> str:
    return NO_CHECK if choice.candidate.locked else f"{lock.lacks(choice.place)}, and allows the default"


def _reason(
    choice: DispatchChoice, results: list[Result], candidates: list[Candidate], unused: list[tuple[Result, str]]
) -> str:
    candidate, record = choice.candidate, choice.record
    if record is not None:
        rivals = [c.record for c in candidates if c.tier == candidate.tier and c.record is not None]
        compared = 1 + sum(_comparable(r, record) for r in rivals)
        fastest = f"the fastest of {compared} configs measured" if compared > 1 else "the only config measured"
        if candidate.tier == Tier.MEASURED_HERE:
            return f"{fastest} with {Toolchain.here()}"
        if candidate.supports_default:
            fastest = f"the default, at most {MOST_LOSS - 1:.0%} slower than the fastest config measured"
        basis = f"{fastest} with {record.evidence.measured_with}"
        if record.place.bucket != choice.place.bucket:
            basis += f" at {record.place.bucket}"
        if record.place.gpu != choice.place.gpu:
            basis += f" on {record.place.gpu}, a card of the same capability"
        return f"{basis}; {_why_nothing_closer(choice, record, unused)}"
    if choice.refused:
        return "every borrowed kernel spills too much, does not fit or does not compile here"
    if not results:
        return "this kernel and bucket have no records"
    if unused:
        return _why_none_is_used(unused, "")
    kinds = format_counts(Counter(result.outcome for result in results))
    return f"no config of this kernel and bucket was timed; results: {kinds}"


def _comparable(a: Result, b: Result) -> bool:
    """Whether two times are comparable: the same place, toolchain and timing protocol."""
    evidences = (a.evidence, b.evidence)
    return a.place == b.place and len({(e.toolchain, e.protocol) for e in evidences}) == 1


def _why_nothing_closer(choice: DispatchChoice, record: Result, unused: list[tuple[Result, str]]) -> str:
    """Why the chosen record is borrowed: which records closer tiers have, and why those do not count."""
    if choice.refused:
        return "every kernel of a record that ranks higher spills too much, does not fit or does not compile here"
    here, tier = Toolchain.here(), choice.candidate.tier
    if tier == Tier.OTHER_TOOLCHAIN:
        if closer := [(r, reason) for r, reason in unused if comparable_here(r.evidence)]:
            return _why_none_is_used(closer, f" with {here}")
        if record.evidence.toolchain.compiles_like(here):
            return "no record has today's timing protocol, and times of different protocols are not compared"
        return f"no usable record was measured with {here}"
    where = "at this bucket" if tier == Tier.NEAR_BUCKET else "on this card"
    return _why_none_is_used(unused, f" {where}") if unused else f"no usable record was measured {where}"


def _why_none_is_used(unused: list[tuple[Result, str]], of_what: str) -> str:
    summary = f"the only record{of_what} is not used"
    if len(unused) > 1:
        summary = f"none of {len(unused)} records{of_what} is used"
    return f"{summary}: {'; '.join(dict.fromkeys(reason for _, reason in unused))}"


def _why_unused(result: Result, gpu: Gpu, memory: Memory) -> str:
    """Why a measured result is no candidate."""
    if reason := why_invalid(result.place.spec, result.config, gpu):
        return f"no longer valid: {reason}"
    return why_not_chosen(result, gpu, memory) if is_rendered(result, gpu) else ANOTHER_KERNEL
