"""A warning for tensors in the layout of torch's scaled_dot_product_attention, where their sizes show it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from parallax_gen.runtime.dispatch import user_stacklevel

MOST_HEADS = 128  # of the largest models, such as Llama 3.1 405B, and there with fewer kv heads


def is_likely_heads_first(q: Sequence[int], k: Sequence[int]) -> bool:
    """Whether the shapes of q and k are likely (batch, heads, seqlen, head_dim), not (batch, seqlen, heads, head_dim).

    They are if dimension 2 is the same in q and k, as the length of self-attention is, and larger than any model's
    count of heads; and if dimension 1 can be counts of heads: at most MOST_HEADS, and q's a multiple of k's. In the
    right layout this would be a model with more than MOST_HEADS heads, as many kv heads, and few tokens.
    """
    return q[2] == k[2] and q[2] > MOST_HEADS >= q[1] and q[1] % k[1] == 0


class LayoutNotice:
    """Warns once, for the first call whose tensors are likely in the other layout."""

    def __init__(self) -> None:
        self._warned = False

    def check(self, q: Tensor, k: Tensor) -> None:
        """Check a dense call's tensors, which have passed all other checks and are not empty."""
        if self._warned or not is_likely_heads_first(q.shape, k.shape):
            return
        self._warned = True  # set first: where warnings are errors, the next call runs
        message = (
            f"parallax_gen: q of shape {tuple(q.shape)} is read as (batch, seqlen, heads, head_dim), so as"
            f" {q.shape[1]} tokens with {q.shape[2]} heads. If it is (batch, heads, seqlen, head_dim), the layout of"
            " scaled_dot_product_attention, pass q.transpose(1, 2), r, k and v likewise, and transpose the output back."
            " This warning appears once per process."
        )
        warnings.warn(message, stacklevel=user_stacklevel())


@cache
def layout_notice() -> LayoutNotice:
    """The process's notice."""
    return LayoutNotice()
