"""Baselines whose packages are not installed, faked by their definitions in their layouts and conventions."""

from __future__ import annotations

import math
import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax_gen.bench.baselines import BASELINES, baselines_of, parallax_kernel
from parallax_gen.bench.baselines.base import CALLS_PER_CONFIG, autotuning_with_few_calls
from parallax_gen.bench.baselines.flash_attn import FLASH
from parallax_gen.bench.oracle_check import random_inputs_for_case
from parallax_gen.cli.bench import bench
from parallax_gen.codegen.abi import Inputs
from parallax_gen.oracle.inputs import attend
from parallax_gen.oracle.reference import reference_forward
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.problem.workloads import TRAINING

CAUSAL = KernelSpec("forward", 64, "fp16", group=2, causal=True)
WINDOWED = KernelSpec("forward", 64, "fp16", group=2, causal=True, window=True)
FULL = KernelSpec("forward", 64, "fp16", group=2)
CAPPED = KernelSpec("forward", 64, "fp16", group=2, causal=True, softcap=True)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_size: tuple[int | None, int | None],
    lengths: list[int],
    softcap: float,
) -> Tensor:
    """As flash-attn documents it: query i, counted from the end of the keys, sees i - left to i + right.

    softcap  0 for none
    """
    group, (left, right) = q.shape[2] // k.shape[2], window_size
    result = torch.zeros(q.shape, dtype=torch.float64)
    for b, length in enumerate(lengths):
        keys, values = (x[b, :length].double().repeat_interleave(group, dim=1) for x in (k, v))
        s = torch.einsum("qhd,khd->hqk", q[b].double(), keys) / math.sqrt(q.shape[-1])
        s = softcap * torch.tanh(s / softcap) if softcap else s
        i = torch.arange(q.shape[1])[:, None] + length - q.shape[1]
        j = torch.arange(length)
        hidden = (j > i) if causal else torch.zeros_like(i + j, dtype=torch.bool)
        if left not in (None, -1):
            hidden = hidden | (j < i - left)
        if right not in (None, -1):
            hidden = hidden | (j > i + right)
        p = s.masked_fill(hidden, -math.inf).softmax(-1)
        result[b] = torch.einsum("hqk,khd->qhd", p, values)
    return result.to(q.dtype)


def flash_module(name: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Install a fake of one of the three packages; returns the keyword arguments of the calls to its functions."""
    of, module, calls = FLASH[name], ModuleType(FLASH[name].module), []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **options: Any) -> Any:
        calls.append(options)
        if options.get("num_splits") == 0 and module.__dict__.get("no_splits"):
            raise AssertionError("SplitKV not supported")
        window = options.get("window_size", (of.no_window, of.no_window))
        out = flash_attention(q, k, v, causal, window, [k.shape[1]] * len(q), options.get("softcap", 0.0))
        return (out, None) if name == "flash-attn 4" else out

    def flash_attn_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float = 0.0,
        **pages: Tensor | None,
    ) -> Tensor:
        calls.append(pages)
        lengths = [k_cache.shape[1]] * len(q) if cache_seqlens is None else cache_seqlens.tolist()
        return flash_attention(q, k_cache, v_cache, causal, window_size, lengths, softcap)

    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    if of.page_table_name:
        module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, of.module, module)
    return calls


def prepared(name: str, op: str, spec: KernelSpec, x: Inputs) -> Any:
    return BASELINES[name].prepare(op, spec, x)


def close(result: Tensor, expected: Tensor) -> bool:
    """Equal up to fp16 rounding, for values around 1."""
    return torch.allclose(result.double(), expected, atol=2e-3, rtol=2e-3)


# flash-attn


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (CAUSAL, Shape(2, 4, 2, 40, 40)),
        (CAUSAL, Shape(2, 4, 2, 10, 40)),
        (WINDOWED, Shape(2, 4, 2, 40, 40, 9)),
        (FULL, Shape(2, 4, 2, 10, 40)),
        (CAPPED, Shape(2, 4, 2, 40, 40)),
    ],
    ids=["causal", "chunk", "window", "full", "softcap"],
)
def test_flash_attention_is_softmax_under_our_mask(
    name: str, spec: KernelSpec, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_module(name, monkeypatch)
    x = random_inputs_for_case("forward", spec, shape, "cpu")
    assert close(prepared(name, "forward", spec, x).results()["out"], attend(spec, x).v_mean)


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_module(name, monkeypatch)
    spec = CAUSAL.for_op("forward")
    x = random_inputs_for_case(TRAINING, spec, Shape(1, 4, 2, 24, 24), "cpu")
    result = prepared(name, TRAINING, spec, x).results()
    q, k, v = (t.double().requires_grad_() for t in (x.q, x.k, x.v))
    out = reference_forward(q, torch.zeros_like(q), k, v, causal=True).out
    assert x.do is not None
    expected = torch.autograd.grad(out, (q, k, v), x.do.double())
    assert close(result["out"], out)
    for grad, reference in zip((result["dq"], result["dk"], result["dv"]), expected, strict=True):
        assert torch.allclose(grad.double(), reference, atol=1e-2, rtol=1e-2)  # do and p in fp16


def test_ours_and_flash_attention_alone_cap_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name for name, baseline in BASELINES.items() if baseline.softcap} == {
        "parallax_gen",
        "batch-invariant",
        *FLASH,
    }
    x = random_inputs_for_case("forward", CAPPED, Shape(1, 4, 2, 24, 24), "cpu")
    with pytest.raises(NotImplementedError, match="no softcap"):
        prepared("fla", "forward", CAPPED, x)
    assert close(prepared("parallax_gen", "forward", CAPPED, x).results()["out"], attend(CAPPED, x).out)
    decode = KernelSpec("decode", 64, "fp16", group=2, softcap=True)
    x = random_inputs_for_case("decode", decode, Shape(3, 4, 2, 1, 50), "cpu")
    assert close(prepared("parallax_gen", "decode", decode, x).results()["out"], attend(decode, x).out)
    for name in FLASH:
        flash_module(name, monkeypatch)
        assert close(prepared(name, "decode", decode, x).results()["out"], attend(decode, x).v_mean)


@pytest.mark.parametrize("name", ["flash-attn 2", "flash-attn 3"])
def test_flash_attention_decodes_with_lengths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = flash_module(name, monkeypatch)
    spec = KernelSpec("decode_varlen", 64, "fp16", group=2)
    x = random_inputs_for_case("decode", spec, Shape(3, 4, 2, 1, 50), "cpu")
    x.cache_seqlens = torch.tensor([50, 7, 20], dtype=torch.int32)
    assert close(prepared(name, "decode", spec, x).results()["out"], attend(spec, x).v_mean)
    assert calls == [{}]
    x.page_table = torch.zeros(3, 4, dtype=torch.int32)
    prepared(name, "decode", spec, x).results()
    assert list(calls[1]) == [FLASH[name].page_table_name]


@pytest.mark.parametrize("splits", [True, False])
def test_flash_attention_4_decodes_split_where_it_can(splits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = flash_module("flash-attn 4", monkeypatch)
    sys.modules["flash_attn.cute"].no_splits = not splits  # type: ignore[attr-defined]
    spec = KernelSpec("decode", 64, "fp16", group=2)
    x = random_inputs_for_case("decode", spec, Shape(3, 4, 2, 1, 50), "cpu")
    single = prepared("flash-attn 4", "decode", spec, x)
    calls.clear()
    assert close(single.results()["out"], attend(spec, x).v_mean)
    assert calls == [{"num_splits": 0} if splits else {}]


def test_unsupported_flash_attention_cases_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(1, 4, 2, 24, 24)
    for name in FLASH:
        monkeypatch.setitem(sys.modules, FLASH[name].module, ModuleType("empty"))  # as a namespace package
        x = random_inputs_for_case("forward", CAUSAL, shape, "cpu")
        with pytest.raises(ImportError, match="has no flash_attn_func"):
            prepared(name, "forward", CAUSAL, x)
        flash_module(name, monkeypatch)
        for spec in (
            KernelSpec("forward", 64, "fp32", group=2, causal=True),
            KernelSpec("forward", 64, "fp16", group=2, causal=True, varlen=True),
        ):
            with pytest.raises(NotImplementedError):
                prepared(name, "forward", spec, random_inputs_for_case("forward", spec, shape, "cpu"))
    decode = KernelSpec("decode_varlen", 64, "fp16", group=2, cache_dtype="e4m3")
    for name in FLASH:
        with pytest.raises(NotImplementedError):
            prepared(name, "decode", decode, random_inputs_for_case("decode", decode, Shape(1, 4, 2, 1, 24), "cpu"))


# parallax-kernel's Helion kernels


@pytest.fixture
def _helion(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake package. Layout: (batch, heads, seqlen, head_dim); for decode the same as ours."""

    def parallax_func(
        q: Tensor, r: Tensor, k: Tensor, v: Tensor, qk_scale: float | None = None, window_size_left: int = -1
    ) -> Tensor:
        assert all(x.is_contiguous() for x in (q, r, k, v))
        window = None if window_size_left == -1 else window_size_left
        inputs = (x.transpose(1, 2) for x in (q, r, k, v))
        return reference_forward(*inputs, causal=True, window_size=window).out.to(q.dtype).transpose(1, 2)

    module = ModuleType("parallax.helion")
    module.parallax_func = parallax_func  # type: ignore[attr-defined]
    module.parallax_fwd = lambda *x, **options: (parallax_func(*x, **options),)  # type: ignore[attr-defined]
    module.parallax_decode = lambda *x: reference_forward(*x).out.to(x[0].dtype)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "parallax.helion", module)
    monkeypatch.setenv(parallax_kernel.HELION_EFFORT, "quick")


@pytest.mark.usefixtures("_helion")
@pytest.mark.parametrize(("spec", "window"), [(CAUSAL, 0), (WINDOWED, 9)])
def test_helion_kernels_of_parallax_kernel(spec: KernelSpec, window: int) -> None:
    from parallax_gen.bench.oracle_check import OracleCheck

    shape = Shape(2, 4, 2, 40, 40, window)
    for op in ("forward", TRAINING):
        x = random_inputs_for_case(op, spec, shape, "cpu")
        errors = OracleCheck(op, spec, shape, x, "whole").errors(
            prepared("parallax-kernel Helion", op, spec, x).results()
        )
        assert len(errors) == (1 if op == "forward" else 5)
        assert max(errors.values()) < 1.25e-3  # what rounding to fp16 explains
    decode = KernelSpec("decode", 64, "fp16", group=2)
    x = random_inputs_for_case("decode", decode, Shape(2, 4, 2, 1, 40), "cpu")
    assert close(prepared("parallax-kernel Helion", "decode", decode, x).results()["out"], attend(decode, x).out)


@pytest.mark.usefixtures("_helion")
def test_notes_say_how_helion_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BASELINES["parallax-kernel Helion"].package().endswith("HELION_AUTOTUNE_EFFORT=quick")
    monkeypatch.delenv(parallax_kernel.HELION_EFFORT)
    assert BASELINES["parallax-kernel Helion"].package().endswith("HELION_AUTOTUNE_EFFORT=none")
    parallax_kernel.import_helion()
    assert os.environ[parallax_kernel.HELION_EFFORT] == "none"


# the list of baselines


def test_names_and_parts_of_baselines() -> None:
    names = ["SDPA flash", "SDPA cuDNN", "flash-attn 2", "flash-attn 3", "flash-attn 4"]
    assert [name for name, baseline in BASELINES.items() if baseline.softmax] == names
    assert list(BASELINES) == [
        "parallax_gen",
        "batch-invariant",
        *names,
        "parallax-kernel CuTeDSL",
        "parallax-kernel Triton",
        "parallax-kernel Helion",
        "fla",
    ]  # the names in CSV files of earlier releases
    assert [baseline.name for baseline in baselines_of("decode")] == list(BASELINES)
    for op in ("forward", TRAINING):
        assert {baseline.name for baseline in baselines_of(op)} == set(BASELINES) - {"parallax-kernel CuTeDSL"}


def test_the_help_of_bench_names_every_baseline() -> None:
    """The help spells them out because it must not import them."""
    listed = " ".join((bench.help or "").partition(" Baselines\n")[2].partition("\b")[0].split())
    assert set(listed.split(", ")) == set(BASELINES)


def test_packages_are_listed_with_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    versions = {"parallax-kernel": "0.1.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    packages = {name: baseline.package() for name, baseline in BASELINES.items()}
    assert packages["parallax-kernel CuTeDSL"] == "parallax-kernel 0.1.1"
    assert packages["fla"] == ""
    versions["nvidia-cutlass-dsl"] = "4.1.0"
    packages = {name: baseline.package() for name, baseline in BASELINES.items()}
    assert packages["parallax-kernel CuTeDSL"] == "parallax-kernel 0.1.1, nvidia-cutlass-dsl 4.1.0"


# quick autotuning


def test_autotuners_use_few_calls_within_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.autotuner import Autotuner

    class Event:
        def __init__(self, **_: object) -> None: ...

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, _: object) -> float:
            return 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    tuner, calls = Autotuner.__new__(Autotuner), []
    tuner._do_bench = careful = lambda *_, **__: [1.0]
    with autotuning_with_few_calls():
        assert tuner.do_bench(lambda: calls.append(1), quantiles=(0.5, 0.2, 0.8)) == [0.5] * 3
    assert len(calls) == 1 + CALLS_PER_CONFIG
    assert tuner.do_bench is careful
