"""Training steps compared with the naive function: dense, windowed and packed."""

import torch
from fla.ops.parallax import naive_parallax, parallel_parallax


def ratio(result, expected):
    return ((result - expected).float().norm() / expected.float().norm()).item()


def leaves(batch, length, width):
    q, r = (torch.randn(batch, length, 4, width, dtype=torch.float16, device="cuda") for _ in range(2))
    k, v = (torch.randn(batch, length, 2, width, dtype=torch.float16, device="cuda") for _ in range(2))
    return [x.requires_grad_() for x in (q, r / 8, k, v)]


for options in ({}, {"scale": 0.1}, {"window_size": 32}):
    inputs = leaves(2, 111, 100)
    do = torch.randn_like(inputs[0])
    tri = parallel_parallax(*inputs, **options)
    found = torch.autograd.grad(tri, inputs, do)
    ref = naive_parallax(*[x.float() for x in inputs], **options).to(tri.dtype)
    wanted = torch.autograd.grad(ref, inputs, do)
    assert ratio(tri, ref) < 0.005
    assert all(ratio(x, y) < 0.005 for x, y in zip(found, wanted, strict=True))

q, r, k, v = leaves(1, 111, 64)
cu_seqlens = torch.tensor([0, 15, 111], dtype=torch.long, device="cuda")
tri = parallel_parallax(q=q, r=r, k=k, v=v, window_size=16, cu_seqlens=cu_seqlens)
parts = [[x[:, begin:end] for x in (q, r, k, v)] for begin, end in ((0, 15), (15, 111))]
ref = torch.cat([naive_parallax(*part, window_size=16) for part in parts], 1)
assert ratio(tri, ref) < 0.005
