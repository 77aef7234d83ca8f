"""PARALLAX_GEN_BATCH_INVARIANT: commands describe, tune and lock the kernels that calls get in that mode."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from cli_samples import CALL, H200, PLACE, SPEC, make_record, run, run_json

from parallax_gen.environment import BATCH_INVARIANT
from parallax_gen.memory.calls import add_calls
from parallax_gen.memory.commands import lock_command, tune_command
from parallax_gen.memory.lock import read_lock, write_lock
from parallax_gen.memory.place import Place, place_of
from parallax_gen.memory.ranking import default_of
from parallax_gen.memory.store import Store
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec, batch_invariant_spec

SERVING = ("--gpu", "h200", "--for", "serving", "--heads", "32/8")
SHARED = place_of("h200", batch_invariant_spec(SPEC), PLACE.bucket)
FORWARD = KernelSpec("forward", 128, "bf16", causal=True)
TRAINING = place_of("h200", batch_invariant_spec(FORWARD), Shape(1, 1, 1, 1, 1))


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BATCH_INVARIANT, "On")


def specs_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    kernels = [kernel for step in document["steps"] for kernel in step["kernels"]]
    return [kernel["spec"] for kernel in kernels]


def test_one_kernel(mode: None, tmp_path: Path) -> None:
    path = tmp_path / "kernels.lock"
    run("lock", "-o", path, *CALL)
    assert list(read_lock(path).kernels) == [SHARED]
    run("lock", "-o", path, *CALL, "--no-batch-invariant")
    assert list(read_lock(path).kernels) == [PLACE]
    assert "batch-invariant" in run("explain", *CALL).stdout
    assert "batch-invariant" in run("show", *CALL).stdout
    assert run_json("render", *CALL)["spec"]["batch_invariant"]
    (file,) = run_json("export", *CALL, "-o", tmp_path / "kernels")["kernels"]
    assert "batch_invariant" in file["file"]


def test_a_model(mode: None, tmp_path: Path) -> None:
    path = tmp_path / "kernels.lock"
    specs = specs_of(run_json("explain", *SERVING))
    assert specs
    assert all(spec.get("batch_invariant") for spec in specs)
    assert run("lock", "-o", path, *SERVING).exit_code == 0
    decode = [place.spec for place in read_lock(path).kernels if place.spec.public_op == "decode"]
    assert decode
    assert all(spec.batch_invariant for spec in decode)


def test_a_value_that_is_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for value in ("0", "Off", ""):
        monkeypatch.setenv(BATCH_INVARIANT, value)
        assert not any(spec.get("batch_invariant") for spec in specs_of(run_json("explain", *SERVING)))
    assert "batch-invariant" in run("explain", *CALL, "--batch-invariant").stdout


@pytest.mark.parametrize("value", ["t", "y", "2", " 1", "maybe"])
def test_a_value_that_calls_would_refuse(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BATCH_INVARIANT, value)
    result = run("explain", *CALL)
    assert result.exit_code != 0
    assert result.stderr.startswith(f"error: {BATCH_INVARIANT}: got {value!r}; allowed: 1, true, yes, on for on")


def test_tune(mode: None, fake_h200: None, store: Store, tmp_path: Path) -> None:
    quick = ("--trials", "2", "--workers", "1")
    assert run("tune", *CALL[2:], *quick).exit_code == 0
    assert {result.place for result in store.all()} == {SHARED}
    calls = tmp_path / "calls.jsonl"
    add_calls(calls, {(PLACE.spec, PLACE.bucket): 1})  # they say themselves what they are
    assert run("tune", "--calls", calls, *quick).exit_code == 0
    assert {result.place for result in store.all()} == {SHARED, PLACE}
    jobs = json.loads(run("tune", "--refresh", "--workers", "1", "--json").stdout)["jobs"]
    assert len(jobs) == 2  # all that is known, in whatever mode


def test_lists_of_what_is_known(mode: None, store: Store, tmp_path: Path) -> None:
    """The mode leaves out nothing that was measured, and `--all` writes what calls get in it."""
    store.save(make_record())
    store.save(make_record(place=SHARED))
    assert len(run_json("list", "--all")["records"]) == 2
    assert len(run_json("list", "--all", "--batch-invariant")["records"]) == 1
    call = ("export", "--gpu", "h200", "--op", "decode")
    shape = ("--head-dim", f"{SPEC.head_dim}", "--dtype", SPEC.dtype, "--all", "-o", tmp_path / "kernels")
    (file,) = run_json(*call, *shape)["kernels"]
    assert "batch_invariant" in file["file"]


def test_all_training_kernels_of_the_shared_place(mode: None, store: Store, tmp_path: Path) -> None:
    other = Place("h200", TRAINING.spec, Bucket(8, 1024, 1024))
    for place in (TRAINING, other):
        store.save(make_record(place=place, config=default_of(place, H200)))
    call = ("export", "--gpu", "h200", "--op", "training", "--all", "-o", tmp_path / "kernels")
    (file,) = run_json(*call)["kernels"]
    assert "rows64" in file["file"]


def test_bench_does_not_add_its_baseline(mode: None) -> None:
    assert BATCH_INVARIANT not in run("bench", "--help").stdout
    assert BATCH_INVARIANT in run("lock", "--help").stdout


@pytest.mark.parametrize("place", [PLACE, SHARED, TRAINING, Place("h200", FORWARD, Bucket(8, 1024, 1024))])
def test_the_command_of_an_error_locks_its_place(mode: None, tmp_path: Path, place: Place) -> None:
    """Also that of a call which says itself that it is not batch-invariant."""
    path = tmp_path / "kernels.lock"
    write_lock(path, [])
    assert run(*shlex.split(lock_command(place, path))[1:]).exit_code == 0
    assert list(read_lock(path).kernels) == [place]
    assert ("--no-batch-invariant" in tune_command(place)) == (place not in (SHARED, TRAINING))
