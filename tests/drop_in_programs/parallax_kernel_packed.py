"""Packed sequences of different lengths, heads last, each compared with the reference."""

from itertools import pairwise

import torch
from parallax import parallax_reference, parallax_varlen_func

cu_seqlens = torch.tensor([0, 40, 41, 128], device="cuda", dtype=torch.int32)
q = torch.randn(1, 128, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
r = (torch.randn(1, 128, 4, 64, device="cuda", dtype=torch.bfloat16) / 8).requires_grad_()
k = torch.randn(1, 128, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
v = torch.randn(1, 128, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

o = parallax_varlen_func(q, r, k, v, cu_seqlens=cu_seqlens)
o.sum().backward()
assert all(x.grad is not None for x in (q, r, k, v))

ends = cu_seqlens.tolist()
for begin, end in pairwise(ends):
    one = [x.detach()[:, begin:end] for x in (q, r, k, v)]
    ref = parallax_reference(*one, 64**-0.5)
    assert (o[:, begin:end].float() - ref).abs().max() < 1e-2 * ref.abs().max()

dense = parallax_varlen_func(q, r, k, v)
assert dense.shape == q.shape
