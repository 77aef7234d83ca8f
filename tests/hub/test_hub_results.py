"""What a hub package computes: with torch and triton alone, and as the `kernels` library loads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_samples import run as run_command
from hub_samples import (
    DECODE,
    DTYPE,
    FORWARD,
    H200,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    OWN_LENGTHS,
    PAGED,
    SPECS,
    import_package,
)
from strategies import STEP, StepCase
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training_steps import run as run_step
from training_steps import why_steps_differ

from parallax_gen.codegen.abi import Inputs, prepare
from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.hub.folder import HubPackage
from parallax_gen.memory.shipped import Memory
from parallax_gen.oracle.inputs import softmax_scale
from parallax_gen.oracle.kvcache import reference_cached_forward
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import choose

pytestmark = pytest.mark.interpreter

BATCH, SEQLEN, PAGE = 1, 21, 16
PROGRAM = Path(__file__).with_name("hub_program.py")


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    """A prompt of SEQLEN tokens, as keys in pages too, and lengths that leave the last keys out."""
    generator = torch.Generator().manual_seed(0)

    def heads(count: int) -> Tensor:
        return torch.randn(BATCH, SEQLEN, count, HEAD_DIM, generator=generator).half()

    made = {name: heads(count) for name, count in zip("qrkv", (HEADS, HEADS, KV_HEADS, KV_HEADS), strict=True)}
    made |= {"do": heads(HEADS), "lengths": torch.tensor([SEQLEN - 7], dtype=torch.int32)}
    pages = -(-SEQLEN // PAGE)
    table = torch.randperm(pages, generator=generator)
    for name in "kv":
        padded = nn.functional.pad(made[name], (0, 0, 0, 0, 0, pages * PAGE - SEQLEN))
        made[f"{name}_pages"] = torch.empty(pages, PAGE, KV_HEADS, HEAD_DIM, dtype=torch.float16)
        made[f"{name}_pages"][table] = padded.view(pages, PAGE, KV_HEADS, HEAD_DIM)
    return made | {"table": table.int()[None]}


@pytest.fixture(scope="module")
def results(
    package: HubPackage, inputs: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """Those of the package, in a process that can import neither parallax_gen nor what it depends on."""
    folder = tmp_path_factory.mktemp("results")
    torch.save(inputs, folder / "inputs.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, PROGRAM, package.build, folder / "inputs.pt", folder / "outputs.pt"],
        cwd=folder,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "outputs.pt")  # type: ignore[no-any-return]


def chosen(spec: KernelSpec, shape: Shape) -> Any:
    """The config that calls of parallax_gen get."""
    return choose(spec, shape, H200, Memory()).config


def decoded(spec: KernelSpec, inputs: dict[str, Tensor]) -> Tensor:
    """The last token's attention by the kernel that calls of parallax_gen launch."""
    seqlen_kv = inputs["table"].shape[1] * PAGE if spec.page_size else SEQLEN
    config = chosen(spec, Shape(BATCH, HEADS, KV_HEADS, 1, seqlen_kv))
    k, v = ("k_pages", "v_pages") if spec.page_size else ("k", "v")
    x = Inputs(*(inputs[name][:, -1:].contiguous() for name in "qr"), inputs[k], inputs[v])
    x.cache_seqlens = inputs["lengths"] if spec.per_sequence_lengths else None
    x.page_table = inputs["table"] if spec.page_size else None
    call = prepare(spec, config, x)
    load(render(spec, config, H200)).launch(*call.arguments(softmax_scale(spec)))
    return call.out


def test_a_training_step_has_the_results_of_our_kernels(inputs: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    shape = Shape(BATCH, HEADS, KV_HEADS, SEQLEN, SEQLEN)
    rows = Shape(BATCH, HEADS, HEADS, SEQLEN, SEQLEN)
    configs = {op: chosen(FORWARD.for_op(op), rows if op == "preprocess" else shape) for op in STEP}
    case = StepCase(replace(FORWARD, stats=True), configs, shape, seed=0)
    x = Inputs(*(inputs[name] for name in "qrkv"), do=inputs["do"], max_seqlen_q=SEQLEN, max_seqlen_k=SEQLEN)
    step = run_step(case, x, H200)
    for name in ("out", "dq", "dr", "dk", "dv"):
        assert torch.equal(results[name], step[name]), name
    statistics = {name: step[name] for name in ("lse", "t_mean", "v_mean")}
    assert why_steps_differ(case, x, {**results, **statistics}) is None


def test_a_forward_without_gradients_has_the_results_of_our_kernel(
    inputs: dict[str, Tensor], results: dict[str, Tensor]
) -> None:
    config = chosen(FORWARD, Shape(BATCH, HEADS, KV_HEADS, SEQLEN, SEQLEN))
    call = prepare(FORWARD, config, Inputs(*(inputs[name] for name in "qrkv")))
    load(render(FORWARD, config, H200)).launch(*call.arguments(softmax_scale(FORWARD)))
    assert torch.equal(results["forward"], call.out)


@pytest.mark.parametrize(("name", "spec"), [("decode", DECODE), ("own lengths", OWN_LENGTHS), ("pages", PAGED)])
def test_decode_has_the_results_of_our_kernel(
    name: str, spec: KernelSpec, inputs: dict[str, Tensor], results: dict[str, Tensor]
) -> None:
    assert torch.equal(results[name], decoded(spec, inputs))
    lengths = inputs["lengths"] if spec.per_sequence_lengths else None
    last = (inputs[x][:, -1:] for x in "qr")
    expected = reference_cached_forward(*last, inputs["k"], inputs["v"], cache_seqlens=lengths).out
    torch.testing.assert_close(results[name].double(), expected, rtol=1e-2, atol=1e-2)  # fp16 output


@pytest.mark.slow
def test_a_call_is_one_operator_for_the_compiler(package: HubPackage, inputs: dict[str, Tensor]) -> None:
    attention = import_package(package.build, "a_compiled_package")
    q, r, k, v = (inputs[name][:, -4:].requires_grad_() for name in "qrkv")
    compiled = torch.compile(attention.parallax_attn_func, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(function(q, r, k, v, causal=True).float().sum(), (q, r, k, v))
        for function in (attention.parallax_attn_func, compiled)
    ]
    assert all(map(torch.equal, *gradients))


def test_operators_are_of_the_builds_namespace(package: HubPackage) -> None:
    attention = import_package(package.build, "a_built_package")
    with FakeTensorMode():
        q, k = torch.empty(2, 1, HEADS, HEAD_DIM).half(), torch.empty(2, SEQLEN, KV_HEADS, HEAD_DIM).half()
        assert attention.parallax_attn_with_kvcache(q, q, k, k).shape == q.shape
    namespace = sys.modules["a_built_package.operators"].NAMESPACE
    assert namespace.startswith("_parallax_attn_cuda_")
    assert hasattr(getattr(torch.ops, namespace), "attention_with_stats")
    unbuilt = import_package(package.folder / "torch-ext" / package.module, "an_unbuilt_package")
    assert sys.modules["an_unbuilt_package.operators"].NAMESPACE == "an_unbuilt_package"
    assert [*map(str, unbuilt.specs())] == [*map(str, attention.specs())] == [*map(str, SPECS)]
    assert unbuilt.cards() == ["h200"]


# -- with the package `kernels`, where it is installed


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("kernels")


def test_the_kernels_library_reads_the_project_and_its_build(kernels: Any, package: HubPackage) -> None:
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    read_project = Build.open
    read_project(package.folder)
    metadata = Metadata.read_from_file(package.build / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, package.build))


@pytest.fixture
def layer_of(kernels: Any, package: HubPackage) -> Callable[[type[nn.Module], str], nn.Module]:
    """Replaces the forward of a layer by the package's."""

    def layer_of(layer: type[nn.Module], name: str) -> nn.Module:
        # The path of the variant: on a machine without CUDA the library accepts none for CUDA in the project's folder.
        repository = kernels.LocalLayerRepository(package.build, layer_name=name)
        decorated = kernels.use_kernel_forward_from_hub(name)(layer)()
        with kernels.use_kernel_mapping({name: {"cpu": repository}}, inherit_mapping=False):
            mode = kernels.Mode.TRAINING if name == "ParallaxAttention" else kernels.Mode.INFERENCE
            options = {"mode": mode | kernels.Mode.TORCH_COMPILE, "device": "cpu", "use_fallback": False}
            kernelized: nn.Module = kernels.kernelize(decorated, **options)
            return kernelized

    return layer_of


class Attention(nn.Module):
    """A model's own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.causal = True
        self.window_size = self.softmax_scale = self.softcap = None

    def forward(self, q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("the hub's forward was not used")


class CachedAttention(Attention):
    def forward(  # type: ignore[override]
        self, q: Tensor, r: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Any = None, page_table: Any = None
    ) -> Tensor:
        raise AssertionError("the hub's forward was not used")


def test_a_model_uses_its_layers(
    layer_of: Callable[[type[nn.Module], str], nn.Module], inputs: dict[str, Tensor], results: dict[str, Tensor]
) -> None:
    q, r, k, v = (inputs[name].clone().requires_grad_() for name in "qrkv")
    out = layer_of(Attention, "ParallaxAttention")(q, r, k, v)
    out.backward(inputs["do"])
    assert torch.equal(out, results["out"])
    assert torch.equal(k.grad, results["dk"])  # type: ignore[arg-type]
    last = (inputs[name][:, -1:].contiguous() for name in "qr")
    layer = layer_of(CachedAttention, "ParallaxAttentionWithKVCache")
    assert torch.equal(layer(*last, inputs["k"], inputs["v"], inputs["lengths"]), results["own lengths"])


# -- a package's own tests


def run_own_tests(package: HubPackage) -> str:
    """The summary of pytest, beside nothing of ours."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(package.folder / "torch-ext"), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(
        command, cwd=package.folder, env=environment, capture_output=True, encoding="utf-8", timeout=500
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_package_of_a_model_passes_its_own_tests(tmp_path: Path) -> None:
    """All kernels of Qwen3-0.6B, by the command."""
    config = {"model_type": "qwen3", "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    config |= {"head_dim": HEAD_DIM, "num_hidden_layers": 28, "hidden_size": 1024, "max_position_embeddings": 40960}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    call = ("--gpu", "h100,h200", "--model", tmp_path, "--dtype", DTYPE, "--hub", tmp_path / "hub")
    done = run_command("export", *call, "--json")
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)
    assert len(written["specs"]) == 10
    package = HubPackage(tmp_path / "hub", "parallax_attn", (), written["kernels"])
    assert run_own_tests(package).startswith("6 passed")
