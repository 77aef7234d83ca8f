"""Without a GPU a tune survives a compilation that hangs, and records it. tests/gpu injects worse faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from injected_faults import FAULTS, outcomes, tune_with_faults

from parallax_gen.ops.space import every_config
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.spec import KernelSpec


@pytest.mark.interpreter
def test_a_hanging_compilation_fails_only_its_own_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    document, results = tune_with_faults(tmp_path)
    assert outcomes(results) == {place: outcome for place, (_, _, outcome) in FAULTS.items()}
    assert len(results) == len(list(every_config(KernelSpec("preprocess", 128, "bf16"), GPUS["h200"])))
    (job,) = document["jobs"]
    assert job["failures"] == {"timeout": 1}
    (hung,) = [r for r in results if r.outcome == "timeout"]
    assert hung.detail == "no answer in 30 s"
