"""Peaked rows on a card by chosen configs and in parts: both forms of the softmax, the fix-up kernel, merged states.

tests/codegen/test_peaked_merges.py measures the same in Triton's interpreter, and gives the reason of each bound.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peaked_on_card import (
    ALIKE,
    OF_ALIKE_KEYS,
    OF_DISTINCT_KEYS,
    inputs,
    softmax_attention,
    times_the_error_of_softmax,
)
from torch import Tensor

from parallax_gen import State, merge_states, parallax_attn_func
from parallax_gen.codegen.abi import Inputs
from parallax_gen.codegen.build import load
from parallax_gen.codegen.device import gpu_of_device
from parallax_gen.codegen.render import render
from parallax_gen.ops.forward import ForwardConfig
from parallax_gen.oracle import verify
from parallax_gen.oracle.inputs import attend, softmax_scale
from parallax_gen.oracle.peaked import KINDS
from parallax_gen.oracle.reference import reference_forward
from parallax_gen.problem.spec import KernelSpec
from parallax_gen.runtime.states import merge_into

pytestmark = pytest.mark.gpu

ONLINE = ForwardConfig(BLOCK_M=64, BLOCK_N=64, GROUP_HEADS=1, num_warps=4, num_stages=2)
FIXED = replace(ONLINE, SOFTMAX="fixed_reference")
WINDOW = 300


def forward(spec: KernelSpec, config: ForwardConfig, x: Inputs) -> Tensor:
    call = verify.poisoned_call(spec, config, x)
    load(render(spec, config, gpu_of_device(0))).launch(*call.arguments(softmax_scale(spec)))
    return call.written["out"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "config"),
    [(64, "bf16", ONLINE), (128, "bf16", ONLINE), (128, "fp16", ONLINE), (64, "bf16", FIXED), (128, "bf16", FIXED)],
)
def test_both_forms_of_the_softmax(head_dim: int, dtype: str, config: ForwardConfig, window: bool, kind: str) -> None:
    spec = KernelSpec("forward", head_dim, dtype, 2, causal=True, window=window)
    x = Inputs(*inputs(kind, head_dim, dtype), window_size=WINDOW if window else 0)
    softmax = softmax_attention(x.q, x.k, x.v, WINDOW if window else None)
    # A fixed reference rounds the largest p in rows of every kind.
    most = OF_ALIKE_KEYS if config is FIXED or kind in ALIKE else OF_DISTINCT_KEYS
    assert times_the_error_of_softmax(forward(spec, config, x), attend(spec, x).out, softmax, dtype) <= most


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("kind", ["one key", "twin keys"])
def test_tiles_that_overflow(kind: str, window: bool) -> None:
    """The fix-up kernel recomputes them with a running maximum. The fixed reference, which is the first key, or under a
    window each row's last, is e^60 below other keys of the row, under a window in the rows of the second half."""
    spec = KernelSpec("forward", 128, "bf16", 2, causal=True, window=window)
    q, r, k, v = inputs(kind, 128, "bf16", 256)
    q[..., 0], r[..., 0], k[..., 0] = 8, 0, 0
    k[:, slice(128, None) if window else 0, :, 0] = -60 * 128**0.5 / 8
    x = Inputs(q, r, k, v, window_size=WINDOW if window else 0)
    softmax = softmax_attention(q, k, v, WINDOW if window else None)
    most = OF_ALIKE_KEYS if kind in ALIKE else OF_DISTINCT_KEYS
    assert times_the_error_of_softmax(forward(spec, FIXED, x), attend(spec, x).out, softmax, "bf16") <= most


def in_pairs(states: list[State]) -> State:
    while len(states) > 1:
        states = [merge_states(*states[i : i + 2]) for i in range(0, len(states), 2)]
    return states[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "own key"])
@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bf16"), (128, "bf16"), (128, "fp16")])
def test_merged_states(head_dim: int, dtype: str, parts: int, kind: str) -> None:
    """Queries over parts of the keys, without a mask: a rounding more for all parts, or one for each level of pairs."""
    q, r, k, v = inputs(kind, head_dim, dtype, 640)
    states = [
        State(*parallax_attn_func(q, r, *of_keys, return_stats=True))
        for of_keys in zip(k.chunk(parts, 1), v.chunk(parts, 1), strict=True)
    ]
    expected, softmax = reference_forward(q, r, k, v).out, softmax_attention(q, k, v, causal=False)
    levels = parts.bit_length() - 1
    for merged, roundings in ((merge_states(*states), 1), (in_pairs(states), levels)):
        most = (OF_ALIKE_KEYS**2 + roundings) ** 0.5
        assert times_the_error_of_softmax(merged.out, expected, softmax, dtype) <= most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bf16"), (128, "bf16"), (128, "fp16")])
def test_the_sums_of_a_ring(head_dim: int, dtype: str, kind: str) -> None:
    """What the last of four ranks computes: its own keys with a causal mask, then those of earlier ranks without."""
    shards = [x.chunk(4, 1) for x in inputs(kind, head_dim, dtype, 640)]
    q, r, k, v = shards
    own = State(*parallax_attn_func(q[3], r[3], k[3], v[3], causal=True, return_stats=True))
    total = own._replace(out=own.out.float(), v_mean=own.v_mean.float())
    for rank in (2, 1, 0):
        merge_into(total, State(*parallax_attn_func(q[3], r[3], k[rank], v[rank], return_stats=True)))
    whole_k, whole_v = torch.cat(k, 1), torch.cat(v, 1)
    expected = reference_forward(torch.cat(q, 1), torch.cat(r, 1), whole_k, whole_v, causal=True).out[:, -160:]
    softmax = softmax_attention(q[3], whole_k, whole_v)
    out = total.out.to(q[3].dtype)
    assert times_the_error_of_softmax(out, expected, softmax, dtype) <= (OF_ALIKE_KEYS**2 + 1) ** 0.5
