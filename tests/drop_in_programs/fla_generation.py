"""Generation with a cache of left-padded sequences: the prompt, then token by token."""

import torch
from fla.ops.parallax import parallel_parallax
from fla.ops.parallax.decode import parallax_decode, parallax_decode_one_step

batch, prompt, new, window = 2, 24, 4, 16
attention_mask = torch.ones(batch, prompt, dtype=torch.long, device="cuda")
attention_mask[1, :5] = 0

q, r = (torch.randn(batch, prompt + new, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
k, v = (torch.randn(batch, prompt + new, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
r = r / 8

outputs = []
for length in range(prompt, prompt + new + 1):
    queries = prompt if length == prompt else 1
    rows = slice(length - queries, length)
    cache_start = (prompt - attention_mask.sum(-1)).to(torch.int32)
    decode_fn = parallax_decode_one_step if queries == 1 else parallax_decode
    outputs.append(
        decode_fn(q[:, rows], r[:, rows], k[:, :length], v[:, :length], window_size=window, cache_start=cache_start)
    )
found = torch.cat(outputs, 1)
assert not found.isnan().any()

for b, padding in enumerate((0, 5)):
    whole = parallel_parallax(*[x[b : b + 1, padding:] for x in (q, r, k, v)], window_size=window)
    torch.testing.assert_close(found[b : b + 1, padding:], whole, rtol=2e-2, atol=2e-2)
