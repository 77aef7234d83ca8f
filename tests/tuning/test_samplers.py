"""Samplers: each proposes every config once; the sampler with a cost model corrects the model by its trials."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

import pytest

from parallax_gen.errors import ArgumentError, install_command
from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.space import every_config, why_invalid
from parallax_gen.ops.tiles import TileConfig
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.search import search as search_module
from parallax_gen.tuning.search.cost_model import guess_us
from parallax_gen.tuning.search.search import SAMPLERS, Search, missing_package

H200 = GPUS["h200"]
FORWARD = KernelSpec("forward", 128, "bf16", causal=True)
SMALL = (KernelSpec("preprocess", 64, "fp32"), GPUS["rtx4090"])  # 21 configs
TRAINED = Shape(4, 16, 16, 4096, 4096)


def guess(config: KernelConfig) -> float:
    return guess_us(FORWARD, config, TRAINED, H200)


def wrong(config: KernelConfig) -> float:
    """Times that differ from the guess by one factor for each value of two knobs."""
    assert isinstance(config, TileConfig)
    return guess(config) * {1: 1.0, 2: 1.6, 3: 1.9, 4: 2.1}[config.num_stages] * {4: 1.0, 8: 1.7}[config.num_warps]


def costs(search: Search) -> Iterator[float]:
    while (config := search.ask()) is not None:
        yield wrong(config)
        search.tell(config, wrong(config))


def tried(search: Search, trials: int) -> list[float]:
    return list(islice(costs(search), trials))


@pytest.mark.parametrize("sampler", ["model", "corrected", "random"])
def test_every_config_is_proposed_once(sampler: str) -> None:
    spec, gpu = SMALL
    all_configs = list(every_config(spec, gpu))
    search = Search(spec, gpu, seed=0, sampler=sampler, guess=lambda c: guess_us(spec, c, TRAINED, gpu))
    proposed = []
    while (config := search.ask()) is not None:
        proposed.append(config)
        search.tell(config, None if len(proposed) % 4 == 0 else 100.0 + len(proposed))
    assert len(proposed) == len(all_configs)
    assert set(proposed) == set(all_configs)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s not in ("model", "corrected", "random")])
def test_optunas_samplers_propose_valid_new_configs(sampler: str) -> None:
    if missing_package(sampler):
        pytest.skip(f"{missing_package(sampler)} is not installed")
    search = Search(FORWARD, H200, seed=0, sampler=sampler)
    proposed = []
    for n in range(18):  # the first 16 are random
        config = search.ask()
        assert config is not None
        assert why_invalid(FORWARD, config, H200) is None
        proposed.append(config)
        search.tell(config, None if n % 4 == 0 else 10.0 + n)
    assert len(set(proposed)) == len(proposed)


def test_without_costs_the_guess_determines_the_order() -> None:
    search = Search(FORWARD, H200, guess=guess, sampler="model")
    proposed = [search.ask() for _ in range(30)]
    best = sorted(map(guess, every_config(FORWARD, H200)))[:30]
    assert [guess(config) for config in proposed if config is not None] == best


def test_a_wrong_guess_is_corrected() -> None:
    best = min(map(wrong, every_config(FORWARD, H200)))
    corrected, blind = (
        next(
            n
            for n, cost in enumerate(costs(Search(FORWARD, H200, guess=guess, sampler=sampler)))
            if cost <= 1.02 * best
        )
        for sampler in ("corrected", "model")
    )
    assert corrected < blind / 2


def test_failing_configs_are_soon_avoided() -> None:
    """The guess prefers configs that do not compile: the search soon proposes others."""
    doomed = {c for c in every_config(FORWARD, H200) if isinstance(c, TileConfig) and c.num_stages == 4}

    def too_good(config: KernelConfig) -> float:
        return guess(config) / (1.5 if config in doomed else 1.0)

    search, failures = Search(FORWARD, H200, guess=too_good), 0
    while (config := search.ask()) in doomed:
        search.tell(config, None)
        failures += 1
    assert 1 <= failures <= len(doomed) / 10


def test_the_default_sampler_with_and_without_a_guess() -> None:
    by_default, named = (Search(FORWARD, H200, guess=guess, sampler=s) for s in (None, "corrected"))
    assert tried(by_default, 15) == tried(named, 15)
    by_default, named = (Search(FORWARD, H200, seed=3, sampler=s) for s in (None, "tpe"))
    assert tried(by_default, 20) == tried(named, 20)


def test_only_configs_of_the_space_are_proposed() -> None:
    some_configs = list(every_config(FORWARD, H200))[::100]
    for sampler in ("corrected", "tpe"):
        search = Search(
            FORWARD, H200, first=every_config(FORWARD, H200), among=some_configs, guess=guess, sampler=sampler
        )
        proposed = [search.ask() for _ in some_configs]
        assert set(proposed) == set(some_configs)
        assert search.ask() is None


def test_unusable_samplers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="'best'; allowed: model, corrected, tpe"):
        Search(FORWARD, H200, sampler="best")
    with pytest.raises(ArgumentError, match="'model' without a guess"):
        Search(FORWARD, H200, sampler="model")
    monkeypatch.setattr(search_module, "find_spec", lambda name: None)
    install = install_command("samplers")
    with pytest.raises(ArgumentError, match=re.escape(f"package cmaes; allowed: this sampler after: {install}")):
        Search(FORWARD, H200, sampler="cma")
