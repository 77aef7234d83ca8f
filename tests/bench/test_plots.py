"""`bench --picture`: the plotted ratios, the written file, and the error without matplotlib."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from parallax_gen.bench.plots import draw, picture_error, ratios_of
from parallax_gen.bench.rows import Row
from parallax_gen.errors import install_command
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

SPEC = KernelSpec("decode", 128, "bf16")


def row(baseline: str, shape: Shape, time_us: float | None) -> Row:
    return Row(baseline, "decode", "decode", SPEC, shape, time_us)


ONE, TWO = Shape(1, 8, 8, 1, 1024), Shape(2, 4, 4, 1, 1024)  # the same size: batch x kv_heads 8, 1024 keys
LONG = Shape(1, 8, 8, 1, 4096)
ROWS = [
    *(row("parallax_gen", shape, 10.0) for shape in (ONE, TWO, LONG)),
    *(row("other", shape, time) for shape, time in ((ONE, 20.0), (TWO, 15.0), (LONG, 30.0))),
    *(row("absent", shape, None) for shape in (ONE, TWO, LONG)),
]


def test_ratios_are_the_least_per_size_of_the_baselines_that_ran() -> None:
    assert ratios_of(ROWS) == {"other": {(8, 1024): 1.5, (8, 4096): 3.0}}


def test_only_equal_lengths_are_compared() -> None:
    short, shape = (1024, 32), Shape(2, 8, 8, 1, 1024)
    ours, peer, elsewhere = (
        row(name, shape, time) for name, time in (("parallax_gen", 10.0), ("other", 25.0), ("b", 3.0))
    )
    rows = [replace(ours, lengths=short), replace(peer, lengths=short), elsewhere]
    assert ratios_of(rows) == {"other": {(16, 1024): 2.5}}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_plot_is_written(tmp_path: Path) -> None:
    draw(tmp_path / "grid.png", ROWS, "a card")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert install_command("pictures") in picture_error(tmp_path / "grid.png")
