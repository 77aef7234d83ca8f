"""`parallax-gen report`: writes one HTML page on all results."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from parallax_gen.cli.options import check_file, json_option
from parallax_gen.cli.text import print_json, print_text
from parallax_gen.errors import ParallaxGenError


@click.command()
@click.option("--gpu", "gpus", metavar="NAME", multiple=True, help="Such as h100 or h200. Repeatable. Default: all.")
@click.option(
    "--bench",
    "benches",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    multiple=True,
    help="A file of bench --csv or bench --json, for the comparison with other kernels. Repeatable.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    metavar="FILE",
)
@click.option(
    "--all-environments",
    is_flag=True,
    help="Also show results of other toolchains and kernels where there are results of this toolchain and kernel.",
)
@json_option
def report(gpus: tuple[str, ...], benches: tuple[Path, ...], out: Path, all_environments: bool, as_json: bool) -> None:
    """Show in one HTML page what is tuned, how fast it is and why.

    It begins with what calls get on each card, the command that measures the rest, and published times of other
    kernels. From your records and the shipped ones it shows which buckets are tuned, also on a roofline; the trials of
    each search, which knobs matter, what failed and why; and the source of each best kernel. With --bench it also shows
    how our times and errors compare with other kernels'. The page is one file that loads nothing else: it can be sent
    by mail or opened from a disk.

    Each bucket shows results of today's kernels with this toolchain; if there are none, the newest results of other
    kernels or toolchains, which are marked.

    \b
    Example
      parallax-gen report --gpu h200 --bench serving.csv --out h200.html
      where `parallax-gen bench --grid serving --csv serving.csv` wrote the file
    """
    from parallax_gen.bench.rows import read_rows
    from parallax_gen.memory.descriptions import open_memory
    from parallax_gen.report.data import collect, to_json
    from parallax_gen.report.page import html

    for path in benches:
        check_file("--bench", path)
    rows = [row for path in benches for row in read_rows(path)]
    memory = open_memory()
    data = collect(memory, gpus, rows, all_environments=all_environments)
    if as_json:
        print_json(to_json(data, memory))
        return
    page = html(data, _command(gpus, benches, all_environments)).encode()
    try:
        out.write_bytes(page)
    except OSError as error:
        raise ParallaxGenError(f"cannot write {out}: {error}") from error
    measured = sum(entry is not None and entry.best is not None for entry in data.by_place.values())
    print_text(f"{out}: {measured} measured buckets on {', '.join(data.gpus) or 'no GPU'}, {len(page) / 1000:.0f} KB")
    if data.left_out:
        print_text(f"entries of other toolchains and kernels left out: {data.left_out}; --all-environments shows them")


def _command(gpus: tuple[str, ...], benches: tuple[Path, ...], all_environments: bool) -> str:
    """The command that writes the page. It has file names without this machine's folders."""
    command = ["parallax-gen", "report"]
    for gpu in gpus:
        command += ["--gpu", gpu]
    for path in benches:
        command += ["--bench", path.name]
    return shlex.join(command + ["--all-environments"] * all_environments)
