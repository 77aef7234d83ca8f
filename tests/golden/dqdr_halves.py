"""Parallax attention, backward: the gradients of q and r.

spec       dqdr, head_dim 256, fp16, GQA 2:1, full, varlen
config     BLOCK_M=64 BLOCK_N=32 HEAD_GROUP=1 num_warps=4 num_stages=2 HEAD_DIM_AS=halves
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 6e5c352ca593

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


@triton.jit
def fill_padding(dq_ptr, dr_ptr, stride_dqm, stride_dqh, stride_drm, stride_drh, heads, begin, end, total):
    """Write 0 to the rows that no sequence has: those before `begin`, and those from `end` on.

    All programs of the launch share them.
    """
    HEAD_DIM: tl.constexpr = 256
    HEADS: tl.constexpr = 16  # heads of a row that a program fills a step
    dims = tl.arange(0, HEAD_DIM)
    for i in tl.range(tl.program_id(0), total - end + begin, tl.num_programs(0)):
        row = (end + i).to(tl.int64)
        row = tl.where(row < total, row, row - total)  # the last row is followed by row 0
        for first in tl.range(0, heads, HEADS):
            head = (first + tl.arange(0, HEADS)).to(tl.int64)
            there = head < heads
            dq_offsets = row * stride_dqm + (head * stride_dqh)[:, None] + dims[None, :]
            tl.store(dq_ptr + dq_offsets, 0.0, mask=there[:, None])
            dr_offsets = row * stride_drm + (head * stride_drh)[:, None] + dims[None, :]
            tl.store(dr_ptr + dr_offsets, 0.0, mask=there[:, None])


@triton.jit(do_not_specialize=["heads", "sequences", "total_q", "max_seqlen"])
def dqdr_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    rows_ptr,
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
    stride_rows,
    stride_rowsh,
    softmax_scale,
    scale_log2,
    heads,
    sequences,
    total_q,
    max_seqlen,
):
    HALF: tl.constexpr = 128  # of a head's dimensions a program sums so many: two share each tile
    BLOCK_M: tl.constexpr = 64  # query rows a program owns
    BLOCK_N: tl.constexpr = 32  # keys it takes a step
    GROUP: tl.constexpr = 2  # query heads that share a kv head

    # -- which tile of which head
    pid = tl.program_id(0) // 2
    half = tl.program_id(0) % 2
    tiles = tl.cdiv(max_seqlen, BLOCK_M)
    tile = pid % tiles
    bh = pid // tiles
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
        fill_padding(dq_ptr, dr_ptr, stride_dqm, stride_dqh, stride_drm, stride_drh, heads, begin_q, end_q, total_q)
    if row0 >= seqlen_q:  # this sequence is shorter than the longest
        return
    rows = row0 + tl.arange(0, BLOCK_M)
    in_q = rows < seqlen_q
    keys = tl.arange(0, BLOCK_N)
    mine = half * HALF + tl.arange(0, HALF)  # the dimensions that this program sums
    others = (1 - half) * HALF + tl.arange(0, HALF)  # those that it needs for scores alone

    # -- load the rows this program owns
    at = (start_q + rows)[:, None].to(tl.int64)
    q_offsets_mine = head * stride_qh + at * stride_qm + mine[None, :]
    q_offsets_other = head * stride_qh + at * stride_qm + others[None, :]
    q_mine = tl.load(q_ptr + q_offsets_mine, mask=in_q[:, None], other=0.0)  # [BLOCK_M, HALF]
    q_other = tl.load(q_ptr + q_offsets_other, mask=in_q[:, None], other=0.0)  # [BLOCK_M, HALF]
    r_offsets_mine = head * stride_rh + at * stride_rm + mine[None, :]
    r_offsets_other = head * stride_rh + at * stride_rm + others[None, :]
    r_mine = tl.load(r_ptr + r_offsets_mine, mask=in_q[:, None], other=0.0)
    r_other = tl.load(r_ptr + r_offsets_other, mask=in_q[:, None], other=0.0)
    do_offsets_mine = head * stride_doh + at * stride_dom + mine[None, :]
    do_offsets_other = head * stride_doh + at * stride_dom + others[None, :]
    do_mine = tl.load(do_ptr + do_offsets_mine, mask=in_q[:, None], other=0.0)
    do_other = tl.load(do_ptr + do_offsets_other, mask=in_q[:, None], other=0.0)
    stride_rows = tl.cast(stride_rows, tl.int64)  # between the numbers of a row
    stats = rows_ptr + head * stride_rowsh + (start_q + batch * 128) // 128 * 128 + rows
    lse = tl.load(stats)  # times log2(e); inf, behind the last row too, makes p 0
    t1 = tl.load(stats + stride_rows)  # softmax_scale (1 + t_mean)
    b = tl.load(stats + 2 * stride_rows)
    c = tl.load(stats + 3 * stride_rows)  # softmax_scale (b - T)
    k_ptr += start_k * stride_kn + head // GROUP * stride_kh
    v_ptr += start_k * stride_vn + head // GROUP * stride_vh
    k_offsets_mine = keys[:, None] * stride_kn + mine[None, :]
    k_offsets_other = keys[:, None] * stride_kn + others[None, :]
    v_offsets_mine = keys[:, None] * stride_vn + mine[None, :]
    v_offsets_other = keys[:, None] * stride_vn + others[None, :]
    dq_mine = tl.zeros([BLOCK_M, HALF], tl.float32)
    dr_mine = tl.zeros([BLOCK_M, HALF], tl.float32)

    # -- keys: every row sees all of them
    for n in tl.range(0, seqlen_kv, BLOCK_N):
        cols = n + keys
        in_kv = cols < seqlen_kv  # a key that is not there is 0, and adds nothing
        k_block = k_ptr + tl.cast(n, tl.int64) * stride_kn
        v_block = v_ptr + tl.cast(n, tl.int64) * stride_vn
        k_mine = tl.load(k_block + k_offsets_mine, mask=in_kv[:, None], other=0.0)  # [BLOCK_N, HALF]
        k_other = tl.load(k_block + k_offsets_other, mask=in_kv[:, None], other=0.0)  # [BLOCK_N, HALF]
        v_mine = tl.load(v_block + v_offsets_mine, mask=in_kv[:, None], other=0.0)
        v_other = tl.load(v_block + v_offsets_other, mask=in_kv[:, None], other=0.0)

        # -- p = softmax
        s = tl.dot(q_mine, tl.trans(k_mine))  # [BLOCK_M, BLOCK_N]
        s = tl.dot(q_other, tl.trans(k_other), acc=s)
        p = tl.exp2(s * scale_log2 - lse[:, None])

        # -- gt = p (b - a) is the gradient of t, gs = p c - w gt that of q.k, with c = softmax_scale (b - T) and
        #    w = softmax_scale (1 + t_mean - t)
        t = tl.dot(r_mine, tl.trans(k_mine))  # [BLOCK_M, BLOCK_N]
        t = tl.dot(r_other, tl.trans(k_other), acc=t)
        w = t1[:, None] - t * softmax_scale
        a = tl.dot(do_mine, tl.trans(v_mine))  # [BLOCK_M, BLOCK_N]
        a = tl.dot(do_other, tl.trans(v_other), acc=a)
        gt = p * (b[:, None] - a)
        gt_in = gt.to(k_mine.dtype)
        gs = (p * c[:, None] - w * gt).to(k_mine.dtype)
        dr_mine = tl.dot(gt_in, k_mine, acc=dr_mine)
        dq_mine = tl.dot(gs, k_mine, acc=dq_mine)
    dq_offsets_mine = head * stride_dqh + at * stride_dqm + mine[None, :]
    tl.store(dq_ptr + dq_offsets_mine, dq_mine.to(dq_ptr.dtype.element_ty), mask=in_q[:, None])
    dr_offsets_mine = head * stride_drh + at * stride_drm + mine[None, :]
    tl.store(dr_ptr + dr_offsets_mine, dr_mine.to(dr_ptr.dtype.element_ty), mask=in_q[:, None])


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    rows: torch.Tensor,
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
    rows              (4, heads, padded) fp32, contiguous: what preprocess wrote
    cu_seqlens        (batch + 1,) int32: where each sequence begins in q and in k, and where the last one ends
                      dq and dr are 0 in rows that no sequence has
    max_seqlen_q      at least the length of the longest sequence
    """
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    tiles = -(-max_seqlen_q // 64)
    dqdr_kernel[(2 * tiles * batch * heads,)](
        q,
        r,
        k,
        v,
        do,
        rows,
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
        *rows.stride()[:2],
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
