"""What `bench --picture` draws of decode: how much faster ours is at each size, and the bandwidth over size."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from parallax_gen.bench.baselines import OURS
from parallax_gen.bench.rows import Row
from parallax_gen.errors import ParallaxGenError
from parallax_gen.problem.work import work_of_lengths

# (kv rows, keys) -> times ours
Ratios = dict[tuple[int, int], float]

SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Before anything is timed: can `draw` do it? Raises UsageError."""
    if find_spec("matplotlib") is None:
        raise click.UsageError("--picture needs matplotlib: pip install 'parallax-gen[pictures]'")
    if path.suffix.lower() not in SUFFIXES:
        raise click.UsageError(f"--picture: {path} ends in none of {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise click.UsageError(f"--picture: {path.absolute().parent} is no folder")


def draw(path: Path, rows: list[Row], title: str) -> None:
    """A heat map a baseline, of its time over ours, and one plot of bandwidths. Raises ParallaxGenError.

    Of shapes that share a size the slowest ratio is shown.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios = ratios_of(rows)
    figure, axes = pyplot.subplots(
        1, len(ratios) + 1, figsize=(4.6 * (len(ratios) + 1), 4.4), layout="constrained", squeeze=False
    )
    for (name, of_sizes), ax in zip(ratios.items(), axes[0], strict=False):
        _heat_map(ax, name, of_sizes)
    _bandwidths(axes[0][-1], rows)
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ParallaxGenError(f"--picture: {path} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)


def ratios_of(rows: list[Row]) -> dict[str, Ratios]:
    """Each baseline's time over ours by size, the least where several shapes have it; of those that ran at all."""
    ours = {row.what: row.time_us for row in rows if row.contender == OURS}
    found: dict[str, Ratios] = {}
    for row in rows:
        mine = ours.get(row.what)
        if row.contender == OURS or not mine or not row.time_us:
            continue
        size = row.shape.batch * row.shape.kv_heads, row.shape.seqlen_kv
        of_sizes = found.setdefault(row.contender, {})
        of_sizes[size] = min(row.time_us / mine, of_sizes.get(size, float("inf")))
    return found


def _heat_map(ax: Any, name: str, of_sizes: Ratios) -> None:
    from matplotlib import colors

    heights, widths = (sorted({size[i] for size in of_sizes}) for i in (0, 1))
    table = [[of_sizes.get((rows, keys), float("nan")) for keys in widths] for rows in heights]
    colours = colors.TwoSlopeNorm(vmin=0.5, vcenter=1.0, vmax=2.0)  # as fast as ours is neither red nor green
    ax.imshow(table, cmap="RdYlGn", norm=colours, aspect="auto", origin="lower")
    for i, line in enumerate(table):
        for j, ratio in enumerate(line):
            if ratio == ratio:  # a number
                ax.text(j, i, f"{ratio:.2f}", ha="center", va="center", fontsize=6)
    ax.set_xticks(range(len(widths)), [str(keys) for keys in widths], rotation=60, fontsize=7)
    ax.set_yticks(range(len(heights)), [str(rows) for rows in heights], fontsize=7)
    ax.set_xlabel("keys")
    ax.set_ylabel("sequences x kv heads")
    ax.set_title(f"{name}: time / ours", fontsize=9)


def _bandwidths(ax: Any, rows: list[Row]) -> None:
    of: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.time_us:
            size = work_of_lengths(row.spec, row.shape, row.lengths).bytes
            of.setdefault(row.contender, []).append((size / 1e6, size / row.time_us / 1e3))
    for name, points in of.items():
        sizes, rates = zip(*sorted(points), strict=True)
        ax.plot(sizes, rates, ".", markersize=5 if name == OURS else 3, label=name, zorder=2 if name == OURS else 1)
    ax.set_xscale("log")
    ax.set_xlabel("MB read and written")
    ax.set_ylabel("GB/s")
    ax.set_title("bandwidth", fontsize=9)
    ax.legend(fontsize=7)
    ax.grid(alpha=0.3)
