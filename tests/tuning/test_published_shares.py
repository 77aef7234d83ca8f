"""The published table of what a basket of models gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.problem.basket import basket_calls
from parallax_gen.problem.hardware import GPUS
from parallax_gen.report.coverage import coverage

TOP = Path(__file__).parents[2]


@pytest.mark.parametrize("card", ["H200", "H100"])
def test_it_has_the_shares_of_the_shipped_records(card: str) -> None:
    """By the Triton that is here, if the table has it."""
    basket = json.loads((TOP / "tests" / "data" / "basket.json").read_text(encoding="utf-8"))
    *_, total = coverage(basket_calls(basket, "basket.json"), GPUS[card.lower()], Memory())
    shares = total.to_json()["shares"]
    found = ["-" if not share else f"{100 * share:.1f} %" for share in shares.values()]
    lines = (TOP / "docs" / "figures.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {card}, 3.")]
    published = {triton: row[1:] for row in rows for triton in re.findall(r"3\.\d", row[0])}
    assert len(published) == 2
    assert published.get(minor(Toolchain.here().triton), found) == found
    assert shares["default"] < 0.1  # what records are shipped for
