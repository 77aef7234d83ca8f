"""The ranking of configs for a call: by tier, and only kernels that today's templates render."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest

from parallax_gen.codegen import fingerprint as identity
from parallax_gen.codegen.fingerprint import fingerprint
from parallax_gen.codegen.render import render, text_hash_of
from parallax_gen.memory import ranking
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import (
    RecordTable,
    Tier,
    best,
    default_of,
    evidence_of,
    is_current,
    is_rendered,
    near_places,
    ranked,
    siblings,
)
from parallax_gen.memory.result import Evidence, Result
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec

GPU = GPUS["h200"]
SPEC = KernelSpec("forward", 128, "bf16", causal=True)
PLACE = Place(GPU.name, SPEC, Bucket(8, 4096, 4096))
ON_SIBLING = dataclasses.replace(PLACE, gpu="h100")
DEFAULT = default_of(PLACE, GPU)
HERE = Toolchain("3.9.0", "13.4")
OLD = {"triton": "3.6.0", "cuda": "12.8/12.9"}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toolchain, "here", classmethod(lambda cls: HERE))


def other_config(**fields: Any) -> ForwardConfig:
    """A config of a search that knew every knob of the default."""
    assert isinstance(DEFAULT, ForwardConfig)
    return dataclasses.replace(DEFAULT, **({"GROUP_HEADS": 2} | fields))


def record(
    time_us: float = 100.0, config: KernelConfig | None = None, place: Place = PLACE, day: int = 1, **evidence: Any
) -> Result:
    """A result of today's kernel and toolchain, except for the fields in `evidence`."""
    config = other_config() if config is None else config
    result = dataclasses.replace(evidence_of(render(place.spec, config, GPU)), **evidence)
    return Result(place, result, config, "ok", time_us=time_us, created_at=f"2026-01-{day:02}T00:00:00+00:00")


def choices(*records: Result) -> list[tuple[Tier, KernelConfig]]:
    sorted_records = sorted(records, key=lambda r: r.time_us or 0.0)
    return [(c.tier, c.config) for c in ranked(PLACE, GPU, RecordTable(sorted_records))]


LAST = (Tier.DEFAULT, DEFAULT)


def test_without_records_it_is_the_default() -> None:
    assert choices() == [LAST]
    assert choices(record(place=dataclasses.replace(PLACE, bucket=Bucket(16, 4096, 4096)))) == [LAST]


def test_tiers_have_priority_over_times() -> None:
    one, two, three = (other_config(GROUP_HEADS=n) for n in (2, 4, 8))
    slow, faster, fastest = record(9.0, one), record(2.0, two, **OLD), record(1.0, three, ON_SIBLING)
    here, elsewhere, sibling = ((t, c) for t, c in zip([*Tier][:3], (one, two, three), strict=True))
    assert choices(slow, faster, fastest) == [here, elsewhere, sibling, LAST]
    assert choices(faster, fastest) == [elsewhere, sibling, LAST]
    assert choices(fastest) == [sibling, LAST]


def test_a_card_outside_the_table_has_no_siblings() -> None:
    """The limits of a card that is neither in the table nor installed are unknown."""
    sibling = record(place=dataclasses.replace(PLACE, gpu="h100"))
    assert best(PLACE, GPU, RecordTable([sibling])).tier == Tier.SIBLING_CARD
    assert best(dataclasses.replace(PLACE, gpu="nvidia-x-1sm"), GPU, RecordTable([sibling])).tier == Tier.DEFAULT


@pytest.mark.parametrize("name", ["mi300x", "mi355x"])
def test_an_amd_card_borrows_from_its_architecture_alone(name: str) -> None:
    card = GPUS[name]
    others = [gpu for gpu in GPUS.values() if gpu.target != card.target]
    assert siblings(card) == [gpu.name for gpu in GPUS.values() if gpu.target == card.target and gpu is not card]
    assert not any(name in siblings(gpu) for gpu in others)
    place, config = dataclasses.replace(PLACE, gpu=name), default_of(dataclasses.replace(PLACE, gpu=name), card)
    elsewhere = [record(config=config, place=dataclasses.replace(PLACE, gpu=gpu.name)) for gpu in others]
    assert best(place, card, RecordTable(elsewhere)).tier == Tier.DEFAULT
    here = [record(config=config, place=place)]
    assert all(best(r.place, GPUS[r.place.gpu], RecordTable(here)).record is None for r in elsewhere)
    of_sibling = record(config=config, place=dataclasses.replace(PLACE, gpu=siblings(card)[0]))
    assert best(place, card, RecordTable([of_sibling])).tier == Tier.SIBLING_CARD


def test_a_siblings_preprocess_is_evidence_for_the_default_alone() -> None:
    place = Place(GPU.name, KernelSpec("preprocess", 128, "bf16"), Bucket(8, 4096, 4096))
    sibling = dataclasses.replace(place, gpu="h100")
    default = default_of(place, GPU)
    others = [record(us, dataclasses.replace(default, num_warps=n), sibling) for us, n in ((8.0, 8), (12.0, 2))]
    slow, fast = (record(us, default, sibling) for us in (9.0, 8.1))
    assert best(place, GPU, RecordTable(others)).record is None
    assert best(place, GPU, RecordTable([*others, slow])).record is None
    choice = best(place, GPU, RecordTable([*others, fast]))
    assert (choice.tier, choice.record, choice.supports_default) == (Tier.SIBLING_CARD, fast, True)


DECODE = Place(GPU.name, KernelSpec("decode", 128, "bf16", group=4), Bucket(8, 1, 4096))


def near(kv_rows: int, seqlen_kv: int) -> Place:
    return dataclasses.replace(DECODE, bucket=Bucket(kv_rows, 1, seqlen_kv))


def supporting(place: Place, us: float = 8.0) -> list[Result]:
    """Records of today's default, and of two slower configs."""
    default = default_of(DECODE, GPU)
    others = (dataclasses.replace(default, num_stages=n) for n in (2, 3, 4, 5) if n != default.num_stages)
    return [record(us, default, place), *(record(us + 1 + n, next(others), place) for n in range(2))]


def test_near_buckets_support_the_default_along_keys_first() -> None:
    order = [near(8, 2048), near(8, 8192), near(8, 1024), near(8, 16384), near(4, 4096), near(16, 4096)]
    near_records = [r for n, place in enumerate(order) for r in supporting(place, 9.0 - n)]  # the nearest is slowest
    result = list(ranked(DECODE, GPU, RecordTable(near_records)))
    assert [c.tier for c in result] == [Tier.NEAR_BUCKET] * len(order) + [Tier.DEFAULT]
    assert [c.record.place for c in result[:-1] if c.record] == order
    assert {c.config for c in result} == {default_of(DECODE, GPU)}
    own = record(99.0, near_records[1].config, DECODE, **OLD)
    assert best(DECODE, GPU, RecordTable([*near_records, own])).record == own
    further = [near(8, 32768), near(32, 4096), dataclasses.replace(near(8, 2048), gpu="a100")]
    assert best(DECODE, GPU, RecordTable(r for place in further for r in supporting(place))).record is None


def test_near_buckets_of_a_sibling_come_after_its_own_bucket_and_the_cards_near_buckets() -> None:
    here, near_here = DECODE, near(16, 4096)
    there, near_there = (dataclasses.replace(place, gpu="h100") for place in (here, near(8, 2048)))
    config = dataclasses.replace(default_of(DECODE, GPU), num_warps=8)
    records = [record(config=config, place=place) for place in (here, there)]
    records += [r for place in (near_here, near_there) for r in supporting(place)]
    candidates = list(ranked(DECODE, GPU, RecordTable(reversed(records))))
    assert [c.record and c.record.place for c in candidates] == [here, there, near_here, near_there, None]
    assert [c.tier for c in candidates[:-1]] == [1, 3, 4, 4]


PER_SEQUENCE = KernelSpec("decode_varlen", 128, "bf16", group=4, page_size=16)
PROMPTS = KernelSpec("decode_varlen", 128, "bf16", group=4, causal=True, varlen=True, multi_token=True)


@pytest.mark.parametrize(("spec", "seqlen_q"), [(SPEC, 4096), (PROMPTS, 2048), (PER_SEQUENCE, 1), (DECODE.spec, 1)])
def test_near_buckets_only_support_the_default(spec: KernelSpec, seqlen_q: int) -> None:
    """The default's record counts where two others were timed and none is more than 3 % faster."""
    place = Place(GPU.name, spec, Bucket(32, seqlen_q, 4096))
    lengths = {"seqlen_kv": 8192} | ({"seqlen_q": 8192} if seqlen_q == 4096 else {})
    near_place = dataclasses.replace(place, bucket=dataclasses.replace(place.bucket, **lengths))
    default = default_of(place, GPU)
    others = [dataclasses.replace(default, num_stages=n) for n in (2, 3, 4) if n != default.num_stages][:2]
    faster, slower = record(8.0, others[0], near_place), record(12.0, others[1], near_place)
    hardly_slower, slow = record(8.2, default, near_place), record(8.3, default, near_place)
    choice = best(place, GPU, RecordTable([faster, slower, hardly_slower]))
    assert (choice.tier, choice.record, choice.supports_default) == (Tier.NEAR_BUCKET, hardly_slower, True)
    for records in ([faster, slower], [faster, slower, slow], [hardly_slower], [faster, hardly_slower]):
        choice = best(place, GPU, RecordTable(records))
        assert (choice.tier, choice.config) == (Tier.DEFAULT, default)


def test_the_smallest_buckets_have_near_buckets() -> None:
    smallest = [p.bucket for p in near_places(near(1, 128), GPU) if p.gpu == GPU.name]
    assert smallest == [Bucket(1, 1, 256), Bucket(1, 1, 512), Bucket(2, 1, 128)]
    assert near_places(PLACE, GPU)[0].bucket == Bucket(8, 2048, 2048)  # both lengths of self-attention change together


def test_within_a_toolchain_the_fastest_comes_first_across_toolchains_the_newest() -> None:
    one, two, three = (other_config(GROUP_HEADS=n) for n in (2, 4, 8))
    assert [c for _, c in choices(record(2.0, one), record(1.0, two), record(3.0, three))] == [two, one, three, DEFAULT]
    old, older = {"triton": "3.8.0", "cuda": "13.0"}, OLD
    result = choices(record(9.0, one, day=2, **old), record(1.0, two, day=1, **older), record(8.0, three, day=2, **old))
    assert [c for _, c in result] == [three, one, two, DEFAULT]


def test_a_siblings_record_of_this_toolchain_comes_first() -> None:
    one, two = other_config(), other_config(GROUP_HEADS=4)
    result = choices(record(1.0, one, ON_SIBLING, day=9, **OLD), record(2.0, two, ON_SIBLING))
    assert [c for _, c in result] == [two, one, DEFAULT]
    assert siblings(GPU) == ["h100", "h100-pcie", "h100-nvl", "h800", "h20", "gh200", "gh200-144gb"]
    assert "h200" in siblings(GPUS["h100"])
    assert not {"h100", "h200"} & set(siblings(GPUS["a100"]))
    assert (siblings(GPUS["b200"]), siblings(GPUS["b300"]), siblings(GPUS["l4"])) == (
        ["gb200"],
        [],
        ["l40s", "rtx4090"],
    )


@pytest.mark.parametrize(
    "evidence", [{"kernel": "f" * 32, "text": "f" * 32}, {"kernel": "", "text": ""}, {"kernel": "", "templates": "abc"}]
)
def test_records_of_other_kernels_are_never_chosen(evidence: dict[str, str]) -> None:
    assert choices(record(**evidence), record(place=ON_SIBLING, **evidence)) == [LAST]
    assert not is_rendered(record(**evidence), GPU)


def test_another_text_of_the_same_kernel_is_the_same_kernel() -> None:
    assert choices(record(text="e" * 32))[0] == (Tier.MEASURED_HERE, other_config())
    assert choices(record(text=""))[0] == (Tier.MEASURED_HERE, other_config())


def test_a_wrong_fingerprint_in_a_record_affects_no_other_record_or_header() -> None:
    """Whichever record is read first. New measurements have the right fingerprint, too."""
    config = other_config(GROUP_HEADS=16)
    true = record(2.0, config)
    false = record(1.0, config, ON_SIBLING, kernel="f" * 32)
    render.cache_clear()
    identity._CACHED.pop(true.evidence.text)
    assert is_rendered(false, GPU)
    assert true.evidence.text not in identity._CACHED  # matched by its text hash, without parsing
    assert is_rendered(true, GPU)
    source = render(SPEC, config, GPU)
    assert evidence_of(source) == true.evidence
    assert source.kernel == fingerprint(source.text)
    assert f"kernel {source.kernel[:12]}" in source.text


def test_the_second_best_is_chosen_if_the_best_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = record(1.0, other_config(GROUP_HEADS=4)), record(2.0)
    reason = lambda spec, config, gpu: "not today" if config == fast.config else None  # noqa: E731
    monkeypatch.setattr(ranking, "why_invalid", reason)
    assert choices(fast, slow) == [(Tier.MEASURED_HERE, slow.config), LAST]


def test_only_measured_records_are_chosen() -> None:
    failed = dataclasses.replace(record(1.0), outcome="wrong")
    guessed = dataclasses.replace(record(1.0, other_config(GROUP_HEADS=4)), outcome="predicted")
    assert choices(failed, guessed) == [LAST]


def test_times_of_other_protocols_are_a_lower_tier() -> None:
    one, two = other_config(), other_config(GROUP_HEADS=4)
    result = choices(record(1.0, one, protocol=0), record(2.0, two))
    assert result == [(Tier.MEASURED_HERE, two), (Tier.OTHER_TOOLCHAIN, one), LAST]


def test_records_of_a_search_older_than_a_knob_of_the_default_are_skipped() -> None:
    """Such records say nothing about knobs that the default has gained since."""
    assert isinstance(DEFAULT, ForwardConfig)
    assert DEFAULT.SOFTMAX == "fixed_reference"
    before = other_config(SOFTMAX="online")
    assert choices(record(1.0, before)) == [LAST]
    assert choices(record(1.0, before), record(2.0, place=ON_SIBLING)) == [(Tier.SIBLING_CARD, other_config()), LAST]
    # Unless the search also has a record with the knob, or the default's own time.
    assert choices(record(1.0, before), record(2.0))[0] == (Tier.MEASURED_HERE, before)
    assert choices(record(1.0, before), record(2.0, DEFAULT))[0] == (Tier.MEASURED_HERE, before)
    # Failed ones count, too: the search knew the knob.
    failed = dataclasses.replace(record(2.0, DEFAULT), outcome="wrong")
    assert choices(record(1.0, before), failed)[0] == (Tier.MEASURED_HERE, before)
    guessed = dataclasses.replace(record(2.0, DEFAULT), outcome="predicted")
    assert choices(record(1.0, before), guessed) == [LAST]
    # Searches of different toolchains are judged separately.
    assert choices(record(1.0, before), record(2.0, **OLD)) == [(Tier.OTHER_TOOLCHAIN, other_config()), LAST]


def test_records_of_a_search_older_than_a_knob_of_the_siblings_best_are_skipped() -> None:
    windowed = dataclasses.replace(
        PLACE, spec=dataclasses.replace(SPEC, window=True), bucket=Bucket(8, 4096, 4096, 1024)
    )
    default = default_of(windowed, GPU)
    assert isinstance(default, ForwardConfig)
    assert default.SOFTMAX == "online"
    first = dataclasses.replace(default, SOFTMAX="fixed_reference")
    sibling = dataclasses.replace(windowed, gpu="h100")

    def chosen(*records: Result) -> KernelConfig:
        return best(windowed, GPU, RecordTable(records)).config

    own = record(2.0, default, windowed, day=2)
    assert chosen(own, record(1.0, first, sibling, day=3)) == first
    assert (
        chosen(own, record(1.0, first, sibling, day=1)) == default
    )  # it existed during the search, which did not choose it
    assert chosen(own, record(9.0, first, windowed, day=2), record(1.0, first, sibling, day=3)) == default
    assert (
        chosen(own, record(1.0, first, sibling, day=3, kernel="f" * 32, text="")) == default
    )  # of a changed kernel, so it does not count


@pytest.mark.parametrize("outcome", ["wrong", "crash", "compile", "timeout", "resources", "slow"])
@pytest.mark.parametrize("where", [{}, {"place": ON_SIBLING}])
def test_kernels_that_failed_here_are_not_borrowed(outcome: str, where: dict[str, Place]) -> None:
    elsewhere = record(1.0, **where, **OLD)
    failed = dataclasses.replace(record(), outcome=outcome, time_us=9.0 if outcome == "slow" else None)
    assert choices(elsewhere) != [LAST]
    assert choices(elsewhere, failed) == [LAST]
    lost = dataclasses.replace(failed, evidence=dataclasses.replace(failed.evidence, kernel="f" * 32, text="e" * 32))
    assert choices(elsewhere, lost) != [LAST]  # the failed kernel was another one


def test_the_newest_time_of_a_kernel_and_toolchain_counts() -> None:
    old = record(1.0, day=1, triton="3.9.1")
    assert choices(old, record(5.0, day=2)) == [(Tier.MEASURED_HERE, other_config()), LAST]
    faster = record(3.0, other_config(GROUP_HEADS=4))
    assert choices(old, record(5.0, day=2), faster)[0] == (Tier.MEASURED_HERE, faster.config)
    assert choices(old, dataclasses.replace(record(day=2), outcome="wrong", time_us=None)) == [LAST]


def test_current_includes_all_outcomes() -> None:
    failed = dataclasses.replace(record(), outcome="wrong")
    assert is_current(failed, GPU)
    assert is_current(record(triton="3.9.7"), GPU)
    assert not is_current(record(**OLD), GPU)
    assert not is_current(record(protocol=0), GPU)
    assert not is_current(record(kernel="f" * 32, text=""), GPU)


def test_kernels_from_before_fingerprints_are_not_rendered() -> None:
    old = Result(PLACE, Evidence("", "", "3.6", "12.8", 1, "7c01cbe51c52"), default_of(PLACE, GPU), "ok", time_us=1.0)
    assert not is_rendered(old, GPU)
    assert best(PLACE, GPU, RecordTable([old])).tier == Tier.DEFAULT


def test_kernels_are_rendered_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[KernelConfig] = []

    def watched(spec: KernelSpec, config: KernelConfig, gpu: Any) -> str:
        rendered.append(config)
        return text_hash_of(spec, config, gpu)

    records: Iterable[Result] = [record(1.0), record(2.0, other_config(GROUP_HEADS=4)), record(0.5, place=ON_SIBLING)]
    monkeypatch.setattr(ranking, "text_hash_of", watched)
    assert best(PLACE, GPU, RecordTable(records)).tier == Tier.MEASURED_HERE
    assert rendered == [other_config()]
