"""The minimum work of a call in FLOPs and bytes, its rate for a given time, and its roofline bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from parallax_gen.problem.hardware import Gpu
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class Work:
    """The minimum work of a call: floating-point operations, and bytes of device memory traffic."""

    flops: float
    bytes: float


# The number of matmuls, each of 2·head_dim operations per (query, visible key) pair: forward s, t, o1, o2; dkdv s, t,
# dp, dv and two for dk; dqdr s, t, dp, dq, dr.
MATMULS = {"forward": 4, "dkdv": 6, "dqdr": 5, "decode": 4, "decode_varlen": 4}
SCORES = {"forward": 2, "dkdv": 3, "dqdr": 3}  # how many of them compute s, t and dp; the others accumulate outputs


class Traffic(NamedTuple):
    """The minimum memory traffic of each query row and each key row. A row has the elements of one head.

    q_vectors   vectors of head_dim elements per query row
    kv_vectors  vectors of head_dim elements per key row
    row_bytes   other bytes per query row
    flops       FLOPs per query row and dimension, without matmuls
    """

    q_vectors: int
    kv_vectors: int
    row_bytes: int = 0
    flops: int = 0


TRAFFIC = {
    "forward": Traffic(3, 2),  # q, r, o; k, v
    # do, o and v_mean; lse, t_mean and four statistics. Per element a multiply and an add for dp_mean and for
    # dp_mean - delta.
    "preprocess": Traffic(3, 0, 24, 4),
    "dkdv": Traffic(3, 4, 16),  # q, r, do; k, v and dk, dv
    "dqdr": Traffic(5, 2, 16),  # q, r, do and dq, dr; k, v
    "decode": Traffic(3, 2),
    "decode_varlen": Traffic(3, 2),
}
STATS_TRAFFIC = Traffic(1, 0, 8)  # additionally v_mean; lse and t_mean


def work_of(spec: KernelSpec, shape: Shape) -> Work:
    """The matmuls of an op over the visible pairs; each input is read and each output written once."""
    query_rows = shape.batch * shape.heads * shape.seqlen_q
    keys = min(shape.seqlen_kv, shape.window + shape.seqlen_q - 1) if shape.window else shape.seqlen_kv
    key_rows = shape.batch * shape.kv_heads * keys
    traffic = TRAFFIC[spec.op]
    q_vectors, row_bytes = (
        traffic.q_vectors + spec.stats * STATS_TRAFFIC.q_vectors,
        traffic.row_bytes + spec.stats * STATS_TRAFFIC.row_bytes,
    )
    flops = 2 * MATMULS.get(spec.op, 0) * shape.batch * shape.heads * spec.head_dim * _visible(spec, shape)
    flops += traffic.flops * query_rows * spec.head_dim
    per_dimension = query_rows * q_vectors * spec.bytes_per_element + key_rows * traffic.kv_vectors * spec.cache_bytes
    return Work(flops=float(flops), bytes=float(per_dimension * spec.head_dim + query_rows * row_bytes))


def work_of_lengths(spec: KernelSpec, shape: Shape, lengths: Sequence[int]) -> Work:
    """`work_of` for sequences with these numbers of keys, at most the shape's; () means the shape's for all."""
    if not lengths:
        return work_of(spec, shape)
    batches = [replace(shape, batch=count, seqlen_kv=keys) for keys, count in Counter(lengths).items()]
    works = [work_of(spec, batch) for batch in batches]
    return Work(sum(work.flops for work in works), sum(work.bytes for work in works))


def default_scale(head_dim: int) -> float:
    """The default factor of q·k."""
    return float(head_dim**-0.5)


def scale_or_default(softmax_scale: float | None, head_dim: int) -> float:
    return default_scale(head_dim) if softmax_scale is None else softmax_scale


def _visible(spec: KernelSpec, shape: Shape) -> float:
    """The visible (query, key) pairs of one head of one sequence."""
    return visible_pairs(shape.seqlen_q, shape.seqlen_kv, spec.causal, shape.window)


def visible_pairs(seqlen_q: int, seqlen_kv: int, causal: bool, window: int = 0) -> float:
    """The visible (query, key) pairs of one head of one sequence. window: 0 for none.

    Row i of a causal call sees max(0, seqlen_kv - seqlen_q + i + 1) keys. The count is the area of the triangle
    or trapezium, half of the square: the usual convention for causal rates. A window cuts off a corner of it.
    """
    if not causal:
        return seqlen_q * seqlen_kv
    rows = min(seqlen_q, seqlen_kv)
    pairs = rows * (seqlen_kv - rows) + rows * rows / 2
    if 0 < window < seqlen_kv:
        shortest, longest = max(0, seqlen_kv - rows - window), seqlen_kv - window
        pairs -= (longest**2 - shortest**2) / 2
    return pairs


# -- Time and work


def bound_by_matmuls(op: str) -> bool:
    """Whether an op is bound by the tensor cores. Decode and preprocess are bound by memory."""
    return op in SCORES


def rate_unit(op: str) -> str:
    """The unit of an op's rate, which depends on whether matmuls or memory bound the op."""
    return "TFLOP/s" if bound_by_matmuls(op) else "GB/s"


def rate(spec: KernelSpec, shape: Shape, time_us: float, lengths: Sequence[int] = ()) -> float:
    """The minimum work per second, in `rate_unit`; `lengths` as in `work_of_lengths`."""
    work = work_of_lengths(spec, shape, lengths)
    return work.flops / time_us / 1e6 if bound_by_matmuls(spec.op) else work.bytes / time_us / 1e3


def bound_us(spec: KernelSpec, shape: Shape, gpu: Gpu) -> float:
    """The roofline bound of a call in microseconds: its FLOPs at the card's peak, or its bytes at the bandwidth."""
    work = work_of(spec, shape)
    return 1e6 * max(work.flops / gpu.peak(spec.dtype), work.bytes / gpu.bandwidth)
