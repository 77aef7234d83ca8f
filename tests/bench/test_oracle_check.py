"""Errors are estimated on a sample of sequences and kv heads, which is a smaller call by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallax_gen.bench.oracle_check import OracleCheck, Sample, random_inputs_for_case
from parallax_gen.oracle.verify import oracle
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import TRAINING

STEP = KernelSpec("forward", 64, "fp16", group=2, causal=True, stats=True)
SHAPE = Shape(4, 6, 3, 40, 40)
DECODE = Shape(5, 6, 3, 1, 70)


@pytest.mark.parametrize(
    ("op", "spec", "shape"),
    [
        ("forward", STEP, SHAPE),
        ("forward", KernelSpec("forward", 64, "fp16", group=2, causal=True, varlen=True), SHAPE),
        ("decode", KernelSpec("decode", 64, "fp16", group=2), DECODE),
        ("decode", KernelSpec("decode_varlen", 64, "fp16", group=2, leftpad=True, page_size=16), DECODE),
        ("decode", KernelSpec("decode_varlen", 64, "fp16", group=2, cache_dtype="e4m3"), DECODE),
    ],
    ids=["dense", "packed", "decode", "paged", "eight bits"],
)
def test_sampling_commutes_with_the_oracle(op: str, spec: KernelSpec, shape: Shape) -> None:
    x, sample = random_inputs_for_case(op, spec, shape, "cpu"), Sample.first_and_last(spec, shape)
    if spec.cache_dtype:
        x.k_scale, x.v_scale = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 3.0, 0.5])
    whole, part = oracle(spec, x)["out"], oracle(spec, sample.of(spec, x))["out"]
    assert part.numel() * 3 < whole.numel() * 2 + 1  # two of three heads, and of dense sequences two
    assert torch.equal(sample.queries(whole, spec.group), part)


def results(spec: KernelSpec, shape: Shape) -> tuple[OracleCheck, OracleCheck, dict[str, Tensor]]:
    """The checks of the whole and of a sample, and the correct results of a training step."""
    x = random_inputs_for_case(TRAINING, spec, shape, "cpu")
    right = {
        name: oracle(spec.for_op(op), x)[name] for name, op in (("out", "forward"), ("dq", "dqdr"), ("dr", "dqdr"))
    }
    right |= oracle(spec.for_op("dkdv"), x)
    judges = [OracleCheck(TRAINING, spec, shape, x, extent) for extent in ("whole", "sample")]
    return judges[0], judges[1], {name: tensor.half() for name, tensor in right.items()}


def test_errors_of_a_sample_are_near_those_of_the_whole() -> None:
    whole, sample, right = results(STEP, SHAPE)
    assert (whole.pairs, sample.pairs) == (12, 4)
    of_whole, of_sample = whole.errors(right), sample.errors(right)
    assert set(of_whole) == set(of_sample) == {"out", "dq", "dr", "dk", "dv"}
    for name, error in of_whole.items():
        assert 1e-4 < error < 1e-3  # rounding to fp16: at most 2^-12 per element
        assert of_sample[name] == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize("name", ["out", "dq", "dr", "dk", "dv"])
def test_an_error_in_the_last_sequence_and_head_is_in_the_sample(name: str) -> None:
    _, sample, result = results(STEP, SHAPE)
    result[name] = result[name].clone()
    result[name][-1, :, -1] = 0
    errors = sample.errors(result)
    assert errors.pop(name) > 0.1
    assert max(errors.values()) < 1e-3


def test_the_sample_of_a_small_call_is_the_whole() -> None:
    assert Sample.first_and_last(STEP, Shape(1, 2, 1, 9, 9)) == Sample((0,), (0,))
    assert Sample.first_and_last(STEP, Shape(2, 4, 2, 9, 9)).pairs(Shape(2, 4, 2, 9, 9)) == 4


def test_without_an_oracle_there_are_no_errors() -> None:
    oracle_check = OracleCheck("forward", STEP, SHAPE, random_inputs_for_case("forward", STEP, SHAPE, "cpu"), "none")
    assert oracle_check.pairs == 0
    assert oracle_check.errors({"out": torch.zeros(4, 40, 6, 64)}) == {}


def test_random_cases_do_not_use_torchs_global_generator() -> None:
    """A failed CUDA graph capture of a baseline leaves the device's generator unusable."""
    spec, shape = KernelSpec("forward", 64, "bf16", causal=True, stats=True), Shape(1, 2, 2, 20, 20)
    before = torch.get_rng_state()
    first, second = (random_inputs_for_case(TRAINING, spec, shape, "cpu").do for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)
