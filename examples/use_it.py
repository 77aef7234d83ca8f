"""Use the two public functions: a prefill, then a few decode steps against a cache. CPU tensors run the reference."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from parallax_gen import parallax_attn_func, parallax_attn_with_kvcache


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, heads, kv_heads, head_dim, prompt, capacity = 2, 8, 2, 64, 48, 64

    def normal(seqlen: int, n: int) -> torch.Tensor:
        return torch.randn(batch, seqlen, n, head_dim, device=device, dtype=torch.float16)

    k_cache, v_cache = normal(capacity, kv_heads), normal(capacity, kv_heads)
    q, r = normal(prompt, heads), normal(prompt, heads) / head_dim
    out = parallax_attn_func(q, r, k_cache[:, :prompt], v_cache[:, :prompt], causal=True)
    print("prefill", tuple(out.shape))

    lengths = torch.full((batch,), prompt, dtype=torch.int32, device=device)
    for step in range(3):
        k_cache[:, prompt + step], v_cache[:, prompt + step] = normal(1, kv_heads)[:, 0], normal(1, kv_heads)[:, 0]
        lengths += 1
        out = parallax_attn_with_kvcache(
            normal(1, heads), normal(1, heads) / head_dim, k_cache, v_cache, cache_seqlens=lengths
        )
        print("step", step, tuple(out.shape), "attended to", lengths.tolist())

    k, v = k_cache[:, :prompt], v_cache[:, :prompt]
    out = parallax_attn_func(q, torch.zeros_like(q), k, v, causal=True)
    softmax = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    print(f"r = 0 differs from softmax attention by {(out - softmax.transpose(1, 2)).abs().max():.1e} at most")


if __name__ == "__main__":
    main()
