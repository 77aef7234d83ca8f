"""On a card, a tune survives an illegal access, an endless loop, a wrong result and a compilation that hangs."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import PLANTED, outcomes, tune_planted

pytestmark = pytest.mark.gpu


def test_bad_kernels_cost_their_own_trials_and_are_remembered_by_kind(tmp_path: Path) -> None:
    said, results = tune_planted(tmp_path)
    assert outcomes(results) == {place: outcome for place, (_, outcome, _) in PLANTED.items()}
    (job,) = said["jobs"]
    assert said["measured"]
    assert job["outcome"] == "ok"
    failures = {kind: count for kind, count in job["failures"].items() if kind != "slow"}  # others may use the card
    assert failures == {"crash": 1, "timeout": 2, "wrong": 1}
