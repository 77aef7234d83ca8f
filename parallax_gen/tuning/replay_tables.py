"""`parallax-gen replay`: its tables for people, and its JSON documents."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from parallax_gen.ops.base import config_to_dict
from parallax_gen.tables import Table
from parallax_gen.tuning.borrowing import Borrowed, Summary
from parallax_gen.tuning.search.recorded_sweep import Curve, Sweep

FRACTIONS = (0.02, 0.05, 0.1, 0.2)  # fractions of a sweep's configs at which regrets are printed


def sampler_table(name: str, sweep: Sweep, curves: list[Curve]) -> Table:
    """A line per sampler: trials until within 2 % of the best (median, quartiles), then regrets over the search."""
    configs = len(sweep.results)
    fractions = [(share, math.ceil(share * configs)) for share in FRACTIONS]
    fractions = [(share, n) for share, n in fractions if n <= len(curves[0].median)]
    columns = ("sampler", "trials to 2 %", "of configs", *(f"regret at {share:.0%}" for share, _ in fractions))
    lines = []
    for curve in curves:
        first, second, third = (f">{len(curve.median)}" if n is None else str(n) for n in curve.near_after)
        fraction = "-" if curve.near_after[1] is None else f"{curve.near_after[1] / configs:.1%}"
        regrets = [_percent(curve.median[n - 1]) for _, n in fractions]
        lines.append((curve.strategy, f"{second} ({first} to {third})", fraction, *regrets))
    return Table(_title(name, sweep), columns, lines, columns[1:])


def _title(name: str, sweep: Sweep) -> str:
    extent = "every config" if sweep.whole else "PARTIAL: not every config"
    return f"{name}: {sweep.place.spec}; {sweep.place.bucket}\n{len(sweep.results)} configs, {extent}"


def _percent(regret: float) -> str:
    return f"{100 * regret:.1f} %" if math.isfinite(regret) else "-"


def sweep_to_json(name: str, sweep: Sweep, curves: list[Curve]) -> dict[str, Any]:
    return {
        "sweep": name,
        "place": sweep.place.flat(),
        "whole": sweep.whole,
        "configs": len(sweep.results),
        "best_us": sweep.best_us,
        "samplers": [
            {
                "sampler": curve.strategy,
                "trials_to_2_percent": dict(zip(("p25", "median", "p75"), curve.near_after, strict=True)),
                "regret": curve.median,
                "regret_p25": curve.lower,
                "regret_p75": curve.upper,
            }
            for curve in curves
        ],
    }


BORROWING_LEGEND = (
    "mean, worst: a config's time divided by the fastest of its set, and so for the default; means are geometric;\n"
    "places: pairs of kernel and bucket with times of choice and default; others: without such times"
)


def borrowing_tables(summaries: Iterable[Summary]) -> list[Table]:
    """A table for each op, a line for each choice."""
    columns = ("choice", "places", "others", "mean", "worst", "default mean", "default worst")
    by_op = groupby(summaries, key=lambda summary: summary.kind)
    return [Table(op, columns, [_line(summary) for summary in of_op], columns[1:]) for op, of_op in by_op]


def _line(summary: Summary) -> tuple[str, ...]:
    slowdowns = (summary.mean, summary.worst, summary.default_mean, summary.default_worst)
    texts = ("-" if slowdown is None else f"{slowdown:.3f}" for slowdown in slowdowns)
    return (summary.choice, str(summary.places), str(summary.unmeasured), *texts)


def choice_to_json(choice: Borrowed) -> dict[str, Any]:
    times = choice.comparable
    return {
        "place": times.place.flat(),
        "triton": times.toolchain.triton,
        "cuda": times.toolchain.cuda,
        "left_out": choice.left_out,
        "choice": choice.choice,
        "config": config_to_dict(choice.config),
        "slowdown": choice.slowdown,
        "default_slowdown": choice.default_slowdown,
    }
