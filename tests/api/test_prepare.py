"""`parallax_gen.prepare`: which kernels it compiles, and what it says of them. One test compiles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_samples import H200, SPEC, evidence, make_record
from fake_card import FakeWorker

import parallax_gen
from parallax_gen import KernelSpec, Shape
from parallax_gen.api.prepare import Prepared
from parallax_gen.errors import ArgumentError, MachineError, UnknownGpuError, UntunedError
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import Tier, default_of
from parallax_gen.memory.result import Outcome
from parallax_gen.memory.store import Store
from parallax_gen.nn import ParallaxAttention
from parallax_gen.ops.base import KernelConfig
from parallax_gen.problem.shapes import bucket_of
from parallax_gen.runtime.dispatch import UntunedWarning, default_dispatcher
from parallax_gen.tuning import compile_ahead as compiling
from parallax_gen.tuning.workers.messages import Compile, KernelInstance, Reply

SHAPE = Shape(30, 32, 8, 1, 8000)
KERNEL = SPEC, SHAPE
PLACE = Place("h200", SPEC, bucket_of(SHAPE))
FORWARD = KernelSpec("forward", 64, "bf16", causal=True), Shape(1, 4, 4, 300, 300)
DEFAULT = default_of(PLACE, H200)


@pytest.fixture
def compiled(fake_h200: None, monkeypatch: pytest.MonkeyPatch) -> list[KernelInstance]:
    """What the simulated workers compiled. Each takes two seconds."""
    instances: list[KernelInstance] = []
    original = FakeWorker.ask

    def ask(worker: FakeWorker, request: Any, timeout_s: float) -> Reply:
        assert isinstance(request, Compile)
        instances.append(request.instance)
        return Reply(**{**vars(original(worker, request, timeout_s)), "seconds": 2.0})

    monkeypatch.setattr(FakeWorker, "ask", ask)
    monkeypatch.setattr("parallax_gen.tuning.tuner.Worker", FakeWorker)
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: None)
    return instances


def prepare(*kernels: Any, gpu: str | None = "h200", **options: Any) -> Prepared:
    return parallax_gen.prepare(kernels=kernels, gpu=gpu, progress=False, **options)


def record_of(gpu: str, config: KernelConfig, time_us: float, **changes: Any) -> Any:
    place = Place(gpu, SPEC, bucket_of(SHAPE))
    return make_record(time_us, place=place, config=config, evidence=evidence(place, config, **changes))


def test_the_kernels_are_compiled_at_the_shapes_of_calls(compiled: list[KernelInstance], store: Store) -> None:
    store.save(record_of("h200", make_record().config, 20.0))
    prepared = prepare(KERNEL, FORWARD)
    assert {(i.spec, i.shape, i.config, i.gpu) for i in compiled} == {
        (*KERNEL, make_record().config, H200),
        (*FORWARD, default_of(Place("h200", FORWARD[0], bucket_of(FORWARD[1])), H200), H200),
    }
    first, second = prepared.kernels
    assert (first.tier, first.checked, first.time_us, first.seconds) == (Tier.MEASURED_HERE, True, 20.0, 2.0)
    assert (second.tier, second.checked, second.time_us, second.problem) == (Tier.DEFAULT, True, None, "")
    assert prepared.tiers == {"measured here": 1, "the default": 1}
    text = repr(prepared)
    assert text.startswith("2 kernels; on h200\n\nkernel   BxH  seqlen")
    assert "configs: 1 measured here, 1 the default" in text
    assert max(map(len, text.splitlines())) <= 80
    assert prepared.to_json()["kernels"][0]["tier"] == "measured here"


def test_a_borrowed_config_is_compiled_with_the_default_that_it_is_checked_against(
    compiled: list[KernelInstance], store: Store
) -> None:
    borrowed = make_record().config
    store.save(record_of("h100", borrowed, 20.0))
    (kernel,) = prepare(KERNEL).kernels
    assert {instance.config for instance in compiled} == {borrowed, DEFAULT}
    assert (kernel.config, kernel.tier, kernel.checked, kernel.seconds) == (borrowed, Tier.SIBLING_CARD, False, 4.0)
    assert "a sibling card*" in repr(prepare(KERNEL))
    assert "*: not checked yet" in repr(prepare(KERNEL))


def test_on_the_card_calls_find_the_kernel_loaded(
    compiled: list[KernelInstance], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: H200)
    dispatcher = default_dispatcher()
    dispatcher.choose_anew()  # of this test's database
    store.save(record_of("h200", make_record().config, 20.0))
    (kernel,) = prepare(KERNEL, gpu=None).kernels
    assert (kernel.tier, kernel.checked) == (Tier.MEASURED_HERE, True)
    assert dispatcher._kernels[PLACE, PLACE.spec][0].config == kernel.config == make_record().config
    dispatcher._untuned_notice._warned = False
    with pytest.warns(UntunedWarning, match="there is no usable measurement"):
        prepare(FORWARD, gpu="h200")
    monkeypatch.setenv("PARALLAX_GEN_STRICT", "1")
    with pytest.raises(UntunedError, match="PARALLAX_GEN_STRICT is on"):
        prepare((KernelSpec("forward", 64, "fp16"), FORWARD[1]), gpu="h200")


def test_a_model(compiled: list[KernelInstance]) -> None:
    layer = ParallaxAttention(512, 8, 2, dtype=torch.bfloat16)
    prepared = parallax_gen.prepare(layer, training={"batch": 2, "seqlen": 1000}, serving=False, gpu="h200", workers=2)
    assert [kernel.spec.op for kernel in prepared.kernels] == ["forward", "preprocess", "dkdv", "dqdr"]
    assert {kernel.shape.seqlen_q for kernel in prepared.kernels} == {1000}
    assert len(compiled) == 4


def test_a_kernel_that_does_not_compile_is_noted(
    compiled: list[KernelInstance], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeWorker, "ask", lambda *_: Reply(Outcome.COMPILE, "ptxas does not like it"))
    prepared = prepare(KERNEL)
    assert prepared.kernels[0].problem == "ptxas does not like it"
    assert " failed " in repr(prepared)
    assert "did not compile: ptxas does not like it" in " ".join(repr(prepared).split())


def test_a_fault_of_the_machine_is_raised(compiled: list[KernelInstance], monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> Reply:
        raise MachineError("the disk is full")

    monkeypatch.setattr(FakeWorker, "ask", ask)
    with pytest.raises(MachineError, match="the disk is full"):
        prepare(KERNEL, FORWARD)


def test_no_more_children_than_kernels(compiled: list[KernelInstance], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    original = compiling.start_compilers
    monkeypatch.setattr(compiling, "start_compilers", lambda n, devices: started.append(n) or original(n, devices))
    prepare(KERNEL, workers=3)
    prepare(KERNEL, FORWARD, workers=1)
    monkeypatch.setattr(compiling, "usable_cpus", lambda: 8)
    prepare(KERNEL, FORWARD)
    assert started == [1, 1, 2]


def test_bad_arguments_are_named(compiled: list[KernelInstance]) -> None:
    with pytest.raises(UnknownGpuError, match="there is no CUDA device here: name a GPU, such as gpu='h200'"):
        prepare(KERNEL, gpu=None)
    with pytest.raises(UnknownGpuError, match="unknown GPU 'h2000'"):
        prepare(KERNEL, gpu="h2000")
    with pytest.raises(ArgumentError, match="model, kernels: got none of them; allowed: one of them"):
        parallax_gen.prepare()
    with pytest.raises(ArgumentError, match=r"workers: got 1.5; allowed: an int of 1 or more"):
        prepare(KERNEL, workers=1.5)
    assert compiled == []


def test_the_progress_is_one_line_without_a_terminal(
    compiled: list[KernelInstance], capsys: pytest.CaptureFixture[str]
) -> None:
    parallax_gen.prepare(kernels=[KERNEL, FORWARD], gpu="h200")
    assert capsys.readouterr() == ("", "compiling 2 kernels\n")


def test_later_calls_find_the_programs_in_tritons_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real compilers: the second time there is nothing left to compile."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    tiny = KernelSpec("decode", 16, "bf16"), Shape(1, 2, 2, 1, 64)
    (kernel,) = prepare(tiny, workers=1).kernels
    assert kernel.problem == ""

    def programs() -> set[str]:
        return {
            os.path.join(folder, name) for folder, _, names in os.walk(tmp_path) for name in names if "cubin" in name
        }

    first = programs()
    assert first
    prepare(tiny, workers=1)
    assert programs() == first
