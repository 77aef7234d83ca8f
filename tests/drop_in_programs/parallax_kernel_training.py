"""A training step compared with the reference's gradients, and one with a window and GQA."""

import torch
from parallax import parallax_func, parallax_reference


def close(result, expected):
    return (result.float() - expected.float()).abs().max() < 1e-2 * expected.float().abs().max()


for heads_kv, window in ((4, -1), (2, 64)):
    q = torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    r = (torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16) / 8).requires_grad_()
    k = torch.randn(2, heads_kv, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    v = torch.randn(2, heads_kv, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    o = parallax_func(q, r, k, v, window_size_left=window)
    o.float().pow(2).mean().backward()
    assert o.shape == q.shape

    heads_last = [x.detach().permute(0, 2, 1, 3).contiguous().float().requires_grad_() for x in (q, r, k, v)]
    ref = parallax_reference(*heads_last, 64**-0.5, causal=True, window_size_left=window)
    ref.pow(2).mean().backward()
    assert close(o, ref.permute(0, 2, 1, 3))
    for x, y in zip((q, r, k, v), heads_last, strict=True):
        assert close(x.grad, y.grad.permute(0, 2, 1, 3))
