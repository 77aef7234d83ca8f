"""The warning for tensors in scaled_dot_product_attention's layout: where it appears, where not, and how often."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from parallax_gen import parallax_attn_func, parallax_attn_varlen_func, parallax_attn_with_kvcache
from parallax_gen.errors import ArgumentError
from parallax_gen.runtime import attention, layout
from parallax_gen.runtime.layout import LayoutNotice, is_likely_heads_first
from parallax_gen.runtime.plan import PlanCache

ON_CPU = "ignore:parallax_gen. these are CPU tensors"
pytestmark = pytest.mark.filterwarnings(ON_CPU)

HEADS_FIRST = [  # (batch, heads, seqlen, head_dim)
    ((2, 8, 1024, 64), (2, 8, 1024, 64)),
    ((2, 32, 4096, 128), (2, 8, 4096, 128)),
    ((1, 64, 129, 128), (1, 1, 129, 128)),
    ((4, 1, 512, 64), (4, 1, 512, 64)),
    ((1, 128, 131072, 128), (1, 8, 131072, 128)),
]
SEQLEN_FIRST = [  # (batch, seqlen, heads, head_dim)
    ((2, 1024, 8, 64), (2, 1024, 8, 64)),
    ((2, 8, 32, 128), (2, 8, 32, 128)),  # short sequences with many heads
    ((64, 1, 128, 128), (64, 1, 128, 128)),
    ((1, 4, 128, 128), (1, 4, 128, 128)),
    ((1, 1, 96, 128), (1, 4096, 96, 128)),  # one query over many keys
    ((8, 4, 256, 64), (8, 4, 8, 64)),  # more heads than any model, but grouped ones
    ((8, 4, 256, 64), (8, 5, 256, 64)),  # 5 keys: not a number of kv heads for 4 heads
    ((8, 4, 256, 64), (8, 512, 256, 64)),
    ((1, 200, 200, 64), (1, 200, 200, 64)),  # undecided
    ((1, 4096, 256, 64), (1, 4096, 256, 64)),
]


@pytest.mark.parametrize(("q", "k"), HEADS_FIRST)
def test_sizes_that_show_heads_first(q: tuple[int, ...], k: tuple[int, ...]) -> None:
    assert is_likely_heads_first(q, k)
    transposed = [(batch, seqlen, heads, head_dim) for batch, heads, seqlen, head_dim in (q, k)]
    assert not is_likely_heads_first(*transposed)


@pytest.mark.parametrize(("q", "k"), SEQLEN_FIRST)
def test_sizes_that_do_not(q: tuple[int, ...], k: tuple[int, ...]) -> None:
    assert not is_likely_heads_first(q, k)


def heads_first(heads: int = 2, seqlen: int = 136) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, r, k, v = torch.randn(4, 1, heads, seqlen, 8)
    return q, r, k, v


@pytest.fixture
def _new_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, which has not warned yet and has no plans."""
    notice = LayoutNotice()
    monkeypatch.setattr(attention, "_forwards", PlanCache())
    monkeypatch.setattr(attention, "layout_notice", lambda: notice)


@pytest.mark.usefixtures("_new_notice")
@pytest.mark.parametrize("gradients", [False, True])
def test_one_warning_names_the_users_line_and_the_remedy(gradients: bool) -> None:
    inputs = [x.requires_grad_(gradients) for x in heads_first()]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        parallax_attn_func(*inputs)
        parallax_attn_func(*inputs, causal=True)  # another plan
        parallax_attn_func(*heads_first(heads=4))
    ours = [warning for warning in seen if "layout of scaled_dot_product_attention" in str(warning.message)]
    assert [warning.filename for warning in ours] == [__file__]
    for part in ("q of shape (1, 2, 136, 8)", "2 tokens with 136 heads", "pass q.transpose(1, 2)"):
        assert part in str(ours[0].message)


@pytest.mark.usefixtures("_new_notice")
def test_other_calls_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(*ON_CPU.split(":"))
        parallax_attn_func(*(x.transpose(1, 2) for x in heads_first()))
        parallax_attn_func(*heads_first(seqlen=128))
        parallax_attn_func(*heads_first(heads=0))  # empty
        starts = torch.tensor([0, 2], dtype=torch.int32)
        packed = [x.flatten(0, 1) for x in heads_first()]
        parallax_attn_varlen_func(*packed, starts, starts, 2, 2)


@pytest.mark.usefixtures("_new_notice")
def test_where_warnings_are_errors_the_next_call_runs() -> None:
    inputs = heads_first(heads=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(*ON_CPU.split(":"))
        with pytest.raises(UserWarning, match="scaled_dot_product_attention"):
            parallax_attn_func(*inputs)
        assert parallax_attn_func(*inputs).shape == (1, 3, 136, 8)


def test_only_a_first_call_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[tuple[int, ...]] = []

    class Spy(LayoutNotice):
        def check(self, q: Tensor, k: Tensor) -> None:
            checked.append(tuple(q.shape))

    monkeypatch.setattr(attention, "layout_notice", Spy)
    monkeypatch.setattr(attention, "_forwards", PlanCache())
    inputs = heads_first(heads=5)
    for _ in range(3):
        parallax_attn_func(*inputs)
    assert checked == [(1, 5, 136, 8)]


def test_the_process_has_one_notice() -> None:
    assert layout.layout_notice() is layout.layout_notice()


def test_an_error_about_heads_names_their_dimension() -> None:
    q, k = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 512, 64)  # one query of 8 heads, in the other layout
    message = "got 512 kv heads; allowed: a divisor of q's 1 heads, in the dimension before head_dim"
    with pytest.raises(ArgumentError, match=f"^k_cache: {message}"):
        parallax_attn_with_kvcache(q, q, k, k)
    with pytest.raises(ArgumentError, match=f"^k: {message}"):
        parallax_attn_func(q, q, k, k)
