"""Functions for the ranks of a torch.distributed group.

Context parallelism, with one sequence sharded over the ranks:

    from parallax_gen.distributed import gather_sequence, ring_attn_func, shard_sequence

    q, r, k, v = (shard_sequence(x, causal=True) for x in (q, r, k, v))
    out = ring_attn_func(q, r, k, v, causal=True)

Sharing one table of tuned kernels between all ranks:

    from parallax_gen.distributed import share_tuning

    torch.distributed.init_process_group()
    share_tuning()
"""

from __future__ import annotations

from parallax_gen.distributed.ring import gather_sequence, ring_attn_func, shard_sequence
from parallax_gen.distributed.tuning import share_tuning

__all__ = ["gather_sequence", "ring_attn_func", "shard_sequence", "share_tuning"]
