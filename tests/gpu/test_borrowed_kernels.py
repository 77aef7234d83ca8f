"""Borrowed kernels are compiled once, before their first launch, and their spills are checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallax_gen.codegen.abi import prepare
from parallax_gen.codegen.build import compile_for, compile_here, load
from parallax_gen.codegen.device import gpu_of_device
from parallax_gen.codegen.render import render
from parallax_gen.memory import guard
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, Tier, default_of, evidence_of
from parallax_gen.memory.result import Result
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.oracle.inputs import random_inputs_of, softmax_scale
from parallax_gen.problem.shapes import Bucket, Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import Dispatcher

pytestmark = pytest.mark.gpu

SHAPE = Shape(2, 8, 4, 512, 512)
FORWARD = KernelSpec("forward", 72, "bf16", group=2, causal=True)  # no other test here compiles this head_dim
SPILLS = ForwardConfig(64, 64, GROUP_HEADS=1, num_warps=4, num_stages=2, HEAD_DIM_LAYOUT="padded")
CASES: list[tuple[KernelSpec, KernelConfig, Shape]] = [
    (FORWARD, ForwardConfig(32, 32, GROUP_HEADS=1, num_warps=4, num_stages=2, HEAD_DIM_LAYOUT="padded"), SHAPE),
    (FORWARD, SPILLS, SHAPE),
    (
        KernelSpec("decode_varlen", 72, "bf16", group=2, page_size=16),
        DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=6, merge="last", num_warps=2, num_stages=3),
        Shape(2, 8, 4, 1, 512),
    ),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(guard, "cache_dir", lambda: tmp_path)
    return tmp_path / "triton"


@pytest.mark.parametrize(("spec", "config", "shape"), CASES)
def test_resources_match_the_machine_code_and_the_launch_compiles_nothing(
    cache: Path, spec: KernelSpec, config: KernelConfig, shape: Shape
) -> None:
    gpu = gpu_of_device(0)
    source = render(spec, config, gpu)
    result = compile_here(source, spec, config, shape)
    programs = sorted(cache.rglob("*.cubin"))
    assert programs
    inputs = random_inputs_of(spec, shape, seed=1, device="cuda", full=True)
    load(source).launch(*prepare(spec, config, inputs).arguments(softmax_scale(spec)))
    torch.cuda.synchronize()
    assert sorted(cache.rglob("*.cubin")) == programs
    assert result == compile_for(source, spec, config, shape, gpu)
    assert (config != SPILLS) or result.spills > guard.MAX_EXTRA_SPILLS


def test_a_call_gets_a_checked_borrowed_kernel_and_not_one_that_spills() -> None:
    gpu = gpu_of_device(0)
    place = Place(gpu.name, FORWARD, bucket_of(SHAPE))
    default = default_of(place, gpu)
    fine = replace(default, GROUP_HEADS=2)  # type: ignore[call-arg]

    def borrowed(config: KernelConfig, time_us: float) -> Result:
        evidence = replace(evidence_of(render(FORWARD, config, gpu)), triton="2.0.0")
        return Result(place, evidence, config, "ok", time_us=time_us)

    table = RecordTable([borrowed(SPILLS, 1.0), borrowed(fine, 2.0), borrowed(default, 3.0)])
    choice, _ = Dispatcher(table).kernel(FORWARD, SHAPE, gpu)
    assert (choice.candidate.tier, choice.config, choice.checked) == (Tier.OTHER_TOOLCHAIN, fine, True)
    ((refused, why),) = choice.refused
    assert refused.config == SPILLS
    assert "it spills" in why
    # Another process, which compiles nothing, reports the same.
    checked = guard.checked_choice(place, gpu, table)
    assert (checked.candidate, checked.checked) == (choice.candidate, True)
    assert Bucket(8, 512, 512) == place.bucket
