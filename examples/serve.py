"""Serve a batch from a paged cache: chunked prefill of two prompts, then decode steps (on a GPU as a CUDA graph)."""

from __future__ import annotations

import torch

from parallax_gen import GraphedDecode, parallax_attn_with_kvcache

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 2, 64
PAGE_SIZE, PAGES, PROMPTS, CHUNK, STEPS = 16, 16, (40, 23), 16, 5


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=torch.float16)

    # Keys and values of all sequences, in pages. A sequence's row of the table lists its pages.
    k_cache, v_cache = (normal(PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2))
    table = torch.randperm(PAGES, device=device).view(BATCH, PAGES // BATCH).int()
    lengths = torch.zeros(BATCH, dtype=torch.int32, device=device)
    cache = {"cache_seqlens": lengths, "page_table": table}

    def append(counts: list[int]) -> None:
        """Append random keys and values of new tokens; a model would compute them."""
        for b, count in enumerate(counts):
            for n in range(int(lengths[b]), int(lengths[b]) + count):
                k_cache[table[b, n // PAGE_SIZE], n % PAGE_SIZE] = normal(KV_HEADS, HEAD_DIM)
                v_cache[table[b, n // PAGE_SIZE], n % PAGE_SIZE] = normal(KV_HEADS, HEAD_DIM)
        lengths.add_(torch.tensor(counts, dtype=torch.int32, device=device))

    done = 0
    while done < max(PROMPTS):  # the next chunks of both prompts, packed; the last ones are shorter or empty
        counts = [max(0, min(CHUNK, prompt - done)) for prompt in PROMPTS]
        append(counts)
        starts = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32, device=device)
        q, r = normal(sum(counts), HEADS, HEAD_DIM), normal(sum(counts), HEADS, HEAD_DIM) / HEAD_DIM
        out = parallax_attn_with_kvcache(
            q, r, k_cache, v_cache, **cache, cu_seqlens_q=starts, max_seqlen_q=CHUNK, causal=True
        )
        print("chunk of", counts, "->", tuple(out.shape))
        done += CHUNK

    q, r = normal(BATCH, 1, HEADS, HEAD_DIM), normal(BATCH, 1, HEADS, HEAD_DIM) / HEAD_DIM
    append([1] * BATCH)
    step = GraphedDecode(q, r, k_cache, v_cache, **cache) if device == "cuda" else None
    for _ in range(STEPS):
        if step is not None:
            out = step(normal(*q.shape), normal(*r.shape) / HEAD_DIM)
        else:
            out = parallax_attn_with_kvcache(q, r, k_cache, v_cache, **cache)
        print("step over", lengths.tolist(), "keys ->", tuple(out.shape))
        append([1] * BATCH)


if __name__ == "__main__":
    main()
