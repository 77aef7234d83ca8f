"""Why a call gets the kernel that it gets: what that rests on, and why nothing nearer does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from parallax_gen.codegen.build import write
from parallax_gen.codegen.render import render
from parallax_gen.describe import format_counts
from parallax_gen.memory.ranking import Candidate, Tier, comparable_here, is_rendered, ranked, why_not_chosen
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.standing import ANOTHER_KERNEL, Origins
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.space import why_invalid
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import Choice, choose

MOST = 3  # of each kind of alternative


@dataclass(frozen=True)
class Explanation:
    """What dispatch does with one call.

    origin       "yours", "shipped" or "default"
    reason       why that one, in a sentence
    runners_up   what it would get next, the best first
    predicted    what was only predicted of the place, the best first
    unused       measured of the place, and never what a call gets, with why not
    """

    spec: KernelSpec
    shape: Shape
    choice: Choice
    file: Path
    origin: str
    reason: str
    runners_up: list[Candidate]
    predicted: list[Result]
    unused: list[tuple[Result, str]]


def explanation(spec: KernelSpec, shape: Shape, gpu: Gpu, memory: Memory, origins: Origins) -> Explanation:
    """What dispatch chooses for a call, and what else there is."""
    choice = choose(spec, shape, gpu, memory)
    results = memory.results(choice.place)
    refused = [candidate for candidate, _ in choice.refused]
    passed = {c.config for c in refused}
    ranking = list(ranked(choice.place, gpu, memory))
    candidates = [c for c in ranking if c != choice.candidate and c.config not in passed]
    used = {c.record for c in ranking}
    unused = [(r, _why_unused(r, gpu, memory)) for r in results if r.measured and r not in used]
    return Explanation(
        spec=spec,
        shape=shape,
        choice=choice,
        file=write(render(spec, choice.config, gpu)),
        origin="default" if choice.record is None else origins.of(choice.record),
        reason=_reason(choice, results, candidates, unused),
        runners_up=candidates[:MOST],
        predicted=[r for r in results if not r.outcome.tried][:MOST],
        unused=unused[:MOST],
    )


def _reason(
    choice: Choice, results: list[Result], candidates: list[Candidate], unused: list[tuple[Result, str]]
) -> str:
    candidate, record = choice.candidate, choice.record
    if record is not None:
        rivals = [c.record for c in candidates if c.tier == candidate.tier and c.record is not None]
        alike = 1 + sum(_comparable(r, record) for r in rivals)
        fastest = f"the fastest of {alike}" if alike > 1 else "the only one"
        if candidate.tier == Tier.MEASURED_HERE:
            return f"{fastest} measured of this kernel with {Toolchain.here()}"
        if candidate.tier == Tier.NEIGHBOUR:
            found = f"the best measured with {record.evidence.measured_with} at {record.place.bucket}"
        else:
            found = f"{fastest} with {record.evidence.measured_with}"
        if candidate.tier == Tier.SIBLING_CARD:
            found += f" on {record.place.gpu}, a card of the same capability"
        return f"{found}; {_why_nothing_nearer(choice, record, unused)}"
    if choice.refused:
        return "what is borrowed elsewhere compiles badly here"
    if not results:
        return "nothing is known of this place"
    if unused:
        return _none_counts(unused, "")
    kinds = format_counts(Counter(result.outcome for result in results))
    return f"nothing was measured of this place, only: {kinds}"


def _comparable(one: Result, other: Result) -> bool:
    """Whether two times may be compared: of one card and size, with one toolchain, by one timing protocol."""
    evidences = (one.evidence, other.evidence)
    return one.place == other.place and len({(e.toolchain, e.protocol) for e in evidences}) == 1


def _why_nothing_nearer(choice: Choice, record: Result, unused: list[tuple[Result, str]]) -> str:
    """Why what is chosen is borrowed: what there is of nearer tiers, and why that does not count."""
    if choice.refused:
        return "what ranks higher compiles badly here"
    here, tier = Toolchain.here(), choice.candidate.tier
    if tier == Tier.OTHER_TOOLCHAIN:
        if nearer := [(r, why) for r, why in unused if comparable_here(r.evidence)]:
            return _none_counts(nearer, f" with {here}")
        if record.evidence.toolchain.compiles_like(here):
            return "nothing was timed by today's, and times of two protocols are not compared"
        return f"nothing that counts was measured with {here}"
    where = "of this bucket" if tier == Tier.NEIGHBOUR else "on this one"
    return _none_counts(unused, f" {where}") if unused else f"nothing that counts was measured {where}"


def _none_counts(unused: list[tuple[Result, str]], of_what: str) -> str:
    none = f"the only record{of_what} does not count"
    if len(unused) > 1:
        none = f"of {len(unused)} records{of_what} none counts"
    return f"{none}: {'; '.join(dict.fromkeys(why for _, why in unused))}"


def _why_unused(result: Result, gpu: Gpu, memory: Memory) -> str:
    """Of a measured one that is no candidate."""
    if reason := why_invalid(result.place.spec, result.config, gpu):
        return f"not valid any more: {reason}"
    return why_not_chosen(result, gpu, memory) if is_rendered(result, gpu) else ANOTHER_KERNEL
