"""`parallax-gen lock`: writes which kernel each place gets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from parallax_gen.cli.models import ModelArgs, asked, asked_options
from parallax_gen.cli.options import KernelArgs, check_file, chosen_gpu, gpu_option, json_option, shape_option
from parallax_gen.cli.text import print_json, print_text
from parallax_gen.describe import format_counts
from parallax_gen.problem.workloads import Sizes


@click.command()
@click.option("-o", "--output", "path", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--add", is_flag=True, help="Keep the file's kernels of other places.")
@gpu_option
@asked_options
@click.option(
    "--calls",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="All kernels of the calls that PARALLAX_GEN_RECORD wrote to a file.",
)
@shape_option(multiple=True, more_help="Repeatable.")
@json_option
def lock(
    path: Path,
    add: bool,
    gpu: str | None,
    model: ModelArgs | None,
    calls: Path | None,
    requested: KernelArgs,
    shapes: tuple[Sizes, ...],
    as_json: bool,
) -> None:
    """Write which kernels calls get now, so that others get the same.

    The lock has a line for each kernel and bucket of sizes: its config, the fingerprint of the kernel and the versions
    of Triton and ptxas. With PARALLAX_GEN_LOCK=FILE calls take these kernels and no others: a kernel that is not in the
    lock, or that is now rendered or compiled otherwise, is an error. explain and doctor check it, too.

    \b
    Example
      parallax-gen lock -o k.lock --gpu h200 --op decode --shape 32,32/8,8192
      parallax-gen lock -o k.lock --model Llama-3.2-1B --serving
      parallax-gen lock -o k.lock --calls calls.jsonl --add
    """
    from parallax_gen.memory.calls import read_calls
    from parallax_gen.memory.descriptions import open_memory
    from parallax_gen.problem.shapes import representative
    from parallax_gen.runtime.locking import lock_kernels, not_checked

    if calls is not None and (model or requested.op or shapes):
        raise click.UsageError("--calls has the kernels and sizes: leave out the options that choose them")
    if calls is not None:
        check_file("--calls", calls)
        kernels = [(spec, representative(bucket, spec.group)) for spec, bucket in read_calls(calls)]
    else:
        kernels = [(call.spec, call.shape) for call in asked(model, requested, shapes).calls]
    written, choices = lock_kernels(path.expanduser().absolute(), kernels, chosen_gpu(gpu), open_memory(), add=add)
    if as_json:
        print_json({"lock": str(path), "kernels": [locked.to_dict() for locked in written.kernels.values()]})
    else:
        sources = format_counts(Counter(choice.candidate.source for choice in choices))
        print_text(f"{path}: {written.count}; configs written now: {sources}")
    if note := not_checked(choices):
        print_text(note, err=True)
