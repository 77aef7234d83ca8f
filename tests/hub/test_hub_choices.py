"""A hub package picks for each call the kernel that calls of parallax_gen get."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_samples import DECODE, H200, calls_of, limit_sizes
from random_records import random_kernel_configs, random_records

from parallax_gen.errors import ArgumentError, BuildError, UnknownGpuError
from parallax_gen.hub.package import dispatch
from parallax_gen.hub.package import ops as packaged_ops
from parallax_gen.hub.package import records as reader
from parallax_gen.hub.package.dispatch import Choice, candidates, card_like, first_good, toolchain_key
from parallax_gen.hub.package.kernels import Resources
from parallax_gen.hub.records import PackageRecords
from parallax_gen.memory import guard
from parallax_gen.memory.guard import launch_candidates
from parallax_gen.memory.place import config_at, place_of
from parallax_gen.memory.ranking import RecordTable, Tier
from parallax_gen.memory.result import Result
from parallax_gen.memory.shipped import Memory
from parallax_gen.memory.toolchain import Toolchain
from parallax_gen.ops.base import config_to_dict, op_of
from parallax_gen.ops.tile_form import programs_of
from parallax_gen.ops.tiles import TiledOp
from parallax_gen.problem.hardware import GPUS, Gpu
from parallax_gen.problem.shapes import Shape, bucket_of
from parallax_gen.problem.spec import QUERY_ROW_OPS, KernelSpec
from parallax_gen.runtime.dispatch import choose

Read = Callable[[PackageRecords], None]
QWEN3 = KernelSpec("forward", 128, "bf16", group=2, causal=True)
LONGEST = 2048


class Table(RecordTable):
    """Records as a Memory's."""

    def __init__(self, records: Sequence[Result]):
        super().__init__(records)
        self._all = records

    def all(self, gpu: str) -> list[Result]:
        return [record for record in self._all if record.place.gpu == gpu]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Read]:
    """Makes records those of the package that hub/package/ reads, without the limit of CI on sizes."""
    caches = (reader.specs, reader.cards, reader.choices, dispatch.card_like)

    def clear() -> None:
        for cache in caches:
            cache.cache_clear()

    def read_from_now_on(records: PackageRecords) -> None:
        for name, data in records.files.items():
            (tmp_path / name).write_text(json.dumps(data), encoding="utf-8")
        clear()

    limit_sizes(monkeypatch, kv_rows=64, longest=LONGEST)
    monkeypatch.setattr(reader, "CONFIGS", tmp_path)
    yield read_from_now_on
    clear()


def random_shape(draw: random.Random, spec: KernelSpec) -> Shape:
    """A shape within the sizes of the package."""
    one_query = spec.public_op == "decode" and not spec.multi_token
    seqlen_q = 1 if one_query else draw.choice((1, draw.randint(2, LONGEST)))
    seqlen_kv = seqlen_q if spec.op in QUERY_ROW_OPS else draw.randint(1, LONGEST)
    kv_heads = draw.choice((1, 2, 3, 8))
    window = 1024 if spec.window else 0
    return Shape(draw.randint(1, 8), kv_heads * spec.group, kv_heads, seqlen_q, seqlen_kv, window)


def picked(spec: KernelSpec, shape: Shape, card: str, toolchain: Toolchain) -> list[tuple[dict[str, Any], int]]:
    """What the package considers for a call: configs and tiers."""
    options = candidates(spec, bucket_of(shape), card, toolchain_key(toolchain.triton, toolchain.cuda))
    return [(vars(option.config), option.tier) for option in options]


def ours(spec: KernelSpec, shape: Shape, gpu: Gpu, memory: Any, here: Toolchain) -> list[tuple[dict[str, Any], int]]:
    """What calls of parallax_gen consider, and at last the default."""
    place = place_of(gpu.name, spec, shape)
    options = [(c.config, int(c.tier)) for c in launch_candidates(place, gpu, memory, here)]
    if options[-1][1] not in guard.NOT_BORROWED:
        options.append((guard.default_of(place, gpu), int(Tier.DEFAULT)))
    return [(vars(config_at(spec, config)), tier) for config, tier in options]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_random_shapes_get_the_kernels_of_the_ranking(read: Read, seed: int) -> None:
    """With random records: of these and sibling cards, of near buckets, of several toolchains, and failures."""
    draw = random.Random(seed)
    kernels = random_kernel_configs(draw)
    found = (record for _ in range(40) for record in random_records(draw, kernels, 12)[1])
    in_reach = [r for r in found if max(r.place.bucket.seqlen_q, r.place.bucket.seqlen_kv) <= LONGEST]
    memory: Any = Table([*dict.fromkeys(in_reach)])
    cards = [GPUS["h200"], GPUS["a100"]]
    read(PackageRecords(calls_of(kernels), cards, memory))
    toolchains = [Toolchain.here(), Toolchain("3.6.0", "12.8/12.9"), Toolchain("4.0.2", "13.0"), Toolchain("9.9", "")]
    seen = set()
    places = {record.place for record in in_reach}
    for spec in kernels:
        shapes = [random_shape(draw, spec) for _ in range(30)]
        known = [p.bucket for p in places if p.spec == spec and not p.bucket.window % 1024]
        shapes += [Shape(b.kv_rows, spec.group, 1, b.seqlen_q, b.seqlen_kv, b.window) for b in known if b.kv_rows <= 64]
        for shape in shapes:
            for gpu in cards:
                for toolchain in toolchains:
                    expected = ours(spec, shape, gpu, memory, toolchain)
                    assert picked(spec, shape, gpu.name, toolchain) == expected, (spec, shape, gpu.name, toolchain)
                    seen |= {tier for _, tier in expected}
    assert seen >= {Tier.MEASURED_HERE, Tier.OTHER_TOOLCHAIN, Tier.SIBLING_CARD, Tier.DEFAULT}


def test_calls_of_qwen3_get_what_the_dispatcher_chooses(read: Read) -> None:
    """With the shipped records, in this process's toolchain."""
    specs = [QWEN3.for_op(op) for op in ("forward", "preprocess", "dkdv", "dqdr")]
    specs += [QWEN3, KernelSpec("decode", 128, "bf16", group=2)]
    memory = Memory()
    read(PackageRecords(calls_of(specs), [H200], memory))
    draw = random.Random(3)
    for spec in specs:
        for shape in (random_shape(draw, spec) for _ in range(20)):
            choice = choose(spec, shape, H200, memory)
            config, tier = picked(spec, shape, "h200", Toolchain.here())[0]
            assert (config, tier) == (vars(choice.config), choice.candidate.tier)


@pytest.mark.slow
def test_every_bucket_of_a_whole_package(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes up to those that no card holds, and beyond the largest that of the largest."""
    limit_sizes(monkeypatch, kv_rows=2**16, longest=2**20)
    memory = Memory()
    read(PackageRecords(calls_of([QWEN3, DECODE]), [H200], memory))
    draw = random.Random(4)
    for spec in (QWEN3, DECODE):
        for _ in range(2000):
            batch, queries, keys = (round(2 ** draw.uniform(0, most)) for most in (13, 20, 20))
            shape = Shape(batch, 16, 8, queries if spec is QWEN3 else 1, keys)
            assert picked(spec, shape, "h200", Toolchain.here()) == ours(spec, shape, H200, memory, Toolchain.here())
    huge = replace(shape, seqlen_kv=2**24)
    assert picked(DECODE, huge, "h200", Toolchain.here()) == picked(
        DECODE, replace(huge, seqlen_kv=2**20), "h200", Toolchain.here()
    )


def test_launches_take_what_the_ops_say(read: Read) -> None:
    """The arguments, scratch, descriptors and programs of random kernels."""
    draw = random.Random(5)
    kernels = random_kernel_configs(draw)
    changes: list[dict[str, Any]] = [{}, {"page_size": 16}, {"batch_invariant": True}, {"stats": True}]
    several = [replace(s, **change) for s in kernels if s.per_sequence_lengths for change in changes]
    specs = [*dict.fromkeys([*kernels, *several])]
    read(PackageRecords(calls_of(specs), [H200], Table([])))  # type: ignore[arg-type]
    split = 0
    for spec in specs:
        op, packaged = op_of(spec), packaged_ops.op_of(spec)
        for name in ("inputs", "written", "lengths", "sizes", "scales_taken"):
            assert getattr(packaged, name)(spec) == getattr(op, name)(spec)
        assert packaged.per_sequence_lengths == op.per_sequence_lengths
        assert isinstance(packaged, packaged_ops.TiledOp) == isinstance(op, TiledOp)
        for kernel in reader.packaged(spec).kernels:
            config = op.config(**vars(kernel.config))
            for _ in range(10):
                sizes = draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 99) if spec.multi_token else 1
                needed = op.scratch(spec, config, *sizes)
                assert vars(packaged.scratch(spec, kernel.config, *sizes)) == vars(needed)
                split += needed.floats > 0
            if isinstance(op, TiledOp):
                shape = random_shape(draw, spec)
                assert packaged_ops.programs_of(packaged, kernel.config, shape) == programs_of(op, config, shape)
                tensors = [d.tensors for d in op.descriptors(spec, config)]
                assert [d.tensors for d in packaged.descriptors(spec, kernel.config)] == tensors
            assert kernel.config == type(kernel.config)(**vars(kernel.config))
            assert config_to_dict(config).items() <= vars(kernel.config).items()
    assert split


def test_a_spec_that_was_not_exported_is_named_with_those_that_were(read: Read) -> None:
    read(PackageRecords(calls_of([DECODE]), [H200], Table([])))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"got the kernel \(forward, .*allowed: one of this package: \(decode, "):
        packaged_ops.op_of(QWEN3)


def test_another_card_gets_the_most_similar_one_that_fits(read: Read) -> None:
    read(PackageRecords(calls_of([DECODE]), [GPUS["a100"], GPUS["h200"]], Table([])))  # type: ignore[arg-type]
    assert card_like(H200) == "h200"
    with pytest.warns(UserWarning, match="no kernels for NVIDIA H100 SXM: those for h200 are used"):
        assert card_like(GPUS["h100"]) == "h200"
    with pytest.warns(UserWarning, match="those for h200"):
        assert card_like(GPUS["b200"]) == "h200"
    with pytest.raises(UnknownGpuError, match="kernels for a100, h200, which do not fit on NVIDIA GeForce RTX 3090"):
        card_like(GPUS["rtx3090"])


FAST, SECOND, SLOW = Choice("fast", 2, 1.0), Choice("second", 3, 2.0), Choice("default", 5, None)
MEASURED = Choice("measured", 1, 1.0)
GOOD, SPILLING, LARGE = Resources(0, 0), Resources(300, 0), Resources(0, 10**6)


@pytest.mark.parametrize(
    ("options", "resources", "expected", "compiled"),
    [
        ([MEASURED, SLOW], {}, MEASURED, []),
        ([SLOW], {}, SLOW, []),
        ([FAST, SLOW], {"fast": GOOD}, FAST, ["fast"]),
        ([FAST, SLOW], {"fast": Resources(128, 0)}, FAST, ["fast"]),
        ([FAST, SLOW], {"fast": SPILLING, "default": GOOD}, SLOW, ["fast", "default"]),
        ([FAST, SLOW], {"fast": SPILLING, "default": Resources(172, 0)}, FAST, ["fast", "default"]),
        ([FAST, SLOW], {"fast": SPILLING}, FAST, ["fast", "default"]),
        ([FAST, SECOND, SLOW], {"fast": LARGE, "second": GOOD}, SECOND, ["fast", "second"]),
        ([FAST, SECOND, SLOW], {"second": SPILLING, "default": GOOD}, SLOW, ["fast", "second", "default"]),
    ],
)
def test_a_borrowed_kernel_is_compiled_first(
    options: list[Choice], resources: dict[str, Resources], expected: Choice, compiled: list[str]
) -> None:
    """As memory/guard.py decides. A kernel without resources does not compile."""
    asked: list[str] = []

    def compile_kernel(config: str) -> Resources:
        asked.append(config)
        if config not in resources:
            raise BuildError("it does not")
        return resources[config]

    assert first_good(options, H200, compile_kernel) is expected
    assert asked == compiled
    assert first_good(options, H200, None) is options[0]
