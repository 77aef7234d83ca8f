"""Parallax attention, forward.

spec       forward, head_dim 128, bf16, GQA 2:1, window, varlen
config     BLOCK_M=128 BLOCK_N=64 HEAD_GROUP=1 num_warps=8 num_stages=3 ROW_MAX=first
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 85ec98cb69da

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij.
A row's state while keys stream by is (d1, d2, o1, o2), the sums of 2^(s - m) times 1, t, v and t v, where s is
log2(e) softmax_scale q.k, and m that of its own key, or where it sees few keys, the largest. Where sums run over,
since other keys' s are so much larger, a second kernel does the tile again with m the running maximum.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def fill_padding(o_ptr, stride_om, stride_oh, heads, begin, end, total):
    """Write 0 to the rows that no sequence has: those before `begin`, and those from `end` on.

    All programs of the launch share them.
    """
    HEAD_DIM: tl.constexpr = 128
    HEADS: tl.constexpr = 16  # heads of a row that a program fills a step
    dims = tl.arange(0, HEAD_DIM)
    for i in tl.range(tl.program_id(0), total - end + begin, tl.num_programs(0)):
        row = (end + i).to(tl.int64)
        row = tl.where(row < total, row, row - total)  # the last row is followed by row 0
        for first in tl.range(0, heads, HEADS):
            head = (first + tl.arange(0, HEADS)).to(tl.int64)
            there = head < heads
            o_offsets = row * stride_om + (head * stride_oh)[:, None] + dims[None, :]
            tl.store(o_ptr + o_offsets, 0.0, mask=there[:, None])


@triton.jit(do_not_specialize=["heads", "window_size", "max_seqlen"])
def forward_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qm,
    stride_qh,
    stride_rm,
    stride_rh,
    stride_kn: tl.constexpr,
    stride_kh,
    stride_vn: tl.constexpr,
    stride_vh,
    stride_om,
    stride_oh,
    scale_log2,
    heads,
    window_size,
    max_seqlen,
):
    HEAD_DIM: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 128  # query rows a program owns
    BLOCK_N: tl.constexpr = 64  # keys it takes a step
    GROUP: tl.constexpr = 2  # query heads that share a kv head

    # -- which tile of which head: the longest rows first
    pid = tl.program_id(0)
    tiles = tl.cdiv(max_seqlen, BLOCK_M)
    tile = pid % tiles
    bh = pid // tiles
    tile = tiles - 1 - tile
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    row0 = tile * BLOCK_M
    start_q = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
    seqlen_q = (tl.load(cu_seqlens_q_ptr + batch + 1) - start_q).to(tl.int32)
    start_k = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
    seqlen_kv = (tl.load(cu_seqlens_k_ptr + batch + 1) - start_k).to(tl.int32)
    if row0 >= seqlen_q:  # this sequence is shorter than the longest
        return
    rows = row0 + tl.arange(0, BLOCK_M)
    in_q = rows < seqlen_q
    keys = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)

    # -- load the queries and probes this program owns
    at = (start_q + rows)[:, None].to(tl.int64)
    q_offsets = head * stride_qh + at * stride_qm + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=in_q[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
    r_offsets = head * stride_rh + at * stride_rm + dims[None, :]
    r = tl.load(r_ptr + r_offsets, mask=in_q[:, None], other=0.0)
    k_ptr += start_k * stride_kn + head // GROUP * stride_kh
    v_ptr += start_k * stride_vn + head // GROUP * stride_vh
    k_offsets = keys[:, None] * stride_kn + dims[None, :]
    v_offsets = keys[:, None] * stride_vn + dims[None, :]

    # -- keys: row i sees window_size of them, up to i + shift. Blocks that reach past the first row's last key,
    #    or begin before the last row's first one, need a mask
    shift = seqlen_kv - seqlen_q
    last = rows + shift
    seen_by_all = row0 + shift + 1
    unseen_by_some = row0 + BLOCK_M + shift - window_size
    start = tl.maximum(row0 + shift - window_size + 1, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(row0 + BLOCK_M + shift, seqlen_kv)

    # -- the first key, in fp32, and each row's state after it. A first key that outweighs all others has t and
    #    t_mean alike, and o is what is left of their difference: it must not be rounded
    first_key = start.to(tl.int64)
    first_dims = tl.minimum(seqlen_kv, 1) * HEAD_DIM  # none of a sequence without keys
    k0 = tl.load(k_ptr + first_key * stride_kn + dims, mask=dims < first_dims, other=0.0).to(tl.float32)
    v0 = tl.load(v_ptr + first_key * stride_vn + dims, mask=dims < first_dims, other=0.0).to(tl.float32)
    s0 = tl.sum(q * k0[None, :], 1)
    t0 = tl.sum(r * k0[None, :], 1)

    # -- m, which scores are measured against: that of a row's own key, the last that it sees.
    #    Where rows see few keys, the largest: that key then weighs 1, and is not rounded
    own = tl.maximum(last, 0)[:, None].to(tl.int64)
    k_own = tl.load(k_ptr + own * stride_kn + dims[None, :], mask=((last >= 0) & in_q)[:, None], other=0.0)
    s_own = tl.sum(q.to(tl.float32) * k_own, 1)
    m = s_own * scale_log2
    if row0 + shift < BLOCK_N:
        in_kv = keys < seqlen_kv
        k = tl.load(k_ptr + k_offsets, mask=in_kv[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        visible = (keys[None, :] <= last[:, None]) & (keys[None, :] > last[:, None] - window_size)
        s = tl.where(visible, s, float("-inf"))
        m = tl.maximum(m, tl.max(s, 1) * scale_log2)
    sees = (start <= last) & (start > last - window_size)
    w0 = tl.where(sees, tl.exp2(s0 * scale_log2 - m), 0.0)
    d1 = w0
    d2 = w0 * t0
    o1 = w0[:, None] * v0[None, :]
    o2 = t0[:, None] * o1

    # -- the other keys, block by block; the last one may reach past the end
    for n in tl.range(start + 1, end, BLOCK_N):
        cols = n + keys
        in_kv = cols < seqlen_kv
        k_block = k_ptr + tl.cast(n, tl.int64) * stride_kn
        v_block = v_ptr + tl.cast(n, tl.int64) * stride_vn
        k = tl.load(k_block + k_offsets, mask=in_kv[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_block + v_offsets, mask=in_kv[:, None], other=0.0)

        # -- take them into the rows' state
        s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        if (n + BLOCK_N > seen_by_all) | (n < unseen_by_some):
            visible = (cols[None, :] <= last[:, None]) & (cols[None, :] > last[:, None] - window_size)
            s = tl.where(visible, s, float("-inf"))
        t = tl.dot(r, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale_log2 - m[:, None])
        pt = p * t
        d1 += tl.sum(p, 1)
        d2 += tl.sum(pt, 1)
        p = p.to(v.dtype)
        pt = pt.to(v.dtype)
        o1 = tl.dot(p, v, acc=o1)
        o2 = tl.dot(pt, v, acc=o2)

    # -- o = o1/d1 (1 + d2/d1) - o2/d1, and 0 for a row that saw no key
    inv = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
    MOST: tl.constexpr = 1.8446744e19  # 2^64: from there on sums might run over
    inv = tl.where(tl.max(d1) > MOST, float("nan"), inv)  # again_kernel does such tiles once more
    t_mean = d2 * inv
    o = o1 * (inv * (1.0 + t_mean))[:, None] - o2 * inv[:, None]
    o_offsets = head * stride_oh + at * stride_om + dims[None, :]
    tl.store(o_ptr + o_offsets, o.to(o_ptr.dtype.element_ty), mask=in_q[:, None])


@triton.jit(do_not_specialize=["batch_heads", "heads", "window_size", "sequences", "total_q"])
def again_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qm,
    stride_qh,
    stride_rm,
    stride_rh,
    stride_kn: tl.constexpr,
    stride_kh,
    stride_vn: tl.constexpr,
    stride_vh,
    stride_om,
    stride_oh,
    scale_log2,
    batch_heads,
    heads,
    window_size,
    sequences,
    total_q,
):
    HEAD_DIM: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 128  # query rows a program owns
    BLOCK_N: tl.constexpr = 64  # keys it takes a step
    GROUP: tl.constexpr = 2  # query heads that share a kv head
    HEADS: tl.constexpr = 16  # of so many a program looks after one tile each
    begin_q = tl.load(cu_seqlens_q_ptr)
    end_q = tl.load(cu_seqlens_q_ptr + sequences)

    # -- rows that no sequence has
    if end_q - begin_q < total_q:
        fill_padding(o_ptr, stride_om, stride_oh, heads, begin_q, end_q, total_q)

    # -- which of its tiles ran over: forward_kernel left NaN where they begin
    groups = tl.cdiv(batch_heads, HEADS)
    tile = tl.program_id(0) // groups
    bh0 = tl.program_id(0) % groups * HEADS
    each = tl.arange(0, HEADS)
    there = bh0 + each < batch_heads
    its_batch = ((bh0 + each) // heads).to(tl.int64)
    its_head = ((bh0 + each) % heads).to(tl.int64)
    row = tl.load(cu_seqlens_q_ptr + its_batch, mask=there, other=0).to(tl.int64) + tile * BLOCK_M
    there &= row < tl.load(cu_seqlens_q_ptr + its_batch + 1, mask=there, other=0)
    begins = its_head * stride_oh + row * stride_om
    mark = tl.load(o_ptr + begins, mask=there, other=0.0).to(tl.float32)
    again = tl.where(tl.abs(mark) < float("inf"), 0, 1)

    # -- each of those, with a running maximum
    while tl.max(again) > 0:
        i = tl.argmax(again, 0)
        again = tl.where(each == i, 0, again)
        bh = bh0 + i
        batch = (bh // heads).to(tl.int64)
        head = (bh % heads).to(tl.int64)
        row0 = tile * BLOCK_M
        start_q = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
        seqlen_q = (tl.load(cu_seqlens_q_ptr + batch + 1) - start_q).to(tl.int32)
        start_k = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
        seqlen_kv = (tl.load(cu_seqlens_k_ptr + batch + 1) - start_k).to(tl.int32)
        rows = row0 + tl.arange(0, BLOCK_M)
        in_q = rows < seqlen_q
        keys = tl.arange(0, BLOCK_N)
        dims = tl.arange(0, HEAD_DIM)

        # -- load the queries and probes this program owns
        at = (start_q + rows)[:, None].to(tl.int64)
        q_offsets = head * stride_qh + at * stride_qm + dims[None, :]
        q = tl.load(q_ptr + q_offsets, mask=in_q[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
        r_offsets = head * stride_rh + at * stride_rm + dims[None, :]
        r = tl.load(r_ptr + r_offsets, mask=in_q[:, None], other=0.0)
        k_head = k_ptr + start_k * stride_kn + head // GROUP * stride_kh
        v_head = v_ptr + start_k * stride_vn + head // GROUP * stride_vh
        k_offsets = keys[:, None] * stride_kn + dims[None, :]
        v_offsets = keys[:, None] * stride_vn + dims[None, :]

        # -- keys: row i sees window_size of them, up to i + shift. Blocks that reach past the first row's last key,
        #    or begin before the last row's first one, need a mask
        shift = seqlen_kv - seqlen_q
        last = rows + shift
        seen_by_all = row0 + shift + 1
        unseen_by_some = row0 + BLOCK_M + shift - window_size
        start = tl.maximum(row0 + shift - window_size + 1, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(row0 + BLOCK_M + shift, seqlen_kv)

        # -- the first key, in fp32, and each row's state after it. A first key that outweighs all others has t and
        #    t_mean alike, and o is what is left of their difference: it must not be rounded
        first_key = start.to(tl.int64)
        first_dims = tl.minimum(seqlen_kv, 1) * HEAD_DIM  # none of a sequence without keys
        k0 = tl.load(k_head + first_key * stride_kn + dims, mask=dims < first_dims, other=0.0).to(tl.float32)
        v0 = tl.load(v_head + first_key * stride_vn + dims, mask=dims < first_dims, other=0.0).to(tl.float32)
        s0 = tl.sum(q * k0[None, :], 1)
        t0 = tl.sum(r * k0[None, :], 1)
        sees = (start <= last) & (start > last - window_size)
        m = tl.where(sees, s0 * scale_log2, -3.0e38)  # finite: a row that sees no key must not give NaN
        d1 = tl.where(sees, 1.0, 0.0)
        d2 = tl.where(sees, t0, 0.0)
        o1 = tl.where(sees[:, None], v0[None, :], 0.0)
        o2 = d2[:, None] * o1

        # -- the other keys, block by block; the last one may reach past the end
        for n in tl.range(start + 1, end, BLOCK_N):
            cols = n + keys
            in_kv = cols < seqlen_kv
            k_block = k_head + tl.cast(n, tl.int64) * stride_kn
            v_block = v_head + tl.cast(n, tl.int64) * stride_vn
            k = tl.load(k_block + k_offsets, mask=in_kv[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
            v = tl.load(v_block + v_offsets, mask=in_kv[:, None], other=0.0)

            # -- take them into the rows' state
            s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
            if (n + BLOCK_N > seen_by_all) | (n < unseen_by_some):
                visible = (cols[None, :] <= last[:, None]) & (cols[None, :] > last[:, None] - window_size)
                s = tl.where(visible, s, float("-inf"))
            t = tl.dot(r, tl.trans(k))  # [BLOCK_M, BLOCK_N]
            m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
            alpha = tl.exp2(m - m_new)
            p = tl.exp2(s * scale_log2 - m_new[:, None])
            pt = p * t
            d1 = d1 * alpha + tl.sum(p, 1)
            d2 = d2 * alpha + tl.sum(pt, 1)
            p = p.to(v.dtype)
            pt = pt.to(v.dtype)
            o1 = tl.dot(p, v, acc=o1 * alpha[:, None])
            o2 = tl.dot(pt, v, acc=o2 * alpha[:, None])
            m = m_new

        # -- o = o1/d1 (1 + d2/d1) - o2/d1, and 0 for a row that saw no key
        inv = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
        t_mean = d2 * inv
        o = o1 * (inv * (1.0 + t_mean))[:, None] - o2 * inv[:, None]
        o_offsets = head * stride_oh + at * stride_om + dims[None, :]
        tl.store(o_ptr + o_offsets, o.to(o_ptr.dtype.element_ty), mask=in_q[:, None])


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    window_size: int,
    max_seqlen_q: int,
) -> None:
    """Write the attention of q and r over k and v to out, on the current stream.

    q, r, out    (total_q, kv_heads*2, 128) bf16, any strides with a contiguous last dimension
    k, v         (total_k, kv_heads, 128) bf16, likewise
    cu_seqlens   (batch + 1,) int32: where each sequence begins in q and in k, and where the last one ends
                 out is 0 in rows that no sequence has
    max_seqlen_q at least the length of the longest sequence
    window_size  the keys that a query sees at the most, 1 or more
    """
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    tiles = -(-max_seqlen_q // 128)
    arguments = (
        q,
        r,
        k,
        v,
        out,
        cu_seqlens_q,
        cu_seqlens_k,
        *q.stride()[:2],
        *r.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        softmax_scale * LOG2_E,
    )
    forward_kernel[(tiles * batch * heads,)](
        *arguments,
        heads,
        window_size,
        max_seqlen_q,
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
    # One program for each tile of 16 heads: HEADS
    again_kernel[(tiles * -(-batch * heads // 16),)](
        *arguments,
        batch * heads,
        heads,
        window_size,
        batch,
        q.shape[0],
        num_warps=8,
        num_stages=1,
        enable_fp_fusion=True,
    )
