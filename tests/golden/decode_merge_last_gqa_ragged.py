"""Parallax attention of queries against a KV cache, each sequence of its own length.

spec       decode, head_dim 128, bf16, GQA 12:1, ragged
config     BLOCK_N=32 BLOCK_H=8 NUM_SPLITS=6 merge=last num_warps=2 num_stages=4
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 4eb462ee1d17

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij. A row's state while keys stream by is (m, d1, d2, o1, o2): the running maximum of
log2(e) softmax_scale q.k, and the sums of 2^(s - m) times 1, t, v and t v.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634

NUM_SPLITS = 6  # programs that share a sequence's keys, on the average
SPARE = 8  # one program in so many sequences is there for long ones alone


@triton.jit
def _sizes(
    seq,
    there,
    cache_seqlens_ptr,
    seqlen_kv,
    BLOCK_N: tl.constexpr,
):
    """Of sequences: their keys, their queries, and how many blocks of keys they see."""
    length = tl.load(cache_seqlens_ptr + seq, mask=there, other=0)
    length = tl.maximum(tl.minimum(length, seqlen_kv), 0)  # never past the cache; below 0 counts as 0
    len_q = tl.where(there, 1, 0)
    return length, len_q, tl.cdiv(length, BLOCK_N)


@triton.jit
def _step(qr, k, v, visible, scale_log2, m, d1, d2, o):
    """Take a block of keys and values [BLOCK_N, HEAD_DIM] into the rows' state."""
    BLOCK_N: tl.constexpr = k.shape[0]
    st = tl.dot(qr, tl.trans(k))
    s, t = tl.split(tl.permute(tl.reshape(st, [2, 8, BLOCK_N]), [1, 2, 0]))  # [8, BLOCK_N] each
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    pt = p * t
    d1 = d1 * alpha + tl.sum(p, 1)
    d2 = d2 * alpha + tl.sum(pt, 1)
    both = tl.join(p.to(v.dtype), pt.to(v.dtype))
    both = tl.reshape(tl.permute(both, [2, 0, 1]), [16, BLOCK_N])  # stacked again, as qr is
    alpha = tl.reshape(tl.permute(tl.join(alpha, alpha), [1, 0]), [16])
    o = tl.dot(both, v, acc=o * alpha[:, None])  # [2*BLOCK_H, HEAD_DIM]
    return m_new, d1, d2, o


@triton.jit
def _join(d1, d2, o1, o2):
    """o = o1/d1 (1 + d2/d1) - o2/d1, and 0 for a row without keys."""
    inv = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
    return o1 * (inv * (1.0 + d2 * inv)) - o2 * inv


@triton.jit
def _merge(partials, stride, splits, row):
    """Join a row's splits, `stride` floats apart: rescale every state to the largest m, and add."""
    HEAD_DIM: tl.constexpr = 128
    ROWS: tl.constexpr = 8
    dims = tl.arange(0, 128)
    m = -3.0e38
    d1 = 0.0
    d2 = 0.0
    o1 = tl.zeros([128], tl.float32)
    o2 = tl.zeros([128], tl.float32)
    for first in range(0, splits, 32):  # as many vectors at a time as registers hold
        split = first + tl.arange(0, 32)
        there = split < splits  # what is not there has the lowest m, and weighs nothing
        parts = partials + split.to(tl.int64) * stride
        stats = parts + ROWS * 2 * HEAD_DIM + row
        m_part = tl.load(stats, mask=there, other=-3.0e38, cache_modifier=".cg")
        d1_part = tl.load(stats + ROWS, mask=there, other=0.0, cache_modifier=".cg")
        d2_part = tl.load(stats + 2 * ROWS, mask=there, other=0.0, cache_modifier=".cg")
        vectors = parts[:, None] + row * (2 * HEAD_DIM) + dims[None, :]
        in_row = there[:, None]
        v1 = tl.load(vectors, mask=in_row, other=0.0, cache_modifier=".cg")  # [splits, HEAD_DIM]
        v2 = tl.load(vectors + HEAD_DIM, mask=in_row, other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m, tl.max(m_part, 0))
        alpha = tl.exp2(m - m_new)
        weight = tl.exp2(m_part - m_new)
        d1 = d1 * alpha + tl.sum(weight * d1_part, 0)
        d2 = d2 * alpha + tl.sum(weight * d2_part, 0)
        o1 = o1 * alpha + tl.sum(weight[:, None] * v1, 0)
        o2 = o2 * alpha + tl.sum(weight[:, None] * v2, 0)
        m = m_new
    return m, d1, d2, o1, o2


@triton.jit(do_not_specialize=["kv_heads", "batch", "seqlen_kv"])
def decode_varlen_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    cache_seqlens_ptr,
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
    batch,
    kv_heads,
    seqlen_kv,
):
    HEAD_DIM: tl.constexpr = 128
    GROUP: tl.constexpr = 12  # query heads that share a kv head
    BLOCK_H: tl.constexpr = 8  # of which one program serves so many
    BLOCK_N: tl.constexpr = 32  # keys a program takes a step
    NUM_SPLITS: tl.constexpr = 6
    SPARE: tl.constexpr = 8
    ROWS: tl.constexpr = 8  # that a tile's partial state has
    SLOT: tl.constexpr = ROWS * (2 * HEAD_DIM + 4)  # floats of it; 4, not 3, keeps it 16-byte aligned
    SEQUENCES: tl.constexpr = 32  # looked at a time: each warp can do that by itself
    LEAST: tl.constexpr = 2  # blocks that are worth a program of their own
    TILES: tl.constexpr = 2  # that serve a group

    # -- an even share of all sequences' blocks: a long sequence gets many programs, a short one gets one. To round up
    #    takes one more of each sequence: so many shares that the launch has slots for them
    all_blocks = tl.zeros([SEQUENCES], tl.int32)
    for first in range(0, batch, SEQUENCES):
        seqs = first + tl.arange(0, SEQUENCES)
        _, _, blocks = _sizes(seqs, seqs < batch, cache_seqlens_ptr, seqlen_kv, BLOCK_N)
        all_blocks += blocks
    programs = batch * (NUM_SPLITS - 1) + tl.cdiv(batch, SPARE)
    share = tl.maximum(tl.cdiv(tl.sum(all_blocks, 0), programs), LEAST)

    # -- which sequence this program's slot falls to: sequences have tiles * splits slots, one after the other
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    slot = tl.program_id(0) // kv_heads
    seq = 0
    first_slot = 0
    all_slots = 0
    for first in range(0, batch, SEQUENCES):
        seqs = first + tl.arange(0, SEQUENCES)
        _, len_q, blocks = _sizes(seqs, seqs < batch, cache_seqlens_ptr, seqlen_kv, BLOCK_N)
        tiles = len_q * TILES
        slots = tiles * tl.maximum(tl.cdiv(blocks, share), 1)
        ends = all_slots + tl.cumsum(slots, 0)
        before = (ends <= slot) & (seqs < batch)
        seq += tl.sum(before.to(tl.int32), 0)
        first_slot = tl.maximum(first_slot, tl.max(tl.where(before, ends, 0), 0))
        all_slots += tl.sum(slots, 0)
    if slot >= all_slots:
        return

    # -- which tile of its rows, and which split of the tile's keys
    length, len_q, blocks = _sizes(seq, True, cache_seqlens_ptr, seqlen_kv, BLOCK_N)
    splits = tl.maximum(tl.cdiv(blocks, share), 1)
    tile = (slot - first_slot) // splits
    split = (slot - first_slot) % splits
    row0 = tile * BLOCK_H
    mine = tl.cdiv(blocks, splits) * BLOCK_N
    start = split * mine
    end = tl.minimum(start + mine, length)

    # -- one tile of queries and probes: 8 of each in turn
    stacked = tl.arange(0, 2 * BLOCK_H)
    heads = row0 + stacked % 8
    is_query = stacked < 8
    in_tile = heads < GROUP
    dims = tl.arange(0, 128)
    seq64 = seq.to(tl.int64)
    q_rows = q_ptr + seq64 * stride_qb + (kv_head * GROUP + heads) * stride_qh
    r_rows = r_ptr + seq64 * stride_rb + (kv_head * GROUP + heads) * stride_rh
    q = tl.load(q_rows[:, None] + dims[None, :], mask=(in_tile & is_query)[:, None], other=0.0)
    r = tl.load(r_rows[:, None] + dims[None, :], mask=(in_tile & ~is_query)[:, None], other=0.0)
    qr = q + r  # [2*BLOCK_H, HEAD_DIM]: one of the two is 0 in every row
    heads = row0 + tl.arange(0, BLOCK_H)
    in_tile = heads < GROUP

    keys = tl.arange(0, BLOCK_N)
    stride_kn64 = tl.cast(stride_kn, tl.int64)  # offsets within a block fit 32 bits, a cache's may not
    stride_vn64 = tl.cast(stride_vn, tl.int64)
    m = tl.full([BLOCK_H], -3.0e38, tl.float32)  # finite: rows without keys must not give NaN
    d1 = tl.zeros([BLOCK_H], tl.float32)
    d2 = tl.zeros([BLOCK_H], tl.float32)
    o = tl.zeros([2 * BLOCK_H, 128], tl.float32)

    # -- stream the keys. A block that would reach past the end is moved back to it, and keys it took before are
    #    masked: no load needs a mask, and what lies behind a sequence's end is never read
    k_ptr += seq64 * stride_kb + kv_head * stride_kh
    v_ptr += seq64 * stride_vb + kv_head * stride_vh
    near = tl.minimum(keys, length - 1)[:, None]  # of a sequence shorter than a block, the last key again
    k_offsets = near * stride_kn + dims[None, :]
    v_offsets = near * stride_vn + dims[None, :]
    last_block = tl.maximum(length - BLOCK_N, 0)
    # (From Triton 3.7 on, a loop that begins at a number found behind an early return is not pipelined.)
    for i in tl.range(0, end - start, BLOCK_N):
        n = start + i
        first = tl.minimum(n, last_block)
        k = tl.load(k_ptr + first * stride_kn64 + k_offsets)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_ptr + first * stride_vn64 + v_offsets)
        cols = first + keys
        visible = (cols >= n) & (cols < end)
        m, d1, d2, o = _step(qr, k, v, visible[None, :], scale_log2, m, d1, d2, o)

    o1, o2 = tl.split(tl.permute(tl.reshape(o, [2, 8, 128]), [1, 2, 0]))  # [8, HEAD_DIM] each
    o_ptr += seq64 * stride_ob + kv_head * GROUP * stride_oh
    if splits == 1:
        # -- nobody else has keys of this tile
        rows_at = heads * stride_oh
        out = _join(d1[:, None], d2[:, None], o1, o2)
        o_ptrs = o_ptr + rows_at[:, None] + dims[None, :]
        tl.store(o_ptrs, out.to(o_ptr.dtype.element_ty), mask=in_tile[:, None])
    else:
        # -- leave this split's state: [ROWS, 2, HEAD_DIM], then [3, ROWS]
        local = tl.arange(0, BLOCK_H)
        partials = partials_ptr + tl.program_id(0).to(tl.int64) * SLOT
        vector_ptrs = partials + local[:, None] * (2 * HEAD_DIM) + dims[None, :]
        tl.store(vector_ptrs, o1, mask=in_tile[:, None])
        tl.store(vector_ptrs + HEAD_DIM, o2, mask=in_tile[:, None])
        stat_ptrs = partials + ROWS * 2 * HEAD_DIM + local
        tl.store(stat_ptrs, m, mask=in_tile)
        tl.store(stat_ptrs + ROWS, d1, mask=in_tile)
        tl.store(stat_ptrs + 2 * ROWS, d2, mask=in_tile)

        # -- the last split to arrive joins them all, and sets the counter back for the next launch
        tl.debug_barrier()
        first_split = (slot - split) * kv_heads + kv_head
        if tl.atomic_add(arrived_ptr + first_split, 1, sem="acq_rel") == splits - 1:
            tl.store(arrived_ptr + first_split, 0)
            partials = partials_ptr + first_split.to(tl.int64) * SLOT
            for i in range(tl.minimum(GROUP - row0, BLOCK_H)):
                head = row0 + i
                row_at = head * stride_oh
                _, d1_row, d2_row, o1_row, o2_row = _merge(partials, kv_heads * SLOT, splits, i)
                out_row = _join(d1_row, d2_row, o1_row, o2_row)
                tl.store(o_ptr + row_at + dims, out_row.to(o_ptr.dtype.element_ty))


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    cache_seqlens: torch.Tensor,
    partials: torch.Tensor,
    arrived: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the attention of each sequence's queries over its cached keys to out, on the current stream.

    q, r, out         (batch, 1, kv_heads*12, 128) bf16, any strides with a contiguous last dimension
    k_cache, v_cache  (batch, seqlen, kv_heads, 128) bf16, any strides likewise
    cache_seqlens     (batch,) int32: keys in each sequence, 0 to seqlen; what lies behind is never read
    partials          fp32 scratch of slots * kv_heads * 2080 numbers, slots as below
    arrived           int32 scratch of slots * kv_heads numbers, 0 at first and again after every launch
    """
    batch, kv_heads = cache_seqlens.shape[0], k_cache.shape[2]
    slots = 2 * (batch * NUM_SPLITS + triton.cdiv(batch, SPARE))  # at the most
    decode_varlen_kernel[(slots * kv_heads,)](
        q,
        r,
        k_cache,
        v_cache,
        out,
        cache_seqlens,
        partials,
        arrived,
        q.stride(0),
        q.stride(2),
        r.stride(0),
        r.stride(2),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        out.stride(0),
        out.stride(2),
        softmax_scale * LOG2_E,
        batch,
        kv_heads,
        k_cache.shape[1],
        num_warps=2,
        num_stages=4,
        enable_fp_fusion=True,
    )
