"""`parallax-gen bench`: ours against softmax attention and other Parallax kernels, on this card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

import parallax_gen
from parallax_gen.cli.options import (
    Sizes,
    card_here,
    check_flags,
    flag_options,
    head_dim_of,
    json_option,
    shape_option,
)
from parallax_gen.cli.pictures import draw
from parallax_gen.cli.rows import print_means, print_rows, title, to_json, write_csv
from parallax_gen.cli.text import console, number, print_json, print_table
from parallax_gen.errors import MeasureError
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import DTYPES, KernelSpec
from parallax_gen.tuning.grids import GRIDS
from parallax_gen.tuning.usual import TRAINING, USUAL_HEAD_DIM, USUAL_TRAINING, Flags, kernels

if TYPE_CHECKING:
    from parallax_gen.cli.compare import Row

HOST_SHAPE = Shape(1, 8, 8, 1, 4096)  # so little work that the host's time shows

_TRAINED = (Shape(4, 16, 16, 4096, 4096), Shape(1, 16, 16, 16384, 16384))

# (head_dim, shape): from few bytes to many, alone and in a batch, MHA and GQA; a training step and a long prompt.
USUAL: dict[str, tuple[tuple[int, Shape], ...]] = {
    "forward": tuple((128, shape) for shape in _TRAINED),
    "decode": (
        *((128, Shape(batch, 8, 8, 1, keys)) for batch in (1, 32) for keys in (512, 1024, 4096, 16384)),
        (128, Shape(1, 32, 8, 1, 16384)),
        (128, Shape(32, 32, 8, 1, 8192)),
        (64, Shape(8, 16, 16, 1, 4096)),
    ),
    TRAINING: (
        *((128, shape) for shape in _TRAINED),
        *((dim, shape) for dim, shapes in USUAL_TRAINING.items() for shape in shapes if shape not in _TRAINED),
    ),
}


@click.command()
@click.option(
    "--op", "ops", type=click.Choice(tuple(USUAL)), multiple=True, help="Repeatable. Default: forward and decode."
)
@click.option(
    "--head-dim", type=head_dim_of, metavar="N", help="Of every --shape, 128 by default; of the usual ones those of it."
)
@click.option("--dtype", type=click.Choice(DTYPES), default="bf16", show_default=True)
@shape_option(multiple=True, more_help="Repeatable. Default: the usual ones.")
@click.option("--grid", type=click.Choice(tuple(GRIDS)), help="Of decode shapes, instead of --shape.")
@flag_options
@click.option("--only", multiple=True, metavar="NAME", help="Repeatable: contenders by name, such as 'SDPA cuDNN'.")
@click.option("--host", is_flag=True, help="Instead: the host's time of a decode step, and of the launches below it.")
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows there.")
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="Also draw decode's speed-ups there (PNG, SVG)."
)
@json_option
def bench(
    ops: tuple[str, ...],
    head_dim: int | None,
    dtype: str,
    shapes: tuple[Sizes, ...],
    grid: str | None,
    flags: Flags,
    only: tuple[str, ...],
    host: bool,
    csv_file: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Time ours against other Parallax kernels and softmax.

    In one process, on the same inputs.     Softmax is what torch has (SDPA flash and cuDNN): half the matmuls of Parallax. The official kernels and fla's are
    compared with where they can be imported. Errors are against an fp64 oracle. Of --op training the forward, the
    backward and both together are timed, through torch's autograd.

    The official Triton kernels tune themselves for minutes at each new training shape: --only leaves them out.

    \b
    Example
      parallax-gen bench --op decode --shape 32,8,4096 --shape 1,32/8,16384
      parallax-gen bench --op training --shape 4,16,4096 --window 1024
      parallax-gen bench --grid serving --csv serving.csv --picture serving.png
    """
    ops = ("decode",) if host else ops or (("decode",) if grid else ("forward", "decode"))
    check_flags(flags, ops)
    if grid and (shapes or ops != ("decode",)):
        raise click.UsageError("--grid: of --op decode alone, without --shape")
    if picture and ops != ("decode",):
        raise click.UsageError("--picture: of --op decode alone")
    card = card_here()
    if card is None:
        raise MeasureError("there is no CUDA device here: nothing can be timed")
    if host:
        shape = shapes[0].for_op("decode") if shapes else HOST_SHAPE
        _bench_host(*kernels("decode", head_dim or USUAL_HEAD_DIM, dtype, shape, flags)[0], as_json)
        return
    rows: list[Row] = []
    for op, spec, shape in list(_cases(ops, head_dim, dtype, shapes, grid, flags)):
        found = _compare(op, spec, shape, only)
        rows += found
        if found and not as_json:
            print_rows(found)
        if csv_file is not None:  # after every shape: a long run that is stopped has what it timed
            write_csv(csv_file, rows)
    if picture is not None:
        draw(picture, rows, f"{card.title}, {', '.join(f'{name} {version}' for name, version in _versions().items())}")
    if as_json:
        print_json({"gpu": card.name, **_versions(), "rows": [to_json(row) for row in rows]})
    else:
        print_means(rows)
        versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
        click.echo(f"{card.title}, {versions}")
        click.echo("medians of CUDA graph replays, warm L2")


def _bench_host(spec: KernelSpec, shape: Shape, as_json: bool) -> None:
    from parallax_gen.cli.host import host_times

    times = host_times(spec, shape)
    if as_json:
        print_json({"spec": spec.to_dict(), "shape": shape.to_dict(), **_versions(), "host_us": times})
        return
    click.echo(f"{spec}: {shape}")
    print_table(("", "host us a call"), [(name, number(time_us)) for name, time_us in times.items()])


def _cases(
    ops: tuple[str, ...], head_dim: int | None, dtype: str, shapes: tuple[Sizes, ...], grid: str | None, flags: Flags
) -> Iterator[tuple[str, KernelSpec, Shape]]:
    """What is compared: of a training step the forward's spec stands for all. Raises UsageError."""
    for op in ops:
        if shapes:
            asked = [(head_dim or USUAL_HEAD_DIM, sizes.for_op(op)) for sizes in shapes]
        else:
            asked = [(dim, shape) for dim, shape in (GRIDS[grid] if grid else USUAL[op]) if head_dim in (None, dim)]
        if not asked:
            raise click.UsageError(f"no usual shape of {op} has head_dim {head_dim}: say which --shape is meant")
        # Windows that are not asked for, or asked for at many shapes, make some of them the same.
        cases = {kernels(op, dim, dtype, shape, flags)[0]: None for dim, shape in asked}
        for spec, shape in cases:
            yield op, spec, shape


def _compare(op: str, spec: KernelSpec, shape: Shape, only: tuple[str, ...]) -> list[Row]:
    from parallax_gen.cli.compare import compare

    with console(stderr=True).status(title(op, spec, shape)):
        return compare(op, spec, shape, only)


def _versions() -> dict[str, str]:
    import torch
    import triton

    return {
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "parallax_gen": parallax_gen.__version__,
    }
