"""Parallax attention, backward: the gradients of k and v.

spec       dkdv, head_dim 80, fp16, GQA 4:1, window, varlen
config     BLOCK_M=64 BLOCK_N=128 GROUP_HEADS=1 num_warps=8 num_stages=2 HEAD_DIM_LAYOUT=padded
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 193c8f165241

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


@triton.jit
def _fill_padding(
    dk_ptr,
    dv_ptr,
    stride_dkn,
    stride_dkh,
    stride_dvn,
    stride_dvh,
    heads,
    used_begin,
    used_end,
    total,
):
    """Write 0 to the rows that belong to no sequence: [0, used_begin) and [used_end, total).

    The programs of the launch share these rows.
    """
    HEAD_DIM: tl.constexpr = 80
    BLOCK_HEADS: tl.constexpr = 16  # heads per iteration
    offs_d = tl.arange(0, 128)
    for i in tl.range(tl.program_id(0), total - used_end + used_begin, tl.num_programs(0)):
        row = (used_end + i).to(tl.int64)
        row = tl.where(row < total, row, row - total)  # after the last row, continue at row 0
        for first_head in tl.range(0, heads, BLOCK_HEADS):
            offs_h = (first_head + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
            mask_h = offs_h < heads
            mask_hd = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
            dk_offsets = row * stride_dkn + (offs_h * stride_dkh)[:, None] + offs_d[None, :]
            tl.store(dk_ptr + dk_offsets, 0.0, mask=mask_hd)
            dv_offsets = row * stride_dvn + (offs_h * stride_dvh)[:, None] + offs_d[None, :]
            tl.store(dv_ptr + dv_offsets, 0.0, mask=mask_hd)


@triton.jit(do_not_specialize=["kv_heads", "window_size", "num_seqs", "total_k", "max_seqlen"])
def dkdv_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    row_stats_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qm: tl.constexpr,
    stride_qh,
    stride_rm: tl.constexpr,
    stride_rh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_dom: tl.constexpr,
    stride_doh,
    stride_dkn,
    stride_dkh,
    stride_dvn,
    stride_dvh,
    stride_stat,
    stride_stath,
    softmax_scale,
    scale_log2,
    kv_heads,
    window_size,
    num_seqs,
    total_k,
    max_seqlen,
):
    HEAD_DIM: tl.constexpr = 80
    BLOCK_M: tl.constexpr = 64  # query rows per iteration
    BLOCK_N: tl.constexpr = 128  # keys per program
    GROUP: tl.constexpr = 4  # query heads per kv head

    # -- this program's tile of keys. Tiles that the most rows see are launched first
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(max_seqlen, BLOCK_N)
    tile = pid % num_tiles
    bh = pid // num_tiles
    batch = (bh // kv_heads).to(tl.int64)
    kv_head = (bh % kv_heads).to(tl.int64)
    start_n = tile * BLOCK_N
    seq_start_q = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
    seqlen_q = (tl.load(cu_seqlens_q_ptr + batch + 1) - seq_start_q).to(tl.int32)
    seq_start_k = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
    seqlen_kv = (tl.load(cu_seqlens_k_ptr + batch + 1) - seq_start_k).to(tl.int32)
    used_begin = tl.load(cu_seqlens_k_ptr)
    used_end = tl.load(cu_seqlens_k_ptr + num_seqs)

    # -- rows that belong to no sequence
    if used_end - used_begin < total_k:
        _fill_padding(
            dk_ptr,
            dv_ptr,
            stride_dkn,
            stride_dkh,
            stride_dvn,
            stride_dvh,
            kv_heads,
            used_begin,
            used_end,
            total_k,
        )
    if start_n >= seqlen_kv:  # the launch has tiles for the longest sequence
        return

    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < seqlen_kv
    range_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, 128)
    mask_d = (offs_d < HEAD_DIM)[None, :]  # the padding loads as 0

    # -- load k and v
    rows64 = (seq_start_k + offs_n)[:, None].to(tl.int64)
    k_offsets = kv_head * stride_kh + rows64 * stride_kn + offs_d[None, :]
    k = tl.load(k_ptr + k_offsets, mask=mask_n[:, None] & mask_d, other=0.0)  # [BLOCK_N, 128]
    v_offsets = kv_head * stride_vh + rows64 * stride_vn + offs_d[None, :]
    v = tl.load(v_ptr + v_offsets, mask=mask_n[:, None] & mask_d, other=0.0)
    q_ptr += seq_start_q * stride_qm
    r_ptr += seq_start_q * stride_rm
    do_ptr += seq_start_q * stride_dom
    q_offsets = range_m[:, None] * stride_qm + offs_d[None, :]
    r_offsets = range_m[:, None] * stride_rm + offs_d[None, :]
    do_offsets = range_m[:, None] * stride_dom + offs_d[None, :]
    dk = tl.zeros([BLOCK_N, 128], tl.float32)
    dv = tl.zeros([BLOCK_N, 128], tl.float32)

    # -- the rows that see these keys: row i sees the window_size keys up to i + causal_offset. Blocks that reach
    #    before unmasked_begin or past unmasked_last need a mask
    causal_offset = seqlen_kv - seqlen_q
    row_begin = tl.maximum(start_n - causal_offset, 0) // BLOCK_M * BLOCK_M
    row_end = tl.minimum(start_n + BLOCK_N - 1 - causal_offset + window_size, seqlen_q)
    unmasked_begin = start_n + BLOCK_N - 1 - causal_offset  # the first row that sees the last key
    unmasked_last = start_n - 1 - causal_offset + window_size  # the last row that sees the first key
    stride_stat = tl.cast(stride_stat, tl.int64)  # from one statistic of a row to the next
    for group_head in tl.range(0, GROUP):  # dk and dv sum over the query heads of a group
        head = kv_head * GROUP + group_head
        q_head = q_ptr + head * stride_qh
        r_head = r_ptr + head * stride_rh
        do_head = do_ptr + head * stride_doh
        stats_head = row_stats_ptr + head * stride_stath + (seq_start_q + batch * 128) // 128 * 128
        for start_m in tl.range(row_begin, row_end, BLOCK_M):
            offs_m = start_m + range_m
            mask_m = offs_m < seqlen_q
            q_block = q_head + tl.cast(start_m, tl.int64) * stride_qm
            r_block = r_head + tl.cast(start_m, tl.int64) * stride_rm
            do_block = do_head + tl.cast(start_m, tl.int64) * stride_dom
            q = tl.load(q_block + q_offsets, mask=mask_m[:, None] & mask_d, other=0.0)  # [BLOCK_M, 128]
            r = tl.load(r_block + r_offsets, mask=mask_m[:, None] & mask_d, other=0.0)
            do = tl.load(do_block + do_offsets, mask=mask_m[:, None] & mask_d, other=0.0)

            # -- p = softmax, transposed (keys are rows), so that it is the register operand of the next matmuls.
            #    Each row statistic is loaded just before its use: spread along columns, the four would not fit together
            lse2 = tl.load(stats_head + offs_m)  # log2(e) lse; inf in padding rows, so that p is 0 there
            s = tl.dot(k, tl.trans(q))  # [BLOCK_N, BLOCK_M]
            p = tl.exp2(s * scale_log2 - lse2[None, :])
            if (start_m < unmasked_begin) | (start_m + BLOCK_M - 1 > unmasked_last):
                last_key = offs_m[None, :] + causal_offset
                p = tl.where(
                    (offs_n[:, None] <= last_key) & (offs_n[:, None] > last_key - window_size),
                    p,
                    0.0,
                )

            # -- dv sums p w do with w = softmax_scale (1 + t_mean - t); the scale is divided out at the end
            w_bias = tl.load(stats_head + stride_stat + offs_m)  # softmax_scale (1 + t_mean)
            t = tl.dot(k, tl.trans(r))  # [BLOCK_N, BLOCK_M]
            w = w_bias[None, :] - t * softmax_scale
            pw = (p * w).to(q.dtype)
            dv = tl.dot(pw, do, acc=dv)

            # -- dt, the gradient of t, and ds, that of q.k: see the formulas at the top
            dp_mean = tl.load(stats_head + 2 * stride_stat + offs_m)
            dp = tl.dot(v, tl.trans(do))  # [BLOCK_N, BLOCK_M]
            dt = p * (dp_mean[None, :] - dp)
            dt_operand = dt.to(q.dtype)
            c = tl.load(stats_head + 3 * stride_stat + offs_m)  # softmax_scale (dp_mean - delta)
            ds_operand = (p * c[None, :] - w * dt).to(q.dtype)
            dk = tl.dot(dt_operand, r, acc=dk)
            dk = tl.dot(ds_operand, q, acc=dk)

    # -- store dk and dv
    dv *= 1.0 / softmax_scale
    dk_offsets = kv_head * stride_dkh + rows64 * stride_dkn + offs_d[None, :]
    tl.store(dk_ptr + dk_offsets, dk.to(dk_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d)
    dv_offsets = kv_head * stride_dvh + rows64 * stride_dvn + offs_d[None, :]
    tl.store(dv_ptr + dv_offsets, dv.to(dv_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d)


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    row_stats: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    window_size: int,
    max_seqlen_k: int,
) -> None:
    """Write the gradients of k and v to dk and dv, on the current stream. do is the gradient of the output.

    q, r, do      (total_q, kv_heads*4, 80) fp16, any strides with a contiguous last dimension
    k, v, dk, dv  (total_k, kv_heads, 80) fp16, likewise
    row_stats     (4, heads, padded) fp32, contiguous: written by preprocess
    cu_seqlens_q  (batch + 1,) int32: the first row of each sequence in q, and the end of the last one
    cu_seqlens_k  the same for k
                  In rows that belong to no sequence dk and dv are 0
    max_seqlen_k  at least the most keys of a sequence
    window_size   a query sees its last window_size keys; 1 or more
    """
    batch, kv_heads = cu_seqlens_k.shape[0] - 1, k.shape[1]
    num_tiles = -(-max_seqlen_k // 128)
    dkdv_kernel[(num_tiles * batch * kv_heads,)](
        q,
        r,
        k,
        v,
        do,
        row_stats,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        *q.stride()[:2],
        *r.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *do.stride()[:2],
        *dk.stride()[:2],
        *dv.stride()[:2],
        *row_stats.stride()[:2],
        softmax_scale,
        softmax_scale * LOG2_E,
        kv_heads,
        window_size,
        batch,
        k.shape[0],
        max_seqlen_k,
        num_warps=8,
        num_stages=2,
        enable_fp_fusion=True,
    )
