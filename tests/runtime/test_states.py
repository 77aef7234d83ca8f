"""Merged states of attention over parts of the keys equal attention over all keys."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_close
from torch import Tensor

from parallax_gen import State, merge_states, parallax_attn_func
from parallax_gen.errors import ArgumentError
from parallax_gen.oracle.partial import partial_backward
from parallax_gen.oracle.reference import reference_backward, reference_forward
from parallax_gen.runtime.states import merge_into

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")


def sample(seqlen_q: int, seqlen_kv: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seqlen_q)

    def randn(seqlen: int, heads: int) -> Tensor:
        return torch.randn(2, seqlen, heads, 16, generator=generator)

    q, r, k, v = randn(seqlen_q, 4), randn(seqlen_q, 4) / 4, randn(seqlen_kv, 2), randn(seqlen_kv, 2)
    return tuple(x.to(dtype) for x in (q, r, k, v))  # type: ignore[return-value]


def attend(q: Tensor, r: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> State:
    return State(*parallax_attn_func(q, r, k, v, causal=causal, return_stats=True))


@pytest.mark.parametrize("ends", [(9,), (3, 9), (1, 2, 9), (0, 5, 9)])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_merged_parts_equal_the_whole(ends: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    """Also in bf16: each part is rounded an additional time, which the tolerance (four rounding errors) allows."""
    q, r, k, v = sample(5, 9, dtype)
    starts = (0, *ends[:-1])
    parts = [attend(q, r, k[:, a:b], v[:, a:b]) for a, b in zip(starts, ends, strict=True)]
    merged, whole = merge_states(*parts), reference_forward(q, r, k, v)
    assert merged.out.dtype == merged.v_mean.dtype == dtype
    assert merged.lse.dtype == merged.t_mean.dtype == torch.float32
    for result, expected in zip(merged, whole, strict=True):
        assert_close(result, expected, name if result.dtype == dtype else "fp32" if name == "fp32" else "bf16")


def test_order_and_nesting_do_not_matter() -> None:
    q, r, k, v = sample(4, 12)
    a, b, c = (attend(q, r, k[:, i : i + 4], v[:, i : i + 4]) for i in (0, 4, 8))
    for tensor, expected_tensor in zip(merge_states(a, b, c), merge_states(merge_states(c, a), b), strict=True):
        torch.testing.assert_close(tensor, expected_tensor)


def merged_by_formula(*parts: State) -> State:
    """All parts merged at once by the formula in the docstring of `merge_states`."""
    lse = torch.stack([part.lse for part in parts]).logsumexp(0)
    weights = [(part.lse - lse).exp().nan_to_num(0.0) for part in parts]
    rows = [weight.mT[..., None] for weight in weights]
    t_mean = sum(weight * part.t_mean for weight, part in zip(weights, parts, strict=True))
    v_mean = sum(row * part.v_mean for row, part in zip(rows, parts, strict=True))
    apart = [(t_mean - part.t_mean).mT[..., None] * part.v_mean for part in parts]
    out = sum(row * (part.out + more) for row, part, more in zip(rows, parts, apart, strict=True))
    return State(out, lse, t_mean, v_mean)


def test_in_place_absorption_equals_merging() -> None:
    """Also if one or both of the parts saw no key."""
    q, r, k, v = sample(6, 9)
    some, others = attend(q, r, k[:, :3], v[:, :3], causal=True), attend(q, r, k[:, 3:], v[:, 3:])
    none = attend(q, r, k[:, :0], v[:, :0])
    for first, second in ((some, others), (others, some), (none, some), (some, none), (none, none)):
        total = State(*(x.clone() for x in first))
        merge_into(total, second)
        for result, expected in zip(total, merged_by_formula(first, second), strict=True):
            torch.testing.assert_close(result, expected)
        before = [x.clone() for x in first]
        for result, expected in zip(merge_states(first, second), total, strict=True):
            torch.testing.assert_close(result, expected)
        assert all(torch.equal(x, y) for x, y in zip(first, before, strict=True))  # the arguments are unchanged


def test_queries_that_see_no_key_of_a_part_or_of_any() -> None:
    """Of 6 queries over 3 keys, aligned to the end, the first three see none."""
    q, r, k, v = sample(6, 3)
    some, none = attend(q, r, k, v, causal=True), attend(q, r, k[:, :0], v[:, :0])
    assert bool(some.lse[..., :3].isneginf().all())
    for result, expected in zip(merge_states(none, some), some, strict=True):
        torch.testing.assert_close(result, expected)
    nothing = merge_states(none, none)
    assert bool((nothing.out == 0).all())
    assert bool((nothing.lse == -math.inf).all())


def test_a_large_mean_of_t_loses_no_precision() -> None:
    """Parts with t of ±1000: the mean of t·v of a part is far larger than out, and is never computed."""
    q, r, k, v = sample(3, 8)
    k[..., 0], r[..., 0], q[..., 0] = 1, 1000, 0
    parts = [attend(q, r, k[:, i : i + 4], v[:, i : i + 4]) for i in (0, 4)]
    assert float(parts[0].t_mean.abs().min()) > 900
    assert_close(merge_states(*parts).out, reference_forward(q, r, k, v).out, "bf16")


def test_invalid_states_are_refused() -> None:
    q, r, k, v = sample(4, 4)
    state = attend(q, r, k, v)
    with pytest.raises(ArgumentError, match="states"):
        merge_states()
    with pytest.raises(ArgumentError, match=r"states\[1\].*out \(2, 3, 4, 16\)"):
        merge_states(state, attend(q[:, :3], r[:, :3], k, v))
    with pytest.raises(ArgumentError, match=r"states\[0\].*lse \(2, 4, 3\)"):
        merge_states(state._replace(lse=state.lse[..., :3]))


@pytest.mark.parametrize("causal", [False, True])
def test_partial_gradients_add_up(causal: bool) -> None:
    """Gradients over the last keys, which the mask cuts, plus those over the other keys, which all queries see."""
    q, r, k, v = sample(5, 9)
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(7))
    result = reference_forward(q, r, k, v, causal=causal)
    expected = reference_backward(q, r, k, v, do, causal=causal)
    early = partial_backward(q, r, k[:, :4], v[:, :4], do, *result)
    late = partial_backward(q, r, k[:, 4:], v[:, 4:], do, *result, causal=causal)
    torch.testing.assert_close(early.dq + late.dq, expected.dq)
    torch.testing.assert_close(early.dr + late.dr, expected.dr)
    torch.testing.assert_close(torch.cat([early.dk, late.dk], 1), expected.dk)
    torch.testing.assert_close(torch.cat([early.dv, late.dv], 1), expected.dv)


def test_merging_batched_and_unbatched_states_under_vmap() -> None:
    q, r, k, v = sample(3, 9)
    first, second = attend(q, r, k[:, :4], v[:, :4]), [attend(q, r, k[:, 4:], n * v[:, 4:]) for n in (1, 2)]
    stacked = (torch.stack(x) for x in zip(*second, strict=True))
    result = torch.func.vmap(lambda *part: tuple(merge_states(first, part)))(*stacked)
    for n, part in enumerate(second):
        for x, expected in zip(result, merge_states(first, part), strict=True):
            torch.testing.assert_close(x[n], expected)


def test_vmapped_states_that_require_grad_are_refused() -> None:
    """A tensor batched by vmap hides that it requires gradients."""
    r, k, v = (torch.randn(2, 4, 2, 8) for _ in range(3))

    def joined(q: torch.Tensor) -> torch.Tensor:
        parts = [parallax_attn_func(q, r, k + i, v, return_stats=True) for i in range(2)]
        return merge_states(*parts).out

    samples = torch.randn(3, 2, 4, 2, 8)
    with pytest.raises(ArgumentError, match="an out that needs gradients"):
        torch.vmap(joined)(samples.clone().requires_grad_())
    with pytest.raises(ArgumentError, match="an out that needs gradients"):
        torch.func.grad(lambda q: torch.vmap(joined)(q).sum())(samples)
    assert torch.vmap(joined)(samples).isfinite().all()
