"""A decode step captured as a CUDA graph, replayed while a sequence grows in the graph's own cache."""

import torch
from parallax import GraphedDecode, parallax_reference

step = GraphedDecode(B=1, H=8, max_kv_len=64, head_dim=128, device="cuda")
step.k.zero_()
step.v.zero_()
for t in range(1, 6):
    q_t, r_t, k_t, v_t = (torch.randn(1, 1, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    step.k[:, t - 1 : t].copy_(k_t)
    step.v[:, t - 1 : t].copy_(v_t)
    step.cache_seqlens.fill_(t)
    step.q.copy_(q_t)
    step.r.copy_(r_t / 8)
    out = step.replay()
    ref = parallax_reference(step.q, step.r, step.k[:, :t], step.v[:, :t], 128**-0.5)
    assert (out.float() - ref).abs().max() < 1.5e-2 * ref.abs().max()

k_full, v_full = (torch.randn(1, 64, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
lens = torch.tensor([40], dtype=torch.int32, device="cuda")
out = step(q=q_t, r=r_t / 8, k=k_full, v=v_full, cache_seqlens=lens)
ref = parallax_reference(q_t, r_t / 8, k_full[:, :40], v_full[:, :40], 128**-0.5)
assert (out.float() - ref).abs().max() < 1e-2 * ref.abs().max()
