"""Plots: times relative to ours and bandwidths (`bench --picture`), and regrets over trials (`replay --out`)."""

from __future__ import annotations

import csv
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallax_gen.bench.baselines import OURS
from parallax_gen.bench.rows import Row
from parallax_gen.bench.summary import times_ours
from parallax_gen.errors import ParallaxGenError, install_command
from parallax_gen.problem.work import work_of_lengths

if TYPE_CHECKING:
    from parallax_gen.tuning.search.recorded_sweep import Curve, Sweep

# (batch * kv_heads, keys) -> time relative to ours
RatioBySize = dict[tuple[int, int], float]

SUFFIXES = (".png", ".svg", ".pdf")


def picture_error(path: Path) -> str:
    """Why `draw` cannot make a file, checked before anything is timed; "" if it can."""
    if find_spec("matplotlib") is None:
        return f"--picture needs matplotlib: {install_command('pictures')}"
    if path.suffix.lower() not in SUFFIXES:
        return f"--picture: {path} must end in one of {', '.join(SUFFIXES)}"
    if not path.absolute().parent.is_dir():
        return f"--picture: {path.absolute().parent} is not a folder"
    return ""


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Draw a heat map per baseline of its time relative to ours, and one plot of bandwidths.

    A cell that several shapes share shows their smallest ratio. Raises ParallaxGenError.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios = ratios_of(rows)
    figure, axes = pyplot.subplots(
        1, len(ratios) + 1, figsize=(4.6 * (len(ratios) + 1), 4.4), layout="constrained", squeeze=False
    )
    for (name, by_size), ax in zip(ratios.items(), axes[0], strict=False):
        _heat_map(ax, name, by_size)
    _bandwidths(axes[0][-1], rows)
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ParallaxGenError(f"--picture: {path} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)


def ratios_of(rows: list[Row]) -> dict[str, RatioBySize]:
    """Each baseline's time relative to ours by size; the smallest if several shapes share the size."""
    by_baseline: dict[str, RatioBySize] = {}
    for row, ratio in times_ours(rows):
        if ratio is not None:
            size = row.shape.batch * row.shape.kv_heads, row.shape.seqlen_kv
            by_size = by_baseline.setdefault(row.baseline, {})
            by_size[size] = min(ratio, by_size.get(size, float("inf")))
    return by_baseline


def _heat_map(ax: Any, name: str, by_size: RatioBySize) -> None:
    from matplotlib import colors

    heights, widths = (sorted({size[i] for size in by_size}) for i in (0, 1))
    table = [[by_size.get((pairs, keys), float("nan")) for keys in widths] for pairs in heights]
    colours = colors.TwoSlopeNorm(vmin=0.5, vcenter=1.0, vmax=2.0)  # a ratio of 1 is neither red nor green
    ax.imshow(table, cmap="RdYlGn", norm=colours, aspect="auto", origin="lower")
    for i, line in enumerate(table):
        for j, ratio in enumerate(line):
            if not math.isnan(ratio):
                ax.text(j, i, f"{ratio:.2f}", ha="center", va="center", fontsize=6)
    ax.set_xticks(range(len(widths)), [str(keys) for keys in widths], rotation=60, fontsize=7)
    ax.set_yticks(range(len(heights)), [str(pairs) for pairs in heights], fontsize=7)
    ax.set_xlabel("keys")
    ax.set_ylabel("batch x kv_heads")
    ax.set_title(f"{name}: time / ours", fontsize=9)


def _bandwidths(ax: Any, rows: list[Row]) -> None:
    by_baseline: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.time_us:
            size = work_of_lengths(row.spec, row.shape, row.lengths).bytes
            by_baseline.setdefault(row.baseline, []).append((size / 1e6, size / row.time_us / 1e3))
    for name, points in by_baseline.items():
        sizes, rates = zip(*sorted(points), strict=True)
        ax.plot(sizes, rates, ".", markersize=5 if name == OURS else 3, label=name, zorder=2 if name == OURS else 1)
    ax.set_xscale("log")
    ax.set_xlabel("MB read and written")
    ax.set_ylabel("GB/s")
    ax.set_title("bandwidth", fontsize=9)
    ax.legend(fontsize=7)
    ax.grid(alpha=0.3)


# -- For `replay --out`: the regret of searches relative to the best config of a recorded sweep.

# (name of the sweep, the sweep, a curve per sampler)
SearchCurves = list[tuple[str, "Sweep", "list[Curve]"]]


def write_regrets(path: Path, sweeps: SearchCurves) -> None:
    """Write a CSV file with one line per trial."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("sweep", "whole", "configs", "sampler", "trial", "regret", "regret_p25", "regret_p75"))
        for name, sweep, curves in sweeps:
            for curve in curves:
                for trial, regrets in enumerate(zip(curve.median, curve.lower, curve.upper, strict=True), start=1):
                    rounded = [f"{regret:.5f}" for regret in regrets]
                    writer.writerow((name, sweep.whole, len(sweep.results), curve.strategy, trial, *rounded))


def draw_regrets(path: Path, sweeps: SearchCurves) -> bool:
    """Plot regret over trials per sweep: medians as lines, quartiles as bands. False if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(sweeps))
    rows = math.ceil(len(sweeps) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.2 * columns, 3.8 * rows), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(sweeps) :]:
        ax.set_visible(False)
    for ax, (name, sweep, curves) in zip(axes.flat, sweeps, strict=False):
        _regrets(ax, name, sweep, curves)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _regrets(ax: Any, name: str, sweep: Sweep, curves: list[Curve]) -> None:
    for curve in curves:
        trials = range(1, len(curve.median) + 1)
        (line,) = ax.plot(trials, [100 * regret for regret in curve.median], label=curve.strategy, linewidth=1.2)
        lower, upper = ([100 * regret for regret in side] for side in (curve.lower, curve.upper))
        ax.fill_between(trials, lower, upper, alpha=0.12, color=line.get_color())
    ax.axhline(2, color="grey", linewidth=0.6, linestyle="--")
    ax.set_yscale("symlog", linthresh=1)  # linear below 1 %: a search that found the best config has regret 0
    ax.set_ylim(0, 300)
    ax.set_xlabel(f"trials, of {len(sweep.results)} configs{'' if sweep.whole else ' (partial sweep)'}")
    ax.set_ylabel("regret, %")
    ax.set_title(name, fontsize=9)
