"""The other packages' users change one import: programs as their documentation and tests have them, on CPU tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
from drop_in import PROGRAMS, run


@pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program(program: Path) -> None:
    run(program, "cpu")


def test_there_are_programs() -> None:
    assert len(PROGRAMS) >= 8
