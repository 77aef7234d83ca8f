"""What torch.utils.flop_counter.FlopCounterMode counts for the operators of whole sequences.

As `problem.shapes.work_of` counts: 2 FLOP for each multiply and add of the matmuls, over the pairs of a query and a key
that it sees. A causal square is half of one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from parallax_gen.problem.work import MATMULS, SCORES, visible_pairs
from parallax_gen.runtime.checks import Request

_OF_REQUEST = len(Request._fields)


def register(attention: Any, attention_with_stats: Any, attention_backward: Any) -> None:
    """Register the formulas of these operators, overload packets."""
    register_flop_formula([attention, attention_with_stats], get_raw=True)(forward_flops)
    register_flop_formula(attention_backward, get_raw=True)(backward_flops)


def forward_flops(*given: Any, out_val: Any = None) -> int:
    """4 matmuls: 8 · batch · heads · seqlen_q · seqlen_kv · head_dim where every query sees every key."""
    return _flops(MATMULS["forward"], Request(*given[:_OF_REQUEST]))


def backward_flops(*given: Any, out_val: Any = None) -> int:
    """8 matmuls for all gradients, 5 for those of q and r, 6 for those of k and v; and v̄'s, where it is found anew.

    Two kernels that make all of them find the scores twice; that is not counted.
    """
    asked = Request(*given[:_OF_REQUEST])
    v_mean, dqdr, dkdv = given[_OF_REQUEST + 4 : _OF_REQUEST + 7]
    matmuls = MATMULS["dqdr"] * dqdr + MATMULS["dkdv"] * dkdv - SCORES["dqdr"] * (dqdr and dkdv)
    return _flops(matmuls + MATMULS["forward"] * (v_mean is None), asked)


def _flops(matmuls: int, asked: Request) -> int:
    heads, head_dim = asked.q.shape[-2:]
    return int(2 * matmuls * heads * head_dim * _pairs(asked))


def _pairs(asked: Request) -> float:
    """(query, key) pairs that are seen, of one head of all sequences.

    Of packed ones cu_seqlens are read, which waits for the device; a stand-in for them holds no numbers, and then each
    sequence counts as the longest one.
    """
    window = 0 if asked.window_size is None else asked.window_size
    if asked.cu_seqlens_q is None or asked.cu_seqlens_k is None:
        return asked.q.shape[0] * visible_pairs(asked.q.shape[1], asked.k.shape[1], asked.causal, window)
    rows = _lengths(asked.cu_seqlens_q, asked.max_seqlen_q)
    keys = _lengths(asked.cu_seqlens_k, asked.max_seqlen_k)
    return sum(visible_pairs(*lengths, asked.causal, window) for lengths in zip(rows, keys, strict=True))


def _lengths(starts: Tensor, longest: int) -> list[int]:
    if type(starts) is not Tensor:
        return [longest] * (starts.shape[0] - 1)
    lengths: list[int] = starts.diff().clamp(min=0).tolist()
    return lengths
