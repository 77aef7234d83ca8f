"""Random training steps in Triton's CPU interpreter: a sample of them, see `training_steps`.

All take an hour on two cores: `PARALLAX_GEN_STEPS=0/1 pytest -n auto tests/codegen/test_random_steps.py`.
"""

from __future__ import annotations

import pytest
import strategies
import training_steps

from parallax_gen.problem.hardware import GPUS

# For a row without keys the kernels divide by zero and take log2(0). The GPU is silent, the interpreter warns.
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("gpu_arithmetic"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton"),
]

GPU = GPUS["h200"]
DTYPES = ("bf16", "fp16", "fp32")
LONGEST = 130


@pytest.mark.parametrize("seed", training_steps.seeds(50))
def test_a_training_step_agrees_with_float64(seed: int) -> None:
    assert training_steps.wrong(strategies.step_case(seed, DTYPES, GPU, LONGEST), GPU, "cpu") is None
