"""Strides of caches and outputs that are refused. Meta tensors stand for tensors, without memory.

tests/codegen/test_decode_varlen_kernels.py launches kernels with the largest allowed strides.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from parallax_gen import kvcache_workspace_size, parallax_attn_with_kvcache
from parallax_gen.errors import ArgumentError
from parallax_gen.ops.base import LARGEST_BLOCK, OPS_BY_NAME
from parallax_gen.problem.spec import LARGEST_HEAD_DIM
from parallax_gen.runtime.cache_checks import check_cached
from parallax_gen.runtime.requests import MAX_ROW_STRIDE, CacheRequest

pytestmark = pytest.mark.filterwarnings("ignore:parallax_gen. these are CPU tensors")


@pytest.mark.parametrize(
    ("keys", "paged", "dtype", "furthest"),
    [
        pytest.param(7, False, torch.bfloat16, (2**31 - 16) // 6, id="a short sequence"),
        pytest.param(5000, False, torch.bfloat16, (2**31 - 16) // 127, id="blocks of 128"),
        pytest.param(5000, False, torch.float8_e4m3fn, (2**33 - 16) // 127, id="in eight bits"),
        pytest.param(1, False, torch.bfloat16, None, id="a single key"),
        pytest.param(256, True, torch.bfloat16, (2**31 - 16) // 127, id="blocks in a page"),
        pytest.param(16, True, torch.bfloat16, (2**31 - 16) // 15, id="pages in a block"),
        pytest.param(48, True, torch.bfloat16, (2**31 - 16) // 15, id="blocks of 16 in a page"),
        pytest.param(16, True, torch.float8_e4m3fn, (2**33 - 16) // 15, id="pages in eight bits"),
        pytest.param(3, True, torch.bfloat16, None, id="pages that are parts of no block"),
    ],
)
def test_strides_of_keys_beyond_32_bit_block_offsets_are_refused(
    keys: int, paged: bool, dtype: torch.dtype, furthest: int | None
) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 1, 4, 16, dtype=torch.bfloat16)
        table = {"page_table": torch.empty(2, 9, dtype=torch.int32), "cache_seqlens": torch.empty(2, dtype=torch.int32)}

        def given(stride_k: int, stride_v: int) -> dict[str, Any]:
            k, v = (torch.empty_strided((2, keys, 2, 16), (32, x, 16, 1), dtype=dtype) for x in (stride_k, stride_v))
            return {"q": q, "r": q, "k_cache": k, "v_cache": v, **(table if paged else {})}

        near = 2**40 if furthest is None else furthest // 4 * 4
        assert kvcache_workspace_size(**given(near, near)) == 0
        if furthest is not None:
            message = f"got {furthest + 1} elements from key to key; allowed: at most {furthest}"
            with pytest.raises(ArgumentError, match=f"^k_cache: {message}$"):
                parallax_attn_with_kvcache(**given(furthest + 1, furthest + 1))
            with pytest.raises(ArgumentError, match="^v_cache: got strides" if paged else f"^v_cache: {message}$"):
                parallax_attn_with_kvcache(**given(near, furthest + 1))


@pytest.mark.parametrize(("queries", "counted"), [(1, 4), (3, 2)], ids=["all heads", "a group's"])
def test_head_strides_of_out_beyond_32_bits_are_refused(queries: int, counted: int) -> None:
    """Heads of q and r, and all rows, may have any stride."""
    with FakeTensorMode():
        k = torch.empty(2, 7, 2, 16)
        q = torch.empty_strided((2, queries, 4, 16), (16, 2**40, 2**50, 1))
        furthest = (2**31 - 1) // (counted - 1)
        request = CacheRequest(q, q, k, k, *[None] * 7, False, None, None)  # type: ignore[arg-type]
        check_cached(request, torch.empty_strided(q.shape, (16, 2**40, furthest, 1)), False)
        out = torch.empty_strided(q.shape, (16, 32, furthest + 1, 1))
        with pytest.raises(ArgumentError, match=f"^out: got {furthest + 1} elements .*; allowed: at most {furthest}$"):
            parallax_attn_with_kvcache(q, q, k, k, out=out)


def test_stride_checks_cover_the_largest_block() -> None:
    """For blocks of keys in a cache and of rows of dense sequences."""
    blocks = [knob.values for op in OPS_BY_NAME.values() for knob in op.knobs if knob.name in ("BLOCK_M", "BLOCK_N")]
    assert {max(sizes) for sizes in blocks} == {LARGEST_BLOCK}
    assert (LARGEST_BLOCK - 1) * MAX_ROW_STRIDE + LARGEST_HEAD_DIM <= 2**31
