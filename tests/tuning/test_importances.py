"""Importances of knobs, on synthetic costs where one known knob decides."""

from __future__ import annotations

import random

import pytest

from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.decode import DecodeConfig
from parallax_gen.ops.space import every_config, knobs_of
from parallax_gen.problem.hardware import gpu_by_name
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.tuning.search.importances import MIN_TRIALS, importances

SPEC = KernelSpec("decode", 128, "bf16", group=4)
CONFIGS = sorted(every_config(SPEC, gpu_by_name("h200")), key=str)


def costs(knob: str, count: int = 300) -> list[tuple[KernelConfig, float]]:
    """Costs of random configs: one knob decides, plus noise of a tenth of its effect."""
    draw = random.Random(0)
    values = next(k for k in knobs_of(SPEC) if k.name == knob).values
    chosen = draw.sample(CONFIGS, count)
    return [(config, 1.0 + values.index(getattr(config, knob)) + 0.1 * draw.random()) for config in chosen]


@pytest.mark.parametrize("knob", ["BLOCK_N", "num_stages"])
def test_the_knob_that_decides_comes_first(knob: str) -> None:
    shares = importances(SPEC, costs(knob))
    assert next(iter(shares)) == knob
    assert shares[knob] > 0.5
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_knobs_with_a_single_value_are_omitted() -> None:
    assert set(importances(SPEC, costs("BLOCK_N"))) == {k.name for k in knobs_of(SPEC) if len(k.values) > 1}
    assert "BLOCK_H" not in importances(
        SPEC, costs("BLOCK_N")
    )  # with 4 query heads per kv head only one BLOCK_H is valid


def test_no_importances_for_too_few_or_equal_costs() -> None:
    assert importances(SPEC, []) == {}
    assert importances(SPEC, costs("BLOCK_N", MIN_TRIALS - 1)) == {}
    assert importances(SPEC, costs("BLOCK_N", MIN_TRIALS)) != {}
    assert importances(SPEC, [(config, 1.0) for config, _ in costs("BLOCK_N")]) == {}


def test_configs_of_another_space_are_ignored() -> None:
    old = DecodeConfig(BLOCK_N=32, BLOCK_H=8, NUM_SPLITS=5, merge="last", num_warps=1, num_stages=4)
    assert importances(SPEC, [*costs("BLOCK_N"), (old, 0.1)]) == importances(SPEC, costs("BLOCK_N"))
