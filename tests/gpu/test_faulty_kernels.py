"""On a card, a tune survives an illegal access, an endless loop, a wrong result and a compilation that hangs."""

from __future__ import annotations

from pathlib import Path

import pytest
from injected_faults import FAULTS, outcomes, tune_with_faults

pytestmark = pytest.mark.gpu


def test_faulty_kernels_fail_only_their_own_trials(tmp_path: Path) -> None:
    document, results = tune_with_faults(tmp_path)
    assert outcomes(results) == {place: outcome for place, (_, outcome, _) in FAULTS.items()}
    (job,) = document["jobs"]
    assert document["measured"]
    assert job["outcome"] == "ok"
    failures = {
        kind: count for kind, count in job["failures"].items() if kind != "slow"
    }  # other processes may use the card
    assert failures == {"crash": 1, "timeout": 2, "wrong": 1}
