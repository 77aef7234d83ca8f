"""share_tuning on several processes over gloo, each with its own database."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from forked import run_ranks

from parallax_gen.codegen.render import KernelSource, render, text_hash_of
from parallax_gen.codegen.resources import Resources
from parallax_gen.distributed import share_tuning, tuning
from parallax_gen.errors import ArgumentError, DistributedError, StoreError
from parallax_gen.files import data_dir
from parallax_gen.memory import ranking, shipped, toolchain
from parallax_gen.memory.lines import read_file, write_lines
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import default_of, evidence_of
from parallax_gen.memory.result import Result
from parallax_gen.memory.store import Store
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import choose, default_dispatcher
from parallax_gen.runtime.plan import PlanCache

RANKS = 3
GPU = gpu_by_name("h200")
SPEC = KernelSpec("decode", 128, "bf16", group=4)
SHAPE = Shape(2, 32, 8, 1, 5000)


def config(splits: int) -> DecodeConfig:
    return DecodeConfig(BLOCK_N=64, BLOCK_H=8, NUM_SPLITS=splits, merge="kernel", num_warps=2, num_stages=3)


def make_record(splits: int, **changes: Any) -> Result:
    evidence = evidence_of(render(SPEC, config(splits), GPU))
    place = Place("h200", SPEC, bucket_of(SHAPE))
    return replace(Result(place, evidence, config(splits), "ok", time_us=float(splits)), **changes)


def chosen() -> Any:
    return default_dispatcher().kernel(SPEC, SHAPE, GPU)[0].config


@contextmanager
def patched(home: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, name, value)
        yield


def errors_on_difference(rank: int, which: int, home: object, name: str, value: object) -> str:
    """The error of share_tuning on every rank if `name` differs on rank `which`."""
    with patched(home, name, value if rank == which else getattr(home, name)), pytest.raises(DistributedError) as error:
        share_tuning()
    return str(error.value)


def all_ranks_choose_by_rank_0s_records(rank: int) -> None:
    """Rank 2's database has more and faster records; rank 1 has no database."""
    if rank == 0:
        with Store() as store:
            store.merge([make_record(24), make_record(12, outcome="wrong"), make_record(32, time_us=100.0)])
    if rank == 2:
        with Store() as store:
            store.merge([make_record(8), make_record(24, place=replace(make_record(24).place, gpu="h100"))])
    before = chosen()
    assert before == config(8) if rank == 2 else before != config(8)
    plans: PlanCache[int] = PlanCache()
    plans.remember("a call", 1)
    assert share_tuning() > 0
    assert chosen() == config(24)
    assert not plans  # earlier choices are discarded
    if rank == 0:
        with Store() as store:
            store.save(make_record(48, time_us=1.0))
    assert chosen() == config(24)  # the next call shares rank 0's new records
    share_tuning()
    assert chosen() == config(48)


def all_ranks_know_the_knobs_of_rank_0s_search(rank: int) -> None:
    """The fastest config lacks a knob of the default, but its search knew the knob: all ranks choose it."""
    spec, shape = KernelSpec("forward", 128, "bf16", causal=True), Shape(1, 8, 8, 4096, 4096)
    place = Place("h200", spec, bucket_of(shape))
    default = default_of(place, GPU)
    assert isinstance(default, ForwardConfig)
    assert default.SOFTMAX == "fixed_reference"
    fast, slow = replace(default, SOFTMAX="online"), replace(default, GROUP_HEADS=2)
    if rank == 0:
        with Store() as store:
            for config, time_us in ((fast, 1.0), (slow, 2.0)):
                store.save(Result(place, evidence_of(render(spec, config, GPU)), config, "ok", time_us=time_us))
    share_tuning()
    assert default_dispatcher().kernel(spec, shape, GPU)[0].config == fast


def all_ranks_know_the_knobs_of_rank_0s_failed_trials(rank: int) -> None:
    spec, shape = KernelSpec("forward", 128, "bf16", causal=True), Shape(1, 8, 8, 8192, 8192)
    place = Place("h200", spec, bucket_of(shape))
    default = default_of(place, GPU)
    assert isinstance(default, ForwardConfig)
    fast, failed = replace(default, SOFTMAX="online"), replace(default, GROUP_HEADS=2)
    if rank == 0:
        with Store() as store:
            store.save(Result(place, evidence_of(render(spec, fast, GPU)), fast, "ok", time_us=1.0))
            store.save(Result(place, evidence_of(render(spec, failed, GPU)), failed, "wrong"))
    share_tuning()
    assert default_dispatcher().kernel(spec, shape, GPU)[0].config == fast


def all_ranks_choose_the_second_if_the_first_is_rejected(rank: int) -> None:
    shape = replace(SHAPE, batch=2048)
    place = Place("h200", SPEC, bucket_of(shape))
    if rank == 0:
        with Store() as store:
            for splits in (12, 24):
                result = make_record(splits, place=place)
                store.save(replace(result, evidence=replace(result.evidence, triton="2.0.0")))
    share_tuning()

    def spills(config: Any) -> Resources:
        return Resources(255, 1000 if config.NUM_SPLITS == 12 else 0, 1000)

    assert choose(SPEC, shape, GPU, default_dispatcher()._memory, spills).config == config(24)


def all_ranks_use_a_siblings_record(rank: int) -> None:
    place = Place("h200", SPEC, bucket_of(replace(SHAPE, seqlen_kv=70_000)))
    if rank == 0:
        with Store() as store:
            store.save(make_record(6, place=replace(place, gpu="h100")))
    share_tuning()
    assert default_dispatcher().kernel(SPEC, replace(SHAPE, seqlen_kv=70_000), GPU)[0].config == config(6)


def only_rank_0_renders_the_table(rank: int) -> None:
    """The other ranks render a kernel only when they launch it."""

    def fail(*_: object) -> Any:
        raise AssertionError("rendered")

    rendering, hashing = (fail, fail) if rank else (render, text_hash_of)
    with patched(ranking, "render", rendering), patched(ranking, "text_hash_of", hashing):
        assert share_tuning() > 0
    assert chosen() == config(48)


def ranks_that_differ_are_named(rank: int) -> None:
    here = toolchain.triton_version(), toolchain.cuda_version()
    message = errors_on_difference(rank, 1, toolchain, "triton_version", lambda: "3.1")
    assert message == f"the ranks would not run the same kernels: triton is {here[0]} on ranks 0, 2, 3.1 on rank 1"
    message = errors_on_difference(rank, 0, toolchain, "cuda_version", lambda: "11.8")
    assert message == f"the ranks would not run the same kernels: cuda is 11.8 on rank 0, {here[1]} on ranks 1-2"
    message = errors_on_difference(rank, 2, tuning, "render", lambda *_: KernelSource("", "", "", "0" * 32))
    assert "kernels is" in message
    assert "on ranks 0-1" in message
    message = errors_on_difference(rank, 2, tuning, "data_dir", lambda _: Path("no templates"))
    assert "kernels is" in message
    with tempfile.TemporaryDirectory() as folder:  # another version of a template that none of the kernels above uses
        edited = Path(shutil.copytree(data_dir("templates"), Path(folder) / "templates"))
        (edited / "parts" / "fp8.j2").write_text("another", encoding="utf-8")
        message = errors_on_difference(rank, 2, tuning, "data_dir", lambda _: edited)
    assert "kernels is" in message
    message = errors_on_difference(rank, 2, tuning, "gpu_here", lambda: gpu_by_name("h100"))
    assert message == "the ranks would not run the same kernels: GPU is h200 on ranks 0-1, h100 on rank 2"
    message = errors_on_difference(rank, 1, tuning, "gpu_here", lambda: None)
    assert "GPU is h200 on ranks 0, 2, none on rank 1" in message
    message = errors_on_difference(rank, 1, ranking, "why_invalid", lambda *_: "another state of this package's code")
    assert "the choice of kernels is" in message
    assert "on ranks 0, 2" in message
    assert chosen() == config(48)  # unchanged


def an_error_on_one_rank_stops_all(rank: int) -> None:
    def fail(*_: object) -> Any:
        raise StoreError("h200.jsonl, line 3: not a record")

    message = errors_on_difference(rank, 0, tuning, "records_to_share", fail)
    assert message == "rank 0: h200.jsonl, line 3: not a record"
    for line, says in (("{}", "line 2: not a record"), ("\x80", "line 2: not a record")):
        message = errors_on_difference(rank, 0, tuning, "to_line", lambda _, line=line: line)
        assert message.startswith("ranks 0-2: the table of rank 0, ")
        assert says in message
    message = errors_on_difference(
        rank, 0, tuning, "records_to_share", lambda *_: [make_record(8, outcome="predicted")]
    )
    assert message == "ranks 0-2: rank 0 sent a record of h200 (predicted) that this GPU cannot use"


def a_broken_database_is_ignored(rank: int) -> None:
    def fail(*_: object) -> Any:
        raise StoreError("tuning.db is damaged.")

    with patched(Store, "all", fail), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        share_tuning()
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert messages == ["tuning.db is damaged. Only shipped records and defaults are used."] * (rank == 0)
    assert chosen() not in (config(24), config(48))


def a_subgroup_of_ranks(rank: int) -> None:
    some = dist.new_group([1, 2])
    if rank == 0:
        with pytest.raises(ArgumentError, match="a group without this rank"):
            share_tuning(some)
        return
    with Store() as store:
        store.merge([make_record(16, time_us=0.5)] if rank == 1 else [make_record(4, time_us=0.25)])
    share_tuning(some)
    assert chosen() == config(16)
    with (
        patched(toolchain, "triton_version", (lambda: "3.1") if rank == 2 else toolchain.triton_version),
        pytest.raises(DistributedError, match=r"on rank 1, 3\.1 on rank 2$"),
    ):
        share_tuning(some)


def without_a_device_it_is_an_error(rank: int) -> None:
    with patched(tuning, "gpu_here", lambda: None):
        assert share_tuning() == 0


CASES: tuple[Callable[[int], None], ...] = (
    all_ranks_choose_by_rank_0s_records,
    all_ranks_know_the_knobs_of_rank_0s_search,
    all_ranks_know_the_knobs_of_rank_0s_failed_trials,
    all_ranks_choose_the_second_if_the_first_is_rejected,
    all_ranks_use_a_siblings_record,
    only_rank_0_renders_the_table,
    ranks_that_differ_are_named,
    an_error_on_one_rank_stops_all,
    a_broken_database_is_ignored,
    a_subgroup_of_ranks,
    without_a_device_it_is_an_error,
)


def work(rank: int, folder: Path) -> None:
    os.environ["PARALLAX_GEN_DB"] = str(folder / f"{rank}.db")
    os.environ["PARALLAX_GEN_QUIET"] = "1"
    tuning.gpu_here = lambda: GPU  # the test machine has no GPU
    shipped._folder = lambda _: folder / "shipped"
    for case in CASES:
        case(rank)
        dist.barrier()


def test_ranks_share_rank_0s_records(tmp_path: Path) -> None:
    """With few shipped records, because rank 0 renders every kernel of the table."""
    for gpu in ("h100", "h200"):
        records = read_file(data_dir("tuning_db") / f"{gpu}.jsonl").results
        write_lines(tmp_path / "shipped" / f"{gpu}.jsonl", records[::200])
    run_ranks(work, RANKS, tmp_path, tmp_path)


def test_without_a_process_group_share_tuning_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="init_process_group"):
        share_tuning()


def test_long_lists_of_ranks_are_abbreviated() -> None:
    assert tuning.ranks_text([3]) == "rank 3"
    assert tuning.ranks_text([0, 1, 2, 4, 6, 7]) == "ranks 0-2, 4, 6-7"
