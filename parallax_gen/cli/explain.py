"""`parallax-gen explain`: which kernel a call gets, where its config comes from, and why it gets no other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.options import KernelArgs, chosen_gpu, gpu_option, json_option, kernel_options, shape_option
from parallax_gen.cli.text import print_json
from parallax_gen.describe import describe, time_and_rate
from parallax_gen.ops.base import config_to_dict
from parallax_gen.problem.workloads import Sizes

if TYPE_CHECKING:
    from parallax_gen.memory.descriptions import Origins
    from parallax_gen.memory.result import Result
    from parallax_gen.runtime.explain import Explanation


@click.command()
@gpu_option
@kernel_options
@shape_option(required=True)
@json_option
def explain(gpu: str | None, requested: KernelArgs, shape: Sizes, as_json: bool) -> None:
    """Explain which kernel a call gets, and why not another.

    Shows its config and file; where the config comes from (measured here, with another toolchain, or on a card of the
    same compute capability, or the default); the runners-up; results that were only predicted; and measured results
    that are not used.

    \b
    Example
      parallax-gen explain --gpu h200 --op decode --shape 32,32/8,8192
    """
    from parallax_gen.memory.descriptions import Origins, open_memory
    from parallax_gen.runtime.explain import explanation_of

    card, (spec, sizes) = chosen_gpu(gpu), requested.kernel(shape)
    memory = open_memory()
    origins = Origins(memory)
    explanation = explanation_of(spec, sizes, card, memory, origins)
    if as_json:
        print_json(_to_json(explanation, origins))
    else:
        _print(explanation, origins)


def _print(explanation: Explanation, origins: Origins) -> None:
    from parallax_gen.memory.descriptions import NOT_CHECKED, evidence_text

    place, record = explanation.choice.place, explanation.choice.record
    click.echo(f"call    {explanation.spec}; {explanation.shape}; on {place.gpu}")
    click.echo(f"bucket  {place.bucket}")
    click.echo(f"config  {describe(explanation.choice.config)}")
    click.echo(f"file    {explanation.file}")
    if record is None:
        click.echo(f"from    the default config: {explanation.reason}")
    else:
        owner = {"yours": "your record", "shipped": "a shipped record"}[explanation.origin]
        click.echo(f"from    {owner}, {explanation.reason}:")
        click.echo(f"        {_time_text(record)}, {record.source or 'measured'}, {record.created_at}")
    for candidate, reason in explanation.choice.refused:
        click.echo(f"refused {describe(candidate.config)}: {reason}")
    if not explanation.choice.checked:
        click.echo(f"        {NOT_CHECKED}")
    runners_up = [(c.record, evidence_text(c)) for c in explanation.runners_up if c.record is not None]
    _section("runners-up", [_line(r, f"{origins.status(r)}, {evidence}") for r, evidence in runners_up])
    _section("only predicted, so not used", [_line(r, "model's estimate") for r in explanation.predicted])
    _section("measured, but not used", [_line(r, reason) for r, reason in explanation.unused])


def _time_text(result: Result) -> str:
    from parallax_gen.memory.descriptions import shape_of

    assert result.time_us is not None
    return time_and_rate(result.place.spec, shape_of(result), result.time_us)


def _line(result: Result, remark: str) -> str:
    return f"{describe(result.config)}\n    {_time_text(result)}; {remark}"


def _section(title: str, lines: list[str]) -> None:
    if lines:
        click.echo(f"\n{title}")
    for line in lines:
        click.echo(f"  {line}")


def _to_json(explanation: Explanation, origins: Origins) -> dict[str, Any]:
    place, record = explanation.choice.place, explanation.choice.record
    return {
        "gpu": place.gpu,
        "spec": explanation.spec.to_dict(),
        "shape": explanation.shape.to_dict(),
        "bucket": place.bucket.to_dict(),
        "config": config_to_dict(explanation.choice.config),
        "file": str(explanation.file),
        "from": explanation.origin,
        "tier": explanation.choice.candidate.tier.text,
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
