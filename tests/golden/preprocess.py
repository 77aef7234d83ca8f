"""Parallax attention, backward: the row statistics that dkdv and dqdr read.

spec       preprocess, head_dim 128, bf16
config     BLOCK_M=32 num_warps=4
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel d9989553bad6

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij.
Inputs are do, the gradient of the output, and what the forward saved: v_mean_i = sum_j p_ij v_j, t_mean_i and
lse_i, the log of the sum of the exponentials of row i's scores.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "seqlen_q", "num_tiles"])
def preprocess_kernel(
    do_ptr,
    o_ptr,
    v_mean_ptr,
    lse_ptr,
    t_mean_ptr,
    row_stats_ptr,
    stride_dob,
    stride_dom,
    stride_doh,
    stride_ob,
    stride_om,
    stride_oh,
    stride_vmeanb,
    stride_vmeanm,
    stride_vmeanh,
    stride_stat,
    stride_stath,
    softmax_scale,
    heads,
    seqlen_q,
    num_tiles,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    HEAD_DIM: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 32  # query rows per program

    # -- this program's rows
    pid = tl.program_id(0)
    start_m = pid % num_tiles * BLOCK_M
    bh = pid // num_tiles
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < seqlen_q
    offs_d = tl.arange(0, HEAD_DIM)

    # -- load do and what the forward saved
    rows64 = offs_m[:, None].to(tl.int64)
    do_ptrs = do_ptr + batch * stride_dob + head * stride_doh + rows64 * stride_dom + offs_d[None, :]
    o_ptrs = o_ptr + batch * stride_ob + head * stride_oh + rows64 * stride_om + offs_d[None, :]
    v_mean_ptrs = v_mean_ptr + batch * stride_vmeanb + head * stride_vmeanh + rows64 * stride_vmeanm + offs_d[None, :]
    do = tl.load(do_ptrs, mask=mask_m[:, None], other=0.0).to(tl.float32)  # [BLOCK_M, HEAD_DIM]
    o = tl.load(o_ptrs, mask=mask_m[:, None], other=0.0).to(tl.float32)
    v_mean = tl.load(v_mean_ptrs, mask=mask_m[:, None], other=0.0).to(tl.float32)
    stat_offsets = bh.to(tl.int64) * seqlen_q + offs_m
    lse = tl.load(lse_ptr + stat_offsets, mask=mask_m, other=float("-inf"))
    t_mean = tl.load(t_mean_ptr + stat_offsets, mask=mask_m, other=0.0)

    # -- dp_mean = do.v_mean, and dp_mean - delta with delta = do.o: do.(v_mean - o) is more exact than the difference
    dp_mean = tl.sum(do * v_mean, 1)
    dp_mean_minus_delta = tl.sum(do * (v_mean - o), 1)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)  # a row without keys has p = 0 everywhere

    # -- store the row statistics
    stat_ptrs = row_stats_ptr + bh.to(tl.int64) * stride_stath + offs_m
    stride_stat64 = tl.cast(stride_stat, tl.int64)  # from one statistic of a row to the next
    tl.store(stat_ptrs, lse2)
    tl.store(stat_ptrs + stride_stat64, softmax_scale * (1.0 + t_mean))
    tl.store(stat_ptrs + 2 * stride_stat64, dp_mean)
    tl.store(stat_ptrs + 3 * stride_stat64, softmax_scale * dp_mean_minus_delta)


def launch(
    do: torch.Tensor,
    out: torch.Tensor,
    v_mean: torch.Tensor,
    lse: torch.Tensor,
    t_mean: torch.Tensor,
    row_stats: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write four fp32 statistics per query row to row_stats, on the current stream.

    log2(e) lse, softmax_scale (1 + t_mean), dp_mean and softmax_scale (dp_mean - delta), with dp_mean = do.v_mean and
    delta = do.out. The first is inf in rows without keys and in rows of padding.

    do, out, v_mean  (batch, seqlen_q, heads, 128) bf16, any strides with a contiguous last dimension
    lse, t_mean      (batch, heads, seqlen_q) fp32, contiguous
    row_stats        (4, batch, heads, padded) fp32, contiguous: padded is seqlen_q rounded up to a multiple of 128
    """
    batch, seqlen_q, heads, _ = do.shape
    num_tiles = row_stats.shape[3] // 32
    preprocess_kernel[(num_tiles * batch * heads,)](
        do,
        out,
        v_mean,
        lse,
        t_mean,
        row_stats,
        *do.stride()[:3],
        *out.stride()[:3],
        *v_mean.stride()[:3],
        row_stats.stride(0),
        row_stats.stride(2),
        softmax_scale,
        heads,
        seqlen_q,
        num_tiles,
        num_warps=4,
        enable_fp_fusion=True,
    )
