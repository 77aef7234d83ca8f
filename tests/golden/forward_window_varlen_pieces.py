"""Parallax attention, forward.

spec       forward, head_dim 96, bf16, GQA 2:1, window, varlen
config     BLOCK_M=128 BLOCK_N=64 HEAD_GROUP=8 num_warps=8 num_stages=3 HEAD_DIM_AS=pieces
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 83fe8c42e96d

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij. A row's state while keys stream by is (m, d1, d2, o1, o2): the running maximum of
log2(e) softmax_scale q.k, and the sums of 2^(s - m) times 1, t, v and t v.
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
            o_offsets = row * stride_om + (head * stride_oh)[:, None] + dims[None, :]
            tl.store(o_ptr + o_offsets, 0.0, mask=in_row)


@triton.jit(do_not_specialize=["batch_heads", "heads", "window_size", "sequences", "total_q", "max_seqlen"])
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
    batch_heads,
    heads,
    window_size,
    sequences,
    total_q,
    max_seqlen,
):
    BLOCK_M: tl.constexpr = 128  # query rows a program owns
    BLOCK_N: tl.constexpr = 64  # keys it takes a step
    GROUP: tl.constexpr = 2  # query heads that share a kv head
    HEAD_GROUP: tl.constexpr = 8  # query heads whose tiles run together

    # -- which tile of which head: the longest rows first
    pid = tl.program_id(0)
    tiles = tl.cdiv(max_seqlen, BLOCK_M)
    first = pid // (tiles * HEAD_GROUP) * HEAD_GROUP
    together = tl.minimum(HEAD_GROUP, batch_heads - first)  # the last group may be smaller
    tile = (pid - first * tiles) // together
    bh = first + (pid - first * tiles) % together
    tile = tiles - 1 - tile
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    row0 = tile * BLOCK_M
    start_q = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
    seqlen_q = (tl.load(cu_seqlens_q_ptr + batch + 1) - start_q).to(tl.int32)
    start_k = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
    seqlen_kv = (tl.load(cu_seqlens_k_ptr + batch + 1) - start_k).to(tl.int32)
    begin_q = tl.load(cu_seqlens_q_ptr)
    end_q = tl.load(cu_seqlens_q_ptr + sequences)

    # -- rows that no sequence has
    if end_q - begin_q < total_q:
        fill_padding(o_ptr, stride_om, stride_oh, heads, begin_q, end_q, total_q)
    if row0 >= seqlen_q:  # this sequence is shorter than the longest
        return
    rows = row0 + tl.arange(0, BLOCK_M)
    in_q = rows < seqlen_q
    keys = tl.arange(0, BLOCK_N)
    dims_0 = tl.arange(0, 64)
    dims_1 = 64 + tl.arange(0, 32)

    # -- load the queries and probes this program owns
    at = (start_q + rows)[:, None].to(tl.int64)
    q_offsets_0 = head * stride_qh + at * stride_qm + dims_0[None, :]
    q_offsets_1 = head * stride_qh + at * stride_qm + dims_1[None, :]
    q_0 = tl.load(q_ptr + q_offsets_0, mask=in_q[:, None], other=0.0)  # [BLOCK_M, 64]
    q_1 = tl.load(q_ptr + q_offsets_1, mask=in_q[:, None], other=0.0)  # [BLOCK_M, 32]
    r_offsets_0 = head * stride_rh + at * stride_rm + dims_0[None, :]
    r_offsets_1 = head * stride_rh + at * stride_rm + dims_1[None, :]
    r_0 = tl.load(r_ptr + r_offsets_0, mask=in_q[:, None], other=0.0)
    r_1 = tl.load(r_ptr + r_offsets_1, mask=in_q[:, None], other=0.0)
    k_ptr += start_k * stride_kn + head // GROUP * stride_kh
    v_ptr += start_k * stride_vn + head // GROUP * stride_vh
    k_offsets_0 = keys[:, None] * stride_kn + dims_0[None, :]
    k_offsets_1 = keys[:, None] * stride_kn + dims_1[None, :]
    v_offsets_0 = keys[:, None] * stride_vn + dims_0[None, :]
    v_offsets_1 = keys[:, None] * stride_vn + dims_1[None, :]

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
    first_dims = tl.minimum(seqlen_kv, 1) * 96  # none of a sequence without keys
    k0_0 = tl.load(k_ptr + first_key * stride_kn + dims_0, mask=dims_0 < first_dims, other=0.0).to(tl.float32)
    v0_0 = tl.load(v_ptr + first_key * stride_vn + dims_0, mask=dims_0 < first_dims, other=0.0).to(tl.float32)
    k0_1 = tl.load(k_ptr + first_key * stride_kn + dims_1, mask=dims_1 < first_dims, other=0.0).to(tl.float32)
    v0_1 = tl.load(v_ptr + first_key * stride_vn + dims_1, mask=dims_1 < first_dims, other=0.0).to(tl.float32)
    s0 = tl.sum(q_0 * k0_0[None, :], 1) + tl.sum(q_1 * k0_1[None, :], 1)
    t0 = tl.sum(r_0 * k0_0[None, :], 1) + tl.sum(r_1 * k0_1[None, :], 1)
    sees = (start <= last) & (start > last - window_size)
    m = tl.where(sees, s0 * scale_log2, -3.0e38)  # finite: a row that sees no key must not give NaN
    d1 = tl.where(sees, 1.0, 0.0)
    d2 = tl.where(sees, t0, 0.0)
    o1_0 = tl.where(sees[:, None], v0_0[None, :], 0.0)
    o2_0 = d2[:, None] * o1_0
    o1_1 = tl.where(sees[:, None], v0_1[None, :], 0.0)
    o2_1 = d2[:, None] * o1_1

    # -- the other keys, block by block; the last one may reach past the end
    for n in tl.range(start + 1, end, BLOCK_N):
        cols = n + keys
        in_kv = cols < seqlen_kv
        k_block = k_ptr + tl.cast(n, tl.int64) * stride_kn
        v_block = v_ptr + tl.cast(n, tl.int64) * stride_vn
        k_0 = tl.load(k_block + k_offsets_0, mask=in_kv[:, None], other=0.0)  # [BLOCK_N, 64]
        k_1 = tl.load(k_block + k_offsets_1, mask=in_kv[:, None], other=0.0)  # [BLOCK_N, 32]
        v_0 = tl.load(v_block + v_offsets_0, mask=in_kv[:, None], other=0.0)
        v_1 = tl.load(v_block + v_offsets_1, mask=in_kv[:, None], other=0.0)

        # -- take them into the rows' state
        s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_1, tl.trans(k_1), acc=s)
        if (n + BLOCK_N > seen_by_all) | (n < unseen_by_some):
            visible = (cols[None, :] <= last[:, None]) & (cols[None, :] > last[:, None] - window_size)
            s = tl.where(visible, s, float("-inf"))
        t = tl.dot(r_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        t = tl.dot(r_1, tl.trans(k_1), acc=t)
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        pt = p * t
        d1 = d1 * alpha + tl.sum(p, 1)
        d2 = d2 * alpha + tl.sum(pt, 1)
        p = p.to(v_0.dtype)
        pt = pt.to(v_0.dtype)
        o1_0 = tl.dot(p, v_0, acc=o1_0 * alpha[:, None])
        o1_1 = tl.dot(p, v_1, acc=o1_1 * alpha[:, None])
        o2_0 = tl.dot(pt, v_0, acc=o2_0 * alpha[:, None])
        o2_1 = tl.dot(pt, v_1, acc=o2_1 * alpha[:, None])
        m = m_new

    # -- o = o1/d1 (1 + d2/d1) - o2/d1, and 0 for a row that saw no key
    inv = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
    t_mean = d2 * inv
    o_0 = o1_0 * (inv * (1.0 + t_mean))[:, None] - o2_0 * inv[:, None]
    o_1 = o1_1 * (inv * (1.0 + t_mean))[:, None] - o2_1 * inv[:, None]
    o_offsets_0 = head * stride_oh + at * stride_om + dims_0[None, :]
    o_offsets_1 = head * stride_oh + at * stride_om + dims_1[None, :]
    tl.store(o_ptr + o_offsets_0, o_0.to(o_ptr.dtype.element_ty), mask=in_q[:, None])
    tl.store(o_ptr + o_offsets_1, o_1.to(o_ptr.dtype.element_ty), mask=in_q[:, None])


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

    q, r, out    (total_q, kv_heads*2, 96) bf16, any strides with a contiguous last dimension
    k, v         (total_k, kv_heads, 96) bf16, likewise
    cu_seqlens   (batch + 1,) int32: where each sequence begins in q and in k, and where the last one ends
                 out is 0 in rows that no sequence has
    max_seqlen_q at least the length of the longest sequence
    window_size  the keys that a query sees at the most, 1 or more
    """
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    tiles = -(-max_seqlen_q // 128)
    forward_kernel[(tiles * batch * heads,)](
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
        batch * heads,
        heads,
        window_size,
        batch,
        q.shape[0],
        max_seqlen_q,
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
