"""`parallax-gen report`: one HTML page on the known results."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from parallax_gen.cli.options import json_option
from parallax_gen.cli.text import print_json
from parallax_gen.errors import ParallaxGenError


@click.command()
@click.option("--gpu", "gpus", metavar="NAME", multiple=True, help="Repeatable: such as h100 or h200. Default: all.")
@click.option(
    "--bench",
    "benches",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    multiple=True,
    help="Repeatable: what bench --csv or bench --json wrote, for the comparison with other kernels.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    metavar="FILE",
)
@click.option(
    "--all-environments",
    "every",
    is_flag=True,
    help="Also what was measured with another toolchain, or of another kernel, where there is something of this one's.",
)
@json_option
def report(gpus: tuple[str, ...], benches: tuple[Path, ...], out: Path, every: bool, as_json: bool) -> None:
    """Write one HTML page on what is tuned, how fast it is and why.

    From your records and the shipped ones it shows which buckets are tuned, also on a roofline; how each study went,
    which knobs mattered, what failed and why; and each best kernel's source. With --bench it also shows how our times
    compare with other kernels'. The page is one file that loads nothing else: it can be mailed, or read from a disk.

    Each bucket shows results of today's kernels with this toolchain; if there are none, the newest of other kernels or
    toolchains, which are marked.

    \b
    Example
      parallax-gen report --gpu h200 --bench serving.csv --out h200.html
      with a file that `parallax-gen bench --grid serving --csv serving.csv` wrote
    """
    from parallax_gen.bench.rows import read_rows
    from parallax_gen.memory.descriptions import open_memory
    from parallax_gen.report.data import collect, to_json
    from parallax_gen.report.page import html

    rows = [row for path in benches for row in read_rows(path)]
    memory = open_memory()
    found = collect(memory, gpus, rows, every=every)
    if as_json:
        print_json(to_json(found, memory))
        return
    page = html(found, _command(gpus, benches, every)).encode()
    try:
        out.write_bytes(page)
    except OSError as error:
        raise ParallaxGenError(f"cannot write {out}: {error}") from error
    measured = sum(study is not None and study.best is not None for study in found.by_place.values())
    click.echo(f"{out}: {measured} measured buckets on {', '.join(found.gpus) or 'no GPU'}, {len(page) / 1000:.0f} KB")
    if found.left_out:
        click.echo(f"left out: {found.left_out} studies of other toolchains and kernels; --all-environments shows them")


def _command(gpus: tuple[str, ...], benches: tuple[Path, ...], every: bool) -> str:
    """The command that makes the page, without this machine's folders."""
    words = ["parallax-gen", "report"]
    for gpu in gpus:
        words += ["--gpu", gpu]
    for path in benches:
        words += ["--bench", path.name]
    return shlex.join(words + ["--all-environments"] * every)
