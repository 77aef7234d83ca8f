"""Parallax attention of queries against a KV cache, each sequence of its own length.

spec       decode, head_dim 96, bf16, GQA 4:1, window, varlen, stats, ragged, leftpad, many queries
config     BLOCK_N=64 BLOCK_H=32 NUM_SPLITS=3 merge=last num_warps=4 num_stages=2
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel e20065eca7be

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij. A row's state while keys stream by is (m, d1, d2, o1, o2): the running maximum of
log2(e) softmax_scale q.k, and the sums of 2^(s - m) times 1, t, v and t v.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634

NUM_SPLITS = 3  # programs that share a tile's keys, on the average
SPARE = 8  # one program in so many tiles is there for long ones alone


@triton.jit
def _sizes(
    seq,
    there,
    cache_seqlens_ptr,
    cache_leftpad_ptr,
    cu_seqlens_q_ptr,
    seqlen_kv,
    window,
    BLOCK_N: tl.constexpr,
):
    """Of sequences: their keys, the first that any query sees, their queries, and how many blocks of keys they see."""
    length = tl.load(cache_seqlens_ptr + seq, mask=there, other=0)
    length = tl.maximum(tl.minimum(length, seqlen_kv), 0)  # never past the cache; below 0 counts as 0
    start_q = tl.load(cu_seqlens_q_ptr + seq, mask=there, other=0)
    len_q = tl.maximum(tl.load(cu_seqlens_q_ptr + seq + 1, mask=there, other=0) - start_q, 0)
    lower = tl.maximum(tl.load(cache_leftpad_ptr + seq, mask=there, other=0), 0)
    lower = tl.maximum(lower, length - window - len_q + 1)
    blocks = tl.cdiv(tl.maximum(length - lower, 0), BLOCK_N)
    return length, lower, len_q, blocks


@triton.jit
def _step(qr, k, v, visible, scale_log2, m, d1, d2, o):
    """Take a block of keys and values [BLOCK_N, HEAD_DIM] into the rows' state."""
    BLOCK_N: tl.constexpr = k.shape[0]
    BLOCK_H: tl.constexpr = qr.shape[0] // 2
    st = tl.dot(qr, tl.trans(k))
    st = tl.permute(tl.reshape(st, [BLOCK_H // 8, 2, 8, BLOCK_N]), [0, 2, 3, 1])
    s, t = tl.split(tl.reshape(st, [BLOCK_H, BLOCK_N, 2]))  # [BLOCK_H, BLOCK_N] each
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    pt = p * t
    d1 = d1 * alpha + tl.sum(p, 1)
    d2 = d2 * alpha + tl.sum(pt, 1)
    both = tl.join(p.to(v.dtype), pt.to(v.dtype))
    both = tl.reshape(both, [BLOCK_H // 8, 8, BLOCK_N, 2])
    both = tl.reshape(tl.permute(both, [0, 3, 1, 2]), [2 * BLOCK_H, BLOCK_N])  # stacked again, as qr is
    alpha = tl.reshape(tl.join(alpha, alpha), [BLOCK_H // 8, 8, 2])
    alpha = tl.reshape(tl.permute(alpha, [0, 2, 1]), [2 * BLOCK_H])
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
    HEAD_DIM: tl.constexpr = 96
    ROWS: tl.constexpr = 32
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
        in_row = there[:, None] & (dims < HEAD_DIM)[None, :]
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


@triton.jit
def fill_padding(o_ptr, v_mean_ptr, lse_ptr, t_mean_ptr, stride_on, stride_oh, heads, begin, end, total):
    """Write 0, and -inf to lse, to the rows that no sequence has: those before `begin`, and those from `end` on.

    All programs of the launch share them.
    """
    HEAD_DIM: tl.constexpr = 96
    HEADS: tl.constexpr = 16  # heads of a row that a program fills a step
    dims = tl.arange(0, 128)
    for i in tl.range(tl.program_id(0), total - end + begin, tl.num_programs(0)):
        row = (end + i).to(tl.int64)
        row = tl.where(row < total, row, row - total)  # the last row is followed by row 0
        for first in tl.range(0, heads, HEADS):
            head = (first + tl.arange(0, HEADS)).to(tl.int64)
            there = head < heads
            in_row = there[:, None] & (dims < HEAD_DIM)[None, :]
            o_offsets = row * stride_on + (head * stride_oh)[:, None] + dims[None, :]
            tl.store(o_ptr + o_offsets, 0.0, mask=in_row)
            tl.store(v_mean_ptr + o_offsets, 0.0, mask=in_row)
            tl.store(lse_ptr + head * total + row, float("-inf"), mask=there)
            tl.store(t_mean_ptr + head * total + row, 0.0, mask=there)


@triton.jit(do_not_specialize=["kv_heads", "batch", "seqlen_kv", "window", "total_q"])
def ragged_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    t_mean_ptr,
    v_mean_ptr,
    cu_seqlens_q_ptr,
    cache_seqlens_ptr,
    cache_leftpad_ptr,
    partials_ptr,
    arrived_ptr,
    stride_qn,
    stride_qh,
    stride_rn,
    stride_rh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_on,
    stride_oh,
    scale_log2,
    batch,
    kv_heads,
    total_q,
    seqlen_kv,
    window,
):
    HEAD_DIM: tl.constexpr = 96
    GROUP: tl.constexpr = 4  # query heads that share a kv head
    BLOCK_H: tl.constexpr = 32  # (query, head) pairs that a tile has
    BLOCK_N: tl.constexpr = 64  # keys a program takes a step
    NUM_SPLITS: tl.constexpr = 3
    SPARE: tl.constexpr = 8
    ROWS: tl.constexpr = 32  # that a tile's partial state has
    SLOT: tl.constexpr = ROWS * (2 * HEAD_DIM + 4)  # floats of it; 4, not 3, keeps it 16-byte aligned
    LN_2: tl.constexpr = 0.6931471805599453
    SEQUENCES: tl.constexpr = 32  # looked at a time: each warp can do that by itself
    LEAST: tl.constexpr = 1  # blocks that are worth a program of their own
    begin_q = tl.load(cu_seqlens_q_ptr)
    end_q = tl.load(cu_seqlens_q_ptr + batch)

    # -- an even share of all sequences' blocks: a long sequence gets many programs, a short one gets one. To round up
    #    takes one more of each tile: so many shares that the launch has slots for them
    all_blocks = tl.zeros([SEQUENCES], tl.int32)
    all_tiles = tl.zeros([SEQUENCES], tl.int32)
    for first in range(0, batch, SEQUENCES):
        seqs = first + tl.arange(0, SEQUENCES)
        _, _, len_q, blocks = _sizes(
            seqs, seqs < batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, seqlen_kv, window, BLOCK_N
        )
        tiles = tl.cdiv(len_q * GROUP, BLOCK_H)
        all_blocks += tiles * blocks
        all_tiles += tiles
    tiles_in_all = tl.sum(all_tiles, 0)
    programs = tiles_in_all * (NUM_SPLITS - 1) + tl.cdiv(tiles_in_all, SPARE)
    share = tl.maximum(tl.cdiv(tl.sum(all_blocks, 0), tl.maximum(programs, 1)), LEAST)

    # -- which sequence this program's slot falls to: sequences have tiles * splits slots, one after the other
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    slot = tl.program_id(0) // kv_heads
    seq = 0
    first_slot = 0
    all_slots = 0
    for first in range(0, batch, SEQUENCES):
        seqs = first + tl.arange(0, SEQUENCES)
        _, _, len_q, blocks = _sizes(
            seqs, seqs < batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, seqlen_kv, window, BLOCK_N
        )
        tiles = tl.cdiv(len_q * GROUP, BLOCK_H)
        slots = tiles * tl.maximum(tl.cdiv(blocks, share), 1)
        ends = all_slots + tl.cumsum(slots, 0)
        before = (ends <= slot) & (seqs < batch)
        seq += tl.sum(before.to(tl.int32), 0)
        first_slot = tl.maximum(first_slot, tl.max(tl.where(before, ends, 0), 0))
        all_slots += tl.sum(slots, 0)

    # -- rows that no sequence has
    if end_q - begin_q < total_q:
        fill_padding(
            o_ptr, v_mean_ptr, lse_ptr, t_mean_ptr, stride_on, stride_oh, kv_heads * GROUP, begin_q, end_q, total_q
        )
    if slot >= all_slots:
        return

    # -- which tile of its rows, and which split of the tile's keys
    length, lower, len_q, blocks = _sizes(
        seq, True, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, seqlen_kv, window, BLOCK_N
    )
    splits = tl.maximum(tl.cdiv(blocks, share), 1)
    tile = (slot - first_slot) // splits
    split = (slot - first_slot) % splits
    row0 = tile * BLOCK_H
    # its last query sees keys up to `end`, its first ones from `lower` on
    last_query = tl.minimum((row0 + BLOCK_H - 1) // GROUP, len_q - 1)
    seen = tl.maximum(length - len_q + last_query + 1, 0)
    lower = tl.maximum(lower, length - len_q + row0 // GROUP + 1 - window)
    blocks = tl.cdiv(tl.maximum(seen - lower, 0), BLOCK_N)
    mine = tl.cdiv(blocks, splits) * BLOCK_N
    start = lower + split * mine
    end = tl.minimum(start + mine, seen)

    # -- one tile of queries and probes: 8 of each in turn
    stacked = tl.arange(0, 2 * BLOCK_H)
    rows = row0 + stacked // 16 * 8 + stacked % 8
    is_query = stacked % 16 < 8
    in_tile = rows < len_q * GROUP
    heads = rows % GROUP
    queries = (rows // GROUP).to(tl.int64)
    dims = tl.arange(0, 128)
    in_head = dims < HEAD_DIM
    seq64 = seq.to(tl.int64)
    start_q = tl.load(cu_seqlens_q_ptr + seq).to(tl.int64)
    q_rows = q_ptr + (start_q + queries) * stride_qn + (kv_head * GROUP + heads) * stride_qh
    r_rows = r_ptr + (start_q + queries) * stride_rn + (kv_head * GROUP + heads) * stride_rh
    q = tl.load(q_rows[:, None] + dims[None, :], mask=(in_tile & is_query)[:, None] & in_head[None, :], other=0.0)
    r = tl.load(r_rows[:, None] + dims[None, :], mask=(in_tile & ~is_query)[:, None] & in_head[None, :], other=0.0)
    qr = q + r  # [2*BLOCK_H, HEAD_DIM]: one of the two is 0 in every row
    rows = row0 + tl.arange(0, BLOCK_H)
    in_tile = rows < len_q * GROUP
    heads = rows % GROUP
    queries = (rows // GROUP).to(tl.int64)
    positions = length - len_q + rows // GROUP  # of each query among its sequence's keys

    keys = tl.arange(0, BLOCK_N)
    stride_kn64 = tl.cast(stride_kn, tl.int64)  # offsets within a block fit 32 bits, a cache's may not
    stride_vn64 = tl.cast(stride_vn, tl.int64)
    m = tl.full([BLOCK_H], -3.0e38, tl.float32)  # finite: rows without keys must not give NaN
    d1 = tl.zeros([BLOCK_H], tl.float32)
    d2 = tl.zeros([BLOCK_H], tl.float32)
    o = tl.zeros([2 * BLOCK_H, 128], tl.float32)

    # -- stream the keys. A block that would reach past the end is moved back to it, and keys it took before are
    #    masked: no load needs a mask, and what lies behind a sequence's end, or before its beginning, is never read
    k_ptr += seq64 * stride_kb + kv_head * stride_kh
    v_ptr += seq64 * stride_vb + kv_head * stride_vh
    near = tl.minimum(keys, length - lower - 1)[:, None]  # of a sequence shorter than a block, the last key again
    k_offsets = near * stride_kn + dims[None, :]
    v_offsets = near * stride_vn + dims[None, :]
    last_block = tl.maximum(length - BLOCK_N, lower)
    # (From Triton 3.7 on, a loop that begins at a number found behind an early return is not pipelined.)
    for i in tl.range(0, end - start, BLOCK_N):
        n = start + i
        first = tl.minimum(n, last_block)
        k = tl.load(k_ptr + first * stride_kn64 + k_offsets, mask=in_head[None, :], other=0)
        v = tl.load(v_ptr + first * stride_vn64 + v_offsets, mask=in_head[None, :], other=0)
        cols = first + keys
        visible = (cols >= n) & (cols < end)
        behind = positions[:, None] - cols[None, :]
        visible = visible[None, :] & (behind >= 0) & (behind < window)
        m, d1, d2, o = _step(qr, k, v, visible, scale_log2, m, d1, d2, o)

    o = tl.permute(tl.reshape(o, [BLOCK_H // 8, 2, 8, 128]), [0, 2, 3, 1])
    o1, o2 = tl.split(tl.reshape(o, [BLOCK_H, 128, 2]))  # [BLOCK_H, HEAD_DIM] each
    o_ptr += start_q * stride_on + kv_head * GROUP * stride_oh
    v_mean_ptr += start_q * stride_on + kv_head * GROUP * stride_oh
    lse_ptr += start_q + kv_head * GROUP * total_q
    t_mean_ptr += start_q + kv_head * GROUP * total_q
    if splits == 1:
        # -- nobody else has keys of this tile
        rows_at = queries * stride_on + heads * stride_oh
        out = _join(d1[:, None], d2[:, None], o1, o2)
        o_ptrs = o_ptr + rows_at[:, None] + dims[None, :]
        tl.store(o_ptrs, out.to(o_ptr.dtype.element_ty), mask=in_tile[:, None] & in_head[None, :])
        inv = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
        v_mean_ptrs = v_mean_ptr + rows_at[:, None] + dims[None, :]
        v_mean = o1 * inv[:, None]
        tl.store(v_mean_ptrs, v_mean.to(v_mean_ptr.dtype.element_ty), mask=in_tile[:, None] & in_head[None, :])
        stats_at = queries + heads * total_q
        lse = tl.where(d1 > 0.0, LN_2 * (m + tl.log2(d1)), float("-inf"))
        tl.store(lse_ptr + stats_at, lse, mask=in_tile)
        tl.store(t_mean_ptr + stats_at, d2 * inv, mask=in_tile)
    else:
        # -- leave this split's state: [ROWS, 2, HEAD_DIM], then [3, ROWS]
        local = tl.arange(0, BLOCK_H)
        partials = partials_ptr + tl.program_id(0).to(tl.int64) * SLOT
        vector_ptrs = partials + local[:, None] * (2 * HEAD_DIM) + dims[None, :]
        tl.store(vector_ptrs, o1, mask=in_tile[:, None] & in_head[None, :])
        tl.store(vector_ptrs + HEAD_DIM, o2, mask=in_tile[:, None] & in_head[None, :])
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
            for i in range(tl.minimum(len_q * GROUP - row0, BLOCK_H)):
                query = ((row0 + i) // GROUP).to(tl.int64)
                head = (row0 + i) % GROUP
                row_at = query * stride_on + head * stride_oh
                m_row, d1_row, d2_row, o1_row, o2_row = _merge(partials, kv_heads * SLOT, splits, i)
                out_row = _join(d1_row, d2_row, o1_row, o2_row)
                tl.store(o_ptr + row_at + dims, out_row.to(o_ptr.dtype.element_ty), mask=in_head)
                inv_row = tl.where(d1_row > 0.0, 1.0 / d1_row, 0.0)
                v_mean_row = o1_row * inv_row
                tl.store(v_mean_ptr + row_at + dims, v_mean_row.to(v_mean_ptr.dtype.element_ty), mask=in_head)
                stat_at = query + head * total_q
                lse_row = tl.where(d1_row > 0.0, LN_2 * (m_row + tl.log2(d1_row)), float("-inf"))
                tl.store(lse_ptr + stat_at, lse_row)
                tl.store(t_mean_ptr + stat_at, d2_row * inv_row)


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    t_mean: torch.Tensor,
    v_mean: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor,
    partials: torch.Tensor,
    arrived: torch.Tensor,
    softmax_scale: float,
    window_size: int,
    max_seqlen_q: int,
) -> None:
    """Write the attention of each sequence's queries over its cached keys to out, on the current stream.

    q, r, out         (total_q, kv_heads*4, 96) bf16, any strides with a contiguous last dimension
    lse, t_mean       (kv_heads*4, total_q) fp32, contiguous
    v_mean            like out, with its strides
    k_cache, v_cache  (batch, seqlen, kv_heads, 96) bf16, any strides likewise
    cu_seqlens_q      (batch + 1,) int32: where each sequence's queries begin, and where the last one's end. In rows
                      that no sequence has out is 0, lse -inf, and t_mean and v_mean 0
    cache_seqlens     (batch,) int32: keys in each sequence, 0 to seqlen; what lies behind is never read
    cache_leftpad     (batch,) int32: each sequence's first key; what lies before is never read
    partials          fp32 scratch of slots * kv_heads * 6272 numbers, slots as below
    arrived           int32 scratch of slots * kv_heads numbers, 0 at first and again after every launch
    window_size       keys that a query sees at the most, the last ones
    max_seqlen_q      at least the longest sequence's queries
    """
    batch, kv_heads = cache_seqlens.shape[0], k_cache.shape[2]
    tiles = batch * triton.cdiv(max_seqlen_q * 4, 32)
    slots = tiles * NUM_SPLITS + triton.cdiv(tiles, SPARE)  # at the most
    ragged_kernel[(slots * kv_heads,)](
        q,
        r,
        k_cache,
        v_cache,
        out,
        lse,
        t_mean,
        v_mean,
        cu_seqlens_q,
        cache_seqlens,
        cache_leftpad,
        partials,
        arrived,
        *q.stride()[:2],
        *r.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *out.stride()[:2],
        softmax_scale * LOG2_E,
        batch,
        kv_heads,
        q.shape[0],
        k_cache.shape[1],
        window_size,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )
