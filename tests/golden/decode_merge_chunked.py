"""Parallax attention, decode: one query a sequence against a KV cache.

spec       decode, head_dim 128, fp32, MHA
config     BLOCK_N=16 BLOCK_H=8 NUM_SPLITS=24 merge=last num_warps=1 num_stages=3
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 180a0a502f0b

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij. A row's state while keys stream by is (m, d1, d2, o1, o2): the running maximum of
log2(e) softmax_scale q.k, and the sums of 2^(s - m) times 1, t, v and t v.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
NUM_SPLITS = 24  # programs that share one sequence's keys


@triton.jit
def _step(qr, k, v, visible, scale_log2, m, d1, d2, o):
    """Take a block of keys and values [BLOCK_N, HEAD_DIM] into the rows' state."""
    BLOCK_N: tl.constexpr = k.shape[0]
    st = tl.dot(qr, tl.trans(k), input_precision="ieee")
    s, t = tl.split(tl.permute(tl.reshape(st, [2, 8, BLOCK_N]), [1, 2, 0]))  # [8, BLOCK_N] each
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    pt = p * t
    d1 = d1 * alpha + tl.sum(p, 1)
    d2 = d2 * alpha + tl.sum(pt, 1)
    both = tl.join(p, pt)
    both = tl.reshape(tl.permute(both, [2, 0, 1]), [16, BLOCK_N])  # stacked again, as qr is
    alpha = tl.reshape(tl.permute(tl.join(alpha, alpha), [1, 0]), [16])
    o = tl.dot(both, v, acc=o * alpha[:, None], input_precision="ieee")  # [2*BLOCK_H, HEAD_DIM]
    return m_new, d1, d2, o


@triton.jit
def _merge(partials):
    """Join one query head's splits: rescale every state to the largest m, add, and finish. -> [HEAD_DIM]"""
    HEAD_DIM: tl.constexpr = 128
    NUM_SPLITS: tl.constexpr = 24
    splits = tl.arange(0, 32)
    dims = tl.arange(0, HEAD_DIM)
    stats = partials + NUM_SPLITS * 2 * HEAD_DIM
    there = splits < NUM_SPLITS  # what is not there has the lowest m, and weighs nothing
    m = tl.load(stats + splits, mask=there, other=-3.0e38, cache_modifier=".cg")
    d1 = tl.load(stats + NUM_SPLITS + splits, mask=there, other=0.0, cache_modifier=".cg")
    d2 = tl.load(stats + 2 * NUM_SPLITS + splits, mask=there, other=0.0, cache_modifier=".cg")
    m_all = tl.max(m, 0)
    weight = tl.exp2(m - m_all)
    d1 = tl.sum(weight * d1, 0)
    d2 = tl.sum(weight * d2, 0)
    o1 = tl.zeros([HEAD_DIM], tl.float32)
    o2 = tl.zeros([HEAD_DIM], tl.float32)
    for first in tl.static_range(0, NUM_SPLITS, 16):  # as many vectors at a time as registers hold
        splits = first + tl.arange(0, 16)
        there = splits < NUM_SPLITS
        m = tl.load(stats + splits, mask=there, other=-3.0e38, cache_modifier=".cg")
        weight = tl.exp2(m - m_all)
        vectors = partials + splits[:, None] * (2 * HEAD_DIM) + dims[None, :]
        v1 = tl.load(vectors, mask=there[:, None], other=0.0, cache_modifier=".cg")  # [splits, HEAD_DIM]
        v2 = tl.load(vectors + HEAD_DIM, mask=there[:, None], other=0.0, cache_modifier=".cg")
        o1 += tl.sum(weight[:, None] * v1, 0)
        o2 += tl.sum(weight[:, None] * v2, 0)
    inv = 1.0 / d1
    return o1 * (inv * (1.0 + d2 * inv)) - o2 * inv


@triton.jit(do_not_specialize=["kv_heads", "seqlen_kv"])
def decode_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    partials_ptr,
    arrived_ptr,
    stride_qb,
    stride_qh,
    stride_rb,
    stride_rh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_oh,
    scale_log2,
    kv_heads,
    seqlen_kv,
):
    HEAD_DIM: tl.constexpr = 128
    GROUP: tl.constexpr = 1  # query heads that share a kv head
    BLOCK_H: tl.constexpr = 8  # of which one program serves so many
    BLOCK_N: tl.constexpr = 16  # keys it takes a step
    NUM_SPLITS: tl.constexpr = 24

    # -- which split of which sequence and kv head
    pid = tl.program_id(0)
    split = pid % NUM_SPLITS
    bh = pid // NUM_SPLITS
    batch = (bh // kv_heads).to(tl.int64)
    kv_head = (bh % kv_heads).to(tl.int64)
    blocks = tl.cdiv(seqlen_kv, BLOCK_N)
    start = blocks * split // NUM_SPLITS * BLOCK_N
    end = tl.minimum(blocks * (split + 1) // NUM_SPLITS * BLOCK_N, seqlen_kv)

    # -- one tile of queries and probes: 8 of each in turn
    rows = tl.arange(0, 2 * BLOCK_H)
    heads = rows % 8
    is_query = rows < 8
    in_group = heads < GROUP
    dims = tl.arange(0, HEAD_DIM)
    q_ptrs = q_ptr + batch * stride_qb + (kv_head * GROUP + heads)[:, None] * stride_qh + dims[None, :]
    r_ptrs = r_ptr + batch * stride_rb + (kv_head * GROUP + heads)[:, None] * stride_rh + dims[None, :]
    q = tl.load(q_ptrs, mask=(in_group & is_query)[:, None], other=0.0)
    r = tl.load(r_ptrs, mask=(in_group & ~is_query)[:, None], other=0.0)
    qr = q + r  # [2*BLOCK_H, HEAD_DIM]: one of the two is 0 in every row

    keys = tl.arange(0, BLOCK_N)
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    near = tl.minimum(keys, seqlen_kv - 1)[:, None]  # of a sequence shorter than a block, the last key again
    k_offsets = near * stride_kn + dims[None, :]
    v_offsets = near * stride_vn + dims[None, :]
    stride_kn64 = tl.cast(stride_kn, tl.int64)  # offsets within a block fit 32 bits, a cache's may not
    stride_vn64 = tl.cast(stride_vn, tl.int64)
    m = tl.full([BLOCK_H], -3.0e38, tl.float32)  # finite: a split without keys must not give NaN
    d1 = tl.zeros([BLOCK_H], tl.float32)
    d2 = tl.zeros([BLOCK_H], tl.float32)
    o = tl.zeros([2 * BLOCK_H, HEAD_DIM], tl.float32)

    # -- stream the keys. A block that would reach past the end is moved back to it, and keys it took before are
    #    masked: no load needs a mask, and what lies behind the end is never read
    last_block = tl.maximum(seqlen_kv - BLOCK_N, 0)
    for n in tl.range(start, end, BLOCK_N):
        first = tl.minimum(n, last_block)
        k = tl.load(k_ptr + first * stride_kn64 + k_offsets)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_ptr + first * stride_vn64 + v_offsets)
        cols = first + keys
        visible = (cols >= n) & (cols < end)
        m, d1, d2, o = _step(qr, k, v, visible[None, :], scale_log2, m, d1, d2, o)

    o1, o2 = tl.split(tl.permute(tl.reshape(o, [2, 8, HEAD_DIM]), [1, 2, 0]))  # [8, HEAD_DIM] each
    heads = tl.arange(0, BLOCK_H)
    in_group = heads < GROUP

    # -- leave this split's state; a query head's partials are [NUM_SPLITS, 2, HEAD_DIM] then [3, NUM_SPLITS]
    ROW: tl.constexpr = NUM_SPLITS * (2 * HEAD_DIM + 4)  # floats; 4, not 3, keeps rows 16-byte aligned
    row_ptrs = partials_ptr + (bh * GROUP + heads).to(tl.int64) * ROW
    o_ptrs = row_ptrs[:, None] + split * (2 * HEAD_DIM) + dims[None, :]
    tl.store(o_ptrs, o1, mask=in_group[:, None])
    tl.store(o_ptrs + HEAD_DIM, o2, mask=in_group[:, None])
    stat_ptrs = row_ptrs + NUM_SPLITS * 2 * HEAD_DIM + split
    tl.store(stat_ptrs, m, mask=in_group)
    tl.store(stat_ptrs + NUM_SPLITS, d1, mask=in_group)
    tl.store(stat_ptrs + 2 * NUM_SPLITS, d2, mask=in_group)

    # -- the last split to arrive joins them all, and sets the counter back for the next launch
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + bh, 1, sem="acq_rel") == NUM_SPLITS - 1:
        tl.store(arrived_ptr + bh, 0)
        out = _merge(partials_ptr + bh.to(tl.int64) * ROW)
        tl.store(o_ptr + batch * stride_ob + kv_head * stride_oh + dims, out.to(o_ptr.dtype.element_ty))


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    partials: torch.Tensor,
    arrived: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the attention of one query a sequence over its cached keys to out, on the current stream.

    q, r, out         (batch, 1, heads, 128) fp32, any strides with a contiguous last dimension
    k_cache, v_cache  (batch, seqlen, heads, 128) fp32, likewise
    partials          fp32 scratch of batch * heads * NUM_SPLITS * 260 numbers
    arrived           int32 scratch of batch * kv_heads numbers, 0 at first and again after every launch
    """
    batch, kv_heads = k_cache.shape[0], k_cache.shape[2]
    stride_qb, _, stride_qh, _ = q.stride()
    stride_rb, _, stride_rh, _ = r.stride()
    stride_ob, _, stride_oh, _ = out.stride()
    decode_kernel[(batch * kv_heads * NUM_SPLITS,)](
        q,
        r,
        k_cache,
        v_cache,
        out,
        partials,
        arrived,
        stride_qb,
        stride_qh,
        stride_rb,
        stride_rh,
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        stride_ob,
        stride_oh,
        softmax_scale * LOG2_E,
        kv_heads,
        k_cache.shape[1],
        num_warps=1,
        num_stages=3,
        enable_fp_fusion=True,
    )
