"""SVG geometry in pixels: axes, the roofline with its points, and the trials of an entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from parallax_gen.describe import brief, number
from parallax_gen.memory.descriptions import shape_of
from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.work import rate_unit, work_of
from parallax_gen.report.entries import Entry


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis from `low` at pixel `start` to `high` at pixel `end`. Values outside are clamped."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        fraction = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + min(1.0, max(0.0, fraction)) * (self.end - self.start), 1)

    def ticks(self, values: Sequence[float]) -> list[tuple[float, str]]:
        """(pixel, label) of the values that lie on the axis."""
        return [(self(value), f"{value:g}") for value in values if self.low <= value <= self.high]


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    tip: str
    op: str = ""


@dataclass(frozen=True)
class Roof:
    """The bound of one dtype: an SVG path, and labels for its slope and its flat part."""

    dtype: str
    path: str
    slope: str
    flat: str
    ridge: tuple[float, float]


@dataclass(frozen=True)
class Roofline:
    """The roofline of one card: FLOP/s over FLOP/byte, with a point per entry.

    above, in_l2  how many points lie above their bound, and for how many of these all bytes fit the L2
    """

    gpu: Gpu
    width: int
    height: int
    x: Scale
    y: Scale
    roofs: tuple[Roof, ...]
    points: tuple[Point, ...]
    above: int = 0
    in_l2: int = 0


@dataclass(frozen=True)
class History:
    """The trials of one entry: each trial's time relative to the entry's best, and the best so far as a line.

    timed, slow, failed  SVG paths with a mark for each trial that was timed, timed only briefly, or failed
    improvements         the trials that were faster than all earlier ones
    unnumbered           how many trials have no number; they come first, in the order in which they were stored
    """

    width: int
    height: int
    y: Scale
    left: float
    right: float
    trials: int
    best: str
    timed: str
    slow: str
    failed: str
    line: str
    improvements: tuple[Point, ...]
    unnumbered: int = 0


DECADES = tuple(10.0**n for n in range(-4, 6))
WIDTH, HEIGHT = 580, 380
SMALL_WIDTH, SMALL_HEIGHT = 264, 136
MAX_RATIO = 10.0  # relative to the best time; slower trials are drawn at the upper edge


def rooflines(entries: Iterable[Entry]) -> list[Roofline]:
    """One roofline per card with known peaks, with its entries that have a measured best. All share the same axes."""
    by_gpu: dict[Gpu, list[tuple[Entry, float, float]]] = {}  # (entry, FLOP/byte, TFLOP/s)
    for entry in entries:
        if entry.best is not None and entry.best.time_us is not None and entry.gpu is not None:
            work = work_of(entry.place.spec, shape_of(entry.best))
            point = entry, work.flops / work.bytes, work.flops / entry.best.time_us / 1e6
            by_gpu.setdefault(entry.gpu, []).append(point)
    dtypes = {gpu: sorted({entry.place.spec.dtype for entry, _, _ in achieved}) for gpu, achieved in by_gpu.items()}
    peaks = {gpu: {dtype: gpu.peak(dtype) / 1e12 for dtype in dtypes[gpu]} for gpu in by_gpu}
    intensities = [intensity for achieved in by_gpu.values() for _, intensity, _ in achieved]
    intensities += [1e12 * peak / gpu.bandwidth for gpu, by_dtype in peaks.items() for peak in by_dtype.values()]
    rates = [rate for achieved in by_gpu.values() for _, _, rate in achieved]
    if not rates:
        return []
    x = Scale(_decade(min(intensities), math.floor), _decade(max(intensities), math.ceil), 58, WIDTH - 20)
    highest = max(peak for by_dtype in peaks.values() for peak in by_dtype.values())
    y = Scale(_decade(min(rates), math.floor), 2.5 * highest, HEIGHT - 46, 16)
    return [
        Roofline(
            gpu=gpu,
            width=WIDTH,
            height=HEIGHT,
            x=x,
            y=y,
            roofs=tuple(_roof(gpu, dtype, peak, x, y) for dtype, peak in peaks[gpu].items()),
            points=tuple(Point(x(i), y(r), _tip(entry), entry.place.spec.public_op) for entry, i, r in achieved),
            above=sum(entry.is_above_bound for entry, _, _ in achieved),
            in_l2=sum(entry.is_above_bound and entry.fits_l2 for entry, _, _ in achieved),
        )
        for gpu, achieved in by_gpu.items()
    ]


def _decade(value: float, round_to_int: Callable[[float], int]) -> float:
    return 10.0 ** round_to_int(math.log10(value))


def _roof(gpu: Gpu, dtype: str, peak: float, x: Scale, y: Scale) -> Roof:
    slope = gpu.bandwidth / 1e12  # TFLOP/s per FLOP/byte
    left = max(x.low, y.low / slope)
    ridge = x(peak / slope), y(peak)
    return Roof(
        dtype=dtype,
        path=f"M{x(left)} {y(slope * left)}L{ridge[0]} {ridge[1]}H{x(x.high)}",
        slope=f"{slope:g} TB/s",
        flat=f"{peak:g} TFLOP/s, {dtype}",
        ridge=ridge,
    )


def _tip(entry: Entry) -> str:
    """The tooltip of an entry's point."""
    assert entry.best is not None
    assert entry.best.time_us is not None
    op = entry.place.spec.public_op
    lines = [f"{entry.place.gpu}: {entry.place.spec}", str(entry.place.bucket)]
    lines.append(f"{number(entry.best.time_us)} µs, {number(entry.rate or 0)} {rate_unit(op)}")
    lines += [f"{entry.fraction_of_bound:.0%} of the bound"] if entry.fraction_of_bound is not None else []
    lines += [entry.above_bound_note] if entry.is_above_bound else []
    lines += [f"{', '.join(entry.differences)}"] if entry.differences else []
    return "\n".join([*lines, brief(entry.best.config)])


def history(entry: Entry) -> History | None:
    """The history of the user's own trials; None if none was timed.

    If a config was timed twice, its last time counts.
    """
    timed = [trial.time_us for trial in entry.trials if trial.outcome.timed and trial.time_us]
    if not timed:
        return None
    fastest = min(timed)
    max_ratio = min(MAX_RATIO, max(2.0, max(timed) / fastest))
    left, right, top, bottom = 32.0, SMALL_WIDTH - 8.0, 10.0, SMALL_HEIGHT - 24.0
    y = Scale(1.0, max_ratio, bottom - 4, top + 12)
    spacing = (right - left - 8) / max(1, len(entry.trials) - 1)
    dots: dict[str, list[str]] = {"timed": [], "slow": [], "failed": []}
    line, improvements, best = "", [], math.inf
    for i, trial in enumerate(entry.trials):
        x = round(left + 4 + i * spacing, 1)
        if trial.measured and trial.time_us:
            height = y(trial.time_us / fastest)
            dots["timed"].append(f"M{x} {height}h0")
            if trial.time_us < best:
                line += f"M{x} {height}" if not line else f"H{x}V{height}"
                best = trial.time_us
                tip = f"trial {i + 1}: {number(best)} µs, {best / fastest:.2f} times the best\n{brief(trial.config)}"
                improvements.append(Point(x, height, tip))
        elif trial.outcome.timed and trial.time_us:
            dots["slow"].append(f"M{x} {y(trial.time_us / fastest)}h0")
        elif trial.outcome.tried:
            dots["failed"].append(f"M{x - 2.5} {top - 2.5}l5 5m0 -5l-5 5")
    return History(
        width=SMALL_WIDTH,
        height=SMALL_HEIGHT,
        y=y,
        left=left,
        right=right,
        trials=len(entry.trials),
        best=f"{number(fastest)} µs",
        timed="".join(dots["timed"]),
        slow="".join(dots["slow"]),
        failed="".join(dots["failed"]),
        line=f"{line}H{right}" if line else "",
        improvements=tuple(improvements),
        unnumbered=sum(trial.trial is None and trial.outcome.tried for trial in entry.trials),
    )
