"""Parallax attention, forward.

spec       forward, head_dim 96, bf16, GQA 2:1, window, varlen
config     BLOCK_M=128 BLOCK_N=64 GROUP_HEADS=8 num_warps=8 num_stages=3 HEAD_DIM_LAYOUT=chunked
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 83fe8c42e96d

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij. The running state of a row is (m, d1, d2, o1, o2): the maximum m of scale_log2 s, and the
sums of 2^(scale_log2 s - m) times 1, t, v and t v, with s = q.k and scale_log2 = log2(e) softmax_scale.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def _fill_padding(
    o_ptr,
    stride_om,
    stride_oh,
    heads,
    used_begin,
    used_end,
    total,
):
    """Write 0 to the rows that belong to no sequence: [0, used_begin) and [used_end, total).

    The programs of the launch share these rows.
    """
    HEAD_DIM: tl.constexpr = 96
    BLOCK_HEADS: tl.constexpr = 16  # heads per iteration
    offs_d = tl.arange(0, 128)
    for i in tl.range(tl.program_id(0), total - used_end + used_begin, tl.num_programs(0)):
        row = (used_end + i).to(tl.int64)
        row = tl.where(row < total, row, row - total)  # after the last row, continue at row 0
        for first_head in tl.range(0, heads, BLOCK_HEADS):
            offs_h = (first_head + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
            mask_h = offs_h < heads
            mask_hd = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
            o_offsets = row * stride_om + (offs_h * stride_oh)[:, None] + offs_d[None, :]
            tl.store(o_ptr + o_offsets, 0.0, mask=mask_hd)


@triton.jit(do_not_specialize=["batch_heads", "heads", "window_size", "num_seqs", "total_q", "max_seqlen"])
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
    num_seqs,
    total_q,
    max_seqlen,
):
    BLOCK_M: tl.constexpr = 128  # query rows per program
    BLOCK_N: tl.constexpr = 64  # keys per iteration
    GROUP: tl.constexpr = 2  # query heads per kv head
    GROUP_HEADS: tl.constexpr = 8  # query heads whose tiles are launched together

    # -- this program's tile of query rows. Tiles that see the most keys are launched first
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(max_seqlen, BLOCK_M)
    first_bh = pid // (num_tiles * GROUP_HEADS) * GROUP_HEADS
    launch_group_heads = tl.minimum(GROUP_HEADS, batch_heads - first_bh)  # the last group may be smaller
    tile = (pid - first_bh * num_tiles) // launch_group_heads
    bh = first_bh + (pid - first_bh * num_tiles) % launch_group_heads
    tile = num_tiles - 1 - tile
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    start_m = tile * BLOCK_M
    seq_start_q = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
    seqlen_q = (tl.load(cu_seqlens_q_ptr + batch + 1) - seq_start_q).to(tl.int32)
    seq_start_k = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
    seqlen_kv = (tl.load(cu_seqlens_k_ptr + batch + 1) - seq_start_k).to(tl.int32)
    used_begin = tl.load(cu_seqlens_q_ptr)
    used_end = tl.load(cu_seqlens_q_ptr + num_seqs)

    # -- rows that belong to no sequence
    if used_end - used_begin < total_q:
        _fill_padding(
            o_ptr,
            stride_om,
            stride_oh,
            heads,
            used_begin,
            used_end,
            total_q,
        )
    if start_m >= seqlen_q:  # the launch has tiles for the longest sequence
        return

    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < seqlen_q
    range_n = tl.arange(0, BLOCK_N)
    offs_d_0 = tl.arange(0, 64)
    offs_d_1 = 64 + tl.arange(0, 32)

    # -- load q and r
    rows64 = (seq_start_q + offs_m)[:, None].to(tl.int64)
    q_offsets_0 = head * stride_qh + rows64 * stride_qm + offs_d_0[None, :]
    q_offsets_1 = head * stride_qh + rows64 * stride_qm + offs_d_1[None, :]
    q_0 = tl.load(q_ptr + q_offsets_0, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, 64]
    q_1 = tl.load(q_ptr + q_offsets_1, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, 32]
    r_offsets_0 = head * stride_rh + rows64 * stride_rm + offs_d_0[None, :]
    r_offsets_1 = head * stride_rh + rows64 * stride_rm + offs_d_1[None, :]
    r_0 = tl.load(r_ptr + r_offsets_0, mask=mask_m[:, None], other=0.0)
    r_1 = tl.load(r_ptr + r_offsets_1, mask=mask_m[:, None], other=0.0)
    k_ptr += seq_start_k * stride_kn + head // GROUP * stride_kh
    v_ptr += seq_start_k * stride_vn + head // GROUP * stride_vh
    k_offsets_0 = range_n[:, None] * stride_kn + offs_d_0[None, :]
    k_offsets_1 = range_n[:, None] * stride_kn + offs_d_1[None, :]
    v_offsets_0 = range_n[:, None] * stride_vn + offs_d_0[None, :]
    v_offsets_1 = range_n[:, None] * stride_vn + offs_d_1[None, :]

    # -- the keys that these rows see: row i sees the window_size keys up to i + causal_offset. Blocks outside
    #    [unmasked_begin, unmasked_end) need a mask
    causal_offset = seqlen_kv - seqlen_q
    last_key = offs_m + causal_offset
    unmasked_end = start_m + causal_offset + 1
    unmasked_begin = start_m + BLOCK_M + causal_offset - window_size
    key_begin = tl.maximum(start_m + causal_offset - window_size + 1, 0) // BLOCK_N * BLOCK_N
    key_end = tl.minimum(start_m + BLOCK_M + causal_offset, seqlen_kv)

    # -- the first key, k0, is added in fp32, outside the matmuls. Where it has nearly all the weight, its t is
    #    close to t_mean and o depends on their small difference: rounding its p t for a matmul would dominate the
    #    error
    key_begin64 = key_begin.to(tl.int64)
    end_d = tl.minimum(seqlen_kv, 1) * 96  # 0 for a sequence without keys
    k0_0 = tl.load(k_ptr + key_begin64 * stride_kn + offs_d_0, mask=offs_d_0 < end_d, other=0.0).to(tl.float32)
    v0_0 = tl.load(v_ptr + key_begin64 * stride_vn + offs_d_0, mask=offs_d_0 < end_d, other=0.0).to(tl.float32)
    k0_1 = tl.load(k_ptr + key_begin64 * stride_kn + offs_d_1, mask=offs_d_1 < end_d, other=0.0).to(tl.float32)
    v0_1 = tl.load(v_ptr + key_begin64 * stride_vn + offs_d_1, mask=offs_d_1 < end_d, other=0.0).to(tl.float32)
    s0 = tl.sum(q_0 * k0_0[None, :], 1) + tl.sum(q_1 * k0_1[None, :], 1)
    t0 = tl.sum(r_0 * k0_0[None, :], 1) + tl.sum(r_1 * k0_1[None, :], 1)
    sees_k0 = (key_begin <= last_key) & (key_begin > last_key - window_size)
    m = tl.where(sees_k0, s0 * scale_log2, -3.0e38)  # finite: a row that sees no key must not give NaN
    d1 = tl.where(sees_k0, 1.0, 0.0)
    d2 = tl.where(sees_k0, t0, 0.0)
    o1_0 = tl.where(sees_k0[:, None], v0_0[None, :], 0.0)
    o2_0 = d2[:, None] * o1_0
    o1_1 = tl.where(sees_k0[:, None], v0_1[None, :], 0.0)
    o2_1 = d2[:, None] * o1_1

    # -- the other keys, block by block; the last block may reach past the end
    for start_n in tl.range(key_begin + 1, key_end, BLOCK_N):
        offs_n = start_n + range_n
        mask_n = offs_n < seqlen_kv
        k_block = k_ptr + tl.cast(start_n, tl.int64) * stride_kn
        v_block = v_ptr + tl.cast(start_n, tl.int64) * stride_vn
        k_0 = tl.load(k_block + k_offsets_0, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, 64]
        k_1 = tl.load(k_block + k_offsets_1, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, 32]
        v_0 = tl.load(v_block + v_offsets_0, mask=mask_n[:, None], other=0.0)
        v_1 = tl.load(v_block + v_offsets_1, mask=mask_n[:, None], other=0.0)

        # -- scores, and the online softmax
        s = tl.dot(q_0, tl.trans(k_0))  # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_1, tl.trans(k_1), acc=s)
        if (start_n + BLOCK_N > unmasked_end) | (start_n < unmasked_begin):
            visible = (offs_n[None, :] <= last_key[:, None]) & (offs_n[None, :] > last_key[:, None] - window_size)
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

    # -- o = o1/d1 (1 + d2/d1) - o2/d1, where o1/d1 is v_mean and d2/d1 is t_mean; 0 for a row that saw no key
    inv_d1 = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
    t_mean = d2 * inv_d1
    o_0 = o1_0 * (inv_d1 * (1.0 + t_mean))[:, None] - o2_0 * inv_d1[:, None]
    o_1 = o1_1 * (inv_d1 * (1.0 + t_mean))[:, None] - o2_1 * inv_d1[:, None]

    # -- store o
    o_offsets_0 = head * stride_oh + rows64 * stride_om + offs_d_0[None, :]
    o_offsets_1 = head * stride_oh + rows64 * stride_om + offs_d_1[None, :]
    tl.store(o_ptr + o_offsets_0, o_0.to(o_ptr.dtype.element_ty), mask=mask_m[:, None])
    tl.store(o_ptr + o_offsets_1, o_1.to(o_ptr.dtype.element_ty), mask=mask_m[:, None])


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
    cu_seqlens_q (batch + 1,) int32: the first row of each sequence in q, and the end of the last one
    cu_seqlens_k the same for k
                 In rows that belong to no sequence out is 0
    max_seqlen_q at least the most queries of a sequence
    window_size  a query sees its last window_size keys; 1 or more
    """
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    num_tiles = -(-max_seqlen_q // 128)
    forward_kernel[(num_tiles * batch * heads,)](
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
