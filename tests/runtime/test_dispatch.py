"""The config of a call: from a record of the same kernel, or else the default."""

from __future__ import annotations

import random
import sqlite3
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
from random_records import random_kernel_configs, random_records, random_support

from parallax_gen.codegen.render import render
from parallax_gen.memory import toolchain
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import (
    RecordTable,
    Tier,
    default_of,
    evidence_of,
    is_rendered,
    near_places,
    sibling_places,
    siblings,
)
from parallax_gen.memory.result import Evidence, Result
from parallax_gen.memory.shipped import Memory, write_shipped
from parallax_gen.memory.store import Store
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.space import why_invalid
from parallax_gen.problem.hardware import GPUS, Gpu, gpu_by_name
from parallax_gen.problem.shapes import Shape, bucket_of, representative
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.dispatch import Dispatcher, RuntimeMemory, choose

GPU = gpu_by_name("h200")
SPEC = KernelSpec("decode", 128, "bf16", group=4)
SHAPE = Shape(2, 32, 8, 1, 5000)
PLACE = Place("h200", SPEC, bucket_of(SHAPE))
CONFIG = DecodeConfig(BLOCK_N=64, BLOCK_H=8, NUM_SPLITS=24, merge="kernel", num_warps=2, num_stages=3)
DEFAULT = default_of(PLACE, GPU)
UNKNOWN = Evidence.here("0123456789abcdef" * 2, "fedcba9876543210" * 2)  # a kernel that nothing renders


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence the warning for borrowed choices, which test_advice.py tests."""
    monkeypatch.setenv("PARALLAX_GEN_QUIET", "1")


def make_record(config: KernelConfig = CONFIG, place: Place = PLACE, **changes: Any) -> Result:
    """A measurement of today's kernel here, except for `changes`."""
    if "evidence" not in changes:
        changes["evidence"] = evidence_of(render(place.spec, config, GPU))
    values: dict[str, Any] = {"outcome": "ok", "time_us": 10.0} | changes
    return Result(place=place, config=config, **values)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "tuning.db")


def test_without_records_the_default_is_used(tmp_path: Path) -> None:
    choice = choose(SPEC, SHAPE, GPU, Memory(None, tmp_path))
    assert (choice.config, choice.record, choice.place) == (DEFAULT, None, PLACE)
    assert DEFAULT != CONFIG


def test_a_record_of_the_bucket_is_used_for_every_shape_in_it(store: Store, tmp_path: Path) -> None:
    store.save(make_record())
    memory = Memory(store, tmp_path)
    for seqlen in (2900, 4096, 5792):
        assert choose(SPEC, replace(SHAPE, seqlen_kv=seqlen), GPU, memory).config == CONFIG
    longer = choose(SPEC, replace(SHAPE, seqlen_kv=5800), GPU, memory)
    assert (longer.candidate.tier, longer.record) == (Tier.DEFAULT, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"place": replace(PLACE, gpu="a100")},
        {"place": replace(PLACE, spec=replace(SPEC, op="decode_varlen"))},
        {"place": replace(PLACE, bucket=bucket_of(replace(SHAPE, seqlen_kv=65536)))},
        {"evidence": UNKNOWN},
        {"evidence": Evidence.here("", "")},  # without a kernel
        {"evidence": replace(Evidence.here("", ""), templates="0" * 12)},  # older than fingerprints
    ],
)
def test_other_records_are_not_used(store: Store, tmp_path: Path, changes: dict[str, Any]) -> None:
    store.save(make_record(**changes))
    assert choose(SPEC, SHAPE, GPU, Memory(store, tmp_path)).record is None


@pytest.mark.parametrize(
    ("gpu", "toolchain", "tier"),
    [
        ("h200", {}, Tier.MEASURED_HERE),
        ("h200", {"triton": "2.0.0"}, Tier.OTHER_TOOLCHAIN),
        ("h200", {"protocol": 0}, Tier.OTHER_TOOLCHAIN),
        ("h200", {"cuda": "11.0"}, Tier.OTHER_TOOLCHAIN),
        ("h200", {"cuda": ""}, Tier.OTHER_TOOLCHAIN),  # older than this field
        ("h100", {}, Tier.SIBLING_CARD),
        ("h100", {"triton": "2.0.0"}, Tier.SIBLING_CARD),
    ],
)
def test_records_of_other_toolchains_and_sibling_cards_are_used(
    store: Store, tmp_path: Path, gpu: str, toolchain: dict[str, Any], tier: Tier
) -> None:
    result = make_record()
    result = replace(result, place=replace(PLACE, gpu=gpu), evidence=replace(result.evidence, **toolchain))
    store.save(result)
    choice = choose(SPEC, SHAPE, GPU, Memory(store, tmp_path))
    assert (choice.config, choice.record, choice.candidate.tier) == (CONFIG, result, tier)
    # A record measured here has priority, however slow.
    slower = make_record(replace(CONFIG, NUM_SPLITS=12), time_us=99.0)
    store.save(slower)
    expected = result if tier == Tier.MEASURED_HERE else slower
    assert choose(SPEC, SHAPE, GPU, Memory(store, tmp_path)).record == expected


@pytest.mark.parametrize("outcome", ["predicted", "wrong", "slow", "crash"])
def test_only_measured_records_count(store: Store, tmp_path: Path, outcome: str) -> None:
    store.save(make_record(outcome=outcome))
    assert choose(SPEC, SHAPE, GPU, Memory(store, tmp_path)).record is None


def test_a_shipped_record_is_used(tmp_path: Path) -> None:
    write_shipped([make_record()], "h200", tmp_path)
    assert choose(SPEC, SHAPE, GPU, Memory(None, tmp_path)).config == CONFIG


# The Tritons of shipped records, and one without shipped records.
TRITONS = {"3.6.0": "12.8/12.9", "3.9.0": "12.9/13.4", "3.10.0": "13.5"}


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_shipped_records_are_used_with_any_triton(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    """Every place with a usable record, its own or a sibling card's, gets one of them.

    Except where the search did not know a knob of the default: then the default is used.
    """
    memory, card = Memory(None), gpu_by_name(gpu)
    known = (record.place for name in (gpu, *siblings(card)) for record in memory.all(name))
    places = list(dict.fromkeys(replace(place, gpu=gpu) for place in known))
    assert len(places) > 500
    defaults = 0
    for place in places:
        for triton, cuda in TRITONS.items():
            monkeypatch.setattr(toolchain, "triton_version", lambda triton=triton: triton)
            monkeypatch.setattr(toolchain, "cuda_version", lambda cuda=cuda: cuda)
            shape = representative(place.bucket, place.spec.group)
            choice = choose(place.spec, shape, card, memory)
            assert choice.place == place
            if choice.record is None:
                assert choice.config == default_of(place, card)
                assert all(unusable_records(place, card, choice.config, memory))
                defaults += place.spec.op != "preprocess"  # which takes other cards' records for the default alone
                continue
            assert is_rendered(choice.record, card)
            assert choice.config == choice.record.config
            if choice.candidate.supports_default:
                assert (place.spec.op, choice.config) == ("preprocess", default_of(place, card))
                continue
            same_card = choice.record.place == place
            assert same_card or choice.record.place in sibling_places(place, card)
            here = choice.record.evidence.toolchain.compiles_like(Toolchain(triton, cuda))
            own = Tier.MEASURED_HERE if here else Tier.OTHER_TOOLCHAIN
            assert choice.candidate.tier == (own if same_card else Tier.SIBLING_CARD)
    assert defaults <= len(places) * len(TRITONS) / 50


def unusable_records(place: Place, card: Gpu, default: KernelConfig, memory: Memory) -> Iterator[bool]:
    """For each card, whether its records of a place are of other kernels, or of a search older than a knob of the
    default, so that no record has the default's value of it."""
    later = [f for f in fields(default) if f.default not in (MISSING, getattr(default, f.name))]
    for of_card in (place, *sibling_places(place, card)):
        records = memory.results(of_card)
        configs = [r.config for r in records]
        unknown = [f for f in later if getattr(default, f.name) not in [getattr(c, f.name) for c in configs]]
        yield not any(is_rendered(r, card) for r in records) or (bool(unknown) and default not in configs)


def test_a_siblings_record_is_used_if_the_cards_own_is_of_another_kernel(tmp_path: Path) -> None:
    sibling = replace(PLACE, gpu="h100")
    write_shipped([make_record(evidence=UNKNOWN, time_us=1.0)], "h200", tmp_path)
    write_shipped([make_record(place=sibling)], "h100", tmp_path)
    choice = choose(SPEC, SHAPE, GPU, Memory(None, tmp_path))
    assert choice.candidate.tier == Tier.SIBLING_CARD
    assert choice.record is not None
    assert choice.record.place == sibling


def test_a_record_with_an_invalid_config_is_skipped(store: Store, tmp_path: Path) -> None:
    store.save(make_record(replace(CONFIG, num_warps=32), evidence=UNKNOWN, time_us=1.0))
    assert choose(SPEC, SHAPE, GPU, Memory(store, tmp_path)).config == DEFAULT
    second = make_record()
    store.save(second)
    assert choose(SPEC, SHAPE, GPU, Memory(store, tmp_path)).record == second


def test_the_second_best_is_used_if_the_card_cannot_run_the_best(store: Store, tmp_path: Path) -> None:
    """The measured card's name with lower limits, as a driver may report."""
    spec = KernelSpec("forward", 128, "bf16", causal=True)
    shape = Shape(1, 8, 8, 4096, 4096)
    place = Place("h200", spec, bucket_of(shape))
    default = default_of(place, GPU)
    assert isinstance(default, ForwardConfig)
    large = replace(default, BLOCK_N=64, num_stages=4)
    small = replace(large, BLOCK_N=32, num_stages=2)
    smaller = replace(GPU, shared_per_block=100_000)
    assert why_invalid(spec, large, GPU) is None is why_invalid(spec, small, smaller)
    assert why_invalid(spec, large, smaller)
    best, second = make_record(large, place, time_us=1.0), make_record(small, place, time_us=2.0)
    for record in (best, second):
        store.save(record)
    memory = Memory(store, tmp_path)
    assert choose(spec, shape, GPU, memory).record == best
    assert choose(spec, shape, smaller, memory).record == second


def test_records_are_read_once_per_bucket(tmp_path: Path) -> None:
    class Counting(Memory):
        def __init__(self, folder: Path) -> None:
            super().__init__(None, folder)
            self.lookups: Counter[Place] = Counter()

        def results(self, place: Place) -> list[Result]:
            self.lookups[place] += 1
            return super().results(place)

    memory = Counting(tmp_path)
    dispatcher = Dispatcher(memory)
    first = dispatcher.kernel(SPEC, SHAPE, GPU)
    again = dispatcher.kernel(SPEC, replace(SHAPE, seqlen_kv=4097), GPU)
    assert first == again
    places = (PLACE, *sibling_places(PLACE, GPU), *near_places(PLACE, GPU))
    assert memory.lookups == dict.fromkeys(places, 1)
    assert callable(first[1].launch)


# Unusable databases of the user


def unusable(path: Path, how: str) -> None:
    if how == "corrupt":
        path.write_bytes(b"these are not the bytes you are looking for" * 100)
    elif how == "foreign":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE results (a)")
    elif how == "newer":
        Store(path).close()
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 999")
    else:
        path.mkdir()


@pytest.mark.parametrize("how", ["corrupt", "foreign", "newer", "a folder"])
def test_a_database_that_cannot_be_opened_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    path = tmp_path / "mine.db"
    monkeypatch.setenv("PARALLAX_GEN_DB", str(path))
    unusable(path, how)
    sent = make_record()  # made once, since it contains the time of its creation
    write_shipped([sent], "h200", tmp_path)
    with pytest.warns(UserWarning, match=r"mine\.db.* Only shipped records and defaults are used\.$"):
        memory = RuntimeMemory(tmp_path)
    assert Dispatcher(memory).kernel(SPEC, SHAPE, GPU)[0].config == CONFIG
    assert memory.all() == [sent]


def test_a_database_damaged_later_is_ignored_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.db"
    monkeypatch.setenv("PARALLAX_GEN_DB", str(path))
    with Store(path) as store:
        store.merge(replace(make_record(), config=replace(CONFIG, NUM_SPLITS=n)) for n in range(1, 200))
    sent = make_record()
    write_shipped([sent], "h200", tmp_path)
    memory = RuntimeMemory(tmp_path)
    dispatcher = Dispatcher(memory)
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.warns(UserWarning, match=r"mine\.db is damaged.* Only shipped records and defaults are used\.$"):
        assert dispatcher.kernel(SPEC, SHAPE, GPU)[0].config == CONFIG
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatcher.kernel(SPEC, replace(SHAPE, batch=64), GPU)[0].record is None
        assert memory.all() == [sent]


def test_no_warning_for_a_missing_database_or_an_unwritable_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none.db", Path("/proc/none/tuning.db"), tmp_path / "file" / "tuning.db"):
        monkeypatch.setenv("PARALLAX_GEN_DB", str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose(SPEC, SHAPE, GPU, RuntimeMemory(tmp_path)).config == DEFAULT


@pytest.mark.parametrize("card", ["h200", "h100"])
@pytest.mark.parametrize("rest", [b"\n", b"garbage\n", b"\xff\n", b'{"place": {}}\n'])
def test_a_damaged_file_of_shipped_records_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str, rest: bytes
) -> None:
    monkeypatch.setenv("PARALLAX_GEN_DB", str(tmp_path / "mine.db"))
    with Store() as store:
        store.save(make_record())
    write_shipped([make_record(place=replace(PLACE, gpu=card))], card, tmp_path)
    with (tmp_path / f"{card}.jsonl").open("ab") as file:
        file.write(rest)
    with closing(RuntimeMemory(tmp_path)) as memory, pytest.warns(UserWarning, match="Only your own records"):
        assert choose(SPEC, SHAPE, GPU, memory).config == CONFIG


@pytest.mark.parametrize(
    "damage",
    [
        "ALTER TABLE measurements RENAME COLUMN detail TO other",
        "ALTER TABLE measurements DROP COLUMN spills",
        "ALTER TABLE measurements RENAME TO other",
        "ALTER TABLE measurements RENAME TO other; CREATE VIEW measurements AS SELECT * FROM other",
    ],
)
def test_a_database_with_another_schema_does_not_stop_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("PARALLAX_GEN_DB", str(tmp_path / "mine.db"))
    with Store() as store:
        store.save(make_record())
    with closing(sqlite3.connect(tmp_path / "mine.db")) as database:
        database.executescript(damage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with closing(RuntimeMemory(tmp_path)) as memory:
            assert choose(SPEC, SHAPE, GPU, memory).config in (CONFIG, DEFAULT)


def test_choices_from_random_records_are_valid() -> None:
    """1,000 random places, each with its own records."""
    draw = random.Random(0)
    kernels = random_kernel_configs(draw) | {spec: [DEFAULT, CONFIG] for spec in (SPEC, replace(SPEC, group=2))}
    tiers: Counter[Tier] = Counter()
    took = 0.0
    for _ in range(1000):
        place, results = random_records(draw, kernels, most=8)
        spec, card = place.spec, GPUS[place.gpu]
        table = RecordTable([*results, *random_support(draw, place, card)] if draw.random() < 0.05 else results)
        start = time.process_time()
        choice = choose(spec, representative(place.bucket, spec.group), card, table)
        took += time.process_time() - start
        tiers[choice.candidate.tier] += 1
        assert why_invalid(spec, choice.config, card) is None
        record = choice.record
        if record is None:
            assert choice.config == default_of(choice.place, card)
            continue
        assert (record.config, record.outcome) == (choice.config, "ok")
        if choice.candidate.tier == Tier.NEAR_BUCKET:
            assert record.place in near_places(choice.place, card)
            assert choice.config == default_of(choice.place, card)
        else:
            assert replace(record.place, gpu=card.name) == choice.place
            assert record.place == choice.place or record.place.gpu in siblings(card)
        assert not record.evidence.templates
        assert render(spec, record.config, card).kernel == record.evidence.kernel
    assert min(tiers[tier] for tier in Tier) > 5, tiers  # each tier occurs
    assert took < 5.0  # CPU seconds: 5 ms per call, half of the budget, including rendering
