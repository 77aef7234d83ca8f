"""What a trial is checked on."""

from __future__ import annotations

import pytest

from parallax_gen.codegen.calling import empty_inputs
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.heuristics import default_config
from parallax_gen.problem.shapes import Bucket, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.verify import awkward_shape


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("op", ["forward", "dkdv", "dqdr"])
def test_the_small_check_compiles_no_kernel_of_its_own(op: str, varlen: bool) -> None:
    """Rows' strides are constants of a kernel: other ones would be compiled by the child that measures, one by one."""
    spec = KernelSpec(op, 96, "bf16", group=2, causal=True, varlen=varlen)
    shape = representative(Bucket(32, 4096, 4096), spec.group)
    config = default_config(spec, shape, GPUS["h200"])
    small = awkward_shape(spec, config, shape.kv_heads)
    assert small.seqlen_q % config.BLOCK_M
    assert small.seqlen_kv % config.BLOCK_N
    checked, timed = (empty_inputs(spec, sizes, "meta") for sizes in (small, shape))
    assert checked.q.stride(-3) == timed.q.stride(-3)
    assert checked.k.stride(-3) == timed.k.stride(-3)
