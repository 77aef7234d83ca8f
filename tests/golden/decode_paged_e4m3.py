"""Parallax attention of queries against a KV cache, each sequence of its own length.

spec       decode, head_dim 128, bf16, GQA 8:1, ragged, pages of 64, e4m3 cache
config     BLOCK_N=64 BLOCK_H=8 NUM_SPLITS=4 merge=last num_warps=2 num_stages=4
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 42f72e85d19d

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij. A row's state while keys stream by is (m, d1, d2, o1, o2): the running maximum of
log2(e) softmax_scale q.k, and the sums of 2^(s - m) times 1, t, v and t v.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634

NUM_SPLITS = 4  # programs that share a sequence's keys, on the average
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
def _widen(word):
    """The four e4m3 numbers in each int32 as bf16, the lowest byte's first.

    Two at a time, sign, exponent and digits go where bf16 has them. The exponents' biases differ: what stands there
    is the number in units of 2^-120. Of what is not finite comes a large number.
    """
    word = word.to(tl.uint32, bitcast=True)
    even = ((word << 8) & 0x80008000) | ((word << 4) & 0x07F007F0)
    odd = (word & 0x80008000) | ((word >> 4) & 0x07F007F0)
    x_0 = even.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    x_1 = odd.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    x_2 = (even >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    x_3 = (odd >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x_0, x_1, x_2, x_3


@triton.jit
def _step(qr_0, qr_1, qr_2, qr_3, k, v, visible, scale_log2, m, d1, d2, o_0, o_1, o_2, o_3):
    """Take a block of keys and values [BLOCK_N, HEAD_DIM/4], of four numbers each, into the rows' state."""
    BLOCK_N: tl.constexpr = k.shape[0]
    k_0, k_1, k_2, k_3 = _widen(k)
    st = tl.dot(qr_0, tl.trans(k_0))
    st = tl.dot(qr_1, tl.trans(k_1), acc=st)
    st = tl.dot(qr_2, tl.trans(k_2), acc=st)
    st = tl.dot(qr_3, tl.trans(k_3), acc=st)
    st = tl.reshape(st, [2, 8, BLOCK_N])
    s, _ = tl.split(tl.permute(st, [1, 2, 0]))  # [8, BLOCK_N]
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2 - 64.0)  # p is up to 2^64
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    is_query = (tl.arange(0, 2) == 0)[:, None, None]
    both = p[None, :, :] * tl.where(is_query, 1.0, st)  # p and p·t, stacked again as qr is
    sum1, sum2 = tl.split(tl.trans(tl.sum(both, 2)))
    d1 = d1 * alpha + sum1
    d2 = d2 * alpha + sum2
    v_0, v_1, v_2, v_3 = _widen(v)
    both = tl.reshape(both, [16, BLOCK_N]).to(v_0.dtype)
    alpha = tl.reshape(tl.permute(tl.join(alpha, alpha), [1, 0]), [16])
    o_0 = tl.dot(both, v_0, acc=o_0 * alpha[:, None])  # [2*BLOCK_H, HEAD_DIM/4]
    o_1 = tl.dot(both, v_1, acc=o_1 * alpha[:, None])
    o_2 = tl.dot(both, v_2, acc=o_2 * alpha[:, None])
    o_3 = tl.dot(both, v_3, acc=o_3 * alpha[:, None])
    return m_new, d1, d2, o_0, o_1, o_2, o_3


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


@triton.jit(do_not_specialize=["kv_heads", "batch", "seqlen_kv", "stride_tableb"])
def ragged_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    cache_seqlens_ptr,
    page_table_ptr,
    k_scale_ptr,
    v_scale_ptr,
    partials_ptr,
    arrived_ptr,
    stride_qb,
    stride_qh,
    stride_rb,
    stride_rh,
    stride_tableb,
    stride_p,
    stride_n,
    stride_h,
    stride_ob,
    stride_oh,
    stride_scale,
    scale_log2,
    batch,
    kv_heads,
    seqlen_kv,
):
    HEAD_DIM: tl.constexpr = 128
    GROUP: tl.constexpr = 8  # query heads that share a kv head
    BLOCK_H: tl.constexpr = 8  # of which one program serves so many
    BLOCK_N: tl.constexpr = 64  # keys a program takes a step
    PAGE_SIZE: tl.constexpr = 64  # keys a page of the cache
    NUM_SPLITS: tl.constexpr = 4
    SPARE: tl.constexpr = 8
    ROWS: tl.constexpr = 8  # that a tile's partial state has
    SLOT: tl.constexpr = ROWS * (2 * HEAD_DIM + 4)  # floats of it; 4, not 3, keeps it 16-byte aligned
    SEQUENCES: tl.constexpr = 32  # looked at a time: each warp can do that by itself
    LEAST: tl.constexpr = 1  # blocks that are worth a program of their own

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
        tiles = len_q
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
    split = slot - first_slot
    mine = tl.cdiv(blocks, splits) * BLOCK_N
    start = split * mine
    end = tl.minimum(start + mine, length)

    # -- one tile of queries and probes: 8 of each in turn
    stacked = tl.arange(0, 2 * BLOCK_H)
    heads = stacked % 8
    is_query = stacked < 8
    in_tile = heads < GROUP
    dims = tl.arange(0, 128)
    seq64 = seq.to(tl.int64)
    q_rows = q_ptr + seq64 * stride_qb + (kv_head * GROUP + heads) * stride_qh
    r_rows = r_ptr + seq64 * stride_rb + (kv_head * GROUP + heads) * stride_rh
    q = tl.load(q_rows[:, None] + dims[None, :], mask=(in_tile & is_query)[:, None], other=0.0)
    r = tl.load(r_rows[:, None] + dims[None, :], mask=(in_tile & ~is_query)[:, None], other=0.0)
    qr = q + r  # [2*BLOCK_H, HEAD_DIM]: one of the two is 0 in every row
    qr = (qr.to(tl.float32) * 2.0**96).to(qr.dtype)  # keys come in units of 2^-120: too small for fp32
    k_scale = tl.load(k_scale_ptr + kv_head * stride_scale)
    v_scale = tl.load(v_scale_ptr + kv_head * stride_scale)
    k_scale_log2 = 2.0**24 * scale_log2 * k_scale  # the rest of 2^120
    heads = tl.arange(0, BLOCK_H)
    in_tile = heads < GROUP

    keys = tl.arange(0, BLOCK_N)
    stride_n64 = tl.cast(stride_n, tl.int64)  # offsets within a block fit 32 bits, a page's may not
    m = tl.full([BLOCK_H], -3.0e38, tl.float32)  # finite: rows without keys must not give NaN
    d1 = tl.zeros([BLOCK_H], tl.float32)
    d2 = tl.zeros([BLOCK_H], tl.float32)
    qr_even, qr_odd = tl.split(tl.reshape(qr, [2 * BLOCK_H, 32, 2, 2]))
    qr_0, qr_2 = tl.split(qr_even)
    qr_1, qr_3 = tl.split(qr_odd)
    o_0 = tl.zeros([2 * BLOCK_H, 32], tl.float32)
    o_1 = tl.zeros([2 * BLOCK_H, 32], tl.float32)
    o_2 = tl.zeros([2 * BLOCK_H, 32], tl.float32)
    o_3 = tl.zeros([2 * BLOCK_H, 32], tl.float32)
    words = tl.arange(0, 32)

    # -- stream the keys, page by page. Past a sequence's end its last key is read again, and masked: what lies there,
    #    in the cache or in its page table, may be anything. A block's pages are looked up a step ahead: to load keys
    #    from where a load of the same step points to would leave fewer of them in flight
    k_ptr += kv_head * stride_h
    v_ptr += kv_head * stride_h
    page_table_ptr += seq64 * stride_tableb
    last_key = tl.maximum(length - 1, 0)
    page = tl.load(page_table_ptr + tl.minimum(start, last_key) // PAGE_SIZE)  # of the whole block
    # (From Triton 3.7 on, a loop that begins at a number found behind an early return is not pipelined.)
    for i in tl.range(0, end - start, BLOCK_N):
        n = start + i
        cols = n + keys
        at = tl.minimum(cols, last_key)
        block = page.to(tl.int64) * stride_p + n % PAGE_SIZE * stride_n64
        offsets = (at - n)[:, None] * stride_n + words[None, :]
        k = tl.load(k_ptr + block + offsets)
        v = tl.load(v_ptr + block + offsets)
        page = tl.load(page_table_ptr + tl.minimum(n + BLOCK_N, last_key) // PAGE_SIZE)
        visible = cols < end
        m, d1, d2, o_0, o_1, o_2, o_3 = _step(
            qr_0, qr_1, qr_2, qr_3, k, v, visible[None, :], k_scale_log2, m, d1, d2, o_0, o_1, o_2, o_3
        )
    o = tl.reshape(tl.join(tl.join(o_0, o_2), tl.join(o_1, o_3)), [2 * BLOCK_H, 128])

    o1, o2 = tl.split(tl.permute(tl.reshape(o, [2, 8, 128]), [1, 2, 0]))  # [8, HEAD_DIM] each
    # sums out of their units: q and r were taken 2^96 times, p 2^64 times; keys and values come in
    # 2^-120, and have scales besides
    m += 64.0
    d1 *= 2.0**-64
    d2 *= 2.0**-40 * k_scale
    o1 *= 2.0**56 * v_scale
    o2 *= 2.0**80 * k_scale * v_scale
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
            for head in range(GROUP):
                row_at = head * stride_oh
                _, d1_row, d2_row, o1_row, o2_row = _merge(partials, kv_heads * SLOT, splits, head)
                out_row = _join(d1_row, d2_row, o1_row, o2_row)
                tl.store(o_ptr + row_at + dims, out_row.to(o_ptr.dtype.element_ty))


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    partials: torch.Tensor,
    arrived: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the attention of each sequence's queries over its cached keys to out, on the current stream.

    q, r, out         (batch, 1, kv_heads*8, 128) bf16, any strides with a contiguous last dimension
    k_cache, v_cache  (pages, 64, kv_heads, 32) int32, four e4m3 numbers in each, the same strides likewise
    cache_seqlens     (batch,) int32: keys in each sequence, 0 to what its pages hold; what lies behind is never read
    page_table        (batch, pages of a sequence at the most) int32: each sequence's pages, in order
    k_scale, v_scale  (1,) or (kv_heads,) fp32, of the same size: what stored keys and values are to be multiplied by
    partials          fp32 scratch of slots * kv_heads * 2080 numbers, slots as below
    arrived           int32 scratch of slots * kv_heads numbers, 0 at first and again after every launch
    """
    batch, kv_heads = cache_seqlens.shape[0], k_cache.shape[2]
    slots = batch * NUM_SPLITS + triton.cdiv(batch, SPARE)  # at the most
    ragged_kernel[(slots * kv_heads,)](
        q,
        r,
        k_cache,
        v_cache,
        out,
        cache_seqlens,
        page_table,
        k_scale,
        v_scale,
        partials,
        arrived,
        q.stride(0),
        q.stride(2),
        r.stride(0),
        r.stride(2),
        page_table.stride(0),
        *k_cache.stride()[:3],
        out.stride(0),
        out.stride(2),
        1 if k_scale.shape[0] > 1 else 0,
        softmax_scale * LOG2_E,
        batch,
        kv_heads,
        page_table.shape[1] * 64,
        num_warps=2,
        num_stages=4,
        enable_fp_fusion=True,
    )
