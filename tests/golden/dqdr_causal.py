"""Parallax attention, backward: the gradients of q and r.

spec       dqdr, head_dim 128, bf16, MHA, causal
config     BLOCK_M=128 BLOCK_N=64 GROUP_HEADS=4 num_warps=8 num_stages=3
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 8252f284e619

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


@triton.jit(do_not_specialize=["batch_heads", "heads", "seqlen_q", "seqlen_kv"])
def dqdr_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    row_stats_ptr,
    dq_ptr,
    dr_ptr,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_rb,
    stride_rm,
    stride_rh,
    stride_kb,
    stride_kn: tl.constexpr,
    stride_kh,
    stride_vb,
    stride_vn: tl.constexpr,
    stride_vh,
    stride_dob,
    stride_dom,
    stride_doh,
    stride_dqb,
    stride_dqm,
    stride_dqh,
    stride_drb,
    stride_drm,
    stride_drh,
    stride_stat,
    stride_stath,
    softmax_scale,
    scale_log2,
    batch_heads,
    heads,
    seqlen_q,
    seqlen_kv,
):
    HEAD_DIM: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 128  # query rows per program
    BLOCK_N: tl.constexpr = 64  # keys per iteration
    GROUP_HEADS: tl.constexpr = 4  # query heads whose tiles are launched together

    # -- this program's tile of query rows. Tiles that see the most keys are launched first
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(seqlen_q, BLOCK_M)
    first_bh = pid // (num_tiles * GROUP_HEADS) * GROUP_HEADS
    pid_in_launch_group = pid - first_bh * num_tiles
    launch_group_heads = tl.minimum(GROUP_HEADS, batch_heads - first_bh)  # the last group may be smaller
    tile = num_tiles - 1 - pid_in_launch_group // launch_group_heads
    bh = first_bh + pid_in_launch_group % launch_group_heads
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    start_m = tile * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < seqlen_q
    range_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)

    # -- load q, r, do and the row statistics
    rows64 = offs_m[:, None].to(tl.int64)
    q_offsets = batch * stride_qb + head * stride_qh + rows64 * stride_qm + offs_d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
    r_offsets = batch * stride_rb + head * stride_rh + rows64 * stride_rm + offs_d[None, :]
    r = tl.load(r_ptr + r_offsets, mask=mask_m[:, None], other=0.0)
    do_offsets = batch * stride_dob + head * stride_doh + rows64 * stride_dom + offs_d[None, :]
    do = tl.load(do_ptr + do_offsets, mask=mask_m[:, None], other=0.0)
    stride_stat64 = tl.cast(stride_stat, tl.int64)  # from one statistic of a row to the next
    stat_ptrs = row_stats_ptr + bh.to(tl.int64) * stride_stath + offs_m
    lse2 = tl.load(stat_ptrs)  # log2(e) lse; inf in padding rows, so that p is 0 there
    w_bias = tl.load(stat_ptrs + stride_stat64)  # softmax_scale (1 + t_mean)
    dp_mean = tl.load(stat_ptrs + 2 * stride_stat64)
    c = tl.load(stat_ptrs + 3 * stride_stat64)  # softmax_scale (dp_mean - delta)

    # -- addresses of k and v, which are streamed in blocks; accumulators
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    k_offsets = range_n[:, None] * stride_kn + offs_d[None, :]
    v_offsets = range_n[:, None] * stride_vn + offs_d[None, :]
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    dr = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    # -- the keys that these rows see: row i sees keys up to i + causal_offset
    causal_offset = seqlen_kv - seqlen_q
    key_end = tl.minimum(start_m + BLOCK_M + causal_offset, seqlen_kv)

    # -- loop over these keys
    for start_n in tl.range(0, key_end, BLOCK_N):
        offs_n = start_n + range_n
        mask_n = offs_n < seqlen_kv  # keys past the end load as 0, and add nothing
        start_n64 = tl.cast(start_n, tl.int64)
        k_block = k_ptr + start_n64 * stride_kn
        v_block = v_ptr + start_n64 * stride_vn
        k = tl.load(k_block + k_offsets, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_block + v_offsets, mask=mask_n[:, None], other=0.0)

        # -- p = softmax. Every block is masked: a branch would cost more
        s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale_log2 - lse2[:, None])
        p = tl.where(offs_n[None, :] <= offs_m[:, None] + causal_offset, p, 0.0)

        # -- dt, the gradient of t, and ds, that of q.k: see the formulas at the top
        t = tl.dot(r, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        w = w_bias[:, None] - t * softmax_scale
        dp = tl.dot(do, tl.trans(v))  # [BLOCK_M, BLOCK_N]
        dt = p * (dp_mean[:, None] - dp)
        dt_operand = dt.to(k.dtype)
        ds_operand = (p * c[:, None] - w * dt).to(k.dtype)
        dr = tl.dot(dt_operand, k, acc=dr)
        dq = tl.dot(ds_operand, k, acc=dq)

    # -- store dq and dr
    dq_offsets = batch * stride_dqb + head * stride_dqh + rows64 * stride_dqm + offs_d[None, :]
    tl.store(dq_ptr + dq_offsets, dq.to(dq_ptr.dtype.element_ty), mask=mask_m[:, None])
    dr_offsets = batch * stride_drb + head * stride_drh + rows64 * stride_drm + offs_d[None, :]
    tl.store(dr_ptr + dr_offsets, dr.to(dr_ptr.dtype.element_ty), mask=mask_m[:, None])


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    row_stats: torch.Tensor,
    dq: torch.Tensor,
    dr: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the gradients of q and r to dq and dr, on the current stream. do is the gradient of the output.

    q, r, do, dq, dr  (batch, seqlen_q, heads, 128) bf16, any strides with a contiguous last dimension
    k, v              (batch, seqlen_kv, heads, 128) bf16, likewise
    row_stats         (4, batch, heads, padded) fp32, contiguous: written by preprocess
    """
    batch, seqlen_q, heads, _ = q.shape
    num_tiles = triton.cdiv(seqlen_q, 128)
    dqdr_kernel[(num_tiles * batch * heads,)](
        q,
        r,
        k,
        v,
        do,
        row_stats,
        dq,
        dr,
        *q.stride()[:3],
        *r.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *do.stride()[:3],
        *dq.stride()[:3],
        *dr.stride()[:3],
        row_stats.stride(0),
        row_stats.stride(2),
        softmax_scale,
        softmax_scale * LOG2_E,
        batch * heads,
        heads,
        seqlen_q,
        k.shape[1],
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
