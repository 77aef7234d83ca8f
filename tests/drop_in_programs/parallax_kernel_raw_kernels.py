"""The kernels without autograd, with heads folded into the batch, as a custom operator calls them."""

import torch
from parallax import parallax_bwd, parallax_func, parallax_fwd

batch, heads, kv_heads, length, width = 2, 4, 2, 128, 64
scale, group, window = width**-0.5, heads // kv_heads, 64

q = torch.randn(batch, heads, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
r = (torch.randn(batch, heads, length, width, device="cuda", dtype=torch.bfloat16) / 8).requires_grad_()
k = torch.randn(batch, kv_heads, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
v = torch.randn(batch, kv_heads, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
qf, rf, kf, vf = (x.detach().reshape(-1, length, width) for x in (q, r, k, v))

o, barv, d1, bart, m = parallax_fwd(qf, rf, kf, vf, scale, group, window)
grad_o = torch.randn_like(o)
grads = parallax_bwd(qf, rf, kf, vf, o, barv, d1, bart, m, grad_o, scale, group, window)

whole = parallax_func(q, r, k, v, scale, window)
whole.backward(grad_o.reshape(q.shape))
torch.testing.assert_close(o.reshape(q.shape), whole, rtol=2e-2, atol=2e-2)
for x, grad in zip((q, r, k, v), grads, strict=True):
    torch.testing.assert_close(grad.reshape(x.shape), x.grad, rtol=2e-2, atol=2e-2)
