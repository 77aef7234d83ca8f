"""`parallax-gen show`: all results of one kernel in one bucket of sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from parallax_gen.cli.options import KernelArgs, chosen_gpu, gpu_option, json_option, kernel_options, shape_option
from parallax_gen.cli.text import print_json, print_table
from parallax_gen.describe import LEGEND, brief, number
from parallax_gen.problem.workloads import Sizes

if TYPE_CHECKING:
    from parallax_gen.memory.descriptions import Origins
    from parallax_gen.memory.result import Result


@click.command()
@gpu_option
@kernel_options
@shape_option(required=True)
@json_option
def show(gpu: str | None, requested: KernelArgs, shape: Sizes, as_json: bool) -> None:
    """Show all results of one kernel at one shape.

    Lists all results of the shape's bucket, from fast to slow, then failures with their reasons. Marks results of
    another toolchain, and of other kernels than today's.

    \b
    Example
      parallax-gen show --gpu h200 --op decode --shape 32,32/8,8192
    """
    from parallax_gen.memory.descriptions import Origins, open_memory
    from parallax_gen.memory.place import Place
    from parallax_gen.problem.shapes import bucket_of

    card, (spec, sizes) = chosen_gpu(gpu), requested.kernel(shape)
    place = Place(card.name, spec, bucket_of(sizes))
    memory = open_memory()
    results = memory.results(place)
    origins = Origins(memory, card.name)
    if as_json:
        print_json({"place": place.flat(), "results": [origins.to_json(r) for r in results]})
        return
    click.echo(f"{card.name}: {place.spec}; {place.bucket}")
    if not results:
        click.echo("there are no results for this kernel and bucket: parallax-gen explain says which config calls get")
        return
    _print_timed([r for r in results if not r.outcome.failed], origins)
    _print_failed([r for r in results if r.outcome.failed])
    click.echo(LEGEND)
    click.echo("status: measured (by you), shipped (measured elsewhere), or predicted (calls never use it);")
    click.echo("regs: registers per thread; spills: bytes per thread; shared: bytes per program;")
    click.echo("error: relative, against an fp64 oracle;")
    click.echo("differs in: how the result differs from this process: kernel, Triton, ptxas (cuda), timing protocol")


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
        click.echo(
            f"{result.outcome}: {brief(result.config)}; {registers} registers, {spills} bytes spilled, ", nl=False
        )
        click.echo(f"{shared} shared, error {error}" + (f", {number(result.time_us)} us" if result.time_us else ""))
        if result.detail:
            retry_note = " (a fault of the machine: tune tries it again)" if result.is_machine_fault else ""
            click.echo(f"    {result.detail}{retry_note}")
    if results:
        click.echo()


def _resources(result: Result) -> tuple[str, str, str, str]:
    """Registers, spills, shared memory and error as text, "-" if unknown."""
    sizes = (result.registers, result.spills, result.shared_bytes)
    registers, spills, shared = ("-" if size is None else str(size) for size in sizes)
    return registers, spills, shared, "-" if result.error is None else f"{result.error:.1e}"
