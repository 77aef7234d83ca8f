"""`parallax-gen sweep`: writes files with the results of all configs of a kernel, on which searches are replayed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parallax_gen.cli.text import print_table
from parallax_gen.describe import number, seqlen_text
from parallax_gen.errors import StoreError
from parallax_gen.problem.spec import PUBLIC_OPS

if TYPE_CHECKING:
    from parallax_gen.memory.place import Place
    from parallax_gen.memory.result import Result
    from parallax_gen.memory.toolchain import Toolchain
    from parallax_gen.tuning.search.recorded_sweep import Sweep


@click.command()
@click.option("--gpu", metavar="NAME", help="Such as h100 or h200. Default: all.")
@click.option("--op", type=click.Choice(PUBLIC_OPS), help="Default: all.")
@click.option(
    "--partial",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also write partial sweeps with at least N tried configs. Their files say that they are partial.",
)
@click.option("--plain", is_flag=True, help="Write text files, not gzipped ones.")
@click.option(
    "--to", "folder", type=click.Path(path_type=Path, file_okay=False), default=Path("sweeps"), show_default=True
)
def sweep(gpu: str | None, op: str | None, partial: int | None, plain: bool, folder: Path) -> None:
    """For maintainers: write the database's sweeps to files.

    Writes one file per kernel and bucket. A sweep is whole if every valid config was tried, as tune does with --trials
    9999 and a --time-budget of an hour. parallax-gen replay compares samplers on a sweep without a GPU.

    \b
    Example
      parallax-gen sweep --gpu h200 --op forward --to sweeps
    """
    from parallax_gen.memory.descriptions import name_in_records
    from parallax_gen.memory.store import Store
    from parallax_gen.problem.hardware import GPUS
    from parallax_gen.tuning.search.recorded_sweep import sweep_of, write_sweep

    with Store(read_only=True) as store:
        results = store.all(name_in_records(gpu, store.all()) if gpu else None, op)
    written = []
    by_place: dict[tuple[Place, Toolchain], list[Result]] = {}
    for result in results:
        if not result.informative:
            continue
        by_place.setdefault((result.place, result.evidence.toolchain), []).append(result)
    for (place, toolchain), tried in by_place.items():
        if place.gpu not in GPUS or not any(result.outcome.timed for result in tried):
            continue
        recorded = sweep_of(tried, GPUS[place.gpu])
        if recorded.whole or (partial is not None and len(tried) >= partial):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{file_name(place, toolchain)}.jsonl{'' if plain else '.gz'}"
            write_sweep(recorded, path)
            written.append((path, recorded))
    if not written:
        raise StoreError(f"{store.path} has no such whole sweep: tune with more --trials, or use --partial N")
    _print(written)
    click.echo(f"written to {folder}")


def file_name(place: Place, toolchain: Toolchain) -> str:
    """Such as h200-forward-128-64x4096-1a2b3c4d: GPU, op, head_dim, bucket, and a hash of everything else."""
    sizes = f"{place.bucket.kv_rows}x{seqlen_text(place.bucket).replace(' ', '-')}"
    digest = hashlib.sha256(f"{place.text} {toolchain.triton} {toolchain.cuda}".encode()).hexdigest()[:8]
    return f"{place.gpu}-{place.spec.public_op}-{place.spec.head_dim}-{sizes}-{digest}"


def _print(written: list[tuple[Path, Sweep]]) -> None:
    columns = ("configs", "whole", "best us", "file")
    lines = [
        (str(len(recorded.results)), "yes" if recorded.whole else "no", number(recorded.best_us), path.name)
        for path, recorded in written
    ]
    print_table(columns, lines, right=("configs", "best us"))
