"""The public functions on a card: results, launches on other tensors, several streams, CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from assertions import assert_close
from torch import Tensor

from parallax_gen import parallax_attn_func, parallax_attn_with_kvcache
from parallax_gen.oracle.reference import reference_forward

pytestmark = pytest.mark.gpu


def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*size, device="cuda", dtype=dtype)


def decode_inputs(batch: int, seqlen: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, r = normal(batch, 1, heads, 128), normal(batch, 1, heads, 128) / 12
    return q, r, normal(batch, seqlen, kv_heads, 128), normal(batch, seqlen, kv_heads, 128)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (12, 1)])
@pytest.mark.parametrize("seqlen", [1, 130, 4096, 16384])
def test_decode_by_the_jit_and_directly(seqlen: int, heads: int, kv_heads: int) -> None:
    for _ in range(3):  # the first call goes through the JIT, the others launch directly
        inputs = decode_inputs(2, seqlen, heads, kv_heads)
        assert_close(parallax_attn_with_kvcache(*inputs), reference_forward(*inputs).out, "bf16")


def test_decode_with_lengths() -> None:
    lengths = torch.tensor([0, 5, 700, 1000], dtype=torch.int32, device="cuda")
    for _ in range(3):
        q, r, k, v = decode_inputs(4, 1000, 16, 4)
        for b, length in enumerate(lengths.tolist()):
            k[b, length:], v[b, length:] = float("nan"), float("inf")
        out = parallax_attn_with_kvcache(q, r, k, v, cache_seqlens=lengths)
        assert_close(out, reference_forward(q, r, k, v, cache_seqlens=lengths).out, "bf16")
        assert not out[0].any()


def test_direct_launches_distinguish_one_tensor_as_q_and_r_from_two() -> None:
    q, r, k, v = decode_inputs(1, 500, 8, 8)
    q /= 12
    assert_close(parallax_attn_with_kvcache(q, q, k, v), reference_forward(q, q, k, v).out, "bf16")
    assert_close(parallax_attn_with_kvcache(q, r, k, v), reference_forward(q, r, k, v).out, "bf16")


def test_unaligned_tensors() -> None:
    """Tensors that are not 16-byte aligned take the launch path that inspects its arguments."""
    q, r, k, v = decode_inputs(1, 500, 8, 8)
    parallax_attn_with_kvcache(q, r, k, v)
    shifted = torch.empty(k.numel() + 1, device="cuda", dtype=k.dtype)[1:].view(k.shape).copy_(k)
    assert shifted.data_ptr() % 16
    assert_close(parallax_attn_with_kvcache(q, r, shifted, v), reference_forward(q, r, k, v).out, "bf16")


def test_a_profilers_hook_sees_direct_launches() -> None:
    inputs = decode_inputs(1, 500, 8, 8)
    expected = reference_forward(*inputs).out
    for _ in range(2):
        parallax_attn_with_kvcache(*inputs)
    names: list[str] = []

    def hook(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    chain = triton.knobs.runtime.launch_enter_hook
    chain.add(hook)
    try:
        assert_close(parallax_attn_with_kvcache(*inputs), expected, "bf16")
    finally:
        chain.remove(hook)
    assert names[0] == "decode_kernel"
    seen = len(names)
    assert_close(parallax_attn_with_kvcache(*inputs), expected, "bf16")
    assert len(names) == seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_whole_sequences(causal: bool, dtype: torch.dtype) -> None:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    for seqlen_q, seqlen_kv in ((300, 300), (77, 500), (200, 130)):
        # Four projections in one buffer: strided views, as a fused layer returns them.
        fused_projection = torch.randn(2, seqlen_q, 4, 8, 64, device="cuda", dtype=dtype)
        q, r = fused_projection[:, :, 0], fused_projection[:, :, 1].mul_(0.1)
        k, v = (normal(2, seqlen_kv, 2, 64, dtype=dtype) for _ in range(2))
        result = parallax_attn_func(q, r, k, v, causal=causal, return_stats=True)
        expected = reference_forward(q, r, k, v, causal=causal)
        assert_close(result[0], expected.out, name)
        assert_close(result[1].exp(), expected.lse.exp(), name)
        assert_close(result[2], expected.t_mean, name)
        assert_close(result[3], expected.v_mean, name)


def test_r_zero_is_softmax_attention() -> None:
    q, k, v = normal(2, 256, 8, 128), normal(2, 256, 8, 128), normal(2, 256, 8, 128)
    out = parallax_attn_func(q, torch.zeros_like(q), k, v, causal=True)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    softmax = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    assert (out - softmax.transpose(1, 2)).abs().max() <= 2**-6  # two roundings of values below 4 to bf16


def test_a_captured_graph_reads_lengths_on_the_device() -> None:
    q, r, k, v = decode_inputs(2, 4096, 8, 2)
    lengths = torch.full((2,), 4096, dtype=torch.int32, device="cuda")
    parallax_attn_with_kvcache(q, r, k, v, cache_seqlens=lengths)
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            parallax_attn_with_kvcache(q, r, k, v, cache_seqlens=lengths, out=out)
    for length in (1, 900, 4096):
        lengths.fill_(length)
        q.copy_(normal(*q.shape))
        graph.replay()
        eager = parallax_attn_with_kvcache(q, r, k, v, cache_seqlens=lengths)
        assert_close(out, reference_forward(q, r, k, v, cache_seqlens=lengths).out, "bf16")
        assert torch.equal(out, eager)


def test_streams_do_not_share_scratch() -> None:
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [decode_inputs(1, 16384, 8, 8) for _ in streams]
    outs: list[Tensor] = [parallax_attn_with_kvcache(*x) for x in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs[i] = parallax_attn_with_kvcache(*inputs[i])
    torch.cuda.synchronize()
    for x, out in zip(inputs, outs, strict=True):
        assert_close(out, reference_forward(*x).out, "bf16")
