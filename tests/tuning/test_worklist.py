"""The default jobs of a tune, and the kernels that shapes and flags select."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallax_gen.codegen.render import render
from parallax_gen.errors import ArgumentError
from parallax_gen.ops.base import op_of
from parallax_gen.ops.space import default_config
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import (
    NO_FLAGS,
    OPS_AND_TRAINING,
    STEP,
    TRAINING,
    USUAL_SHAPES,
    USUAL_TRAINING,
    Flags,
    has_flag,
    kernels,
    usual_shapes,
)
from parallax_gen.tuning.job import DEFAULT_OPS, Job, worklist

GPU = GPUS["h200"]
INFERENCE = ("forward", "decode")

# (head_dim, batch, heads, kv_heads, seqlen, window) of model training; window 0: none.
TRAINED = [
    (128, 32, 6, 6, 2048, 0),
    (128, 32, 6, 6, 2048, 513),
    (128, 32, 10, 10, 2048, 0),
    (128, 16, 12, 12, 2048, 0),
    (128, 16, 12, 12, 2048, 513),
    (128, 4, 16, 8, 4096, 0),
    (64, 8, 32, 32, 2048, 0),
    (128, 2, 32, 8, 8192, 0),
    (128, 4, 16, 16, 4096, 0),
    (128, 1, 16, 16, 16384, 0),
    (128, 1, 16, 16, 16384, 4096),
    (96, 4, 32, 32, 4096, 0),
    (256, 2, 8, 4, 4096, 0),
]


def test_the_usual_jobs_of_inference() -> None:
    jobs = worklist(GPU, ops=INFERENCE)
    assert len(jobs) == len(set(jobs)) == 12
    assert len({job.place for job in jobs}) == 12
    assert [job.spec.op for job in jobs] == ["forward"] * 4 + ["decode"] * 8
    for job in jobs:
        assert job.gpu == GPU
        assert (job.spec.head_dim, job.spec.dtype) == (128, "bf16")
        assert job.spec.causal == (job.spec.op == "forward")
        assert not job.spec.stats
        assert not op_of(job.spec).per_sequence_lengths
    assert [job.bucket for job in jobs[:4]] == [
        Bucket(64, 4096, 4096),
        Bucket(16, 16384, 16384),
        Bucket(256, 1024, 1024),
        Bucket(128, 2048, 2048),
    ]
    assert [job.spec.group for job in jobs[4:]] == [1] * 6 + [4] * 2
    assert all(job.bucket.seqlen_q == 1 for job in jobs[4:])


def test_everything_is_inference_then_training() -> None:
    assert DEFAULT_OPS == (*INFERENCE, TRAINING)
    assert worklist(GPU) == [*worklist(GPU, ops=INFERENCE), *worklist(GPU, ops=(TRAINING,))]


def test_the_usual_training_shapes_are_those_that_models_train_with() -> None:
    shapes = [(dim, Shape(b, h, kv, n, n, window)) for dim, b, h, kv, n, window in TRAINED]
    assert sorted(shapes, key=str) == sorted(((dim, s) for dim, of in USUAL_TRAINING.items() for s in of), key=str)


def test_a_training_step_is_four_kernels_with_their_own_sizes() -> None:
    jobs = worklist(GPU, ops=(TRAINING,), shapes={TRAINING: [Shape(2, 32, 8, 8192, 8192, 1000)]})
    assert [job.spec.op for job in jobs] == ["forward", "preprocess", "dkdv", "dqdr"] == list(STEP)
    forward, preprocess, *backward = jobs
    assert (forward.spec.stats, forward.spec.window, forward.spec.group) == (True, True, 4)
    assert forward.bucket == Bucket(16, 8192, 8192, 1024)
    assert (preprocess.spec.group, preprocess.spec.causal, preprocess.spec.window) == (1, False, False)
    assert preprocess.bucket == Bucket(64, 8192, 8192)
    for job in backward:
        assert job.bucket == forward.bucket
        assert job.spec == forward.spec.for_op(job.spec.op)


def test_jobs_of_training_are_distinct() -> None:
    jobs = worklist(GPU, ops=(TRAINING,))
    assert len({job.place for job in jobs}) == len(jobs)
    expected = {
        (op, dim, 1 if op == "preprocess" else heads // kv_heads, n, 0 if op == "preprocess" else window)
        for dim, _, heads, kv_heads, n, window in TRAINED
        for op in STEP
    }
    result = {(j.spec.op, j.spec.head_dim, j.spec.group, j.bucket.seqlen_kv, j.bucket.window) for j in jobs}
    assert result == {(*rest, 512 if window == 513 else window) for *rest, window in expected}
    assert {job.bucket.kv_rows for job in jobs if job.bucket.seqlen_q == 2048} == {256}  # 192 and 320: one bucket


@pytest.mark.parametrize("job", worklist(GPU, ops=(TRAINING,)), ids=str)
def test_every_job_of_training_has_a_default_that_renders(job: Job) -> None:
    for gpu in (GPU, GPUS["rtx4090"]):
        config = default_config(job.spec, job.shape, gpu)
        assert "def launch(" in render(job.spec, config, gpu).text


def test_a_kernel_of_the_backward_has_the_usual_shapes_of_training() -> None:
    for op in STEP[1:]:
        jobs = worklist(GPU, ops=(op,))
        assert jobs == [job for job in worklist(GPU, ops=(TRAINING,)) if job.spec.op == op]
        assert jobs


def test_head_dims_choose_among_the_usual_training_shapes() -> None:
    assert {job.spec.head_dim for job in worklist(GPU, ops=(TRAINING,), head_dims=(96, 64))} == {64, 96}
    assert worklist(GPU, ops=(TRAINING,), head_dims=(72,)) == []
    assert list(usual_shapes("decode", (64,))) == [64]


def test_every_combination_in_the_order_given() -> None:
    flags = Flags(per_sequence_lengths=True, stats=True)
    jobs = worklist(GPU, ops=("decode",), head_dims=(64, 128), dtypes=("fp16", "bf16"), flags=flags)
    assert len(jobs) == 4 * len(USUAL_SHAPES["decode"])
    assert all(job.spec.op == "decode_varlen" and job.spec.stats and not job.spec.causal for job in jobs)
    kernels = list(dict.fromkeys((job.spec.head_dim, job.spec.dtype) for job in jobs))
    assert kernels == [(64, "fp16"), (64, "bf16"), (128, "fp16"), (128, "bf16")]


def test_flags_apply_to_their_ops() -> None:
    for job in worklist(GPU, ops=INFERENCE, flags=Flags(causal=False, stats=True, per_sequence_lengths=True)):
        assert (job.spec.causal, job.spec.stats) == (False, True)
        assert job.spec.op in ("forward", "decode_varlen")
    for job in worklist(GPU, ops=(TRAINING,), flags=Flags(varlen=True)):
        assert job.spec.varlen
    assert {op for op in OPS_AND_TRAINING if has_flag(op, "window")} == {"forward", "dkdv", "dqdr", "decode", TRAINING}
    assert {op for op in OPS_AND_TRAINING if has_flag(op, "leftpad")} == {"decode"}
    assert not has_flag(TRAINING, "stats")


@pytest.mark.parametrize(
    ("queries", "flags", "expected"),
    [
        (1, NO_FLAGS, {}),
        (1, Flags(causal=True), {}),  # a single query sees every key either way
        (1, Flags(per_sequence_lengths=True), {"op": "decode_varlen"}),
        (1, Flags(stats=True), {"op": "decode_varlen", "stats": True}),
        (1, Flags(leftpad=True), {"op": "decode_varlen", "leftpad": True}),
        (1, Flags(page_size=16), {"op": "decode_varlen", "page_size": 16}),
        (1, Flags(cache_dtype="e5m2"), {"op": "decode_varlen", "cache_dtype": "e5m2"}),
        (1, Flags(window=100), {"op": "decode_varlen", "causal": True, "window": True}),
        (1, Flags(window=4096), {}),  # the window covers all keys
        (1, Flags(varlen=True), {"op": "decode_varlen", "causal": True, "multi_token": True, "varlen": True}),
        (4, NO_FLAGS, {"op": "decode_varlen", "causal": True, "multi_token": True}),
        (4, Flags(causal=False), {"op": "decode_varlen", "multi_token": True}),
        (4, Flags(window=100), {"op": "decode_varlen", "causal": True, "multi_token": True, "window": True}),
    ],
)
def test_flags_of_decode_imply_the_flags_they_need(queries: int, flags: Flags, expected: dict[str, object]) -> None:
    requested = Shape(8, 32, 8, queries, 4096)
    ((spec, shape),) = kernels("decode", 96, "bf16", requested, flags)
    assert spec == replace(KernelSpec("decode", 96, "bf16", 4), **expected)  # type: ignore[arg-type]
    assert shape == replace(requested, window=100 if "window" in expected else 0)


def test_windows() -> None:
    shape = Shape(1, 8, 8, 4096, 4096)
    for window, seen in (
        (513, 513),
        (4095, 4095),
        (4096, 0),
        (9999, 0),
    ):  # a window of all keys is none, as at run time
        ((spec, sizes),) = kernels("dkdv", 128, "bf16", shape, Flags(window=window))
        assert (spec.window, sizes.window) == (seen > 0, seen)
    windowed = Shape(1, 8, 8, 4096, 4096, 700)
    assert kernels("dkdv", 128, "bf16", windowed, NO_FLAGS)[0][1].window == 700
    assert kernels("dkdv", 128, "bf16", windowed, Flags(window=300))[0][1].window == 300
    full = worklist(GPU, ops=(TRAINING,), flags=Flags(causal=False))
    assert not any(job.spec.causal or job.bucket.window for job in full)
    with pytest.raises(ArgumentError, match="window: got True without causal"):
        kernels("dkdv", 128, "bf16", shape, Flags(causal=False, window=300))


def test_a_step_in_tf32_has_a_preprocess_in_fp32() -> None:
    jobs = worklist(GPU, ops=(TRAINING,), head_dims=(64,), dtypes=("tf32",))
    assert [job.spec.dtype for job in jobs] == ["tf32", "fp32", "tf32", "tf32"]


def test_a_place_is_tuned_once() -> None:
    shapes = {"forward": [Shape(4, 16, 16, 4096, 4096), Shape(8, 8, 8, 4000, 4100), Shape(4, 16, 16, 4096, 4096)]}
    (job,) = worklist(GPU, ops=("forward", "forward"), dtypes=("bf16", "bf16"), shapes=shapes)
    assert job.bucket == Bucket(64, 4096, 4096)
    grouped = {"forward": [*shapes["forward"], Shape(4, 32, 16, 4096, 4096)]}
    assert [job.spec.group for job in worklist(GPU, ops=("forward",), shapes=grouped)] == [1, 2]


def test_invalid_kernels_are_refused() -> None:
    with pytest.raises(ArgumentError, match="head_dim"):
        worklist(GPU, ops=("decode",), head_dims=(100,))
    with pytest.raises(ArgumentError, match="cache_dtype"):
        worklist(GPU, ops=("decode",), dtypes=("fp32",), flags=Flags(cache_dtype="e4m3"))
