"""`parallax-gen explain`: which kernel a call gets, where its config comes from, and why it gets no other."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from parallax_gen.cli.models import ModelArgs, model_options
from parallax_gen.cli.options import KernelArgs, chosen_gpu, gpu_option, json_option, kernel_options, shape_option
from parallax_gen.cli.text import print_json, print_tables
from parallax_gen.describe import LEGEND, describe, time_and_rate
from parallax_gen.problem.workloads import Sizes

if TYPE_CHECKING:
    from parallax_gen.memory.descriptions import Origins
    from parallax_gen.memory.result import Result
    from parallax_gen.runtime.explain import Explanation


@click.command()
@gpu_option
@model_options
@functools.partial(kernel_options, op_required=False)
@shape_option()
@json_option
def explain(
    gpu: str | None, model: ModelArgs | None, requested: KernelArgs, shape: Sizes | None, as_json: bool
) -> None:
    """Explain which kernel a call gets, and why not another.

    Shows its config and file; where the config comes from (measured here, with another toolchain, or on a card of the
    same compute capability, or the default); the runners-up; results that were only predicted; and measured results
    that are not used.

    With --model, shows all kernels of a model's steps: where their configs come from, their times where they are known,
    and the sum of a step, against the defaults.

    \b
    Example
      parallax-gen explain --gpu h200 --op decode --shape 32,32/8,8192
    """
    from parallax_gen.memory.descriptions import Origins, open_memory
    from parallax_gen.runtime.explain import explanation_of, to_json

    if model is not None:
        _explain_model(model, requested, shape, gpu, as_json)
        return
    if not requested.op or shape is None:
        raise click.UsageError("give --op and --shape, or --model, or --for with --heads")
    card, (spec, sizes) = chosen_gpu(gpu), requested.kernel(shape)
    memory = open_memory()
    origins = Origins(memory)
    explanation = explanation_of(spec, sizes, card, memory, origins)
    if as_json:
        print_json(to_json(explanation, origins))
    else:
        _print(explanation, origins)


def _explain_model(
    model: ModelArgs, requested: KernelArgs, shape: Sizes | None, gpu: str | None, as_json: bool
) -> None:
    from parallax_gen.memory.descriptions import open_memory
    from parallax_gen.tuning.plan import plan_of, times_of_choices
    from parallax_gen.tuning.summary import times_tables

    if requested.op or shape is not None:
        raise click.UsageError("--model and --for choose kernels and sizes: leave out --op and --shape")
    given = click.get_current_context().get_parameter_source
    head_dims = [requested.head_dim] * (given("head_dim") is ParameterSource.COMMANDLINE)
    dtypes = [requested.dtype] * (given("dtype") is ParameterSource.COMMANDLINE)
    memory = open_memory()
    plan = plan_of(*model.steps(head_dims, dtypes, requested.flags), chosen_gpu(gpu), memory)
    times = times_of_choices(plan, memory)
    if as_json:
        print_json({"gpu": plan.gpu.name, "model": str(plan.model), "steps": [step.to_json() for step in times]})
    else:
        click.echo(f"{plan.model}; on {plan.gpu.name}\n")
        print_tables(times_tables(times, "us", with_source=True))
        click.echo(LEGEND)


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
