"""Partial states of peaked rows, merged: the errors that merge_states, and so ring attention, adds to a kernel's.

The kernels run in Triton's interpreter with bf16 rounded as on a GPU; see test_peaked_rows.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

import pytest
from peaked_samples import FIXED, FIXED_REFERENCE, FORWARD, ONLINE, times_the_error_of_softmax

from parallax_gen.codegen.build import load
from parallax_gen.codegen.render import render
from parallax_gen.oracle import verify
from parallax_gen.oracle.inputs import random_inputs_of, softmax_scale
from parallax_gen.oracle.peaked import KINDS
from parallax_gen.problem.hardware import GPUS
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.states import State, merge_states

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("gpu_arithmetic"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton"),
]

QUERIES, KEYS = 64, 384
CONFIGS = {"online": (FORWARD, ONLINE), "fixed": (FIXED, FIXED_REFERENCE)}
# What eight parts merged one after another have at most, of three seeds: 3.9. A key's weight changes with each step by
# less than the rounding of 16 bits, which keeps its part of the sum as it was.
OF_A_CHAIN = 4.2


def in_pairs(states: list[State]) -> State:
    """By one call for each two states, of the halves of the keys at last."""
    while len(states) > 1:
        states = [merge_states(*states[i : i + 2]) for i in range(0, len(states), 2)]
    return states[0]


def quick_or_slow() -> Iterator[object]:
    """ "own key" needs a causal mask, which parts do not have."""
    for head_dim, softmax, parts, kind in itertools.product((64, 128), CONFIGS, (2, 8), KINDS):
        for seed in (1, 2, 3) if kind != "own key" else ():
            quick = head_dim == 128 and seed == 1 and kind in ("one key", "two keys")
            yield pytest.param(head_dim, softmax, parts, kind, seed, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("head_dim", "softmax", "parts", "kind", "seed"), list(quick_or_slow()))
def test_merged_states(head_dim: int, softmax: str, parts: int, kind: str, seed: int) -> None:
    """Queries over parts of the keys: the key that dominates is in one of them, or two are in two.

    A kernel's error is at most `most` roundings of an output. Each state that a call returns is rounded once more, and
    those of several calls add up: one for all parts in one call, as in a ring, whose sums are in fp32; log2(parts) for
    parts merged in pairs.
    """
    spec, shape = KernelSpec("forward", head_dim, "bf16", 2, stats=True), Shape(1, 2, 1, QUERIES, KEYS)
    config, most = CONFIGS[softmax]
    x = random_inputs_of(spec, shape, seed=seed, device="cpu", full=True, kind=kind)
    launch = load(render(spec, config, GPUS["h200"])).launch
    states = []
    for first in range(0, KEYS, KEYS // parts):
        keys = slice(first, first + KEYS // parts)
        call = verify.poisoned_call(spec, config, replace(x, k=x.k[:, keys], v=x.v[:, keys]))
        launch(*call.arguments(softmax_scale(spec)))
        states.append(State(*(call.written[name] for name in State._fields)))
    levels = parts.bit_length() - 1
    assert times_the_error_of_softmax(spec, x, merge_states(*states).out) <= (most**2 + 1) ** 0.5
    assert times_the_error_of_softmax(spec, x, in_pairs(states).out) <= (most**2 + levels) ** 0.5
    assert times_the_error_of_softmax(spec, x, reduce(merge_states, states).out) <= OF_A_CHAIN
