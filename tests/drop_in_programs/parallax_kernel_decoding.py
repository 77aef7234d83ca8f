"""Single-query decoding: the whole cache, a window, per-sequence lengths, and an output of the caller's."""

import math

import torch
from parallax import parallax_attn_with_kvcache, parallax_decode, parallax_reference

B, H, D = 4, 8, 128
kv_len = 256
scale = 1.0 / math.sqrt(D)
q = torch.randn(B, 1, H, D, device="cuda", dtype=torch.bfloat16)
r = torch.randn_like(q) / 8
k = torch.randn(B, kv_len, H, D, device="cuda", dtype=torch.bfloat16)
v = torch.randn_like(k)


def close(result, expected):
    return (result.float() - expected).abs().max() < 1e-2 * expected.abs().max()


o = parallax_decode(q, r, k, v, qk_scale=scale)
assert close(o, parallax_reference(q, r, k, v, scale, causal=True))
assert torch.equal(parallax_attn_with_kvcache(q, r, k, v), o)

windowed = parallax_attn_with_kvcache(q, r, k, v, window_size=(100, 0))
assert close(windowed, parallax_reference(q, r, k, v, scale, window_size_left=100))
assert torch.equal(windowed, parallax_decode(q, r, k, v, scale, window_size_left=100))

used = torch.tensor([200, 1, 64, 256], dtype=torch.int32, device="cuda")
out = torch.empty_like(q)
assert parallax_attn_with_kvcache(q, r, k, v, seqused_k=used, out=out).data_ptr() == out.data_ptr()
for b, n in enumerate(used.tolist()):
    assert close(
        out[b : b + 1], parallax_reference(q[b : b + 1], r[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], scale)
    )
