"""Kernels for AMD GPUs, none of which was ever run: what they compile to, and that nothing of CUDA is rendered."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from strategies import Kernel, random_kernels

from parallax_gen.codegen.render import render
from parallax_gen.codegen.resources import usage_of_amdgcn
from parallax_gen.errors import ConfigError, MachineError
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.dkdv import DkDvConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.space import default_config, shared_bytes, why_invalid
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.workers.messages import Compile, KernelInstance
from parallax_gen.tuning.workers.worker import Worker

CARDS = {gpu.target: gpu for gpu in (GPUS["mi300x"], GPUS["mi355x"])}
FORWARD = KernelSpec("forward", 64, "bf16", causal=True, stats=True)
FIXED = ForwardConfig(32, 32, 1, 4, 2, maxnreg=168, LOADS="descriptors", SOFTMAX="fixed_reference")
SHAPE = Shape(1, 2, 2, 256, 256)
OF_CUDA = ("inline_asm", "TensorDescriptor", "maxnreg", "launch_pdl", "gdc_")


@pytest.mark.parametrize("gpu", CARDS.values(), ids=CARDS)
def test_small_kernels_compile_and_fit(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels: list[tuple[KernelSpec, KernelConfig, Shape]] = [
        (FORWARD, ForwardConfig(64, 32, 1, num_warps=4, num_stages=2), SHAPE),
        (KernelSpec("decode", 64, "bf16", 4), DecodeConfig(16, 8, 2, "last", 1, 2), Shape(1, 4, 1, 1, 256)),
    ]
    with closing(Worker(device=None)) as worker:
        for spec, config, shape in kernels:
            reply = worker.ask(Compile(KernelInstance(spec, config, shape, gpu)), 60)
            assert (resources := reply.resources) is not None, reply
            assert 16 < resources.registers <= gpu.registers_per_thread(config.num_warps)
            assert resources.spills == 0
            assert 0 < resources.shared_bytes <= shared_bytes(spec, config, gpu) <= gpu.shared_per_block


@pytest.mark.parametrize("gpu", CARDS.values(), ids=CARDS)
def test_nothing_of_cuda_is_rendered(gpu: Gpu) -> None:
    # The first has most of it on an H200.
    kernels = [Kernel(replace(FORWARD, head_dim=128, softcap=True), replace(FIXED, maxnreg=0, LOADS="pointers"))]
    kernels += random_kernels(200, gpu)
    for kernel in kernels:
        text = render(kernel.spec, kernel.config, gpu).text
        assert not any(word in text for word in OF_CUDA), kernel


def test_the_words_of_cuda_are_those_that_kernels_have_elsewhere() -> None:
    text = render(replace(FORWARD, head_dim=128, softcap=True), FIXED, GPUS["h200"]).text
    assert text.count("inline_asm") == 2  # zeros and tanh
    assert [word for word in OF_CUDA if word in text] == ["inline_asm", "TensorDescriptor", "maxnreg"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ForwardConfig(64, 64, 1, 4, 1, LOADS="descriptors"), r"LOADS 'descriptors' needs .*; mi300x is AMD's gfx942"),
        (ForwardConfig(64, 64, 1, 4, 1, maxnreg=168), "maxnreg is a limit for ptxas; mi300x is AMD's gfx942"),
        (ForwardConfig(64, 128, 1, 4, 4), "its tiles need .* bytes of shared memory; a block of .* has 65536"),
    ],
)
def test_configs_that_are_not_for_amd(config: ForwardConfig, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        render(FORWARD, config, CARDS["gfx942"])


def test_a_thread_has_twice_the_registers_and_a_warp_twice_the_threads() -> None:
    """A tile whose accumulators need 512 registers of a thread on an NVIDIA card, and 256 on an AMD card."""
    spec, config = KernelSpec("dkdv", 128, "bf16"), DkDvConfig(128, 128, 1, 4, 1)
    assert "need 512 registers per thread; there are 255" in str(why_invalid(spec, config, GPUS["h200"]))
    assert why_invalid(spec, config, CARDS["gfx950"]) is None


def test_gfx950_has_no_tf32() -> None:
    spec = replace(FORWARD, dtype="tf32")
    assert default_config(spec, SHAPE, CARDS["gfx942"])
    message = "on AMD Instinct MI355X: AMD Instinct MI355X has no matmuls in tf32: use fp32, bf16 or fp16$"
    with pytest.raises(ConfigError, match=message):
        default_config(spec, SHAPE, CARDS["gfx950"])


def test_usage_of_amdgcn() -> None:
    metadata = "    .private_segment_fixed_size: {}\n    .vgpr_count:     {}\n    .vgpr_spill_count: 7\n"
    assert usage_of_amdgcn(metadata.format(0, 312)) == (312, 0)
    assert usage_of_amdgcn(metadata.format(376, 64) + metadata.format(0, 512)) == (512, 376)
    with pytest.raises(MachineError, match="no metadata"):
        usage_of_amdgcn(".vgpr_count: 12\n")
