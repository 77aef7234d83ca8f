"""The correctness checks of a trial: inputs, expected outputs, tolerances."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from parallax_gen.codegen.abi import empty_inputs
from parallax_gen.ops.base import op_of
from parallax_gen.ops.space import default_config, timed_lengths
from parallax_gen.oracle.inputs import random_inputs_of
from parallax_gen.oracle.verify import FEW_KEYS, TrainingStep, oracle, term_sizes
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket, Shape, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.job import step_spec


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("op", ["forward", "dkdv", "dqdr"])
def test_the_awkward_shape_uses_the_same_compiled_kernel(op: str, varlen: bool) -> None:
    """Strides are specialised: with other strides the measuring worker would have to compile again."""
    spec = KernelSpec(op, 96, "bf16", group=2, causal=True, varlen=varlen)
    shape = representative(Bucket(32, 4096, 4096), spec.group)
    config = default_config(spec, shape, GPUS["h200"])
    small = op_of(spec).awkward_shape(spec, config, shape.kv_heads)
    assert small.seqlen_q % config.BLOCK_M
    assert small.seqlen_kv % config.BLOCK_N
    checked, timed = (empty_inputs(spec, sizes, "meta") for sizes in (small, shape))
    assert checked.q.stride(-3) == timed.q.stride(-3)
    assert checked.k.stride(-3) == timed.k.stride(-3)


@pytest.mark.parametrize("more", [{}, {"causal": True, "window": True}, {"causal": True, "varlen": True}])
def test_the_kernels_of_a_step_share_one_oracle_call(more: dict[str, bool]) -> None:
    """All kernels of a step get the same inputs, and the expected outputs equal those of each kernel's own oracle."""
    shape = Shape(2, 4, 2, 33, 33, 7 if "window" in more else 0)
    specs = [KernelSpec(op, 16, "fp32", group=2, **more) for op in ("forward", "dkdv", "dqdr")]
    assert len({step_spec(spec) for spec in specs}) == 1
    step = TrainingStep(step_spec(specs[0]), shape, seed=3, device="cpu")
    for spec in (*specs, replace(specs[0], stats=True)):
        expected, result = oracle(spec, step.inputs), step.expected(spec)
        assert list(result) == list(expected)
        for name, tensor in result.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0.0, atol=0.0)


DECODE_VARLEN = KernelSpec("decode_varlen", 96, "bf16", group=2, stats=True)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"leftpad": True},
        {"page_size": 16},
        {"leftpad": True, "page_size": 48, "cache_dtype": "e4m3"},
        {"leftpad": True, "cache_dtype": "e5m2"},
        {"multi_token": True, "causal": True},
        {"multi_token": True, "causal": True, "window": True, "varlen": True, "leftpad": True, "page_size": 16},
    ],
)
def test_unseen_cache_positions_are_nan(more: dict[str, Any]) -> None:
    """Only those: the expected outputs are finite, and depend on every visible key."""
    spec = replace(DECODE_VARLEN, **more)
    config = default_config(spec, representative(Bucket(32, 128 if spec.multi_token else 1, 4096), 2), GPUS["h200"])
    shape = op_of(spec).awkward_shape(spec, config)
    assert shape.seqlen_kv % config.BLOCK_N  # type: ignore[union-attr]
    assert not spec.multi_token or shape.seqlen_q * spec.group > config.BLOCK_H  # type: ignore[union-attr]
    inputs = random_inputs_of(spec, shape, seed=1, device="cpu")
    for cache in (inputs.k, inputs.v):
        assert cache.float().isnan().any()
    expected = oracle(spec, inputs)
    assert expected.keys() == {"out", "lse", "t_mean", "v_mean"}
    assert expected["out"].isfinite().all()
    assert expected["out"].any()
    inputs.v = torch.where(inputs.v.float().isnan(), float("nan"), 1.0).to(inputs.v.dtype)
    assert oracle(spec, inputs)["v_mean"].isfinite().all()


@pytest.mark.parametrize("cache_dtype", ["e4m3", "e5m2"])
def test_scales_are_per_tensor_or_per_head(cache_dtype: str) -> None:
    spec = replace(DECODE_VARLEN, cache_dtype=cache_dtype)
    sizes = set()
    for seed in range(4):
        inputs = random_inputs_of(spec, op_of(spec).awkward_shape(spec, CONFIG), seed=seed, device="cpu")
        assert inputs.k_scale is not None
        assert inputs.v_scale is not None
        assert inputs.k_scale.shape == inputs.v_scale.shape
        sizes.add(len(inputs.k_scale))
    assert sizes == {1, 3}


CONFIG = default_config(DECODE_VARLEN, representative(Bucket(32, 1, 4096), 2), GPUS["h200"])


def test_given_lengths_are_used() -> None:
    """Such as the lengths of a timing, paged or not; the rest of the cache is NaN."""
    spec, shape = replace(DECODE_VARLEN, page_size=16), Shape(3, 4, 2, 1, 64)
    inputs = random_inputs_of(spec, shape, seed=0, device="cpu", full=True, lengths=timed_lengths(spec, shape)[0])
    assert inputs.cache_seqlens is not None
    assert inputs.page_table is not None
    assert inputs.cache_seqlens.tolist() == [64, 11, 2]
    assert (inputs.page_table < len(inputs.k)).sum(1).tolist() == [4, 1, 1]
    assert oracle(spec, inputs)["out"].isfinite().all()


def test_gradients_of_queries_with_few_keys_may_be_rounding_error() -> None:
    """For three queries with one key each, a correct tf32 kernel had 1.2 times the error that is allowed elsewhere."""
    spec = KernelSpec("dqdr", 16, "fp16", group=2, causal=True)
    x = random_inputs_of(spec, Shape(1, 2, 1, 40, 40), seed=1, device="cpu")
    ordinary, causal = term_sizes(replace(spec, causal=False), x), term_sizes(spec, x)
    assert len(ordinary.dq.unique()) == 1
    sees_few_keys = torch.arange(1, 41)[:, None] < FEW_KEYS
    for name in ("dq", "dr"):
        assert torch.allclose(getattr(causal, name), getattr(ordinary, name) * torch.where(sees_few_keys, 12.0, 1.0))
    assert torch.equal(causal.dk, ordinary.dk)  # some queries of each key see many keys
    windowed = replace(spec, window=True)
    for shape, times in ((Shape(1, 2, 1, 40, 40, 1), 12 * 2**0.5), (Shape(1, 2, 1, 40, 40, FEW_KEYS), 1.0)):
        x = random_inputs_of(windowed, shape, seed=1, device="cpu")
        assert float(term_sizes(windowed, x).dk / ordinary.dk) == pytest.approx(times)
    packed = replace(windowed, varlen=True)
    x = random_inputs_of(packed, Shape(2, 2, 1, 40, 40, 1), seed=4, device="cpu")  # and padding rows
    assert x.cu_seqlens_q is not None
    assert len(term_sizes(packed, x).dq) == x.cu_seqlens_q[-1] - x.cu_seqlens_q[0] < len(x.q)
