"""`parallax-gen explain`: which kernel a call gets, from where, and why not another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.options import Asked, Sizes, gpu_named, gpu_option, json_option, kernel_options, shape_option
from parallax_gen.cli.text import print_json
from parallax_gen.describe import counted, describe, time_and_rate
from parallax_gen.ops.base import config_to_dict
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from parallax_gen.cli.known import Origins
    from parallax_gen.memory.ranking import Candidate
    from parallax_gen.memory.result import Result
    from parallax_gen.memory.shipped import Memory
    from parallax_gen.runtime.dispatch import Choice

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


@click.command()
@gpu_option
@kernel_options
@shape_option(required=True)
@json_option
def explain(gpu: str | None, asked: Asked, shape: Sizes, as_json: bool) -> None:
    """Explain which kernel a call gets, and why not another.

    Its config and file, what they rest on (measured here, by another toolchain, on a sibling card, or the default),
    the runners-up, what was only predicted, and what was measured and is not used.

    \b
    Example
      parallax-gen explain --gpu h200 --op decode --shape 32,32/8,8192
    """
    from parallax_gen.cli.known import Origins, open_memory

    card, (spec, sizes) = gpu_named(gpu), asked.kernel(shape)
    memory = open_memory()
    origins = Origins(memory)
    found = explanation(spec, sizes, card, memory, origins)
    if as_json:
        print_json(_to_json(found, origins))
    else:
        _print(found, origins)


def explanation(spec: KernelSpec, shape: Shape, gpu: Gpu, memory: Memory, origins: Origins) -> Explanation:
    """What dispatch chooses for a call, and what else there is."""
    from parallax_gen.codegen.build import write
    from parallax_gen.codegen.render import render
    from parallax_gen.memory.ranking import ranked
    from parallax_gen.runtime.dispatch import choose

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
    from parallax_gen.memory.ranking import Tier
    from parallax_gen.memory.toolchain import Toolchain

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
    kinds = counted(Counter(result.outcome for result in results))
    return f"nothing was measured of this place, only: {kinds}"


def _comparable(one: Result, other: Result) -> bool:
    """Whether two times may be compared: of one card and size, with one toolchain, by one timing protocol."""
    evidences = (one.evidence, other.evidence)
    return one.place == other.place and len({(e.toolchain, e.protocol) for e in evidences}) == 1


def _why_nothing_nearer(choice: Choice, record: Result, unused: list[tuple[Result, str]]) -> str:
    """Why what is chosen is borrowed: what there is of nearer tiers, and why that does not count."""
    from parallax_gen.memory.ranking import Tier, is_like
    from parallax_gen.memory.toolchain import Toolchain

    if choice.refused:
        return "what ranks higher compiles badly here"
    here, tier = Toolchain.here(), choice.candidate.tier
    if tier == Tier.OTHER_TOOLCHAIN:
        if nearer := [(r, why) for r, why in unused if is_like(r.evidence)]:
            return _none_counts(nearer, f" with {here}")
        if record.evidence.toolchain.like(here):
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
    from parallax_gen.cli.known import ANOTHER_KERNEL
    from parallax_gen.memory.ranking import is_rendered, why_not_chosen
    from parallax_gen.ops.space import why_invalid

    if reason := why_invalid(result.place.spec, result.config, gpu):
        return f"not valid any more: {reason}"
    return why_not_chosen(result, gpu, memory) if is_rendered(result, gpu) else ANOTHER_KERNEL


def _print(found: Explanation, origins: Origins) -> None:
    from parallax_gen.cli.known import NOT_CHECKED, rests_on

    place, record = found.choice.place, found.choice.record
    click.echo(f"call    {found.spec}; {found.shape}; on {place.gpu}")
    click.echo(f"bucket  {place.bucket}")
    click.echo(f"config  {describe(found.choice.config)}")
    click.echo(f"file    {found.file}")
    if record is None:
        click.echo(f"from    the default config: {found.reason}")
    else:
        whose = {"yours": "your record", "shipped": "a shipped record"}[found.origin]
        click.echo(f"from    {whose}, {found.reason}:")
        click.echo(f"        {_told(record)}, {record.source or 'measured'}, {record.created_at}")
    for candidate, why in found.choice.refused:
        click.echo(f"not     {describe(candidate.config)}: {why}")
    if not found.choice.checked:
        click.echo(f"        {NOT_CHECKED}")
    runners_up = [(c.record, rests_on(c, place)) for c in found.runners_up if c.record is not None]
    _section("runners-up", [_line(r, f"{origins.status(r)}, {by}") for r, by in runners_up])
    _section("only predicted, so not used", [_line(r, "model's estimate") for r in found.predicted])
    _section("measured, and not used", [_line(r, why) for r, why in found.unused])


def _told(result: Result) -> str:
    from parallax_gen.cli.known import shape_of

    assert result.time_us is not None
    return time_and_rate(result.place.spec, shape_of(result), result.time_us)


def _line(result: Result, remark: str) -> str:
    return f"{describe(result.config)}\n    {_told(result)}; {remark}"


def _section(title: str, lines: list[str]) -> None:
    if lines:
        click.echo(f"\n{title}")
    for line in lines:
        click.echo(f"  {line}")


def _to_json(found: Explanation, origins: Origins) -> dict[str, Any]:
    place, record = found.choice.place, found.choice.record
    return {
        "gpu": place.gpu,
        "spec": found.spec.to_dict(),
        "shape": found.shape.to_dict(),
        "bucket": place.bucket.to_dict(),
        "config": config_to_dict(found.choice.config),
        "file": str(found.file),
        "from": found.origin,
        "tier": found.choice.candidate.tier.words,
        "reason": found.reason,
        "checked": found.choice.checked,
        "refused": [{"why": why, "config": config_to_dict(c.config)} for c, why in found.choice.refused],
        "record": None if record is None else origins.to_json(record),
        "runners_up": [
            {"tier": c.tier.words, "record": origins.to_json(c.record)} for c in found.runners_up if c.record
        ],
        "predicted": [origins.to_json(r) for r in found.predicted],
        "unused": [{"why": why, "record": origins.to_json(result)} for result, why in found.unused],
    }
