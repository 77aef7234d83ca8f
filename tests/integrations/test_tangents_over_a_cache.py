"""transformers' attention under torch.func: it has derivatives over a cache's keys, unlike our decode function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

from parallax_gen.integrations.transformers.attention import parallax_attention
from parallax_gen.oracle.reference import reference_forward

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")


def test_new_tokens_over_a_cache() -> None:
    generator = torch.Generator().manual_seed(0)
    q, r, d = (torch.randn(1, 4, 2, 16, generator=generator) for _ in range(3))
    k, v = (torch.randn(1, 2, 5, 16, generator=generator) for _ in range(2))

    def attend(query: Tensor) -> Tensor:
        return parallax_attention(torch.nn.Module(), query, k, v, None, r=r)[0]

    def wanted(query: Tensor) -> Tensor:
        return reference_forward(*(x.transpose(1, 2) for x in (query, r, k, v)), causal=True).out

    out, tangent = jvp(wanted, (q.double(),), (d.double(),))
    for a, b in zip(jvp(attend, (q,), (d,)), (out, tangent), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vmap(attend)(q[None])[0].double(), out, rtol=1e-5, atol=1e-5)
