"""`parallax-gen bench`: ours against softmax attention and other Parallax kernels, on this card."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import parallax_gen
from parallax_gen.cli.options import Sizes, card_here, flag_options, json_option, shape_option
from parallax_gen.cli.text import console, number, print_json, print_table, rate_unit
from parallax_gen.errors import MeasureError
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import DTYPES, HEAD_DIMS, OPS, KernelSpec

if TYPE_CHECKING:
    from parallax_gen.cli.compare import Row

OURS = "parallax_gen"

HOST_SHAPE = Shape(1, 8, 8, 1, 4096)  # so little work that the host's time shows

# (head_dim, shape): from few bytes to many, alone and in a batch, MHA and GQA; a training step and a long prompt.
USUAL: dict[str, tuple[tuple[int, Shape], ...]] = {
    "forward": ((128, Shape(4, 16, 16, 4096, 4096)), (128, Shape(1, 16, 16, 16384, 16384))),
    "decode": (
        *((128, Shape(batch, 8, 8, 1, keys)) for batch in (1, 32) for keys in (512, 1024, 4096, 16384)),
        (128, Shape(1, 32, 8, 1, 16384)),
        (128, Shape(32, 32, 8, 1, 8192)),
        (64, Shape(8, 16, 16, 1, 4096)),
    ),
}


@click.command()
@click.option("--op", "ops", type=click.Choice(OPS), multiple=True, help="Repeatable. Default: both.")
@click.option("--head-dim", type=click.Choice(HEAD_DIMS), default=128, show_default=True, help="Of every --shape.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bf16", show_default=True)
@shape_option(multiple=True, more_help="Repeatable. Default: the usual ones.")
@flag_options
@click.option("--only", multiple=True, metavar="NAME", help="Repeatable: contenders by name, such as 'SDPA cuDNN'.")
@click.option("--host", is_flag=True, help="Instead: the host's time of a decode step, and of the launches below it.")
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows there.")
@json_option
def bench(
    ops: tuple[str, ...],
    head_dim: int,
    dtype: str,
    shapes: tuple[Sizes, ...],
    causal: bool | None,
    stats: bool,
    ragged: bool,
    only: tuple[str, ...],
    host: bool,
    csv_file: Path | None,
    as_json: bool,
) -> None:
    """Time ours against softmax attention and other Parallax kernels, in one process on the same inputs.

    Softmax is what torch has (SDPA flash and cuDNN): half the matmuls of Parallax. The official kernels and fla's are
    compared with where they can be imported. Errors are against an fp64 oracle.

    \b
    Example
      parallax-gen bench --op decode --shape 32,8,4096 --shape 1,32/8,16384
    """
    card = card_here()
    if card is None:
        raise MeasureError("there is no CUDA device here: nothing can be timed")
    if host:
        shape = shapes[0].for_op("decode") if shapes else HOST_SHAPE
        _bench_host(KernelSpec("decode", head_dim, dtype, shape.group, ragged=ragged), shape, as_json)
        return
    rows: list[Row] = []
    for spec, shape in _cases(ops or OPS, head_dim, dtype, shapes, causal, stats, ragged):
        found = _compare(spec, shape, only)
        rows += found
        if not as_json:
            _print(spec, shape, found)
    if csv_file is not None:
        _write_csv(csv_file, rows)
    if as_json:
        print_json({"gpu": card.name, **_versions(), "rows": [_to_json(row) for row in rows]})
    else:
        _print_means(rows)
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
    ops: tuple[str, ...],
    head_dim: int,
    dtype: str,
    shapes: tuple[Sizes, ...],
    causal: bool | None,
    stats: bool,
    ragged: bool,
) -> Iterator[tuple[KernelSpec, Shape]]:
    for op in ops:
        asked = [(head_dim, sizes.for_op(op)) for sizes in shapes] if shapes else USUAL[op]
        flags = {"causal": causal is not False, "stats": stats} if op == "forward" else {"ragged": ragged}
        for dim, shape in asked:
            yield KernelSpec(op, dim, dtype, shape.group, **flags), shape


def _compare(spec: KernelSpec, shape: Shape, only: tuple[str, ...]) -> list[Row]:
    from parallax_gen.cli.compare import compare

    with console(stderr=True).status(f"{spec}: {shape}"):
        return compare(spec, shape, only)


def _print(spec: KernelSpec, shape: Shape, rows: list[Row]) -> None:
    click.echo(f"{spec}: {shape}")
    ours = next((row.time_us for row in rows if row.contender == OURS), None)
    columns = ("", "time us", rate_unit(spec.op), "time / ours", "error", "note")
    table = []
    for row in rows:
        if row.time_us is None or row.rate is None:
            table.append((row.contender, "-", "-", "-", "-", row.why_not))
            continue
        times = f"{row.time_us / ours:.2f}" if ours else "-"
        error = f"{row.error:.1e}" if row.error is not None else "softmax"
        table.append((row.contender, number(row.time_us), number(row.rate), times, error, ""))
    print_table(columns, table, right=columns[1:5])
    click.echo()


def _print_means(rows: list[Row]) -> None:
    """How many times ours each contender takes, over all shapes where both run."""
    for op in OPS:
        ratios: dict[str, list[float]] = {}
        ours = {(row.spec, row.shape): row.time_us for row in rows if row.contender == OURS and row.spec.op == op}
        for row in rows:
            mine = ours.get((row.spec, row.shape))
            if mine and row.time_us and row.contender != OURS:
                ratios.setdefault(row.contender, []).append(row.time_us / mine)
        for name, values in ratios.items():
            mean = math.exp(sum(map(math.log, values)) / len(values))
            least = min(values)
            click.echo(f"{op}: {name} takes {mean:.2f} times ours (geometric mean of {len(values)}, least {least:.2f})")


def _write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        documents = [_flat(row) for row in rows]
        writer = csv.DictWriter(file, fieldnames=list(documents[0]))
        writer.writeheader()
        writer.writerows(documents)


def _to_json(row: Row) -> dict[str, Any]:
    return {
        "contender": row.contender,
        "spec": row.spec.to_dict(),
        "shape": row.shape.to_dict(),
        "time_us": row.time_us,
        "rate": row.rate,
        "rate_unit": rate_unit(row.spec.op),
        "error": row.error,
        "why_not": row.why_not,
    }


def _flat(row: Row) -> dict[str, Any]:
    document = _to_json(row)
    spec, shape = document.pop("spec"), document.pop("shape")
    return {**spec, **shape, **document}


def _versions() -> dict[str, str]:
    import torch
    import triton

    return {
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "parallax_gen": parallax_gen.__version__,
    }
