"""Inputs whose rows give most of their weight to one key or to a few, as rows of trained models do.

Such rows show a rounding error that normal inputs hide. Where one key j has nearly all weight of row i, t_ij and t̄_i
are nearly equal and o_i = v̄_i (1 + t̄_i) - Σ_j p_ij t_ij v_j is a small difference of terms |t_ij| times as large.
|t_ij| is about sqrt(head_dim) for normal r and k. A kernel that rounds p·t for its matmul, and sums it without
rounding, has |t_ij| times the error of softmax attention; one that centers t on its running mean first does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallax_gen.errors import ArgumentError

# What the rows of each kind attend to: one key of the sequence (the first, or the one at a tenth of its length), each
# row's own key (on the diagonal), or two keys that are far apart. In the last two kinds rows attend to two and to six
# neighbouring keys, which are nearly equal but have different values.
KINDS = ("normal", "first key", "own key", "one key", "two keys", "twin keys", "six alike")

FEWEST_KEYS = 16
Kind = str | int  # one of KINDS, or the number of a key: see `peaked`
_ALIKE: dict[Kind, int] = {"twin keys": 2, "six alike": 6}
_SPREAD = 0.05  # of keys that are nearly the same, relative to their size


def peaked(kind: Kind, q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """q and k, normal and of unit variance, changed so that every query attends to its kind's keys.

    kind  one of KINDS; "normal" returns them as they are. Or the number of the key: from 0 in the sequence, or negative
          and counted back from each row's own key, which is -1; rows without such a key attend to the first
    q     (batch, seqlen_q, heads, head_dim)
    k     (batch, seqlen_kv, kv_heads, head_dim), seqlen_kv at least FEWEST_KEYS

    Causal rows before such a key attend to all keys that they see.
    """
    if not isinstance(kind, int) and kind not in KINDS:
        raise ArgumentError("kind", repr(kind), ", ".join(KINDS))
    if isinstance(kind, int) and not -k.shape[1] <= kind < k.shape[1]:
        raise ArgumentError("kind", kind, f"a key of the {k.shape[1]}")
    if k.shape[1] < FEWEST_KEYS:
        raise ArgumentError("k", f"seqlen_kv {k.shape[1]}", f"at least {FEWEST_KEYS}")
    if kind == "normal":
        return q, k
    group, one, other = q.shape[2] // k.shape[2], k.shape[1] // 10, k.shape[1] * 7 // 10
    k = k.clone()
    for near in range(one + 1, one + _ALIKE.get(kind, 1)):
        k[:, near] = k[:, one] + _SPREAD * k[:, near]

    def of_heads(keys: Tensor) -> Tensor:
        return keys.repeat_interleave(group, dim=2)

    def counted_back(number: int) -> Tensor:
        return (torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1] + 1 + number).clamp(min=0)

    if isinstance(kind, int):
        return 0.5 * q + of_heads(k[:, counted_back(kind) if kind < 0 else [kind]]), k
    if kind == "own key":
        noise = torch.randn(q.shape, dtype=q.dtype, device=q.device, generator=generator)
        return of_heads(k[:, counted_back(-1)]) + 0.2 * noise, k
    if kind == "two keys":
        return 0.4 * q + 0.6 * of_heads(k[:, one : one + 1]) + 0.6 * of_heads(k[:, other : other + 1]), k
    key = 0 if kind == "first key" else one
    return 0.5 * q + of_heads(k[:, key : key + 1]), k
