"""Without a GPU a tune survives a compilation that hangs, and remembers it. tests/gpu plants worse."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import PLANTED, outcomes, tune_planted

from parallax_gen.ops.space import every_config
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.spec import KernelSpec


@pytest.mark.interpreter
def test_a_compilation_that_hangs_costs_its_own_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said, results = tune_planted(tmp_path)
    assert outcomes(results) == {place: outcome for place, (_, _, outcome) in PLANTED.items()}
    assert len(results) == len(list(every_config(KernelSpec("preprocess", 128, "bf16"), GPUS["h200"])))
    (job,) = said["jobs"]
    assert job["failures"] == {"timeout": 1}
    (hung,) = [r for r in results if r.outcome == "timeout"]
    assert hung.detail == "no answer in 25 s"
