"""Random training steps on a card, as in tests/codegen/test_random_steps.py.

Here in every dtype and with longer sequences. Compiling takes most of the time, some seconds per step. To run all:
`PARALLAX_GEN_STEPS=0/1 pytest -n 14 tests/gpu/test_random_steps_gpu.py`.
"""

from __future__ import annotations

import pytest
import strategies
import training_steps
from triton.runtime.errors import OutOfResources

from parallax_gen.codegen.device import gpu_of_device
from parallax_gen.problem.spec import DTYPES

pytestmark = pytest.mark.gpu

LONGEST = 300


@pytest.mark.parametrize("seed", training_steps.seeds(5))
def test_a_training_step_agrees_with_float64(seed: int) -> None:
    gpu = gpu_of_device(0)
    case = strategies.step_case(seed, DTYPES, gpu, LONGEST)
    try:
        assert training_steps.wrong(case, gpu, "cuda") is None
    except OutOfResources as error:  # only compiling shows it
        pytest.skip(f"a kernel of it does not fit this card: {error}")
