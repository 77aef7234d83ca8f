"""Parallax attention, decode: one query a sequence against a KV cache.

spec       decode, head_dim 128, bf16, GQA 4:1, ragged, pages of 16
config     BLOCK_N=32 BLOCK_H=8 NUM_SPLITS=4 merge=last num_warps=2 num_stages=4
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, templates e39a2290c511

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij. A row's state while keys stream by is (m, d1, d2, o1, o2): the running maximum of
log2(e) softmax_scale q.k, and the sums of 2^(s - m) times 1, t, v and t v.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
NUM_SPLITS = 4  # programs that share one sequence's keys


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
def _merge(partials):
    """Join one query head's splits: rescale every state to the largest m, add, and finish. -> [HEAD_DIM]"""
    HEAD_DIM: tl.constexpr = 128
    NUM_SPLITS: tl.constexpr = 4
    splits = tl.arange(0, 4)
    dims = tl.arange(0, HEAD_DIM)
    stats = partials + NUM_SPLITS * 2 * HEAD_DIM
    m = tl.load(stats + splits, cache_modifier=".cg")
    d1 = tl.load(stats + NUM_SPLITS + splits, cache_modifier=".cg")
    d2 = tl.load(stats + 2 * NUM_SPLITS + splits, cache_modifier=".cg")
    m_all = tl.max(m, 0)
    weight = tl.exp2(m - m_all)
    d1 = tl.sum(weight * d1, 0)
    d2 = tl.sum(weight * d2, 0)
    vectors = partials + splits[:, None] * (2 * HEAD_DIM) + dims[None, :]
    v1 = tl.load(vectors, cache_modifier=".cg")  # [splits, HEAD_DIM]
    v2 = tl.load(vectors + HEAD_DIM, cache_modifier=".cg")
    o1 = tl.sum(weight[:, None] * v1, 0)
    o2 = tl.sum(weight[:, None] * v2, 0)
    inv = tl.where(d1 > 0.0, 1.0 / d1, 0.0)  # 0 for a sequence without keys
    return o1 * (inv * (1.0 + d2 * inv)) - o2 * inv


@triton.jit(do_not_specialize=["kv_heads", "seqlen_kv", "stride_tableb"])
def decode_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    cache_seqlens_ptr,
    page_table_ptr,
    partials_ptr,
    arrived_ptr,
    stride_qb,
    stride_qh,
    stride_rb,
    stride_rh,
    stride_tableb,
    stride_kp,
    stride_kn,
    stride_kh,
    stride_vp,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_oh,
    scale_log2,
    kv_heads,
    seqlen_kv,
):
    HEAD_DIM: tl.constexpr = 128
    GROUP: tl.constexpr = 4  # query heads that share a kv head
    BLOCK_H: tl.constexpr = 8  # of which one program serves so many
    BLOCK_N: tl.constexpr = 32  # keys it takes a step
    PAGE_SIZE: tl.constexpr = 16  # keys a page of the cache
    NUM_SPLITS: tl.constexpr = 4

    # -- which split of which sequence and kv head
    pid = tl.program_id(0)
    split = pid % NUM_SPLITS
    bh = pid // NUM_SPLITS
    batch = (bh // kv_heads).to(tl.int64)
    kv_head = (bh % kv_heads).to(tl.int64)
    seqlen_kv = tl.minimum(tl.load(cache_seqlens_ptr + batch), seqlen_kv)  # never past the cache
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
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    page_table_ptr += batch * stride_tableb
    stride_kn64 = tl.cast(stride_kn, tl.int64)  # offsets within a block fit 32 bits, a page's may not
    stride_vn64 = tl.cast(stride_vn, tl.int64)
    m = tl.full([BLOCK_H], -3.0e38, tl.float32)  # finite: a split without keys must not give NaN
    d1 = tl.zeros([BLOCK_H], tl.float32)
    d2 = tl.zeros([BLOCK_H], tl.float32)
    o = tl.zeros([2 * BLOCK_H, HEAD_DIM], tl.float32)

    # -- stream the keys, page by page. Past a sequence's end its last key is read again, and masked: what lies there,
    #    in the cache or in its page table, may be anything. A block's pages are looked up a step ahead: to load keys
    #    from where a load of the same step points to would leave fewer of them in flight
    last_key = tl.maximum(seqlen_kv - 1, 0)
    pages = tl.load(page_table_ptr + tl.minimum(start + keys, last_key) // PAGE_SIZE).to(tl.int64)  # [BLOCK_N]
    for n in tl.range(start, end, BLOCK_N):
        cols = n + keys
        at = tl.minimum(cols, last_key)
        k_rows = k_ptr + pages * stride_kp + at % PAGE_SIZE * stride_kn64
        v_rows = v_ptr + pages * stride_vp + at % PAGE_SIZE * stride_vn64
        k = tl.load(k_rows[:, None] + dims[None, :])  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_rows[:, None] + dims[None, :])
        pages = tl.load(page_table_ptr + tl.minimum(cols + BLOCK_N, last_key) // PAGE_SIZE).to(tl.int64)
        visible = cols < end
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
        for head in range(GROUP):
            out = _merge(partials_ptr + (bh * GROUP + head).to(tl.int64) * ROW)
            o_row = o_ptr + batch * stride_ob + (kv_head * GROUP + head) * stride_oh
            tl.store(o_row + dims, out.to(o_ptr.dtype.element_ty))


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
    partials: torch.Tensor,
    arrived: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the attention of one query a sequence over its cached keys to out, on the current stream.

    q, r, out         (batch, 1, kv_heads*4, 128) bf16, any strides with a contiguous last dimension
    k_cache, v_cache  (pages, 16, kv_heads, 128) bf16, likewise
    cache_seqlens     (batch,) int32: keys in each sequence, 0 to what its pages hold; what lies behind is never read
    page_table        (batch, pages of a sequence at the most) int32: each sequence's pages, in order
    partials          fp32 scratch of batch * heads * NUM_SPLITS * 260 numbers
    arrived           int32 scratch of batch * kv_heads numbers, 0 at first and again after every launch
    """
    batch, kv_heads = q.shape[0], k_cache.shape[2]
    stride_qb, _, stride_qh, _ = q.stride()
    stride_rb, _, stride_rh, _ = r.stride()
    stride_ob, _, stride_oh, _ = out.stride()
    decode_kernel[(batch * kv_heads * NUM_SPLITS,)](
        q,
        r,
        k_cache,
        v_cache,
        out,
        cache_seqlens,
        page_table,
        partials,
        arrived,
        stride_qb,
        stride_qh,
        stride_rb,
        stride_rh,
        page_table.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        stride_ob,
        stride_oh,
        softmax_scale * LOG2_E,
        kv_heads,
        page_table.shape[1] * 16,
        num_warps=2,
        num_stages=4,
        enable_fp_fusion=True,
    )
