"""Parallax attention of queries against a KV cache, each sequence of its own length.

spec       decode, head_dim 128, bf16, GQA 12:1, ragged
config     BLOCK_N=32 BLOCK_H=8 NUM_SPLITS=6 merge=last num_warps=2 num_stages=4
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 4eb462ee1d17

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij. The running state of a row is (m, d1, d2, o1, o2): the maximum m of
s = log2(e) softmax_scale q.k, and the sums of 2^(s - m) times 1, t, v and t v.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634

NUM_SPLITS = 6  # splits per sequence, on average
SPARE_EVERY = 8  # one extra split per 8 sequences, for the long ones


@triton.jit
def _lengths(
    seq,
    valid,
    cache_seqlens_ptr,
    seqlen_kv,
    BLOCK_N: tl.constexpr,
):
    """Per sequence: number of keys, number of queries, number of visible key blocks."""
    length = tl.load(cache_seqlens_ptr + seq, mask=valid, other=0)
    length = tl.maximum(tl.minimum(length, seqlen_kv), 0)  # clamped to the cache
    len_q = tl.where(valid, 1, 0)
    return length, len_q, tl.cdiv(length, BLOCK_N)


@triton.jit
def _step(qr, k, v, visible, scale_log2, m, d1, d2, o):
    """Update the rows' state (m, d1, d2, o) by a block of keys and values [BLOCK_N, HEAD_DIM]."""
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
    weights = tl.join(p.to(v.dtype), pt.to(v.dtype))
    weights = tl.reshape(tl.permute(weights, [2, 0, 1]), [16, BLOCK_N])  # stacked like qr
    alpha = tl.reshape(tl.permute(tl.join(alpha, alpha), [1, 0]), [16])
    o = tl.dot(weights, v, acc=o * alpha[:, None])  # [2*BLOCK_H, HEAD_DIM]
    return m_new, d1, d2, o


@triton.jit
def _output(d1, d2, o1, o2):
    """o = o1/d1 (1 + d2/d1) - o2/d1, and 0 for a row without keys."""
    inv = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
    return o1 * (inv * (1.0 + d2 * inv)) - o2 * inv


@triton.jit
def _merge(partials, stride, splits, row):
    """Merge the states of a row's splits, `stride` floats apart: rescale each to the largest m, and add."""
    HEAD_DIM: tl.constexpr = 128
    ROWS: tl.constexpr = 8
    dims = tl.arange(0, 128)
    m = -3.0e38
    d1 = 0.0
    d2 = 0.0
    o1 = tl.zeros([128], tl.float32)
    o2 = tl.zeros([128], tl.float32)
    for first in range(0, splits, 32):  # as many vectors at a time as fit in registers
        split = first + tl.arange(0, 32)
        valid = split < splits  # lanes past the last split get the lowest m, hence weight 0
        parts = partials + split.to(tl.int64) * stride
        stats = parts + ROWS * 2 * HEAD_DIM + row
        m_part = tl.load(stats, mask=valid, other=-3.0e38, cache_modifier=".cg")
        d1_part = tl.load(stats + ROWS, mask=valid, other=0.0, cache_modifier=".cg")
        d2_part = tl.load(stats + 2 * ROWS, mask=valid, other=0.0, cache_modifier=".cg")
        vectors = parts[:, None] + row * (2 * HEAD_DIM) + dims[None, :]
        in_row = valid[:, None]
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
    GROUP: tl.constexpr = 12  # query heads per kv head
    BLOCK_H: tl.constexpr = 8  # query heads per program
    BLOCK_N: tl.constexpr = 32  # keys per iteration
    NUM_SPLITS: tl.constexpr = 6
    SPARE_EVERY: tl.constexpr = 8
    ROWS: tl.constexpr = 8  # rows of a split's state
    STATE: tl.constexpr = ROWS * (2 * HEAD_DIM + 4)  # its floats; 4, not 3, for alignment to 16 bytes
    SEQUENCES: tl.constexpr = 32  # sequences scanned at a time, one a lane: no exchange between warps
    MIN_BLOCKS: tl.constexpr = 2  # blocks of keys that a split has at least
    TILES: tl.constexpr = 2  # tiles per group of query heads

    # -- blocks per split, equal for all sequences: long sequences get many splits, short ones one. Rounding up adds at
    #    most one split per sequence, for which the launch has work items
    all_blocks = tl.zeros([SEQUENCES], tl.int32)
    for first in range(0, batch, SEQUENCES):
        seqs = first + tl.arange(0, SEQUENCES)
        _, _, blocks = _lengths(seqs, seqs < batch, cache_seqlens_ptr, seqlen_kv, BLOCK_N)
        all_blocks += blocks
    programs = batch * (NUM_SPLITS - 1) + tl.cdiv(batch, SPARE_EVERY)
    blocks_per_split = tl.maximum(tl.cdiv(tl.sum(all_blocks, 0), programs), MIN_BLOCKS)

    # -- the sequence of this program's work item: each sequence has tiles * splits items, in order
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    item = tl.program_id(0) // kv_heads
    seq = 0
    first_item = 0
    num_items = 0
    for first in range(0, batch, SEQUENCES):
        seqs = first + tl.arange(0, SEQUENCES)
        _, len_q, blocks = _lengths(seqs, seqs < batch, cache_seqlens_ptr, seqlen_kv, BLOCK_N)
        tiles = len_q * TILES
        items = tiles * tl.maximum(tl.cdiv(blocks, blocks_per_split), 1)
        ends = num_items + tl.cumsum(items, 0)
        before = (ends <= item) & (seqs < batch)
        seq += tl.sum(before.to(tl.int32), 0)
        first_item = tl.maximum(first_item, tl.max(tl.where(before, ends, 0), 0))
        num_items += tl.sum(items, 0)
    if item >= num_items:
        return

    # -- the tile of its rows, and the split of the tile's keys
    length, len_q, blocks = _lengths(seq, True, cache_seqlens_ptr, seqlen_kv, BLOCK_N)
    splits = tl.maximum(tl.cdiv(blocks, blocks_per_split), 1)
    tile = (item - first_item) // splits
    split = (item - first_item) % splits
    row0 = tile * BLOCK_H
    keys_per_split = tl.cdiv(blocks, splits) * BLOCK_N
    start = split * keys_per_split
    end = tl.minimum(start + keys_per_split, length)

    # -- one tile that stacks q and r: 8 rows of each in turn
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
    qr = q + r  # [2*BLOCK_H, HEAD_DIM]: in every row one of the two is 0
    heads = row0 + tl.arange(0, BLOCK_H)
    in_tile = heads < GROUP

    keys = tl.arange(0, BLOCK_N)
    stride_kn64 = tl.cast(stride_kn, tl.int64)  # offsets within a block fit 32 bits, those of a cache may not
    stride_vn64 = tl.cast(stride_vn, tl.int64)
    m = tl.full([BLOCK_H], -3.0e38, tl.float32)  # finite, so that rows without keys do not give NaN
    d1 = tl.zeros([BLOCK_H], tl.float32)
    d2 = tl.zeros([BLOCK_H], tl.float32)
    o = tl.zeros([2 * BLOCK_H, 128], tl.float32)

    # -- loop over the keys. A block that would reach past the end is moved back, and keys that an earlier block had are
    #    masked: loads need no mask, and nothing past a sequence's end is read
    k_ptr += seq64 * stride_kb + kv_head * stride_kh
    v_ptr += seq64 * stride_vb + kv_head * stride_vh
    key_rows = tl.minimum(keys, length - 1)[:, None]  # a sequence shorter than a block repeats its last key
    k_offsets = key_rows * stride_kn + dims[None, :]
    v_offsets = key_rows * stride_vn + dims[None, :]
    last_block = tl.maximum(length - BLOCK_N, 0)
    # (The loop begins at 0: Triton 3.7 and later do not pipeline one whose start is computed after an early return.)
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
        # -- the only split of this tile
        rows_at = heads * stride_oh
        out = _output(d1[:, None], d2[:, None], o1, o2)
        o_ptrs = o_ptr + rows_at[:, None] + dims[None, :]
        tl.store(o_ptrs, out.to(o_ptr.dtype.element_ty), mask=in_tile[:, None])
    else:
        # -- store this split's state: o1 and o2 as [ROWS, 2, HEAD_DIM], then m, d1 and d2 as [3, ROWS]
        local = tl.arange(0, BLOCK_H)
        partials = partials_ptr + tl.program_id(0).to(tl.int64) * STATE
        vector_ptrs = partials + local[:, None] * (2 * HEAD_DIM) + dims[None, :]
        tl.store(vector_ptrs, o1, mask=in_tile[:, None])
        tl.store(vector_ptrs + HEAD_DIM, o2, mask=in_tile[:, None])
        stat_ptrs = partials + ROWS * 2 * HEAD_DIM + local
        tl.store(stat_ptrs, m, mask=in_tile)
        tl.store(stat_ptrs + ROWS, d1, mask=in_tile)
        tl.store(stat_ptrs + 2 * ROWS, d2, mask=in_tile)

        # -- the last split to arrive merges all of them, and resets the counter for the next launch
        tl.debug_barrier()
        first_split = (item - split) * kv_heads + kv_head
        if tl.atomic_add(arrived_ptr + first_split, 1, sem="acq_rel") == splits - 1:
            tl.store(arrived_ptr + first_split, 0)
            partials = partials_ptr + first_split.to(tl.int64) * STATE
            for i in range(tl.minimum(GROUP - row0, BLOCK_H)):
                head = row0 + i
                row_at = head * stride_oh
                _, d1_row, d2_row, o1_row, o2_row = _merge(partials, kv_heads * STATE, splits, i)
                out_row = _output(d1_row, d2_row, o1_row, o2_row)
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
    cache_seqlens     (batch,) int32: keys in each sequence, 0 to seqlen; nothing past them is read
    partials          fp32 scratch of items * kv_heads * 2080 numbers, items as below
    arrived           int32 scratch of items * kv_heads zeros, which every launch leaves zero again
    """
    batch, kv_heads = cache_seqlens.shape[0], k_cache.shape[2]
    items = 2 * (batch * NUM_SPLITS + triton.cdiv(batch, SPARE_EVERY))  # an upper bound
    decode_varlen_kernel[(items * kv_heads,)](
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
