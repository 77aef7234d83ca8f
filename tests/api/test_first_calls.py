"""Tuning at first calls, on a simulated GPU: what is tuned, when it is not, and what ranks do."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cli_samples import H200, start_python
from dispatched_kernels import recorded_kernels
from fake_card import FakeWorker

import parallax_gen
from parallax_gen import KernelSpec, Shape
from parallax_gen.api import first_calls
from parallax_gen.api.first_calls import FirstCalls, kernels_with, memory_of
from parallax_gen.errors import ArgumentError, ConfigError, MachineError, UntunedError
from parallax_gen.memory import ranking
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import RecordTable, Tier
from parallax_gen.memory.store import Store
from parallax_gen.problem.shapes import Bucket, bucket_of
from parallax_gen.runtime.dispatch import Dispatcher, RuntimeMemory, UntunedWarning, default_dispatcher
from parallax_gen.tuning.job import Job

SPEC, SHAPE = KernelSpec("decode", 64, "bf16", group=4), Shape(2, 8, 2, 1, 4096)
OTHER = Shape(2, 8, 2, 1, 1024)
PLACE = Place("h200", SPEC, bucket_of(SHAPE))
FORWARD = KernelSpec("forward", 64, "bf16", group=2, causal=True, stats=True), Shape(2, 4, 2, 300, 300)


@pytest.fixture
def card(fake_h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card with much free memory, on which nothing is captured."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 << 30, 141 << 30))
    monkeypatch.setattr("parallax_gen.tuning.tuner.usable_cpus", lambda: 2)


@pytest.fixture
def dispatcher() -> Dispatcher:
    return Dispatcher(RuntimeMemory())


def first_calls_of(dispatcher: Dispatcher, budget_s: float = 60.0) -> FirstCalls:
    return FirstCalls(dispatcher, budget_s, 10.0, trials=2, progress=False)


def call(dispatcher: Dispatcher, spec: KernelSpec = SPEC, shape: Shape = SHAPE) -> Tier:
    """The tier of a call's config."""
    return dispatcher.kernel(spec, shape, H200)[0].candidate.tier


@pytest.mark.filterwarnings("error::parallax_gen.runtime.dispatch.UntunedWarning")
def test_a_first_call_is_tuned_and_uses_what_was_found(card: None, dispatcher: Dispatcher, store: Store) -> None:
    with first_calls_of(dispatcher) as tuning:
        assert call(dispatcher) is Tier.MEASURED_HERE
        assert tuning.tuned == [PLACE]
        trials = FakeWorker.measured
        assert call(dispatcher) is Tier.MEASURED_HERE  # chosen before
        assert call(Dispatcher(RuntimeMemory())) is Tier.MEASURED_HERE
        assert FakeWorker.measured == trials > 0
        assert call(dispatcher, shape=OTHER) is Tier.MEASURED_HERE
    assert {record.place.bucket for record in store.all()} == {bucket_of(SHAPE), bucket_of(OTHER)}
    assert repr(tuning).startswith("<2 kernels and buckets tuned, ")


def test_a_measured_kernel_is_not_tuned_again(card: None, dispatcher: Dispatcher) -> None:
    with first_calls_of(dispatcher):
        call(dispatcher)
    trials = FakeWorker.measured
    another = Dispatcher(RuntimeMemory())
    with first_calls_of(another) as tuning:
        assert call(another) is Tier.MEASURED_HERE
    assert (FakeWorker.measured, tuning.tuned) == (trials, [])


def test_without_it_nothing_is_tuned(card: None, dispatcher: Dispatcher, store: Store) -> None:
    tuning = first_calls_of(dispatcher)
    tuning.stop()
    assert dispatcher.on_first_call is None
    with pytest.warns(UntunedWarning):
        assert call(dispatcher) is Tier.DEFAULT
    assert store.all() == []


def test_strict_mode_sees_what_was_found(card: None, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_GEN_STRICT", "1")
    with first_calls_of(dispatcher):
        assert call(dispatcher) is Tier.MEASURED_HERE
    with pytest.raises(UntunedError):
        call(dispatcher, shape=OTHER)


@pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")
def test_the_backwards_kernels_are_tuned_with_the_forward(card: None, dispatcher: Dispatcher, store: Store) -> None:
    q, r = (torch.randn(2, 300, 4, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    k, v = (torch.randn(2, 300, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with recorded_kernels() as launched:
        parallax_gen.parallax_attn_func(q, r, k, v, causal=True).sum().backward()
    assert set(kernels_with(*FORWARD)) == set(launched)
    with first_calls_of(dispatcher) as tuning:
        call(dispatcher, *FORWARD)
    assert {(place.spec, place.bucket) for place in tuning.tuned} == set(launched)


def test_inference_tunes_one_kernel() -> None:
    spec = KernelSpec("forward", 64, "bf16", causal=True)
    assert kernels_with(spec, Shape(1, 4, 4, 300, 300)) == [(spec, Bucket(4, 256, 256))]


# When nothing is tuned


@pytest.fixture(params=["capture", "compile", "memory", "budget", "shared"])
def obstacle(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif request.param == "compile":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif request.param == "memory":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 141 << 30))
    return str(request.param)


@pytest.mark.filterwarnings("ignore::parallax_gen.runtime.dispatch.UntunedWarning")
def test_obstacles(card: None, obstacle: str, dispatcher: Dispatcher, store: Store) -> None:
    if obstacle == "shared":
        dispatcher.use(RecordTable([]))
    with first_calls_of(dispatcher, budget_s=1e-9 if obstacle == "budget" else 60.0) as tuning:
        tuning.left_s -= 1e-9 * (obstacle == "budget")
        assert call(dispatcher) is Tier.DEFAULT
    assert (store.all(), tuning.tuned) == ([], [])


@pytest.mark.filterwarnings("ignore::parallax_gen.runtime.dispatch.UntunedWarning")
def test_nothing_is_tuned_in_a_backward(card: None, dispatcher: Dispatcher, store: Store) -> None:
    tiers: list[Tier] = []

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            tiers.append(call(dispatcher))
            return grad

    with first_calls_of(dispatcher):
        Step.apply(torch.ones(1, requires_grad=True)).backward()  # type: ignore[no-untyped-call]
        assert tiers == [Tier.DEFAULT]
        assert store.all() == []
        assert call(dispatcher, shape=OTHER) is Tier.MEASURED_HERE


def test_the_budget_is_spent_by_tuning(card: None, dispatcher: Dispatcher) -> None:
    with first_calls_of(dispatcher) as tuning:
        call(dispatcher)
        assert 0 < tuning.left_s < 60.0
        tuning.left_s = -1.0
        with pytest.warns(UntunedWarning):
            assert call(dispatcher, shape=OTHER) is not Tier.MEASURED_HERE


def test_a_kernel_needs_memory_for_its_inputs_and_the_oracle() -> None:
    job = Job(*FORWARD[:1], Bucket(64, 8192, 8192), H200)
    inputs = 2 * 8 * 8192 * 64 * (3 * 2 + 2) * 8  # bytes of q, r, out and k, v; 16 query heads, 8 sequences
    assert 8 * inputs < memory_of(job) < 40 * inputs + (2 << 30)


@pytest.mark.filterwarnings("ignore::parallax_gen.runtime.dispatch.UntunedWarning")
def test_a_fault_of_the_machine_ends_it_with_a_warning(
    card: None, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identify(_: FakeWorker) -> None:
        raise MachineError("the device is lost")

    monkeypatch.setattr(FakeWorker, "identify", identify)
    with first_calls_of(dispatcher):
        with pytest.warns(UserWarning, match="first calls are not tuned any more: the device is lost"):
            assert call(dispatcher) is Tier.DEFAULT
        assert dispatcher.on_first_call is None


@pytest.mark.filterwarnings("ignore::parallax_gen.runtime.dispatch.UntunedWarning")
def test_a_child_that_finds_another_card_ends_it(
    card: None, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeWorker, "identify", lambda _: None)
    with first_calls_of(dispatcher), pytest.warns(UserWarning, match="a child process does not find this NVIDIA H200"):
        call(dispatcher)


@pytest.mark.filterwarnings("ignore::parallax_gen.runtime.dispatch.UntunedWarning")
def test_a_forward_runs_though_no_config_fits_its_backward(
    card: None, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def best_of(place: Place, *arguments: Any) -> Any:
        if place.spec.op == "dkdv":
            raise ConfigError("no default config fits")
        return ranking.best(place, *arguments)

    monkeypatch.setattr(first_calls, "best", best_of)
    with first_calls_of(dispatcher) as tuning:
        assert call(dispatcher, *FORWARD) is Tier.DEFAULT
        assert call(dispatcher) is Tier.MEASURED_HERE
        assert tuning.tuned == [PLACE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_s": 0}, "budget_s: got 0; allowed: a number above 0"),
        ({"time_budget_s": "1"}, "time_budget_s: got '1'; allowed: a number above 0"),
        ({"trials": 0}, "trials: got 0; allowed: an int of 1 or more"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        parallax_gen.tune_first_calls(**arguments)
    assert str(error.value) == message
    assert default_dispatcher().on_first_call is None


def test_it_is_on_for_the_calls_of_this_process() -> None:
    with parallax_gen.tune_first_calls(budget_s=1.0):
        assert default_dispatcher().on_first_call is not None
    assert default_dispatcher().on_first_call is None


# Several ranks


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes this thread a rank of a job; all ranks share a store."""
    store, own = dist.HashStore(), threading.local()
    monkeypatch.setattr(first_calls, "_ranks", lambda: (own.rank, store))

    def become(rank: int) -> dist.HashStore:
        own.rank = rank
        return store

    return become


@pytest.mark.filterwarnings("error::parallax_gen.runtime.dispatch.UntunedWarning")
def test_rank_0_tunes_and_the_others_wait_for_its_records(
    card: None, ranks: Any, dispatcher: Dispatcher, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers: list[Tier] = []

    def rank_1() -> None:
        ranks(1)
        other = Dispatcher(RuntimeMemory())
        with first_calls_of(other) as tuning:
            tiers.append(call(other, *FORWARD))
            assert tuning.tuned == []
            tiers.append(call(other, FORWARD[0].for_op("dqdr"), FORWARD[1]))  # the backward's: there is no wait

    thread = threading.Thread(target=rank_1)
    thread.start()
    time.sleep(0.2)
    assert tiers == []  # it waits
    ranks(0)
    with first_calls_of(dispatcher) as tuning:
        assert call(dispatcher, *FORWARD) is Tier.MEASURED_HERE
        assert len(tuning.tuned) == 4
    thread.join(60)
    assert tiers == [Tier.MEASURED_HERE] * 2


def test_records_of_another_host_are_stored(
    card: None, ranks: Any, dispatcher: Dispatcher, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(0)
    with first_calls_of(dispatcher):
        call(dispatcher)
    found = store.results(PLACE)
    monkeypatch.setenv("PARALLAX_GEN_DB", str(tmp_path / "another.db"))
    ranks(1)
    other = Dispatcher(RuntimeMemory())
    with first_calls_of(other):
        assert call(other) is Tier.MEASURED_HERE
    with Store(tmp_path / "another.db") as another:
        assert another.results(PLACE) == found


@pytest.mark.filterwarnings("ignore::parallax_gen.runtime.dispatch.UntunedWarning")
def test_a_rank_waits_no_longer_than_its_budget(card: None, ranks: Any, dispatcher: Dispatcher) -> None:
    ranks(1)
    begun = time.monotonic()
    with first_calls_of(dispatcher, budget_s=0.3) as tuning:
        assert call(dispatcher) is Tier.DEFAULT
        assert call(dispatcher, shape=OTHER) is Tier.DEFAULT
        assert tuning.left_s <= 0
    assert 0.2 < time.monotonic() - begun < 20


@pytest.mark.filterwarnings("ignore::parallax_gen.runtime.dispatch.UntunedWarning")
def test_nobody_waits_for_what_rank_0_cannot_tune(
    card: None, ranks: Any, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 141 << 30))
    for rank in (0, 1):
        ranks(rank)
        other = Dispatcher(RuntimeMemory())
        begun = time.monotonic()
        with first_calls_of(other):
            assert call(other) is Tier.DEFAULT
        assert time.monotonic() - begun < 30


@pytest.mark.filterwarnings("ignore::parallax_gen.runtime.dispatch.UntunedWarning")
def test_damaged_records_end_it_with_a_warning(card: None, ranks: Any, dispatcher: Dispatcher) -> None:
    shared = ranks(1)
    shared.set(first_calls.PREFIX + PLACE.digest, "\nimport os\n")
    with (
        first_calls_of(dispatcher),
        pytest.warns(UserWarning, match="the records of rank 0, line 2: not a record"),
    ):
        assert call(dispatcher) is Tier.DEFAULT


def test_one_process_is_no_group() -> None:
    assert first_calls._ranks() is None


RANK = """
import sys, time
import torch.distributed as dist
from parallax_gen.api.first_calls import _ranks
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
rank, store = _ranks()
if rank == 0:
    store.set("key", "text")
while not store.check(["key"]):
    time.sleep(0.1)
print(rank, store.get("key"))
dist.barrier()
"""


def test_the_ranks_of_a_job_share_a_store(tmp_path: Path) -> None:
    ranks = [start_python("-c", RANK, tmp_path / "ranks", rank) for rank in (0, 1)]
    printed = [process.communicate(timeout=60)[0].splitlines(keepends=True) for process in ranks]
    ours = [[line for line in lines if not line.startswith("[Gloo]")] for lines in printed]  # torch 2.9 prints such
    assert ours == [["0 b'text'\n"], ["1 b'text'\n"]]
