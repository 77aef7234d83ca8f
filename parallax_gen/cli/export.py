"""`parallax-gen export`: writes each kernel to a file, for use without this package."""

from __future__ import annotations

from pathlib import Path

import click

from parallax_gen.cli.models import ModelArgs, asked, asked_options
from parallax_gen.cli.options import KernelArgs, gpu_option, gpu_or_stand_in, json_option, shape_option
from parallax_gen.cli.text import print_json, print_text
from parallax_gen.codegen import device
from parallax_gen.problem.workloads import Sizes


@click.command()
@gpu_option
@asked_options
@shape_option(multiple=True, more_help="Repeatable. Default: the first of the op's usual shapes.")
@click.option("--all", "every", is_flag=True, help="With --op, instead of --shape: every size with a measured record.")
@click.option("--cubin", is_flag=True, help="Also compile for the card, and write what a C program needs to launch it.")
@click.option("-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), help="One file a kernel.")
@click.option(
    "--hub",
    type=click.Path(path_type=Path, file_okay=False),
    help="A package of the Hugging Face kernels hub, with kernels for all sizes. --gpu takes several: h100,h200.",
)
@click.option("--repo-id", metavar="OWNER/NAME", help="With --hub: its place in the hub.")
@json_option
def export(
    gpu: str | None,
    model: ModelArgs | None,
    requested: KernelArgs,
    shapes: tuple[Sizes, ...],
    every: bool,
    cubin: bool,
    folder: Path | None,
    hub: Path | None,
    repo_id: str | None,
    as_json: bool,
) -> None:
    """Write kernels as files that need only torch and triton.

    Writes one file for each kernel and --shape, or for each kernel of a model, and a README.md that says how to call
    them. They are the kernels that calls get: see parallax-gen explain. If no record can be used, the file has the
    default config.

    With --hub writes a package for kernels.get_kernel: its functions launch these kernels at all sizes.

    \b
    Example
      parallax-gen export --gpu h200 --op decode --shape 32,32/8,8192 -o kernels
      parallax-gen export --op decode --shape 32,32/8,8192 --cubin -o kernels
      parallax-gen export --op training --shape 4,16,4096 -o kernels
      parallax-gen export --for serving --heads 32/8 --page-size 16 -o kernels
      parallax-gen export --gpu h100,h200 --model Qwen3-0.6B --hub attention
    """
    from parallax_gen.hub.folder import write_package
    from parallax_gen.memory.descriptions import open_memory
    from parallax_gen.memory.lock import lock_of_environment
    from parallax_gen.runtime.export import kernels_at, known_places, write_kernels

    if every and (shapes or not requested.op):
        raise click.UsageError("--all needs --op, and no --shape")
    if (folder is None) == (hub is None) or (repo_id and hub is None) or (hub and (every or cubin)):
        raise click.UsageError("give either -o, or --hub, with which --repo-id is allowed, but not --all or --cubin")
    kernels = asked(model, requested, shapes, usual=True)
    names = gpu.split(",") if gpu and hub else [gpu]
    cards, memory = [gpu_or_stand_in(name, lambda: device.gpu_here(0)) for name in names], open_memory()
    if hub is not None:
        package = write_package(hub, [(call.spec, call.shape) for call in kernels.calls], cards, memory, repo_id)
        if as_json:
            print_json(package.to_json())
            return
        for line in package.lines:
            print_text(line, indent="    ")
        return
    assert folder is not None
    card = cards[0]
    known = known_places(memory, card, requested.matches) if every else []
    places = [(place.spec, place) for place in known]
    kernels_here = kernels_at(places or kernels.kernels(card), card, memory, lock_of_environment())
    written = write_kernels(kernels_here, card, folder, kernels.calls if cubin else None)
    if as_json:
        files = [file.to_json() for file in written]
        print_json({"gpu": card.name, "readme": str(folder / "README.md"), "kernels": files})
        return
    for file in written:
        print_text(str(file.path))
        for line in file.lines:
            print_text(f"    {line}", indent="    ")
    if requested.op and not (shapes or places):
        why = "no size has a record, so" if every else "without --shape"
        advice = "" if every else "; --all writes every size with a record"
        print_text(f"{why} this is {kernels.steps[0].detail}{advice}", err=True)
