"""Every default fits every card: a call without records launches it, and there is no fallback.

Kernels are lowered ahead of time, only far enough to know their needs. A sample runs always, all of them with
`-m slow`. `tests/aot_matrix.py` has the kernels, and compiles them to machine code, which shows spills.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import triton
from aot_matrix import BUCKETS, CARDS, DECODED, DTYPES, HEAD_DIMS, PREFILLED, Row, jobs_of, specs_of, table
from lowering import Job, needs
from packaging.version import Version

from parallax_gen.codegen.resources import Resources
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.space import coerce, default_config, knobs_of, most_shared_bytes, shared_bytes, why_invalid
from parallax_gen.problem.hardware import GPUS, KIB
from parallax_gen.problem.shapes import Bucket, representative
from parallax_gen.problem.spec import KernelSpec

TENSOR_COLUMNS = 512  # a multiprocessor's tensor memory


def check(jobs: list[Job], folder: Path) -> None:
    """Assert that every job fits its card, and that its bound holds for it: decode has one, and so has AMD."""
    wrong = []
    for job, found in zip(jobs, needs(jobs, folder), strict=True):
        most = job.gpu.shared_per_block
        if job.spec.public_op == "decode" or job.gpu.is_amd:
            most = min(most, shared_bytes(job.spec, job.config, job.gpu))
        if found.error or found.shared_bytes > most or found.tensor_columns > TENSOR_COLUMNS:
            wrong.append(f"{job.gpu.name}: {job.spec}: {job.config}: {found}; {most} bytes at the most")
    assert not wrong, "\n".join(wrong)


def test_a_sample_of_defaults_fits(tmp_path: Path) -> None:
    """Every kind of kernel, and every card."""
    draw, kinds, cards = random.Random(18), list(BUCKETS), list(CARDS)
    jobs = [draw.choice(jobs_of(kind, card)) for kind, card in zip(kinds, cards, strict=False)]  # 8 and 10
    jobs += [draw.choice(jobs_of(*of)) for of in (("dqdr", "gfx942"), ("forward stats", "gfx950"))]
    # Of a B200's shared memory this default has the most.
    shape = representative(Bucket(64, 4096, 4096), 1)
    wide = KernelSpec("forward", 256, "bf16", causal=True, stats=True)
    jobs.append(Job(wide, default_config(wide, shape, GPUS["b200"]), GPUS["b200"], shape))
    check(jobs, tmp_path)


def test_a_split_tile_that_a_b200_has_no_room_for_is_invalid() -> None:
    """From compiling: 233,536 bytes in bf16. On Hopper it takes less."""
    spec = KernelSpec("forward", 256, "bf16", causal=True, stats=True)
    config = ForwardConfig(128, 64, GROUP_HEADS=4, num_warps=8, num_stages=2, HEAD_DIM_LAYOUT="split")
    assert shared_bytes(spec, config, GPUS["b200"]) <= 233536
    for name in ("b200", "gb200", "b300"):
        assert "shared memory" in str(why_invalid(spec, config, GPUS[name]))
        fitting = replace(config, BLOCK_N=32)  # 184,384 bytes
        assert shared_bytes(spec, fitting, GPUS[name]) <= 184384 <= most_shared_bytes(spec, fitting, GPUS[name])
    assert why_invalid(spec, config, GPUS["h200"]) is None


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


def test_amd_kernels_need_at_most_their_bound(tmp_path: Path) -> None:
    """For random configs of training's kernels, which on NVIDIA cards have no bound."""
    draw, jobs = random.Random(18), []
    while len(jobs) < 4:
        gpu = CARDS[draw.choice(("gfx942", "gfx950"))]
        spec = draw.choice(specs_of(draw.choice(("forward", "dkdv", "dqdr")), draw.choice(HEAD_DIMS), "bf16"))
        config = coerce(spec, {knob.name: draw.choice(knob.values) for knob in knobs_of(spec)})
        # Before 3.9 Triton's pass for AMD's pointers fails at some tiles of q and r stacked. No default stacks there.
        compiles = getattr(config, "QR_TILE", "") != "stacked" or Version(triton.__version__) >= Version("3.9")
        if compiles and why_invalid(spec, config, gpu) is None:
            bucket = Bucket(64, 4096, 4096, 128 if spec.window else 0)
            jobs.append(Job(spec, config, gpu, representative(bucket, spec.group)))
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


def test_the_matrix_counts_what_does_not_fit_and_what_spills() -> None:
    spec, shape = KernelSpec("dkdv", 64, "bf16"), representative(Bucket(64, 4096, 4096), 1)
    gpu = GPUS["l4"]
    job = Job(spec, default_config(spec, shape, gpu), gpu, shape)
    found = [Resources(255, 0, 99 * KIB), Resources(255, 8, 99 * KIB + 1), Resources(32, 6200, 0), None]
    rows = [Row(job, resources, "" if resources else "BuildError") for resources in found]
    assert table({"sm_89": rows}).splitlines()[-1] == "| sm_89 | 4 | 1 | 1 | 2 | 1 | 6200 |"


def test_the_matrix_has_every_card() -> None:
    """Their defaults differ with the number of multiprocessors; every default of every card is in it."""
    assert {gpu.target for gpu in GPUS.values()} == set(CARDS)
    for gpu in (GPUS["h20"], GPUS["gb10"], GPUS["l4"], GPUS["mi300a"]):
        configs = {(job.spec, job.config) for job in jobs_of("decode", gpu.target)}
        for spec in specs_of("decode", 128, "bf16"):
            assert (spec, default_config(spec, representative(DECODED[1], spec.group), gpu)) in configs


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("kind", BUCKETS)
def test_every_default_fits(kind: str, card: str, tmp_path: Path) -> None:
    check(jobs_of(kind, card), tmp_path)
