"""Resources estimated before compiling: plausible, near the compiled ones, and useful for ranking configs."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from strategies import specs
from sweep_samples import RECORDED

from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.ops.space import default_config, every_config, shared_bytes
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Bucket, Shape, representative
from parallax_gen.problem.spec import OPS, KernelSpec
from parallax_gen.tuning.search.cost_model import guess_resources, guess_us, sorted_by_guess
from parallax_gen.tuning.search.recorded_sweep import read_sweep

H200 = GPUS["h200"]
FORWARD = KernelSpec("forward", 128, "bf16", causal=True)
TRAINED = Shape(4, 16, 16, 4096, 4096)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=12, deadline=None)
@given(data=specs("forward", ("bf16", "fp32", "tf32")))
def test_every_config_has_an_estimate(op: str, data: KernelSpec) -> None:
    of_cache = op in ("decode", "decode_varlen")
    spec = KernelSpec(op, data.head_dim, data.dtype, data.group) if of_cache else data.for_op(op)
    shape = representative(Bucket(8, 1 if of_cache else 512, 512, 128 if spec.window else 0), spec.group)
    for config in list(every_config(spec, H200))[::40]:
        resources = guess_resources(spec, config, H200)
        assert 0 < resources.registers <= 255
        assert resources.shared_bytes >= shared_bytes(spec, config, H200)
        assert guess_us(spec, config, shape, H200) > 0


def test_ranking_orders_every_config_from_fast_to_slow() -> None:
    configs = list(every_config(FORWARD, H200))
    order = sorted_by_guess(FORWARD, TRAINED, H200, configs)
    times = [guess_us(FORWARD, config, TRAINED, H200) for config in order]
    assert times == sorted(times)
    assert set(order) == set(configs)
    assert order.index(default_config(FORWARD, TRAINED, H200)) < len(order) / 10


def test_fewer_registers_spill_more() -> None:
    spills = [
        guess_resources(FORWARD, ForwardConfig(64, 64, 8, 4, 3, maxnreg=most), H200).spills for most in (0, 168, 128)
    ]
    assert spills == sorted(set(spills))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_resources_are_near_those_of_compiled_kernels(path: Path) -> None:
    sweep = read_sweep(path)
    off, spilled, kept = [], [], []
    for result in sweep.results:
        assert result.registers is not None
        assert result.spills is not None
        guessed = guess_resources(sweep.place.spec, result.config, GPUS[sweep.place.gpu])
        off.append(abs(guessed.registers - result.registers))
        (spilled if result.spills > 200 else kept if result.spills == 0 else []).append(guessed.spills)
    assert statistics.mean(off) < 25  # of 255
    assert not spilled or statistics.median(spilled) > 50
    assert statistics.median(kept) == 0


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_the_best_measured_configs_are_in_the_first_fifth(path: Path) -> None:
    """Only for recorded configs, which a search chose."""
    sweep = read_sweep(path)
    order = sorted_by_guess(sweep.place.spec, sweep.shape, GPUS[sweep.place.gpu], sweep.costs)
    best = min(sweep.costs, key=lambda config: sweep.costs[config] or float("inf"))
    assert order.index(best) < len(order) / 5
