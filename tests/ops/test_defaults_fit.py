"""Every default fits every card: a call without records launches it, and there is no fallback.

Kernels are lowered ahead of time, only far enough to know their needs. A sample runs always, all of them with
`-m slow`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from lowering import Job, needs

from parallax_gen.ops.space import coerce, default_config, knobs_of, shared_bytes, why_invalid
from parallax_gen.problem.hardware import GIB, GPUS, Gpu, recognise
from parallax_gen.problem.shapes import Bucket, representative
from parallax_gen.problem.spec import KernelSpec

CARDS: dict[str, Gpu] = {
    "sm_80": GPUS["a100"],
    "sm_86": GPUS["rtx3090"],
    "sm_89": GPUS["rtx4090"],
    "sm_90": GPUS["h100"],
    "sm_100": GPUS["b200"],
    "sm_103": recognise("NVIDIA B300 SXM6 AC", (10, 3), 148, 268 * GIB),
    "sm_120": GPUS["rtx5090"],
    "sm_121": recognise("NVIDIA GB10", (12, 1), 48, 119 * GIB),
}
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = ("bf16", "fp16", "tf32")
TENSOR_COLUMNS = 512  # a multiprocessor's tensor memory

# One batch that fills a card, and one that does not.
TRAINED = (Bucket(64, 4096, 4096), Bucket(1, 128, 1024))
DECODED = (Bucket(256, 1, 4096), Bucket(8, 1, 16384))
PREFILLED = (Bucket(64, 512, 4096), Bucket(8, 128, 1024))


def decode_layouts(head_dim: int, dtype: str, many: bool) -> Iterator[KernelSpec]:
    """decode_varlen with one query or several a sequence, in every cache layout."""
    dense = KernelSpec("decode_varlen", head_dim, dtype, 4, causal=many, multi_token=many)
    yield dense
    yield replace(dense, group=71)
    yield replace(dense, page_size=16)
    yield replace(dense, page_size=256)
    yield replace(dense, leftpad=True)
    yield replace(dense, window=True, causal=True)
    yield replace(dense, stats=True)
    if many:
        yield replace(dense, group=1, causal=False)
        yield replace(dense, varlen=True, page_size=16)
    if dtype != "tf32":
        yield replace(dense, cache_dtype="e4m3")
        yield replace(dense, cache_dtype="e5m2", page_size=16)


def specs_of(kind: str, head_dim: int, dtype: str) -> list[KernelSpec]:
    """The specs of a kind of kernel at a head_dim and dtype."""
    if kind == "preprocess":
        return [KernelSpec("preprocess", head_dim, "fp32" if dtype == "tf32" else dtype)]
    if kind == "decode":
        return [KernelSpec("decode", head_dim, dtype, group) for group in (1, 16, 71)]
    if kind.startswith("decode "):
        return list(decode_layouts(head_dim, dtype, many=kind == "decode multi-token"))
    spec = KernelSpec(kind.split()[0], head_dim, dtype, causal=True, stats=kind == "forward stats")
    return [spec, replace(spec, group=4, window=True, varlen=True), replace(spec, causal=False)]


BUCKETS = {
    **dict.fromkeys(("forward", "forward stats", "preprocess", "dkdv", "dqdr"), TRAINED),
    "decode": DECODED,
    "decode own lengths": DECODED,
    "decode multi-token": PREFILLED,
}


def jobs_of(kind: str, card: str) -> list[Job]:
    """The distinct defaults of a kind of kernel on a card."""
    gpu, jobs = CARDS[card], []
    for head_dim in HEAD_DIMS:
        for dtype in DTYPES:
            for spec in specs_of(kind, head_dim, dtype):
                for bucket in BUCKETS[kind]:
                    shape = representative(replace(bucket, window=128 if spec.window else 0), spec.group)
                    jobs.append(Job(spec, default_config(spec, shape, gpu), gpu, shape))
    return list(dict.fromkeys(jobs))


def check(jobs: list[Job], folder: Path) -> None:
    """Assert that every job fits its card, and that decode's bound holds for it."""
    wrong = []
    for job, found in zip(jobs, needs(jobs, folder), strict=True):
        most = job.gpu.shared_per_block
        if job.spec.public_op == "decode":
            most = min(most, shared_bytes(job.spec, job.config, job.gpu))
        if found.error or found.shared_bytes > most or found.tensor_columns > TENSOR_COLUMNS:
            wrong.append(f"{job.gpu.name}: {job.spec}: {job.config}: {found}; {most} bytes at the most")
    assert not wrong, "\n".join(wrong)


def test_a_sample_of_defaults_fits(tmp_path: Path) -> None:
    """Every kind of kernel, and every card."""
    draw, kinds, cards = random.Random(18), list(BUCKETS), list(CARDS)
    # Consecutive kernels are on different cards.
    jobs = [draw.choice(jobs_of(kinds[i % 8], cards[(i + i // 8 * 3) % 8])) for i in range(12)]
    check(jobs, tmp_path)


def test_decode_needs_at_most_its_bound(tmp_path: Path) -> None:
    """For random configs, not only for defaults."""
    draw, jobs = random.Random(18), []
    while len(jobs) < 4:
        spec = draw.choice(decode_kinds())
        gpu = CARDS[draw.choice(("sm_89", "sm_90", "sm_100"))]
        config = coerce(spec, {knob.name: draw.choice(knob.values) for knob in knobs_of(spec)})
        if why_invalid(spec, config, gpu) is None:
            jobs.append(Job(spec, config, gpu, representative(prefilled_or_decoded(spec), spec.group)))
    check(jobs, tmp_path)


def decode_kinds() -> list[KernelSpec]:
    return [
        spec
        for kind in ("decode", "decode own lengths", "decode multi-token")
        for head_dim in HEAD_DIMS
        for dtype in DTYPES
        for spec in specs_of(kind, head_dim, dtype)
    ]


def prefilled_or_decoded(spec: KernelSpec) -> Bucket:
    return replace((PREFILLED if spec.multi_token else DECODED)[0], window=128 if spec.window else 0)


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("kind", BUCKETS)
def test_every_default_fits(kind: str, card: str, tmp_path: Path) -> None:
    check(jobs_of(kind, card), tmp_path)
