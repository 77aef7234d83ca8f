"""The Triton decode, which needs no extras, over left-padded caches."""

import torch
from parallax import parallax_reference
from parallax.triton import parallax_decode

q = torch.randn(2, 1, 4, 64, device="cuda", dtype=torch.bfloat16)
r = torch.randn_like(q) / 8
k = torch.randn(2, 100, 2, 64, device="cuda", dtype=torch.bfloat16)
v = torch.randn_like(k)

padding = torch.tensor([0, 30], device="cuda")
o = parallax_decode(q, r, k, v, cache_start=padding, window_size_left=80)
for b, (first, keys) in enumerate(((20, 80), (30, 70))):
    one = [x[b : b + 1] for x in (q, r, k[:, first:], v[:, first:])]
    ref = parallax_reference(*one, 64**-0.5)
    assert one[2].shape[1] == keys
    assert (o[b : b + 1].float() - ref).abs().max() < 1e-2 * ref.abs().max()
