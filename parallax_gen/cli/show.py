"""`parallax-gen show`: all results of one kernel in one bucket of sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from parallax_gen.cli.models import ModelArgs, asked, asked_options
from parallax_gen.cli.options import KernelArgs, chosen_gpu, gpu_option, json_option, shape_option
from parallax_gen.cli.text import print_json, print_table, print_text
from parallax_gen.describe import LEGEND, brief, number
from parallax_gen.problem.workloads import Sizes

if TYPE_CHECKING:
    from parallax_gen.memory.descriptions import Origins
    from parallax_gen.memory.place import Place
    from parallax_gen.memory.result import Result

EXPLANATION = """status: measured (by you), shipped (measured elsewhere), or predicted (calls never use it);
regs: registers per thread; spills: bytes per thread; shared: bytes per program;
error: relative, against an fp64 oracle;
differs in: how the result differs from this process: kernel, Triton, ptxas (cuda), timing protocol"""


@click.command()
@gpu_option
@asked_options
@shape_option()
@json_option
def show(gpu: str | None, model: ModelArgs | None, requested: KernelArgs, shape: Sizes | None, as_json: bool) -> None:
    """Show all results of a kernel at one shape.

    Lists all results of the shape's bucket, from fast to slow, then failures with their reasons. Marks results of
    another toolchain, and of other kernels than today's. With --op training or --model, of each kernel.

    \b
    Example
      parallax-gen show --gpu h200 --op decode --shape 32,32/8,8192
    """
    from parallax_gen.memory.descriptions import Origins, open_memory

    kernels = asked(model, requested, [shape] if shape else [])
    card = chosen_gpu(gpu)
    memory = open_memory()
    found = [(place, memory.results(place)) for place in kernels.places(card)]
    origins = Origins(memory, card.name)
    if as_json:
        documents = [{"place": p.flat(), "results": [origins.to_json(r) for r in results]} for p, results in found]
        print_json(documents[0] if kernels.one else {"kernels": documents})
        return
    for place, results in found:
        _print(place, results, origins)
    if any(results for _, results in found):
        print_text(LEGEND)
        print_text(EXPLANATION)


def _print(place: Place, results: list[Result], origins: Origins) -> None:
    print_text(f"{place.gpu}: {place.spec}; {place.bucket}")
    if not results:
        print_text("there are no results for this kernel and bucket: parallax-gen explain says which config calls get")
    _print_timed([r for r in results if not r.outcome.failed], origins)
    _print_failed([r for r in results if r.outcome.failed])


def _print_timed(results: list[Result], origins: Origins) -> None:
    if not results:
        return
    numbers = ("time us", "regs", "spills", "shared", "error")
    print_table((*numbers, "config", "status", "differs in"), [_line(r, origins) for r in results], right=numbers)
    click.echo()


def _line(result: Result, origins: Origins) -> tuple[str, ...]:
    from parallax_gen.memory.descriptions import differences_from_here

    assert result.time_us is not None
    differences = ", ".join(differences_from_here(result))
    return number(result.time_us), *_resources(result), brief(result.config), origins.status(result), differences


def _print_failed(results: list[Result]) -> None:
    """Print two lines per failed config, since messages may be long."""
    for result in results:
        registers, spills, shared, error = _resources(result)
        time = f", {number(result.time_us)} us" if result.time_us else ""
        resources = f"{registers} registers, {spills} bytes spilled, {shared} shared, error {error}{time}"
        print_text(f"{result.outcome}: {brief(result.config)}; {resources}", indent="  ")
        if result.detail:
            retry_note = " (a fault of the machine: tune tries it again)" if result.is_machine_fault else ""
            print_text(f"    {result.detail}{retry_note}", indent="    ")
    if results:
        click.echo()


def _resources(result: Result) -> tuple[str, str, str, str]:
    """Registers, spills, shared memory and error as text, "-" if unknown."""
    sizes = (result.registers, result.spills, result.shared_bytes)
    registers, spills, shared = ("-" if size is None else str(size) for size in sizes)
    return registers, spills, shared, "-" if result.error is None else f"{result.error:.1e}"
