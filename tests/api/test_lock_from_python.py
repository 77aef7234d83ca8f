"""`parallax_gen.lock`, and `prepare` under a lock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_samples import H200, SPEC, config, evidence, make_record

import parallax_gen
from parallax_gen import KernelSpec, Shape
from parallax_gen.errors import ArgumentError, LockError, UnknownGpuError
from parallax_gen.memory.calls import add_calls
from parallax_gen.memory.lock import LockedKernel, read_lock
from parallax_gen.memory.place import Place
from parallax_gen.memory.store import Store
from parallax_gen.nn import ParallaxAttention
from parallax_gen.problem.shapes import bucket_of

SHAPE = Shape(30, 32, 8, 1, 8000)
PLACE = Place("h200", SPEC, bucket_of(SHAPE))
CHEAP = KernelSpec("forward", 64, "bf16", causal=True), Shape(1, 4, 4, 300, 300)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "kernels.lock"
    parallax_gen.use_lock(None)


def test_kernels_are_locked_and_used(path: Path, store: Store) -> None:
    store.save(make_record(place=PLACE))
    lock = parallax_gen.lock(path, kernels=(SPEC, SHAPE), gpu="h200")
    assert lock.kernels == read_lock(path).kernels == {PLACE: LockedKernel.here(PLACE, config(2), H200)}
    store.save(make_record(1.0, splits=4, place=PLACE))
    assert parallax_gen.use_lock(path) == lock
    assert parallax_gen.lock(path, kernels=CHEAP, gpu="h200", add=True).kernels.keys() > {PLACE}


def test_a_model_is_locked(path: Path) -> None:
    layer = ParallaxAttention(512, 8, 2, dtype=torch.bfloat16)
    lock = parallax_gen.lock(path, layer, training={"batch": 2, "seqlen": 1024}, serving=False, gpu="h200")
    assert {place.spec.op for place in lock.kernels} == {"forward", "preprocess", "dkdv", "dqdr"}


def test_all_recorded_calls_are_locked(path: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls.jsonl"
    add_calls(calls, {(SPEC, bucket_of(SHAPE)): 1_000_000, (CHEAP[0], bucket_of(CHEAP[1])): 1})
    assert len(parallax_gen.lock(path, calls=calls, gpu="h200").kernels) == 2


def test_what_could_not_be_checked_is_told(path: Path, store: Store) -> None:
    store.save(make_record(place=PLACE, evidence=evidence(PLACE, config(2), triton="3.4.1")))
    with pytest.warns(UserWarning, match="1 borrowed kernel was locked without a check"):
        parallax_gen.lock(path, kernels=(SPEC, SHAPE), gpu="h200")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ArgumentError, "model, kernels, calls: got none of them"),
        ({"calls": "calls.jsonl", "tp": 2}, ArgumentError, "tp: got 2"),
        ({"kernels": CHEAP}, UnknownGpuError, "there is no CUDA device here: name a GPU"),
        ({"kernels": CHEAP, "gpu": "h300"}, UnknownGpuError, "h300"),
    ],
)
def test_bad_arguments_write_nothing(path: Path, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parallax_gen.lock(path, **arguments)
    assert not path.exists()


def test_prepare_compiles_what_is_locked(path: Path, store: Store, fake_h200: None, monkeypatch: Any) -> None:
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: None)
    store.save(make_record(place=PLACE))
    parallax_gen.lock(path, kernels=(SPEC, SHAPE), gpu="h200")
    store.save(make_record(1.0, splits=4, place=PLACE))
    parallax_gen.use_lock(path)
    prepared = parallax_gen.prepare(kernels=(SPEC, SHAPE), gpu="h200", progress=False)
    (kernel,) = prepared.kernels
    assert (kernel.config, kernel.locked, kernel.checked) == (config(2), True, True)
    assert prepared.to_json()["kernels"][0]["tier"] == "the lock"
    assert "configs: 1 the lock" in repr(prepared)
    with pytest.raises(LockError, match="does not have forward"):
        parallax_gen.prepare(kernels=CHEAP, gpu="h200", progress=False)
