"""Parallax attention, backward: the gradients of q and r.

spec       dqdr, head_dim 256, fp16, GQA 2:1, full, varlen
config     BLOCK_M=64 BLOCK_N=32 GROUP_HEADS=1 num_warps=4 num_stages=2 HEAD_DIM_LAYOUT=split
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 6e5c352ca593

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij.
With dp_ij = do_i.v_j, dp_mean_i = do_i.v_mean_i where v_mean_i = sum_j p_ij v_j, delta_i = do_i.o_i,
w_ij = softmax_scale (1 + t_mean_i - t_ij)  and  c_i = softmax_scale (dp_mean_i - delta_i), the gradients are
dt_ij = p_ij (dp_mean_i - dp_ij) of t_ij,  ds_ij = p_ij c_i - w_ij dt_ij of q_i.k_j,
dq_i = sum_j ds_ij k_j  and  dr_i = sum_j dt_ij k_j.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def _fill_padding(
    dq_ptr,
    dr_ptr,
    stride_dqm,
    stride_dqh,
    stride_drm,
    stride_drh,
    heads,
    used_begin,
    used_end,
    total,
):
    """Write 0 to the rows that belong to no sequence: [0, used_begin) and [used_end, total).

    The programs of the launch share these rows.
    """
    HEAD_DIM: tl.constexpr = 256
    BLOCK_HEADS: tl.constexpr = 16  # heads per iteration
    offs_d = tl.arange(0, HEAD_DIM)
    for i in tl.range(tl.program_id(0), total - used_end + used_begin, tl.num_programs(0)):
        row = (used_end + i).to(tl.int64)
        row = tl.where(row < total, row, row - total)  # after the last row, continue at row 0
        for first_head in tl.range(0, heads, BLOCK_HEADS):
            offs_h = (first_head + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
            mask_h = offs_h < heads
            dq_offsets = row * stride_dqm + (offs_h * stride_dqh)[:, None] + offs_d[None, :]
            tl.store(dq_ptr + dq_offsets, 0.0, mask=mask_h[:, None])
            dr_offsets = row * stride_drm + (offs_h * stride_drh)[:, None] + offs_d[None, :]
            tl.store(dr_ptr + dr_offsets, 0.0, mask=mask_h[:, None])


@triton.jit(do_not_specialize=["heads", "num_seqs", "total_q", "max_seqlen"])
def dqdr_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    row_stats_ptr,
    dq_ptr,
    dr_ptr,
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
    stride_dom,
    stride_doh,
    stride_dqm,
    stride_dqh,
    stride_drm,
    stride_drh,
    stride_stat,
    stride_stath,
    softmax_scale,
    scale_log2,
    heads,
    num_seqs,
    total_q,
    max_seqlen,
):
    HALF_DIM: tl.constexpr = 128  # dimensions per program: two programs share a tile
    BLOCK_M: tl.constexpr = 64  # query rows per program
    BLOCK_N: tl.constexpr = 32  # keys per iteration
    GROUP: tl.constexpr = 2  # query heads per kv head

    # -- this program's tile of query rows
    pid = tl.program_id(0) // 2
    half = tl.program_id(0) % 2
    num_tiles = tl.cdiv(max_seqlen, BLOCK_M)
    tile = pid % num_tiles
    bh = pid // num_tiles
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
            dq_ptr,
            dr_ptr,
            stride_dqm,
            stride_dqh,
            stride_drm,
            stride_drh,
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
    offs_d_this = half * HALF_DIM + tl.arange(0, HALF_DIM)  # the dimensions that this program accumulates
    offs_d_other = (1 - half) * HALF_DIM + tl.arange(0, HALF_DIM)  # those that it needs for scores alone

    # -- load q, r, do and the row statistics
    rows64 = (seq_start_q + offs_m)[:, None].to(tl.int64)
    q_offsets_this = head * stride_qh + rows64 * stride_qm + offs_d_this[None, :]
    q_offsets_other = head * stride_qh + rows64 * stride_qm + offs_d_other[None, :]
    q_this = tl.load(q_ptr + q_offsets_this, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, HALF_DIM]
    q_other = tl.load(q_ptr + q_offsets_other, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, HALF_DIM]
    r_offsets_this = head * stride_rh + rows64 * stride_rm + offs_d_this[None, :]
    r_offsets_other = head * stride_rh + rows64 * stride_rm + offs_d_other[None, :]
    r_this = tl.load(r_ptr + r_offsets_this, mask=mask_m[:, None], other=0.0)
    r_other = tl.load(r_ptr + r_offsets_other, mask=mask_m[:, None], other=0.0)
    do_offsets_this = head * stride_doh + rows64 * stride_dom + offs_d_this[None, :]
    do_offsets_other = head * stride_doh + rows64 * stride_dom + offs_d_other[None, :]
    do_this = tl.load(do_ptr + do_offsets_this, mask=mask_m[:, None], other=0.0)
    do_other = tl.load(do_ptr + do_offsets_other, mask=mask_m[:, None], other=0.0)
    stride_stat = tl.cast(stride_stat, tl.int64)  # from one statistic of a row to the next
    stat_ptrs = row_stats_ptr + head * stride_stath + (seq_start_q + batch * 128) // 128 * 128 + offs_m
    lse2 = tl.load(stat_ptrs)  # log2(e) lse; inf in padding rows, so that p is 0 there
    w_bias = tl.load(stat_ptrs + stride_stat)  # softmax_scale (1 + t_mean)
    dp_mean = tl.load(stat_ptrs + 2 * stride_stat)
    c = tl.load(stat_ptrs + 3 * stride_stat)  # softmax_scale (dp_mean - delta)
    k_ptr += seq_start_k * stride_kn + head // GROUP * stride_kh
    v_ptr += seq_start_k * stride_vn + head // GROUP * stride_vh
    k_offsets_this = range_n[:, None] * stride_kn + offs_d_this[None, :]
    k_offsets_other = range_n[:, None] * stride_kn + offs_d_other[None, :]
    v_offsets_this = range_n[:, None] * stride_vn + offs_d_this[None, :]
    v_offsets_other = range_n[:, None] * stride_vn + offs_d_other[None, :]
    dq_this = tl.zeros([BLOCK_M, HALF_DIM], tl.float32)
    dr_this = tl.zeros([BLOCK_M, HALF_DIM], tl.float32)

    # -- every row sees all keys
    for start_n in tl.range(0, seqlen_kv, BLOCK_N):
        offs_n = start_n + range_n
        mask_n = offs_n < seqlen_kv  # keys past the end load as 0, and add nothing
        k_block = k_ptr + tl.cast(start_n, tl.int64) * stride_kn
        v_block = v_ptr + tl.cast(start_n, tl.int64) * stride_vn
        k_this = tl.load(k_block + k_offsets_this, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, HALF_DIM]
        k_other = tl.load(k_block + k_offsets_other, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, HALF_DIM]
        v_this = tl.load(v_block + v_offsets_this, mask=mask_n[:, None], other=0.0)
        v_other = tl.load(v_block + v_offsets_other, mask=mask_n[:, None], other=0.0)

        # -- p = softmax
        s = tl.dot(q_this, tl.trans(k_this))  # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_other, tl.trans(k_other), acc=s)
        p = tl.exp2(s * scale_log2 - lse2[:, None])

        # -- dt, the gradient of t, and ds, that of q.k: see the formulas at the top
        t = tl.dot(r_this, tl.trans(k_this))  # [BLOCK_M, BLOCK_N]
        t = tl.dot(r_other, tl.trans(k_other), acc=t)
        w = w_bias[:, None] - t * softmax_scale
        dp = tl.dot(do_this, tl.trans(v_this))  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(do_other, tl.trans(v_other), acc=dp)
        dt = p * (dp_mean[:, None] - dp)
        dt_operand = dt.to(k_this.dtype)
        ds_operand = (p * c[:, None] - w * dt).to(k_this.dtype)
        dr_this = tl.dot(dt_operand, k_this, acc=dr_this)
        dq_this = tl.dot(ds_operand, k_this, acc=dq_this)

    # -- store dq and dr
    dq_offsets_this = head * stride_dqh + rows64 * stride_dqm + offs_d_this[None, :]
    tl.store(dq_ptr + dq_offsets_this, dq_this.to(dq_ptr.dtype.element_ty), mask=mask_m[:, None])
    dr_offsets_this = head * stride_drh + rows64 * stride_drm + offs_d_this[None, :]
    tl.store(dr_ptr + dr_offsets_this, dr_this.to(dr_ptr.dtype.element_ty), mask=mask_m[:, None])


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    row_stats: torch.Tensor,
    dq: torch.Tensor,
    dr: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    max_seqlen_q: int,
) -> None:
    """Write the gradients of q and r to dq and dr, on the current stream. do is the gradient of the output.

    q, r, do, dq, dr  (total_q, kv_heads*2, 256) fp16, any strides with a contiguous last dimension
    k, v              (total_k, kv_heads, 256) fp16, likewise
    row_stats         (4, heads, padded) fp32, contiguous: written by preprocess
    cu_seqlens_q      (batch + 1,) int32: the first row of each sequence in q, and the end of the last one
    cu_seqlens_k      the same for k
                      In rows that belong to no sequence dq and dr are 0
    max_seqlen_q      at least the most queries of a sequence
    """
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    num_tiles = -(-max_seqlen_q // 64)
    dqdr_kernel[(2 * num_tiles * batch * heads,)](
        q,
        r,
        k,
        v,
        do,
        row_stats,
        dq,
        dr,
        cu_seqlens_q,
        cu_seqlens_k,
        *q.stride()[:2],
        *r.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *do.stride()[:2],
        *dq.stride()[:2],
        *dr.stride()[:2],
        *row_stats.stride()[:2],
        softmax_scale,
        softmax_scale * LOG2_E,
        heads,
        batch,
        q.shape[0],
        max_seqlen_q,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )
