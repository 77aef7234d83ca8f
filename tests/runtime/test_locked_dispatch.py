"""Dispatch under a lock: it takes the lock's kernels and nothing else, on all ranks."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch.distributed as dist
from forked import run_code, run_ranks

import parallax_gen
from parallax_gen.codegen.render import render
from parallax_gen.codegen.resources import Resources
from parallax_gen.distributed import share_tuning, tuning
from parallax_gen.errors import ArgumentError, DistributedError, LockError, StoreError
from parallax_gen.memory import shipped
from parallax_gen.memory.guard import checked_choice
from parallax_gen.memory.lock import LockedKernel, read_lock, write_lock
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, Tier, default_of, evidence_of
from parallax_gen.memory.result import Result
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import Dispatcher, UnlockedWarning, choose, default_dispatcher
from parallax_gen.runtime.locking import lock_kernels
from parallax_gen.runtime.plan import PlanCache

GPU = gpu_by_name("h200")
SPEC = KernelSpec("decode", 128, "bf16", group=4)
SHAPE = Shape(2, 32, 8, 1, 5000)
PLACE = Place("h200", SPEC, bucket_of(SHAPE))
LONGER = replace(SHAPE, seqlen_kv=50_000)
RANKS = 2


def config(splits: int) -> DecodeConfig:
    return DecodeConfig(BLOCK_N=64, BLOCK_H=8, NUM_SPLITS=splits, merge="kernel", num_warps=2, num_stages=3)


def record(splits: int, **changes: Any) -> Result:
    evidence = replace(evidence_of(render(SPEC, config(splits), GPU)), **changes)
    return Result(PLACE, evidence, config(splits), "ok", time_us=splits / 100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A lock of one kernel."""
    path = tmp_path / "kernels.lock"
    write_lock(path, [LockedKernel.here(PLACE, config(24), GPU)])
    return path


@pytest.fixture
def no_lock() -> Iterator[None]:
    """Leave this process's dispatcher without a lock."""
    yield
    parallax_gen.use_lock(None)


def chosen(dispatcher: Dispatcher, shape: Shape = SHAPE) -> Any:
    return dispatcher.kernel(SPEC, shape, GPU)[0].config


def test_the_lock_decides_whatever_is_measured(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = RecordTable([record(8)])
    assert chosen(Dispatcher(memory)) == config(8)
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter("error")
        choice, module = Dispatcher(memory, read_lock(path)).kernel(SPEC, SHAPE, GPU)
    assert (choice.config, choice.record, choice.checked) == (config(24), None, True)
    assert module.__file__ is not None
    assert Path(module.__file__).read_text(encoding="utf-8") == render(SPEC, config(24), GPU).text
    assert f"the lock {path}, which decides: locked kernels are not checked for spills" in caplog.text


def test_the_check_for_spills_does_not_apply(path: Path) -> None:
    def spills(_: Any) -> Resources:
        return Resources(255, 1000 if _ == config(24) else 0, 1000)

    borrowed = RecordTable([record(24, triton="2.0.0")])
    assert choose(SPEC, SHAPE, GPU, borrowed, spills).config == default_of(PLACE, GPU)
    assert choose(SPEC, SHAPE, GPU, borrowed, spills, read_lock(path)).config == config(24)
    assert checked_choice(PLACE, GPU, borrowed, spills, read_lock(path)).refused == ()


def test_strict_mode_allows_what_is_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_GEN_STRICT", "1")
    assert chosen(Dispatcher(RecordTable([]), read_lock(path))) == config(24)


def test_nothing_is_tuned_at_first_calls(path: Path) -> None:
    dispatcher = Dispatcher(RecordTable([]), read_lock(path, "default"))
    dispatcher.on_first_call = lambda *_: pytest.fail("tuned")
    assert chosen(dispatcher) == config(24)


def test_a_missing_place_is_an_error(path: Path) -> None:
    with pytest.raises(LockError, match=r"kernels.lock does not have decode, .*run `parallax-gen lock --add"):
        chosen(Dispatcher(RecordTable([record(8)]), read_lock(path)), LONGER)


def test_a_missing_place_may_get_its_default_told_once(path: Path) -> None:
    """Not what is measured: that differs from one database to the next."""
    place = Place("h200", SPEC, bucket_of(LONGER))
    memory = RecordTable([replace(record(8), place=place)])
    dispatcher = Dispatcher(memory, read_lock(path, "default"))
    with pytest.warns(UnlockedWarning) as caught:
        assert chosen(dispatcher, LONGER) == default_of(place, GPU)
    (message,) = {str(warning.message) for warning in caught}
    assert message.startswith(f"{path} does not have {SPEC}; {place.bucket} on h200: its default config is used. Run `")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen(dispatcher, replace(LONGER, batch=64))


def test_quiet_mode_does_not_tell(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_GEN_QUIET", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen(Dispatcher(RecordTable([]), read_lock(path, "default")), LONGER)


def test_use_lock_applies_to_earlier_choices(path: Path, no_lock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_GEN_QUIET", "1")
    before = chosen(default_dispatcher())
    assert before != config(24)
    plans: PlanCache[int] = PlanCache()
    plans.remember("a call", 1)
    lock = parallax_gen.use_lock(path)
    assert lock is not None
    assert repr(lock) == f"<{path}: 1 kernel and bucket, missing='error'>"
    assert not plans
    assert chosen(default_dispatcher()) == config(24)
    default_dispatcher().choose_anew()  # as after a tune
    assert chosen(default_dispatcher()) == config(24)
    assert parallax_gen.use_lock(None) is None
    assert chosen(default_dispatcher()) == before


def test_a_bad_argument_leaves_the_lock_as_it_is(path: Path, no_lock: None, tmp_path: Path) -> None:
    parallax_gen.use_lock(path)
    with pytest.raises(ArgumentError, match="missing: got 'none'"):
        parallax_gen.use_lock(path, missing="none")
    with pytest.raises(StoreError, match="cannot read the lock"):
        parallax_gen.use_lock(tmp_path / "no.lock")
    assert chosen(default_dispatcher()) == config(24)


# -- Writing a lock.


def test_a_lock_has_what_calls_get(tmp_path: Path) -> None:
    memory, path = RecordTable([record(8), record(12)]), tmp_path / "new" / "kernels.lock"
    lock, choices = lock_kernels(
        path, [(SPEC, SHAPE), (SPEC, LONGER), (SPEC, replace(SHAPE, seqlen_kv=4500))], GPU, memory
    )
    assert {place: locked.config for place, locked in lock.kernels.items()} == {
        PLACE: config(8),
        Place("h200", SPEC, bucket_of(LONGER)): choose(SPEC, LONGER, GPU, memory).config,
    }
    assert [choice.place for choice in choices] == list(lock.kernels)
    assert chosen(Dispatcher(RecordTable([record(12)]), lock)) == config(8)


def test_add_keeps_the_other_places(tmp_path: Path) -> None:
    path = tmp_path / "kernels.lock"
    lock_kernels(path, [(SPEC, SHAPE)], GPU, RecordTable([record(8)]), add=True)
    lock, _ = lock_kernels(path, [(SPEC, LONGER)], GPU, RecordTable([record(12)]), add=True)
    assert len(lock.kernels) == 2
    assert lock.kernels[PLACE].config == config(8)
    lock, _ = lock_kernels(path, [(SPEC, SHAPE)], GPU, RecordTable([record(12)]), add=True)
    assert (len(lock.kernels), lock.kernels[PLACE].config) == (2, config(12))
    lock, _ = lock_kernels(path, [(SPEC, SHAPE)], GPU, RecordTable([record(12)]))
    assert list(lock.kernels) == [PLACE]


def test_borrowed_kernels_are_checked_if_the_card_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = RecordTable([record(24, triton="2.0.0")])
    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: None)
    lock, (choice,) = lock_kernels(tmp_path / "a.lock", [(SPEC, SHAPE)], GPU, memory)
    assert (lock.kernels[PLACE].config, choice.checked) == (config(24), False)

    def compiler(*_: Any) -> Any:
        return lambda config_: Resources(255, 1000 if config_ == config(24) else 0, 1000)

    monkeypatch.setattr("parallax_gen.codegen.device.gpu_here", lambda index: GPU)
    monkeypatch.setattr("parallax_gen.runtime.locking.compiler", compiler)
    lock, (choice,) = lock_kernels(tmp_path / "b.lock", [(SPEC, SHAPE)], GPU, memory)
    assert (lock.kernels[PLACE].config, choice.checked) == (default_of(PLACE, GPU), True)
    assert choice.candidate.tier == Tier.DEFAULT


def test_a_lock_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="kernels: got none"):
        lock_kernels(tmp_path / "kernels.lock", [], GPU, RecordTable([]))


# -- Other processes, with the lock in their environment.

CHOOSE = f"""
import hashlib, json, sys
from parallax_gen.codegen import build
from parallax_gen.errors import LockError
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import default_dispatcher
choice, module = default_dispatcher().kernel({SPEC!r}, {SHAPE!r}, gpu_by_name("h200"))
print(json.dumps([choice.config.NUM_SPLITS, hashlib.sha256(open(module.__file__, "rb").read()).hexdigest()]))
"""


def process(folder: Path, name: str, splits: int, **environment: str) -> CompletedProcess[str]:
    """A process with a database of its own, in which another config is the best."""
    database = folder / f"{name}.db"
    with Store(database) as store:
        store.save(record(splits))
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in {"PARALLAX_GEN_DB": str(database), "PARALLAX_GEN_QUIET": "1", **environment}.items():
            patch.setenv(variable, value)
        return run_code(CHOOSE, folder)


def test_two_processes_with_one_lock_and_different_databases(path: Path, tmp_path: Path) -> None:
    free = [json.loads(process(tmp_path, f"{n}", n).stdout) for n in (8, 12)]
    assert [splits for splits, _ in free] == [8, 12]
    same = [json.loads(process(tmp_path, f"{n}", n, PARALLAX_GEN_LOCK=str(path)).stdout) for n in (8, 12)]
    assert same == [[24, render(SPEC, config(24), GPU).sha256]] * 2


def test_a_process_refuses_a_changed_kernel(path: Path, tmp_path: Path) -> None:
    write_lock(path, [replace(LockedKernel.here(PLACE, config(24), GPU), kernel="0" * 32)])
    refused = process(tmp_path, "changed", 24, PARALLAX_GEN_LOCK=str(path))
    assert refused.returncode == 1
    assert f"parallax_gen.errors.LockError: {path} has" in refused.stderr
    assert "its config now renders kernel" in refused.stderr


def test_a_process_refuses_another_toolchain(path: Path, tmp_path: Path) -> None:
    write_lock(path, [replace(LockedKernel.here(PLACE, config(24), GPU), toolchain=Toolchain("3.1.0", "12.4"))])
    refused = process(tmp_path, "toolchain", 24, PARALLAX_GEN_LOCK=str(path))
    assert "with Triton 3.1.0, ptxas 12.4, but here is" in refused.stderr


def test_a_process_does_not_run_without_its_lock(tmp_path: Path) -> None:
    refused = process(tmp_path, "none", 24, PARALLAX_GEN_LOCK=str(tmp_path / "no.lock"))
    assert "StoreError: cannot read the lock" in refused.stderr


# -- Ranks.


def lock_of(folder: Path, splits: int, name: str = "") -> Path:
    path = folder / f"{name}{splits}.lock"
    write_lock(path, [LockedKernel.here(PLACE, config(splits), GPU)])
    return path


def ranks_with_one_lock(rank: int, folder: Path) -> None:
    parallax_gen.use_lock(lock_of(folder, 24, f"{rank}-"))  # equal files of other names
    assert chosen(default_dispatcher()) == config(24)


def ranks_may_replace_it(rank: int, folder: Path) -> None:
    parallax_gen.use_lock(lock_of(folder, 12, f"{rank}-"))
    assert chosen(default_dispatcher()) == config(12)


def another_lock_is_found_at_a_call(rank: int, folder: Path) -> None:
    if rank == 0:
        parallax_gen.use_lock(lock_of(folder, 8))
        assert chosen(default_dispatcher()) == config(8)
    dist.barrier()
    if rank == 1:
        path = lock_of(folder, 6)
        parallax_gen.use_lock(path)
        with pytest.raises(DistributedError, match=rf"the ranks hold different locks: rank 1 has {path} \("):
            chosen(default_dispatcher())
        parallax_gen.use_lock(folder / "8.lock", missing="default")
        with pytest.raises(DistributedError, match=r"missing=default\), another rank has .*missing=error"):
            chosen(default_dispatcher())
        parallax_gen.use_lock(folder / "8.lock")
        assert chosen(default_dispatcher()) == config(8)


def ranks_may_switch_it_off(rank: int, folder: Path) -> None:
    parallax_gen.use_lock(None)
    assert chosen(default_dispatcher()) == default_of(PLACE, GPU)
    dist.barrier()
    parallax_gen.use_lock(lock_of(folder, 24, f"{rank}-"))
    assert chosen(default_dispatcher()) == config(24)


def a_later_rank_without_a_lock_is_found_at_a_call(rank: int, folder: Path) -> None:
    if rank == 1:
        with pytest.raises(DistributedError, match=r"rank 1 has no lock, another rank has \w{12}, missing=error;"):
            chosen(Dispatcher(RecordTable([])))


def a_later_rank_with_a_lock_is_found_at_a_call(rank: int, folder: Path) -> None:
    path = lock_of(folder, 24, f"{rank}-")
    parallax_gen.use_lock(None)
    chosen(default_dispatcher())
    dist.barrier()
    if rank == 1:
        with pytest.raises(DistributedError, match=rf"rank 1 has {path} \(.*\), another rank has no lock;"):
            chosen(Dispatcher(RecordTable([]), read_lock(path)))


def ranks_without_locks_ask_once(rank: int, folder: Path) -> None:
    """One operation of the store in all, and none that waits."""
    dispatcher, store = Dispatcher(RecordTable([])), CountedStore(dist.distributed_c10d._get_default_store())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        for shape in (SHAPE, LONGER, replace(LONGER, batch=64)):
            chosen(dispatcher, shape)
        assert store.asked == ["compare_set"]
        store.asked.clear()
        patch.setattr(CountedStore, "broken", True)
        assert chosen(Dispatcher(RecordTable([]))) == default_of(PLACE, GPU)
        with pytest.raises(RuntimeError, match="gone"):
            chosen(Dispatcher(RecordTable([]), read_lock(lock_of(folder, 24, f"{rank}-"))))
    parallax_gen.use_lock(None)


class CountedStore:
    """A store that keeps the names of the operations that it is asked for, until it is broken."""

    broken = False

    def __init__(self, store: Any) -> None:
        self.store, self.asked = store, list[str]()

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        if self.broken:
            raise RuntimeError("the store is gone")
        return getattr(self.store, name)


def share_tuning_finds_a_rank_without_a_lock(rank: int, folder: Path) -> None:
    parallax_gen.use_lock(lock_of(folder, 24, f"{rank}-"))
    share_tuning()
    assert chosen(default_dispatcher()) == config(24)  # the lock decides before the table
    parallax_gen.use_lock(None if rank else folder / "0-24.lock")
    with pytest.raises(DistributedError, match=r"the lock is \(\w{12}, missing=error\) on rank 0, none on rank 1$"):
        share_tuning()


CASES: tuple[Callable[[int, Path], None], ...] = (
    ranks_with_one_lock,
    ranks_may_replace_it,
    another_lock_is_found_at_a_call,
    ranks_may_switch_it_off,
    a_later_rank_without_a_lock_is_found_at_a_call,
    a_later_rank_with_a_lock_is_found_at_a_call,
    ranks_without_locks_ask_once,
    share_tuning_finds_a_rank_without_a_lock,
)


def work(rank: int, folder: Path) -> None:
    os.environ["PARALLAX_GEN_DB"] = str(folder / f"{rank}.db")
    os.environ["PARALLAX_GEN_QUIET"] = "1"
    tuning.gpu_here = lambda: GPU  # the test machine has no GPU
    shipped._folder = lambda _: folder / "shipped"
    for case in CASES:
        case(rank, folder)
        dist.barrier()


def test_ranks_check_that_they_hold_the_same_lock(tmp_path: Path) -> None:
    run_ranks(work, RANKS, tmp_path, tmp_path)
