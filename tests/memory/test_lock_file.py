"""Locks as files: what is written can be read and compared, and no other line is accepted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from parallax_gen.codegen.fingerprint import below_header
from parallax_gen.codegen.render import KernelSource, render
from parallax_gen.errors import ArgumentError, LockError, StoreError
from parallax_gen.memory.commands import lock_command
from parallax_gen.memory.lock import Lock, LockedKernel, lock_of_environment, lock_text, read_lock, write_lock
from parallax_gen.memory.place import Place, kernels_of, place_of
from parallax_gen.memory.ranking import Tier, default_of
from parallax_gen.memory.shipped import load_shipped
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.problem.hardware import Gpu, gpu_by_name
from parallax_gen.problem.shapes import Bucket, Shape
from parallax_gen.problem.spec import KernelSpec

GPU = gpu_by_name("h200")
PLACE = Place("h200", KernelSpec("decode", 128, "bf16", group=4), Bucket(16, 1, 4096))
OTHER = replace(PLACE, bucket=Bucket(16, 1, 8192))
CONFIG = DecodeConfig(BLOCK_N=64, BLOCK_H=8, NUM_SPLITS=24, merge="kernel", num_warps=2, num_stages=3)
LOCKED = LockedKernel.here(PLACE, CONFIG, GPU)
SHARED = Shape(8, 32, 8, 256, 256)  # batch-invariant calls of all sizes share a place
STEP = KernelSpec("forward", 128, "bf16", group=4, causal=True, stats=True, batch_invariant=True)
ONE_QUERY = KernelSpec("decode_varlen", 128, "bf16", group=4, batch_invariant=True)
CHUNK = replace(ONE_QUERY, causal=True, multi_token=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kernels.lock"


def written(path: Path, *kernels: LockedKernel, missing: str = "error") -> Lock:
    write_lock(path, kernels)
    return read_lock(path, missing)


def lines_with(path: Path, **changes: Any) -> None:
    """A lock of one line, with other fields."""
    write_lock(path, [])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(LOCKED.to_dict() | changes) + "\n")


def test_a_lock_is_read_as_it_was_written(path: Path) -> None:
    places = [Place("h200", r.place.spec, r.place.bucket) for r in load_shipped("h200")[::150]]
    kernels = {place: LockedKernel.here(place, default_of(place, GPU), GPU) for place in places}
    assert len({place.spec.op for place in places}) > 3
    assert written(path, *kernels.values()).kernels == kernels


def test_a_lock_can_be_reviewed(path: Path) -> None:
    """A header and a line a place, in the order of places, whatever the order it was written in."""
    other = LockedKernel.here(OTHER, CONFIG, GPU)
    first = written(path, LOCKED, other)
    text = path.read_text(encoding="utf-8")
    header, *lines = map(json.loads, text.splitlines())
    assert header["lock"] == 1
    assert [line["place"]["bucket.seqlen_kv"] for line in lines] == [4096, 8192]
    assert lines[0]["config"]["NUM_SPLITS"] == 24
    assert lines[0]["kernel"] == render(PLACE.spec, CONFIG, GPU).kernel
    assert Toolchain(lines[0]["triton"], lines[0]["cuda"]) == Toolchain.here()
    second = written(path, other, LOCKED)
    assert path.read_text(encoding="utf-8") == text
    assert first.identity == second.identity


@pytest.mark.parametrize(
    "changed",
    [{"kernel": "0" * 32}, {"toolchain": Toolchain("3.1.0", "12.4")}, {"config": replace(CONFIG, num_warps=4)}],
)
def test_another_lock_has_another_identity(path: Path, changed: dict[str, Any]) -> None:
    lock = written(path, LOCKED)
    assert written(path, replace(LOCKED, **changed)).identity != lock.identity
    assert written(path, LOCKED, missing="default").identity != lock.identity


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kernel": ""}, "kernel: got an empty text"),
        ({"kernel": "../../etc/passwd"}, "kernel: got '../../etc/passwd'"),
        ({"kernel": 3}, "kernel: got 3"),
        ({"triton": "3.9\n"}, "triton: got"),
        ({"cuda": None}, "cuda: got None"),
        ({"config": []}, "config: got []"),
        ({"config": {"BLOCK_N": "__import__('os')"}}, ""),
        ({"config": CONFIG.__dict__ | {"num_warps": [4]}}, "config's 'num_warps': got [4]"),
        ({"place": {}}, "gpu: got None"),
        ({"place": PLACE.flat() | {"gpu": "../h200"}}, "gpu: got '../h200'"),
        ({"place": PLACE.flat() | {"spec.op": "exec"}}, "op: got 'exec'"),
        ({"place": PLACE.flat() | {"bucket.seqlen_kv": 4097}}, "seqlen_kv: got 4097"),
        ({"place": PLACE.flat() | {"bucket.window": 512}}, "bucket: got"),
        ({"more": 1}, "line: got"),
    ],
)
def test_a_bad_line_is_one_error_with_its_number(path: Path, changes: dict[str, Any], reason: str) -> None:
    lines_with(path, **changes)
    with pytest.raises(StoreError) as error:
        read_lock(path)
    assert str(error.value).startswith(f"{path}, line 2: not a locked kernel: {reason}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 1: not the header of a lock"),
        ("{}", "line 1: not the header of a lock: line: got {}"),
        ('{"lock": 2, "parallax_gen": "9.0"}', "line 1: not the header of a lock: lock: got 2; allowed: 1"),
        ('{"lock": true, "parallax_gen": "9.0"}', "line 1: not the header of a lock: lock: got True"),
        ('{"lock": 1, "parallax_gen": 9}', "line 1: not the header of a lock: parallax_gen: got 9"),
        ("[" * 100_000, "line 1: not the header of a lock"),
        ("\udcff", "line 1: not the header of a lock"),
        ('{"lock": 1, "parallax_gen": "0.1.0"}\n\n{', "line 3: not a locked kernel"),
    ],
)
def test_another_file_is_one_error(path: Path, text: str, reason: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StoreError) as error:
        read_lock(path)
    assert str(error.value).startswith(f"{path}, {reason}")


@pytest.mark.parametrize(
    ("spec", "bucket", "refused"),
    [
        (replace(ONE_QUERY, page_size=16), {}, {"spec.page_size": 16}),
        (replace(ONE_QUERY, leftpad=True), {}, {"spec.leftpad": True}),
        (replace(ONE_QUERY, stats=True), {}, {"spec.stats": True}),
        (replace(CHUNK, varlen=True), {}, {"spec.varlen": True}),
        (ONE_QUERY, {"kv_rows": 8}, {"bucket.kv_rows": 8}),
        (ONE_QUERY, {"seqlen_kv": 8192}, {"bucket.seqlen_kv": 8192}),
        (STEP, {}, {"spec.batch_invariant": True}),
    ],
)
def test_a_place_that_no_call_looks_up_is_refused(
    path: Path, spec: KernelSpec, bucket: dict[str, int], refused: dict[str, Any]
) -> None:
    """Batch-invariant calls look up the place that they share."""
    shared = place_of("h200", spec, SHARED)
    config = default_of(shared, GPU)
    place = Place("h200", spec, replace(shared.bucket, **bucket))
    write_lock(path, [replace(LOCKED, place=place, config=config)])
    with pytest.raises(StoreError) as error:
        read_lock(path)
    assert str(error.value).startswith(f"{path}, line 2: not a locked kernel: place: got {refused}; allowed: the place")
    assert list(written(path, replace(LOCKED, place=shared, config=config)).kernels) == [shared]


def test_a_place_may_occur_once(path: Path) -> None:
    write_lock(path, [LOCKED, LOCKED])
    with pytest.raises(StoreError, match=r"line 3: not a locked kernel: place: got .*; allowed: each place once"):
        read_lock(path)


def test_a_file_that_cannot_be_used_is_named(path: Path) -> None:
    with pytest.raises(StoreError, match=f"cannot read the lock {path}"):
        read_lock(path)
    path.mkdir()
    with pytest.raises(StoreError, match=f"cannot write the lock {path}"):
        write_lock(path, [])


def test_a_locked_kernel_is_the_candidate(path: Path) -> None:
    candidate = written(path, LOCKED).candidate(PLACE, GPU)
    assert (candidate.config, candidate.locked, candidate.record, candidate.source) == (CONFIG, True, None, "the lock")


def message_of(lock: Lock, place: Place) -> str:
    with pytest.raises(LockError) as error:
        lock.candidate(place, GPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_place_is_an_error_with_the_command(path: Path) -> None:
    message = message_of(written(path, LOCKED), OTHER)
    assert message.startswith(f"{path} does not have {OTHER.spec}; {OTHER.bucket} on h200: run `parallax-gen lock")
    assert f"`{lock_command(OTHER, path)}`" in message


def test_a_missing_place_may_get_its_default(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = written(path, LOCKED, missing="default")
    candidate = lock.candidate(OTHER, GPU)
    assert (candidate.config, candidate.locked, candidate.tier) == (default_of(OTHER, GPU), False, Tier.DEFAULT)
    monkeypatch.setenv("PARALLAX_GEN_STRICT", "1")
    assert "PARALLAX_GEN_STRICT is on" in message_of(lock, OTHER)
    assert lock.candidate(PLACE, GPU).locked


def test_a_kernel_that_is_not_rendered_any_more_is_an_error(path: Path) -> None:
    message = message_of(written(path, replace(LOCKED, kernel="0" * 32)), PLACE)
    assert f"as kernel {'0' * 12}, but its config now renders kernel {LOCKED.kernel[:12]}" in message
    assert message.startswith(f"{path} has {PLACE.spec}; {PLACE.bucket} on h200 as kernel")
    assert f"run `{lock_command(PLACE, path)}`" in message


@pytest.mark.parametrize("changed", ["", "page_size", "leftpad", "stats"])
def test_a_batch_invariant_place_is_locked_in_all_layouts(
    path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """A change of the kernel that reads pages, say, changes bits that the lock promises."""
    spec = replace(PLACE.spec, op="decode_varlen", batch_invariant=True)
    place = place_of("h200", spec, PLACE.bucket)
    lock = written(path, LockedKernel.here(place, CONFIG, GPU))
    assert lock.candidate(place, GPU).locked

    def render_another(spec: KernelSpec, config: DecodeConfig, gpu: Gpu) -> KernelSource:
        source = render(spec, config, gpu)
        is_changed = getattr(spec, changed) if changed else spec == place.spec
        return replace(source, kernel="0" * 32) if is_changed else source

    monkeypatch.setattr("parallax_gen.memory.lock.render", render_another)
    assert "its config now renders kernel" in message_of(lock, place)


@pytest.mark.parametrize(
    ("spec", "is_changed"),
    [
        (STEP, lambda spec, _: spec.varlen),
        (STEP, lambda spec, _: not spec.stats),
        (STEP, lambda spec, _: spec.varlen and not spec.stats),
        (STEP, lambda spec, config: not spec.varlen and config.LOADS == "pointers"),
        (STEP, lambda spec, config: not spec.varlen and not spec.stats and config.LOADS == "pointers"),
        (STEP.for_op("preprocess"), lambda spec, _: spec.varlen),
        (STEP.for_op("dkdv"), lambda spec, _: spec.varlen),
        (STEP.for_op("dqdr"), lambda spec, _: spec.varlen),
        (ONE_QUERY, lambda spec, _: spec.page_size == 1),
        (ONE_QUERY, lambda spec, config: 1 < spec.page_size < config.BLOCK_N),
        (ONE_QUERY, lambda spec, config: spec.page_size >= config.BLOCK_N),
        (ONE_QUERY, lambda spec, _: spec.page_size and spec.leftpad),
        (ONE_QUERY, lambda spec, config: spec.page_size >= config.BLOCK_N and spec.stats),
        (ONE_QUERY, lambda spec, _: spec.page_size and spec.leftpad and spec.stats),
        (CHUNK, lambda spec, _: spec.varlen and spec.stats),
        (CHUNK, lambda spec, _: spec.varlen and spec.page_size and spec.leftpad and spec.stats),
    ],
)
def test_a_changed_kernel_of_batch_invariant_calls_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, spec: KernelSpec, is_changed: Callable[[KernelSpec, Any], bool]
) -> None:
    """Each of the kernels that they may launch, also those of a combination of layouts."""
    place = place_of("h200", spec, SHARED)
    lock = written(path, LockedKernel.here(place, default_of(place, GPU), GPU))

    def render_another(spec: KernelSpec, config: KernelConfig, gpu: Gpu) -> KernelSource:
        source = render(spec, config, gpu)
        return replace(source, kernel="0" * 32) if is_changed(spec, config) else source

    assert lock.candidate(place, GPU).locked
    monkeypatch.setattr("parallax_gen.memory.lock.render", render_another)
    assert "its config now renders kernel" in message_of(lock, place)


def test_a_changed_kernel_for_unaligned_tensors_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without batch_invariant: a config that loads by descriptors has two kernels."""
    place = Place("h200", replace(STEP, batch_invariant=False), Bucket(8, 1024, 1024))
    config = default_of(place, GPU)
    assert config.LOADS == "descriptors"  # type: ignore[attr-defined]
    lock = written(path, LockedKernel.here(place, config, GPU))

    def render_another(spec: KernelSpec, config: Any, gpu: Gpu) -> KernelSource:
        source = render(spec, config, gpu)
        return replace(source, kernel="0" * 32) if config.LOADS == "pointers" else source

    monkeypatch.setattr("parallax_gen.memory.lock.render", render_another)
    assert "its config now renders kernel" in message_of(lock, place)


@pytest.mark.parametrize(("spec", "block"), [(ONE_QUERY, 32), (ONE_QUERY, 128), (CHUNK, 64)])
@pytest.mark.parametrize("window", [False, True])
def test_every_line_of_every_layout_is_locked(spec: KernelSpec, block: int, window: bool) -> None:
    """Of pages of all sizes: only numbers differ from the kernels that are locked."""
    spec = replace(spec, causal=spec.causal or window, window=window)
    place = place_of("h200", spec, replace(SHARED, window=100 * window))
    config: Any = replace(default_of(place, GPU), BLOCK_N=block)
    locked = {line for there, one in kernels_of(place, config) for line in masked_lines(there, one)}
    for page_size, leftpad, stats, varlen in product((3, 8, 16, 64, 256), *[(False, True)] * 3):
        if spec.multi_token or not varlen:
            there = replace(spec, page_size=page_size, leftpad=leftpad, stats=stats, varlen=varlen)
            assert masked_lines(there, config) <= locked


def masked_lines(spec: KernelSpec, config: KernelConfig) -> set[str]:
    """The lines of a kernel's text below its header, with N for every number."""
    text = below_header(render(spec, config, GPU).text)
    return set(re.sub(r"\b\d+\b", "N", text).splitlines())


def test_a_config_that_is_not_valid_any_more_is_an_error(path: Path) -> None:
    message = message_of(written(path, replace(LOCKED, config=replace(CONFIG, NUM_SPLITS=1))), PLACE)
    assert "with a config that is not valid any more" in message
    assert f"run `{lock_command(PLACE, path)}`" in message


@pytest.mark.parametrize("change", [{"triton": "3.1.0"}, {"cuda": "11.8"}])
def test_another_toolchain_is_an_error(path: Path, change: dict[str, str]) -> None:
    """Also another patch release of Triton: the lock is of bits, not of speed."""
    message = message_of(written(path, replace(LOCKED, toolchain=replace(Toolchain.here(), **change))), PLACE)
    assert f"{'with Triton 3.1.0' if 'triton' in change else ', ptxas 11.8'}" in message
    assert f"but here is Triton {Toolchain.here().triton}, ptxas" in message
    assert f"run `{lock_command(PLACE, path)}`" in message


def test_missing_is_checked(path: Path) -> None:
    write_lock(path, [])
    with pytest.raises(ArgumentError, match="missing: got 'ignore'; allowed: 'error' or 'default'"):
        read_lock(path, "ignore")


def test_the_environment_names_a_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lock(path, [LOCKED])
    monkeypatch.delenv("PARALLAX_GEN_LOCK", raising=False)
    assert lock_of_environment() is None
    assert lock_text(None) == "no lock is on (PARALLAX_GEN_LOCK is not set)"
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.setenv("PARALLAX_GEN_LOCK", "~/kernels.lock")
    lock = lock_of_environment()
    assert lock is not None
    assert (lock.path, lock.missing) == (path, "error")
    assert lock_text(lock) == f"{path} is on: 1 kernel and bucket; others get an error"
    monkeypatch.setenv("PARALLAX_GEN_LOCK_MISSING", "default")
    lock = lock_of_environment()
    assert lock is not None
    assert lock.missing == "default"
    assert lock_text(lock).endswith("others get their defaults")
    monkeypatch.setenv("PARALLAX_GEN_LOCK_MISSING", "warn")
    with pytest.raises(ArgumentError, match="PARALLAX_GEN_LOCK_MISSING: got 'warn'; allowed: error or default"):
        lock_of_environment()
