"""Kernels that load blocks by tensor descriptors give the bits of those that load by pointers, in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import strategies
import torch
import triton
from descriptor_cases import CASES, assert_same, inputs_of, outputs
from packaging.version import Version

# For a row without keys the kernels divide by zero and take log2(0). The GPU is silent, the interpreter warns.
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("gpu_arithmetic"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton"),
]


@pytest.mark.parametrize("name", CASES)
def test_descriptors_load_what_pointers_load(name: str) -> None:
    spec, config = CASES[name]
    if spec.head_dim % 16 and Version(triton.__version__) < Version("3.6"):
        pytest.skip("the interpreter of Triton 3.5 checks strides of elements as if they were bytes")
    assert_same(spec, config, inputs_of(spec))


@pytest.mark.parametrize("name", ["forward", "dkdv, stacked, GQA", "dqdr"])
def test_heads_before_rows(name: str) -> None:
    """Tensors laid out as (batch, heads, seqlen, head_dim) in memory."""
    spec, config = CASES[name]
    inputs = strategies.heads_first(inputs_of(spec))
    q, r = torch.stack([inputs.q.transpose(1, 2), inputs.r.transpose(1, 2)])
    assert_same(spec, config, replace(inputs, q=q.transpose(1, 2), r=r.transpose(1, 2)))


@pytest.mark.parametrize("name", ["forward", "dkdv, stacked", "dqdr"])
def test_slices_of_one_projection(name: str) -> None:
    spec, config = CASES[name]
    assert_same(spec, config, strategies.fused_projection(inputs_of(spec)))


def test_rows_past_the_end_are_not_read() -> None:
    """Whatever lies behind a sequence in memory, here NaN: a block that reaches past its end loads zeros."""
    spec, config = CASES["forward"]
    inputs = inputs_of(spec)
    keys = [torch.full((2, 128, 2, 64), float("nan"), dtype=torch.bfloat16) for _ in "kv"]
    for longer, tensor in zip(keys, (inputs.k, inputs.v), strict=True):
        longer[:, :91] = tensor
    cut = replace(inputs, k=keys[0][:, :91], v=keys[1][:, :91])
    written = outputs(spec, replace(config, LOADS="descriptors"), cut)
    assert torch.equal(written["out"], outputs(spec, config, inputs)["out"])
