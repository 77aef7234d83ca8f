"""Programs from the documentation and tests of parallax-kernel and fla run with one import changed, on CPU tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
from program_runner import PROGRAMS, run_program


@pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program(program: Path) -> None:
    run_program(program, "cpu")


def test_there_are_programs() -> None:
    assert len(PROGRAMS) >= 8
