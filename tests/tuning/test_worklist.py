"""What to tune when little is said."""

from __future__ import annotations

import pytest

from parallax_gen.errors import ArgumentError
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.tuning.worklist import USUAL_SHAPES, worklist

GPU = GPUS["h200"]


def test_the_usual_jobs() -> None:
    jobs = worklist(GPU)
    assert len(jobs) == len(set(jobs)) == 12
    assert len({job.key for job in jobs}) == 12
    assert [job.spec.op for job in jobs] == ["forward"] * 4 + ["decode"] * 8
    for job in jobs:
        assert job.gpu == GPU
        assert (job.spec.head_dim, job.spec.dtype) == (128, "bf16")
        assert job.spec.causal == (job.spec.op == "forward")
        assert not job.spec.stats
        assert not job.spec.ragged
    assert [job.bucket for job in jobs[:4]] == [
        Bucket(64, 4096, 4096),
        Bucket(16, 16384, 16384),
        Bucket(256, 1024, 1024),
        Bucket(128, 2048, 2048),
    ]
    assert [job.spec.group for job in jobs[4:]] == [1] * 6 + [4] * 2
    assert all(job.bucket.seqlen_q == 1 for job in jobs[4:])


def test_every_combination_in_the_order_given() -> None:
    jobs = worklist(GPU, ops=("decode",), head_dims=(64, 128), dtypes=("fp16", "bf16"), ragged=True, stats=True)
    assert len(jobs) == 4 * len(USUAL_SHAPES["decode"])
    assert all(job.spec.ragged and not job.spec.stats for job in jobs)
    kernels = list(dict.fromkeys((job.spec.head_dim, job.spec.dtype) for job in jobs))
    assert kernels == [(64, "fp16"), (64, "bf16"), (128, "fp16"), (128, "bf16")]


def test_flags_go_to_their_ops() -> None:
    jobs = worklist(GPU, causal=False, stats=True, ragged=True)
    for job in jobs:
        forward = job.spec.op == "forward"
        assert (job.spec.causal, job.spec.stats, job.spec.ragged) == (False, forward, not forward)


def test_a_key_is_tuned_once() -> None:
    shapes = {"forward": [Shape(4, 16, 16, 4096, 4096), Shape(8, 8, 8, 4000, 4100), Shape(4, 16, 16, 4096, 4096)]}
    (job,) = worklist(GPU, ops=("forward", "forward"), dtypes=("bf16", "bf16"), shapes=shapes)
    assert job.bucket == Bucket(64, 4096, 4096)
    grouped = {"forward": [*shapes["forward"], Shape(4, 32, 16, 4096, 4096)]}
    assert [job.spec.group for job in worklist(GPU, ops=("forward",), shapes=grouped)] == [1, 2]


def test_what_no_kernel_can_be_is_refused() -> None:
    with pytest.raises(ArgumentError, match="head_dim"):
        worklist(GPU, head_dims=(96,))
