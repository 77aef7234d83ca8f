"""Parallax attention, backward: the gradients of k and v.

spec       dkdv, head_dim 128, bf16, MHA, causal
config     BLOCK_M=64 BLOCK_N=128 GROUP_HEADS=4 num_warps=8 num_stages=3
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel c14b90d7ec60

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij.
With dp_ij = do_i.v_j, dp_mean_i = do_i.v_mean_i where v_mean_i = sum_j p_ij v_j, delta_i = do_i.o_i,
w_ij = softmax_scale (1 + t_mean_i - t_ij)  and  c_i = softmax_scale (dp_mean_i - delta_i), the gradients are
dt_ij = p_ij (dp_mean_i - dp_ij) of t_ij,  ds_ij = p_ij c_i - w_ij dt_ij of q_i.k_j,
dk_j = sum_i ds_ij q_i + dt_ij r_i  and  dv_j = sum_i p_ij w_ij do_i / softmax_scale.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["batch_heads", "kv_heads", "seqlen_q", "seqlen_kv"])
def dkdv_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    row_stats_ptr,
    dk_ptr,
    dv_ptr,
    stride_qb,
    stride_qm: tl.constexpr,
    stride_qh,
    stride_rb,
    stride_rm: tl.constexpr,
    stride_rh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_dob,
    stride_dom: tl.constexpr,
    stride_doh,
    stride_dkb,
    stride_dkn,
    stride_dkh,
    stride_dvb,
    stride_dvn,
    stride_dvh,
    stride_stat,
    stride_stath,
    softmax_scale,
    scale_log2,
    batch_heads,
    kv_heads,
    seqlen_q,
    seqlen_kv,
):
    HEAD_DIM: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 64  # query rows per iteration
    BLOCK_N: tl.constexpr = 128  # keys per program
    GROUP_HEADS: tl.constexpr = 4  # kv heads whose tiles are launched together

    # -- this program's tile of keys. Tiles that the most rows see are launched first
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(seqlen_kv, BLOCK_N)
    first_bh = pid // (num_tiles * GROUP_HEADS) * GROUP_HEADS
    pid_in_launch_group = pid - first_bh * num_tiles
    launch_group_heads = tl.minimum(GROUP_HEADS, batch_heads - first_bh)  # the last group may be smaller
    tile = pid_in_launch_group // launch_group_heads
    bh = first_bh + pid_in_launch_group % launch_group_heads
    batch = (bh // kv_heads).to(tl.int64)
    kv_head = (bh % kv_heads).to(tl.int64)
    start_n = tile * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < seqlen_kv
    range_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)

    # -- load k and v
    rows64 = offs_n[:, None].to(tl.int64)
    k_offsets = batch * stride_kb + kv_head * stride_kh + rows64 * stride_kn + offs_d[None, :]
    k = tl.load(k_ptr + k_offsets, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
    v_offsets = batch * stride_vb + kv_head * stride_vh + rows64 * stride_vn + offs_d[None, :]
    v = tl.load(v_ptr + v_offsets, mask=mask_n[:, None], other=0.0)

    # -- addresses of q, r, do and the row statistics, which are streamed in blocks; accumulators
    q_ptr += batch * stride_qb
    r_ptr += batch * stride_rb
    do_ptr += batch * stride_dob
    q_offsets = range_m[:, None] * stride_qm + offs_d[None, :]
    r_offsets = range_m[:, None] * stride_rm + offs_d[None, :]
    do_offsets = range_m[:, None] * stride_dom + offs_d[None, :]
    stride_stat64 = tl.cast(stride_stat, tl.int64)  # from one statistic of a row to the next
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)

    # -- the rows that see these keys: row i sees keys up to i + causal_offset. Blocks that begin before unmasked_begin,
    #    the first row that sees the last key, need a mask
    causal_offset = seqlen_kv - seqlen_q
    row_begin = tl.maximum(start_n - causal_offset, 0) // BLOCK_M * BLOCK_M
    unmasked_begin = start_n + BLOCK_N - 1 - causal_offset

    # -- loop over these rows
    q_head = q_ptr + kv_head * stride_qh
    r_head = r_ptr + kv_head * stride_rh
    do_head = do_ptr + kv_head * stride_doh
    stats_head = row_stats_ptr + bh.to(tl.int64) * stride_stath
    for start_m in tl.range(row_begin, seqlen_q, BLOCK_M):
        offs_m = start_m + range_m
        mask_m = offs_m < seqlen_q
        start_m64 = tl.cast(start_m, tl.int64)
        q_block = q_head + start_m64 * stride_qm
        r_block = r_head + start_m64 * stride_rm
        do_block = do_head + start_m64 * stride_dom
        q = tl.load(q_block + q_offsets, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
        r = tl.load(r_block + r_offsets, mask=mask_m[:, None], other=0.0)
        do = tl.load(do_block + do_offsets, mask=mask_m[:, None], other=0.0)

        # -- p = softmax, transposed (keys are rows), so that it is the register operand of the next matmuls.
        #    Each row statistic is loaded just before its use: along columns, all four would take too many registers
        lse2 = tl.load(stats_head + offs_m)  # log2(e) lse; inf in padding rows, so that p is 0 there
        s = tl.dot(k, tl.trans(q))  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(s * scale_log2 - lse2[None, :])
        if start_m < unmasked_begin:
            p = tl.where(offs_n[:, None] <= offs_m[None, :] + causal_offset, p, 0.0)

        # -- dv sums p w do with w = softmax_scale (1 + t_mean - t); the scale is divided out at the end
        w_bias = tl.load(stats_head + stride_stat64 + offs_m)  # softmax_scale (1 + t_mean)
        t = tl.dot(k, tl.trans(r))  # [BLOCK_N, BLOCK_M]
        w = w_bias[None, :] - t * softmax_scale
        pw = (p * w).to(q.dtype)
        dv = tl.dot(pw, do, acc=dv)

        # -- dt, the gradient of t, and ds, that of q.k: see the formulas at the top
        dp_mean = tl.load(stats_head + 2 * stride_stat64 + offs_m)
        dp = tl.dot(v, tl.trans(do))  # [BLOCK_N, BLOCK_M]
        dt = p * (dp_mean[None, :] - dp)
        dt_operand = dt.to(q.dtype)
        c = tl.load(stats_head + 3 * stride_stat64 + offs_m)  # softmax_scale (dp_mean - delta)
        ds_operand = (p * c[None, :] - w * dt).to(q.dtype)
        dk = tl.dot(dt_operand, r, acc=dk)
        dk = tl.dot(ds_operand, q, acc=dk)

    # -- store dk and dv
    dv *= 1.0 / softmax_scale
    dk_offsets = batch * stride_dkb + kv_head * stride_dkh + rows64 * stride_dkn + offs_d[None, :]
    tl.store(dk_ptr + dk_offsets, dk.to(dk_ptr.dtype.element_ty), mask=mask_n[:, None])
    dv_offsets = batch * stride_dvb + kv_head * stride_dvh + rows64 * stride_dvn + offs_d[None, :]
    tl.store(dv_ptr + dv_offsets, dv.to(dv_ptr.dtype.element_ty), mask=mask_n[:, None])


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    row_stats: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the gradients of k and v to dk and dv, on the current stream. do is the gradient of the output.

    q, r, do      (batch, seqlen_q, heads, 128) bf16, any strides with a contiguous last dimension
    k, v, dk, dv  (batch, seqlen_kv, heads, 128) bf16, likewise
    row_stats     (4, batch, heads, padded) fp32, contiguous: written by preprocess
    """
    batch, seqlen_q = q.shape[:2]
    _, seqlen_kv, kv_heads, _ = k.shape
    num_tiles = triton.cdiv(seqlen_kv, 128)
    dkdv_kernel[(num_tiles * batch * kv_heads,)](
        q,
        r,
        k,
        v,
        do,
        row_stats,
        dk,
        dv,
        *q.stride()[:3],
        *r.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *do.stride()[:3],
        *dk.stride()[:3],
        *dv.stride()[:3],
        row_stats.stride(0),
        row_stats.stride(2),
        softmax_scale,
        softmax_scale * LOG2_E,
        batch * kv_heads,
        kv_heads,
        seqlen_q,
        seqlen_kv,
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
