"""Records shared between ranks: calls rank the same kernels in the same order as with all records."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest
from random_records import random_config, random_kernel_configs, random_records, random_result

from parallax_gen.codegen.render import render
from parallax_gen.codegen.resources import Resources
from parallax_gen.memory.guard import CompiledResources, checked_choice, launch_candidates
from parallax_gen.memory.lines import read_lines, to_line
from parallax_gen.memory.place import Place
from parallax_gen.memory.ranking import (
    RecordTable,
    Tier,
    default_of,
    evidence_of,
    near_places,
    representative_records,
)
from parallax_gen.memory.result import Result, reading_order
from parallax_gen.memory.sharing import places_served, records_to_share
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.toolchain import Toolchain, minor
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.space import why_invalid
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket
from parallax_gen.problem.spec import KernelSpec

GPU = GPUS["h200"]
FORWARD = Place("h200", KernelSpec("forward", 128, "bf16", causal=True), Bucket(8, 4096, 4096))
DECODE = Place("h200", KernelSpec("decode", 128, "bf16", group=4), Bucket(16, 1, 4096))
OLD = {"triton": "2.0.0", "cuda": "11.0"}
MOST_ARE_OF_THIS_TRITON = minor(Toolchain.here().triton) == "3.9"  # of the shipped records


class InMemory(Memory):
    """A memory without files."""

    def __init__(self, results: Iterable[Result]) -> None:
        super().__init__()
        self.held = sorted({r.identity: r for r in results}.values(), key=reading_order)

    def results(self, place: Place) -> list[Result]:
        return [r for r in self.held if r.place == place]

    def all(self, gpu: str | None = None, op: str | None = None) -> list[Result]:
        return [r for r in self.held if gpu in (None, r.place.gpu)]


def received(shared: Iterable[Result]) -> RecordTable:
    """The record table of another rank."""
    result = read_lines("sent", "".join(map(to_line, shared)).encode().splitlines())
    assert result.problems == []
    return RecordTable(result.results)


def known(config: KernelConfig, place: Place, time_us: float = 10.0, outcome: str = "ok", **evidence: str) -> Result:
    result = replace(evidence_of(render(place.spec, config, GPU)), **evidence)
    return Result(place, result, config, outcome, time_us=time_us if outcome == "ok" else None)


def compiler(draw: random.Random) -> CompiledResources:
    """A fake compiler; half of the kernels spill."""
    salt = draw.random()
    return lambda config: Resources(255, random.Random(f"{salt} {config}").choice((0, 1000)), 1000)


def full_memory(draw: random.Random, kernels: dict[KernelSpec, list[KernelConfig]]) -> tuple[Place, list[Result]]:
    """A place, and many results of a few kernels (mostly today's) there, at near buckets and on a sibling card."""
    place = Place("h200", draw.choice(list(kernels)), Bucket(8, 1, 4096))
    if place.spec.public_op != "decode":
        place = replace(place, bucket=Bucket(8, 4096, 4096))
    around = [
        replace(p, gpu=gpu) for p in (place, place, *near_places(place, GPU)[:3]) for gpu in ("h200", "h200", "h100")
    ]
    results = [random_result(draw, draw.choice(around), kernels[place.spec]) for _ in range(draw.randint(0, 16))]
    today = [
        replace(known(r.config, r.place).evidence, triton=r.evidence.triton, cuda=r.evidence.cuda) for r in results
    ]
    return place, [replace(r, evidence=e) if draw.random() < 0.8 else r for r, e in zip(results, today, strict=True)]


def valid_kernels(draw: random.Random) -> dict[KernelSpec, list[KernelConfig]]:
    """Valid configs of forward and dkdv, whose knobs were added over time, and of decode."""
    result: dict[KernelSpec, list[KernelConfig]] = {}
    for spec in (FORWARD.spec, replace(FORWARD.spec, op="dkdv"), DECODE.spec, replace(DECODE.spec, head_dim=64)):
        default = default_of(replace(DECODE, spec=spec), GPU)
        others = {
            config for config in (random_config(draw, spec) for _ in range(200)) if not why_invalid(spec, config, GPU)
        }
        before = [config for config in others if all(getattr(config, f.name) == f.default for f in later(config))]
        result[spec] = [default, *sorted(others, key=str)[:4], *sorted(before, key=str)[:2]]
    return result


def later(config: KernelConfig) -> list[Any]:
    return [f for f in fields(config) if f.default is not MISSING]


@pytest.mark.parametrize(
    ("full", "rounds"), [(False, 100), (True, 400), pytest.param(False, 300, marks=pytest.mark.slow)]
)
def test_both_ranks_rank_alike_for_random_records(full: bool, rounds: int) -> None:
    draw = random.Random(1)
    kernels = valid_kernels(draw) if full else random_kernel_configs(draw)
    seen: Counter[str] = Counter()
    for _ in range(rounds):
        place, results = full_memory(draw, kernels) if full else random_records(draw, kernels, most=40)
        card, memory = GPUS[place.gpu], InMemory(results)
        shared = records_to_share(memory, card)
        received_records = received(shared)
        seen["sent"] += len(shared)
        seen["held"] += len(memory.held)
        places = dict.fromkeys([place, *places_served(memory.held, card)])
        chosen = {place: list(launch_candidates(place, card, memory)) for place in places}
        for place, expected in chosen.items():
            assert list(launch_candidates(place, card, received_records)) == expected
            compiled = compiler(draw)
            assert checked_choice(place, card, received_records, compiled) == checked_choice(
                place, card, memory, compiled
            )
            seen[f"{len(expected)} of {expected[0].tier.text}"] += 1
        bests = [choice[0].record for choice in chosen.values() if choice[0].record]
        for name, some in (("bests", bests), ("bests and what their searches knew", known_of(bests, memory))):
            table = RecordTable(sorted(set(some), key=reading_order))
            seen[f"not enough: {name}"] += any(list(launch_candidates(p, card, table)) != chosen[p] for p in places)
    assert seen["sent"] < 0.7 * seen["held"]
    if full:
        several = [f"2 of {tier.text}" for tier in (Tier.OTHER_TOOLCHAIN, Tier.SIBLING_CARD)]
        less = [name for name in seen if name.startswith("not enough")]
        assert len(less) == 2
        assert min(seen[name] for name in (*several, *less, "1 of measured here", "1 of the default")) > 20, seen


def known_of(records: Iterable[Result], memory: Memory) -> list[Result]:
    return [shown for record in records for shown in representative_records(record, memory)]


def test_the_second_candidate_of_a_call_is_sent() -> None:
    configs = [DecodeConfig(64, 8, NUM_SPLITS=n, merge="kernel", num_warps=2, num_stages=3) for n in (6, 12, 24)]
    results = [known(config, DECODE, 10.0 + n, **OLD) for n, config in enumerate(configs)]
    shared = records_to_share(InMemory(results), GPU)
    assert [r.config for r in shared] == configs[:2]
    refused = checked_choice(DECODE, GPU, received(shared), lambda c: Resources(255, 1000 * (c == configs[0]), 1000))
    assert refused.candidate.config == configs[1]


def test_failed_trials_that_show_what_a_search_knew_are_sent() -> None:
    default = default_of(FORWARD, GPU)
    assert isinstance(default, ForwardConfig)
    assert default.SOFTMAX == "fixed_reference"
    fast = known(replace(default, SOFTMAX="online"), FORWARD)
    failed = known(replace(default, GROUP_HEADS=2), FORWARD, outcome="wrong")
    useless = known(replace(default, GROUP_HEADS=4), FORWARD, outcome="wrong")
    shared = records_to_share(InMemory([fast, failed, useless]), GPU)
    assert len(shared) == 2
    assert next(launch_candidates(FORWARD, GPU, received(shared))).record == fast


def test_failures_on_rank_0_prevent_borrowing_on_other_ranks() -> None:
    config = DecodeConfig(64, 8, NUM_SPLITS=6, merge="kernel", num_warps=2, num_stages=3)
    sibling = known(config, replace(DECODE, gpu="h100"))
    assert next(launch_candidates(DECODE, GPU, received(records_to_share(InMemory([sibling]), GPU)))).config == config
    shared = records_to_share(InMemory([sibling, known(config, DECODE, outcome="wrong")]), GPU)
    assert next(launch_candidates(DECODE, GPU, received(shared))).tier == Tier.DEFAULT


@pytest.mark.parametrize(("name", "most"), [("h100", 0.55), ("h200", 0.35 if MOST_ARE_OF_THIS_TRITON else 0.55)])
def test_a_part_of_the_shipped_records_is_sent(name: str, most: float) -> None:
    """Who borrows gets two candidates for each place and the default's time: an H100, and an H200's other Triton."""
    memory, card = Memory(), GPUS[name]
    shared = records_to_share(memory, card)
    table = received(shared)
    everything = memory.all()
    assert len(shared) < most * len(everything)
    known = RecordTable(everything)
    for place in places_served(everything, card)[::7]:
        assert list(launch_candidates(place, card, table)) == list(launch_candidates(place, card, known))


def test_nothing_is_sent_without_records() -> None:
    assert records_to_share(InMemory([]), GPU) == []
