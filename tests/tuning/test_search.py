"""The search: proposals are valid and distinct, given configs come first, and it beats random search."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import specs

from parallax_gen.ops.base import KernelConfig, config_to_dict
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.space import default_config, every_config, knobs_of, neighbours, why_invalid
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.search.search import Search

H200 = GPUS["h200"]
DECODE = KernelSpec("decode", 128, "bf16", group=4)
FORWARD = KernelSpec("forward", 128, "bf16", causal=True)
SMALL = (KernelSpec("preprocess", 64, "fp32"), GPUS["rtx4090"])  # 21 configs


def cost(config: KernelConfig) -> float:
    """A synthetic time: every knob has a best value, far from the middle, and some knobs matter more."""
    assert isinstance(config, DecodeConfig)
    best = DecodeConfig(BLOCK_N=16, BLOCK_H=8, NUM_SPLITS=48, merge="kernel", num_warps=1, num_stages=6)
    time = 10.0
    for weight, knob in enumerate(knobs_of(DECODE), start=1):
        at = [knob.values.index(getattr(c, knob.name)) for c in (config, best)]
        time *= 1 + weight * abs(at[0] - at[1]) / len(knob.values)
    return time


@settings(max_examples=8)
@given(
    st.sampled_from(("forward", "decode", "decode_varlen")).flatmap(lambda op: specs(op, ("bf16", "fp16"))),
    st.integers(0, 99),
)
def test_proposals_are_valid_and_new(spec: KernelSpec, seed: int) -> None:
    search = Search(spec, H200, seed=seed)
    proposals = []
    for n in range(20):
        config = search.ask()
        assert config is not None
        assert why_invalid(spec, config, H200) is None
        proposals.append(config)
        if n % 3:  # some get a cost, some fail, and some are never reported
            search.tell(config, 100.0 + n if n % 3 == 1 else None)
    assert len(set(proposals)) == len(proposals)


def test_the_given_configs_come_first() -> None:
    default = default_config(DECODE, Shape(32, 32, 8, 1, 8192), H200)
    first = [default, *neighbours(DECODE, default, H200)]
    invalid = DecodeConfig(BLOCK_N=16, BLOCK_H=8, NUM_SPLITS=5, merge="last", num_warps=1, num_stages=2)
    search = Search(DECODE, H200, first=[default, invalid, *first], seed=0)
    assert [search.ask() for _ in first] == first
    assert search.ask() not in first


def test_known_configs_are_not_proposed() -> None:
    spec, gpu = SMALL
    configs = list(every_config(spec, gpu))
    known, first = configs[::2], configs[:4]
    search = Search(spec, gpu, first=first, seed=0)
    for n, config in enumerate(known):
        search.tell(config, None if n % 2 else 50.0 + n)
    proposals = [search.ask() for _ in range(len(configs) - len(known))]
    assert proposals[:2] == [first[1], first[3]]
    assert set(proposals) == set(configs) - set(known)
    assert search.ask() is None


def test_a_small_space_is_exhausted() -> None:
    spec, gpu = SMALL
    configs = set(every_config(spec, gpu))
    search = Search(spec, gpu, seed=1)
    proposals = []
    while (config := search.ask()) is not None:
        proposals.append(config)
        search.tell(config, float(len(proposals)))
    assert len(proposals) == len(configs)
    assert set(proposals) == configs
    assert search.ask() is None


def test_results_from_a_larger_space_are_accepted() -> None:
    search = Search(DECODE, H200, seed=0)
    gone = DecodeConfig(BLOCK_N=8, BLOCK_H=8, NUM_SPLITS=5, merge="last", num_warps=1, num_stages=2)
    search.tell(gone, 1.0)
    assert search.ask() not in (None, gone)


def test_the_search_learns_from_costs() -> None:
    all_configs = list(every_config(DECODE, H200))
    draw = random.Random(0)
    by_chance = statistics.median(min(map(cost, draw.sample(all_configs, 60))) for _ in range(50))
    typical = statistics.median(map(cost, all_configs))
    result = []
    for seed in range(3):
        search = Search(DECODE, H200, seed=seed)
        costs = []
        for _ in range(60):
            config = search.ask()
            assert config is not None
            costs.append(cost(config))
            search.tell(config, costs[-1])
        result.append(min(costs))
        assert statistics.median(costs[-30:]) < typical / 2  # random search reaches this once in 400 runs
    assert statistics.median(result) < by_chance


def test_the_search_learns_from_earlier_runs() -> None:
    configs = random.Random(0).sample(list(every_config(DECODE, H200)), 80)
    search = Search(DECODE, H200, seed=0)
    for config in configs:
        search.tell(config, cost(config))
    proposals = [search.ask() for _ in range(10)]
    assert (
        statistics.median(cost(c) for c in proposals if c is not None)
        < statistics.quantiles(map(cost, configs), n=4)[0]
    )


@pytest.mark.parametrize("spec", [DECODE, FORWARD])
def test_equal_seeds_give_equal_proposals(spec: KernelSpec) -> None:
    def proposals() -> list[dict[str, object]]:
        search = Search(spec, H200, seed=7)
        result = []
        for n in range(20):
            config = search.ask()
            assert config is not None
            search.tell(config, 10.0 + n % 5)
            result.append(config_to_dict(config))
        return result

    assert proposals() == proposals()
