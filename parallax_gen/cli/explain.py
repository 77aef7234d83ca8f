"""`parallax-gen explain`: which kernel a call gets, where its config comes from, and why it gets no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from parallax_gen.cli.models import Asked, ModelArgs, asked, asked_options
from parallax_gen.cli.options import KernelArgs, chosen_gpu, gpu_option, json_option, shape_option
from parallax_gen.cli.text import print_json, print_tables, print_text
from parallax_gen.describe import LEGEND, describe, time_and_rate
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.workloads import Sizes

if TYPE_CHECKING:
    from parallax_gen.memory.descriptions import Origins
    from parallax_gen.memory.result import Result
    from parallax_gen.runtime.explain import Explanation

INDENT = " " * 8


@click.command()
@gpu_option
@asked_options
@shape_option()
@json_option
def explain(
    gpu: str | None, model: ModelArgs | None, requested: KernelArgs, shape: Sizes | None, as_json: bool
) -> None:
    """Explain which kernel a call gets, and why not another.

    Shows its config and file; where the config comes from (measured here, with another toolchain, or on a card of the
    same compute capability, or the default); the runners-up; results that were only predicted; and measured results
    that are not used.

    With PARALLAX_GEN_LOCK it says what calls get under the lock, and fails where they would.

    With --op training or --model, shows a table of each step: the config of each kernel and where it comes from, its
    time where it is known, the sum of all calls, and how these compare with the defaults and with the card's limits.

    \b
    Example
      parallax-gen explain --gpu h200 --op decode --shape 32,32/8,8192
      parallax-gen explain --gpu h200 --op training --shape 8,16,4096
    """
    from parallax_gen.memory.descriptions import Origins, open_memory
    from parallax_gen.memory.lock import lock_of_environment
    from parallax_gen.runtime.explain import explanation_of, to_json

    kernels = asked(model, requested, [shape] if shape else [])
    card = chosen_gpu(gpu)
    if not kernels.one:
        _explain_steps(kernels, card, as_json)
        return
    (call,) = kernels.calls
    memory = open_memory()
    origins = Origins(memory)
    explanation = explanation_of(call.spec, call.shape, card, memory, origins, lock_of_environment())
    if as_json:
        print_json(to_json(explanation, origins))
    else:
        _print(explanation, origins)


def _explain_steps(kernels: Asked, card: Gpu, as_json: bool) -> None:
    from parallax_gen.memory.descriptions import open_memory
    from parallax_gen.memory.lock import lock_of_environment, lock_text
    from parallax_gen.tuning.plan import plan_of, times_of_choices
    from parallax_gen.tuning.summary import CHOICES_LEGEND, choices_tables

    memory, lock = open_memory(), lock_of_environment()
    times = times_of_choices(plan_of(kernels.title, kernels.steps, card, memory, lock), memory)
    if as_json:
        steps = [step.to_json() for step in times]
        print_json({"gpu": card.name, "model": kernels.title, "lock": lock and str(lock.path), "steps": steps})
        return
    print_text(f"{kernels.title}; on {card.name}")
    click.echo()
    print_tables(choices_tables(times))
    print_text(CHOICES_LEGEND)
    print_text(LEGEND)
    print_text(lock_text(lock))


def _print(explanation: Explanation, origins: Origins) -> None:
    from parallax_gen.memory.descriptions import NOT_CHECKED, evidence_text
    from parallax_gen.memory.lock import lock_text

    place, record = explanation.choice.place, explanation.choice.record
    lines = {
        "call": f"{explanation.spec}; {explanation.shape}; on {place.gpu}",
        "bucket": str(place.bucket),
        "lock": lock_text(explanation.lock),
        "config": describe(explanation.choice.config),
        "file": str(explanation.file),
        "from": f"the default config: {explanation.reason}",
    }
    if explanation.choice.candidate.locked:
        lines["from"] = f"the lock, {explanation.reason}"
    if record is not None:
        owner = {"yours": "your record", "shipped": "a shipped record"}[explanation.origin]
        lines["from"] = f"{owner}, {explanation.reason}:"
    for name, text in lines.items():
        print_text(f"{name:<8}{text}", indent=INDENT)
    if record is not None:
        print_text(f"{INDENT}{_time_text(record)}, {record.source or 'measured'}, {record.created_at}", indent=INDENT)
    for candidate, reason in explanation.choice.refused:
        print_text(f"refused {describe(candidate.config)}: {reason}", indent=INDENT)
    if not explanation.choice.checked:
        print_text(f"{INDENT}{NOT_CHECKED}", indent=INDENT)
    runners_up = [(c.record, evidence_text(c, place.gpu)) for c in explanation.runners_up if c.record is not None]
    _section("runners-up", [(r, f"{origins.status(r)}, {evidence}") for r, evidence in runners_up])
    _section("only predicted, so not used", [(r, "the model's estimate") for r in explanation.predicted])
    _section("measured, but not used", explanation.unused)


def _time_text(result: Result) -> str:
    from parallax_gen.memory.descriptions import shape_of

    assert result.time_us is not None
    return time_and_rate(result.place.spec, shape_of(result), result.time_us)


def _section(title: str, results: list[tuple[Result, str]]) -> None:
    if results:
        click.echo(f"\n{title}")
    for result, remark in results:
        print_text(f"  {describe(result.config)}", indent="  ")
        print_text(f"    {_time_text(result)}; {remark}", indent="    ")
