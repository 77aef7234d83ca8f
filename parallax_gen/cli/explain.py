"""`parallax-gen explain`: which kernel a call gets, from where, and why not another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parallax_gen.cli.options import Asked, Sizes, gpu_named, gpu_option, json_option, kernel_options, shape_option
from parallax_gen.cli.text import counted, print_json, time_and_rate
from parallax_gen.problem.config import config_to_dict, describe
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

if TYPE_CHECKING:
    from parallax_gen.cli.known import Origins
    from parallax_gen.memory.results import Diff, Result
    from parallax_gen.memory.shipped import Memory
    from parallax_gen.runtime.dispatch import Choice

MOST = 3  # of each kind of alternative


@dataclass(frozen=True)
class Explanation:
    """What dispatch does with one call.

    origin       "yours", "shipped" or "default"
    reason       why that one, in a sentence
    runners_up   the next best measured under the same key
    predicted    what was only predicted under it, the best first
    near_misses  measured under another key, with the fields that differ (here, there)
    """

    spec: KernelSpec
    shape: Shape
    choice: Choice
    file: Path
    origin: str
    reason: str
    runners_up: list[Result]
    predicted: list[Result]
    near_misses: list[tuple[Result, Diff]]


@click.command()
@gpu_option
@kernel_options
@shape_option(required=True)
@json_option
def explain(gpu: str | None, asked: Asked, shape: Sizes, as_json: bool) -> None:
    """Explain which kernel a call gets, and why not another.

    Its config and file, where they come from, the runners-up, what was only predicted, and what was measured
    under a key that differs.

    \b
    Example
      parallax-gen explain --gpu h200 --op decode --shape 32,32/8,8192
    """
    from parallax_gen.cli.known import Origins, open_memory

    card, (spec, sizes) = gpu_named(gpu), asked.kernel(shape)
    memory = open_memory()
    origins = Origins(memory, card.name)
    found = explanation(spec, sizes, card, memory, origins)
    if as_json:
        print_json(_to_json(found, origins))
    else:
        _print(found, origins)


def explanation(spec: KernelSpec, shape: Shape, gpu: Gpu, memory: Memory, origins: Origins) -> Explanation:
    """What dispatch chooses for a call, and what else there is."""
    from parallax_gen.codegen.build import write
    from parallax_gen.codegen.render import render
    from parallax_gen.runtime.dispatch import choose

    choice = choose(spec, shape, gpu, memory)
    results = memory.results(choice.key)
    return Explanation(
        spec=spec,
        shape=shape,
        choice=choice,
        file=write(render(spec, choice.config, gpu)),
        origin="default" if choice.record is None else origins.of(choice.record),
        reason=_reason(choice, results, gpu),
        runners_up=[r for r in results if r.measured and r != choice.record][:MOST],
        predicted=[r for r in results if r.outcome == "predicted"][:MOST],
        near_misses=_one_a_difference(memory.near_misses(choice.key)),
    )


def _reason(choice: Choice, results: list[Result], gpu: Gpu) -> str:
    from parallax_gen.problem.space import why_invalid

    if choice.record is not None:
        measured = sum(r.measured for r in results)
        return f"the fastest of {measured} measured under this call's key" if measured > 1 else "the only one measured"
    if not results:
        return "nothing is known under this call's key"
    if results[0].measured:
        return f"the fastest record is not valid any more: {why_invalid(choice.key.spec, results[0].config, gpu)}"
    kinds: dict[str, int] = {}
    for result in results:
        kinds[result.outcome] = kinds.get(result.outcome, 0) + 1
    return f"nothing was measured under this call's key, only: {counted(kinds)}"


def _one_a_difference(misses: list[tuple[Result, Diff]]) -> list[tuple[Result, Diff]]:
    """The fastest of those that differ in the same way, the nearest first."""
    found: dict[tuple[Any, ...], tuple[Result, Diff]] = {}
    for result, diff in misses:
        found.setdefault(tuple(diff.items()), (result, diff))
    return list(found.values())[:MOST]


def _print(found: Explanation, origins: Origins) -> None:
    from parallax_gen.cli.known import differences

    key, record = found.choice.key, found.choice.record
    click.echo(f"call    {found.spec}; {found.shape}; on {key.gpu}")
    click.echo(f"bucket  {key.bucket}")
    click.echo(f"config  {describe(found.choice.config)}")
    click.echo(f"file    {found.file}")
    if record is None:
        click.echo(f"from    the default config: {found.reason}")
    else:
        whose = {"yours": "your record", "shipped": "a shipped record"}[found.origin]
        click.echo(f"from    {whose}, {found.reason}:")
        click.echo(f"        {_told(record)}, {record.source or 'measured'}, {record.created_at}")
    _section("runners-up, measured under the same key", [_line(r, origins.status(r)) for r in found.runners_up])
    _section("only predicted, so not used", [_line(r, "model's estimate") for r in found.predicted])
    near = [_line(r, ", ".join(differences(diff))) for r, diff in found.near_misses]
    _section("near misses: measured under another key, so not used", near)


def _told(result: Result) -> str:
    from parallax_gen.cli.known import shape_of

    assert result.time_us is not None
    return time_and_rate(result.key.spec, shape_of(result), result.time_us)


def _line(result: Result, remark: str) -> str:
    return f"{describe(result.config)}\n    {_told(result)}; {remark}"


def _section(title: str, lines: list[str]) -> None:
    if lines:
        click.echo(f"\n{title}")
    for line in lines:
        click.echo(f"  {line}")


def _to_json(found: Explanation, origins: Origins) -> dict[str, Any]:
    key, record = found.choice.key, found.choice.record
    return {
        "gpu": key.gpu,
        "spec": found.spec.to_dict(),
        "shape": found.shape.to_dict(),
        "bucket": key.bucket.to_dict(),
        "config": config_to_dict(found.choice.config),
        "file": str(found.file),
        "from": found.origin,
        "reason": found.reason,
        "record": None if record is None else origins.to_json(record),
        "runners_up": [origins.to_json(r) for r in found.runners_up],
        "predicted": [origins.to_json(r) for r in found.predicted],
        "near_misses": [
            {
                "differs": {name: {"here": here, "there": there} for name, (here, there) in diff.items()},
                "record": origins.to_json(result),
            }
            for result, diff in found.near_misses
        ],
    }
