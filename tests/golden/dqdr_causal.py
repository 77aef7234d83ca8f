"""Parallax attention, backward: the gradients of q and r.

spec       dqdr, head_dim 128, bf16, MHA, causal
config     BLOCK_M=128 BLOCK_N=64 GROUP_HEADS=4 num_warps=8 num_stages=3
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel f3020d520197

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij.
With a_ij = do_i.v_j, b_i = do_i.v_mean_i, T_i = do_i.o_i, where v_mean_i = sum_j p_ij v_j, the gradients are
gt_ij = p_ij (b_i - a_ij) of t_ij,  gs_ij = p_ij (b_i - T_i) - (1 + t_mean_i - t_ij) gt_ij of softmax_scale q_i.k_j,
dq_i = softmax_scale sum_j gs_ij k_j  and  dr_i = sum_j gt_ij k_j.
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
    rows_ptr,
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
    stride_rows,
    stride_rowsh,
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

    # -- which tile of which head: the longest rows first
    pid = tl.program_id(0)
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    first = pid // (tiles * GROUP_HEADS) * GROUP_HEADS
    together = tl.minimum(GROUP_HEADS, batch_heads - first)  # the last group may be smaller
    tile = (pid - first * tiles) // together
    bh = first + (pid - first * tiles) % together
    tile = tiles - 1 - tile
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    row0 = tile * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    in_q = rows < seqlen_q
    keys = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)

    # -- load this program's rows
    row_ids = rows[:, None].to(tl.int64)
    q_offsets = batch * stride_qb + head * stride_qh + row_ids * stride_qm + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=in_q[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
    r_offsets = batch * stride_rb + head * stride_rh + row_ids * stride_rm + dims[None, :]
    r = tl.load(r_ptr + r_offsets, mask=in_q[:, None], other=0.0)
    do_offsets = batch * stride_dob + head * stride_doh + row_ids * stride_dom + dims[None, :]
    do = tl.load(do_ptr + do_offsets, mask=in_q[:, None], other=0.0)
    stride_rows = tl.cast(stride_rows, tl.int64)  # from one of the four row_stats to the next
    stats = rows_ptr + bh.to(tl.int64) * stride_rowsh + rows
    lse = tl.load(stats)  # times log2(e). It is inf past the last row, where p becomes 0
    t1 = tl.load(stats + stride_rows)  # softmax_scale (1 + t_mean)
    b = tl.load(stats + 2 * stride_rows)
    c = tl.load(stats + 3 * stride_rows)  # softmax_scale (b - T)
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    k_offsets = keys[:, None] * stride_kn + dims[None, :]
    v_offsets = keys[:, None] * stride_vn + dims[None, :]
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    dr = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    # -- the keys of this tile: row i sees those up to i + shift
    shift = seqlen_kv - seqlen_q
    end = tl.minimum(row0 + BLOCK_M + shift, seqlen_kv)
    for n in tl.range(0, end, BLOCK_N):
        cols = n + keys
        in_kv = cols < seqlen_kv  # keys past the end load as 0, and add nothing
        k_block = k_ptr + tl.cast(n, tl.int64) * stride_kn
        v_block = v_ptr + tl.cast(n, tl.int64) * stride_vn
        k = tl.load(k_block + k_offsets, mask=in_kv[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_block + v_offsets, mask=in_kv[:, None], other=0.0)

        # -- p = softmax
        s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale_log2 - lse[:, None])
        p = tl.where(cols[None, :] <= rows[:, None] + shift, p, 0.0)  # in every block: a branch would cost more

        # -- gt = p (b - a) is the gradient of t, gs = p c - w gt that of q.k, with
        #    c = softmax_scale (b - T) and w = softmax_scale (1 + t_mean - t)
        t = tl.dot(r, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        w = t1[:, None] - t * softmax_scale
        a = tl.dot(do, tl.trans(v))  # [BLOCK_M, BLOCK_N]
        gt = p * (b[:, None] - a)
        gt_in = gt.to(k.dtype)
        gs = (p * c[:, None] - w * gt).to(k.dtype)
        dr = tl.dot(gt_in, k, acc=dr)
        dq = tl.dot(gs, k, acc=dq)
    dq_offsets = batch * stride_dqb + head * stride_dqh + row_ids * stride_dqm + dims[None, :]
    tl.store(dq_ptr + dq_offsets, dq.to(dq_ptr.dtype.element_ty), mask=in_q[:, None])
    dr_offsets = batch * stride_drb + head * stride_drh + row_ids * stride_drm + dims[None, :]
    tl.store(dr_ptr + dr_offsets, dr.to(dr_ptr.dtype.element_ty), mask=in_q[:, None])


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    rows: torch.Tensor,
    dq: torch.Tensor,
    dr: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the gradients of q and r to dq and dr, on the current stream. do is the gradient of the output.

    q, r, do, dq, dr  (batch, seqlen_q, heads, 128) bf16, any strides with a contiguous last dimension
    k, v              (batch, seqlen_kv, heads, 128) bf16, likewise
    rows              (4, batch, heads, padded) fp32, contiguous: written by preprocess
    """
    batch, seqlen_q, heads, _ = q.shape
    tiles = -(-seqlen_q // 128)
    dqdr_kernel[(tiles * batch * heads,)](
        q,
        r,
        k,
        v,
        do,
        rows,
        dq,
        dr,
        *q.stride()[:3],
        *r.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *do.stride()[:3],
        *dq.stride()[:3],
        *dr.stride()[:3],
        *rows.stride()[:3:2],
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
