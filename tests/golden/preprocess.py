"""Parallax attention, backward: the row_stats that dkdv and dqdr read.

spec       preprocess, head_dim 128, bf16
config     BLOCK_M=32 num_warps=4
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel f5661074c886

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij.
Inputs are do, the gradient of the output, and what the forward saved: v_mean_i = sum_j p_ij v_j, t_mean_i and
lse_i, the log of the sum of the exponentials of its scores.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "seqlen_q", "tiles"])
def preprocess_kernel(
    do_ptr,
    o_ptr,
    v_mean_ptr,
    lse_ptr,
    t_mean_ptr,
    rows_ptr,
    stride_dob,
    stride_dom,
    stride_doh,
    stride_ob,
    stride_om,
    stride_oh,
    stride_vb,
    stride_vm,
    stride_vh,
    stride_rows,
    stride_rowsh,
    softmax_scale,
    heads,
    seqlen_q,
    tiles,
):
    HEAD_DIM: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 32  # query rows per program

    pid = tl.program_id(0)
    bh = (pid // tiles).to(tl.int64)
    batch, head = bh // heads, bh % heads
    rows = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    in_q = rows < seqlen_q
    dims = tl.arange(0, HEAD_DIM)
    in_tile = in_q[:, None]
    row_ids = rows[:, None].to(tl.int64)
    do_ptrs = do_ptr + batch * stride_dob + head * stride_doh + row_ids * stride_dom + dims[None, :]
    o_ptrs = o_ptr + batch * stride_ob + head * stride_oh + row_ids * stride_om + dims[None, :]
    v_mean_ptrs = v_mean_ptr + batch * stride_vb + head * stride_vh + row_ids * stride_vm + dims[None, :]
    do = tl.load(do_ptrs, mask=in_tile, other=0.0).to(tl.float32)  # [BLOCK_M, HEAD_DIM]
    o = tl.load(o_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    v_mean = tl.load(v_mean_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    stats = bh * seqlen_q + rows
    lse = tl.load(lse_ptr + stats, mask=in_q, other=float("-inf"))
    t_mean = tl.load(t_mean_ptr + stats, mask=in_q, other=0.0)

    # -- b = do.v_mean and T = do.o. Only b and b - T are needed; do.(v_mean - o) is more exact than b - T
    b = tl.sum(do * v_mean, 1)
    c = tl.sum(do * (v_mean - o), 1)
    LOG2_E: tl.constexpr = 1.4426950408889634
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)  # a row without keys has p = 0 everywhere
    rows_ptr += bh * stride_rowsh
    stride_rows = tl.cast(stride_rows, tl.int64)  # from one of the four row_stats to the next
    tl.store(rows_ptr + rows, lse)
    tl.store(rows_ptr + stride_rows + rows, softmax_scale * (1.0 + t_mean))
    tl.store(rows_ptr + 2 * stride_rows + rows, b)
    tl.store(rows_ptr + 3 * stride_rows + rows, softmax_scale * c)


def launch(
    do: torch.Tensor,
    out: torch.Tensor,
    v_mean: torch.Tensor,
    lse: torch.Tensor,
    t_mean: torch.Tensor,
    rows: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write four fp32 numbers per query row to rows, on the current stream.

    log2(e) lse, softmax_scale (1 + t_mean), b and softmax_scale (b - T), with b = do.v_mean and T = do.out. The
    first is inf in rows without keys and in rows of padding.

    do, out, v_mean  (batch, seqlen_q, heads, 128) bf16, any strides with a contiguous last dimension
    lse, t_mean      (batch, heads, seqlen_q) fp32, contiguous
    rows             (4, batch, heads, padded) fp32, contiguous: padded is seqlen_q rounded up to a multiple of 128
    """
    batch, seqlen_q, heads, _ = do.shape
    tiles = rows.shape[3] // 32
    preprocess_kernel[(tiles * batch * heads,)](
        do,
        out,
        v_mean,
        lse,
        t_mean,
        rows,
        *do.stride()[:3],
        *out.stride()[:3],
        *v_mean.stride()[:3],
        *rows.stride()[:3:2],
        softmax_scale,
        heads,
        seqlen_q,
        tiles,
        num_warps=4,
        enable_fp_fusion=True,
    )
