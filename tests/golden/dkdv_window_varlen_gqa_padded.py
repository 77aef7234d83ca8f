"""Parallax attention, backward: the gradients of k and v.

spec       dkdv, head_dim 80, fp16, GQA 4:1, window, varlen
config     BLOCK_M=64 BLOCK_N=128 HEAD_GROUP=1 num_warps=8 num_stages=2 HEAD_DIM_AS=padded
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 193c8f165241

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij.
With a_ij = do_i.v_j, b_i = do_i.v_mean_i, T_i = do_i.o_i, where v_mean_i = sum_j p_ij v_j, the gradients are
gt_ij = p_ij (b_i - a_ij) of t_ij,  gs_ij = p_ij (b_i - T_i) - (1 + t_mean_i - t_ij) gt_ij of softmax_scale q_i.k_j,
dk_j = sum_i softmax_scale gs_ij q_i + gt_ij r_i  and  dv_j = sum_i p_ij (1 + t_mean_i - t_ij) do_i.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def fill_padding(dk_ptr, dv_ptr, stride_dkn, stride_dkh, stride_dvn, stride_dvh, heads, begin, end, total):
    """Write 0 to the rows that no sequence has: those before `begin`, and those from `end` on.

    All programs of the launch share them.
    """
    HEAD_DIM: tl.constexpr = 80
    HEADS: tl.constexpr = 16  # heads of a row that a program fills a step
    dims = tl.arange(0, 128)
    for i in tl.range(tl.program_id(0), total - end + begin, tl.num_programs(0)):
        row = (end + i).to(tl.int64)
        row = tl.where(row < total, row, row - total)  # the last row is followed by row 0
        for first in tl.range(0, heads, HEADS):
            head = (first + tl.arange(0, HEADS)).to(tl.int64)
            there = head < heads
            in_row = there[:, None] & (dims < HEAD_DIM)[None, :]
            dk_offsets = row * stride_dkn + (head * stride_dkh)[:, None] + dims[None, :]
            tl.store(dk_ptr + dk_offsets, 0.0, mask=in_row)
            dv_offsets = row * stride_dvn + (head * stride_dvh)[:, None] + dims[None, :]
            tl.store(dv_ptr + dv_offsets, 0.0, mask=in_row)


@triton.jit(do_not_specialize=["kv_heads", "window_size", "sequences", "total_k", "max_seqlen"])
def dkdv_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    rows_ptr,
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
    stride_rows,
    stride_rowsh,
    softmax_scale,
    scale_log2,
    kv_heads,
    window_size,
    sequences,
    total_k,
    max_seqlen,
):
    HEAD_DIM: tl.constexpr = 80
    BLOCK_M: tl.constexpr = 64  # query rows it takes a step
    BLOCK_N: tl.constexpr = 128  # keys a program owns
    GROUP: tl.constexpr = 4  # query heads that share a kv head

    # -- which tile of which kv head: keys that most rows see first
    pid = tl.program_id(0)
    tiles = tl.cdiv(max_seqlen, BLOCK_N)
    tile = pid % tiles
    bh = pid // tiles
    batch = (bh // kv_heads).to(tl.int64)
    kv_head = (bh % kv_heads).to(tl.int64)
    n0 = tile * BLOCK_N
    start_q = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
    seqlen_q = (tl.load(cu_seqlens_q_ptr + batch + 1) - start_q).to(tl.int32)
    start_k = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
    seqlen_kv = (tl.load(cu_seqlens_k_ptr + batch + 1) - start_k).to(tl.int32)
    begin_k = tl.load(cu_seqlens_k_ptr)
    end_k = tl.load(cu_seqlens_k_ptr + sequences)

    # -- rows that no sequence has
    if end_k - begin_k < total_k:
        fill_padding(dk_ptr, dv_ptr, stride_dkn, stride_dkh, stride_dvn, stride_dvh, kv_heads, begin_k, end_k, total_k)
    if n0 >= seqlen_kv:  # this sequence is shorter than the longest
        return
    cols = n0 + tl.arange(0, BLOCK_N)
    in_kv = cols < seqlen_kv
    in_tile = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, 128)
    in_head = (dims < HEAD_DIM)[None, :]  # the rest is zeros

    # -- load the keys and values this program owns
    at = (start_k + cols)[:, None].to(tl.int64)
    k_offsets = kv_head * stride_kh + at * stride_kn + dims[None, :]
    k = tl.load(k_ptr + k_offsets, mask=in_kv[:, None] & in_head, other=0.0)  # [BLOCK_N, 128]
    v_offsets = kv_head * stride_vh + at * stride_vn + dims[None, :]
    v = tl.load(v_ptr + v_offsets, mask=in_kv[:, None] & in_head, other=0.0)
    q_ptr += start_q * stride_qm
    r_ptr += start_q * stride_rm
    do_ptr += start_q * stride_dom
    q_offsets = in_tile[:, None] * stride_qm + dims[None, :]
    r_offsets = in_tile[:, None] * stride_rm + dims[None, :]
    do_offsets = in_tile[:, None] * stride_dom + dims[None, :]
    dk = tl.zeros([BLOCK_N, 128], tl.float32)
    dv = tl.zeros([BLOCK_N, 128], tl.float32)

    # -- rows that see these keys: row i sees window_size of them, up to i + shift. Blocks that begin before a row that
    #    sees the last key, or reach past one that sees the first key, need a mask
    shift = seqlen_kv - seqlen_q
    start = tl.maximum(n0 - shift, 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(n0 + BLOCK_N - 1 - shift + window_size, seqlen_q)
    sees_last = n0 + BLOCK_N - 1 - shift
    sees_first = n0 - 1 - shift + window_size
    stride_rows = tl.cast(stride_rows, tl.int64)  # between the numbers of a row
    for member in tl.range(0, GROUP):  # the gradients of a group's query heads are summed here
        head = kv_head * GROUP + member
        q_head = q_ptr + head * stride_qh
        r_head = r_ptr + head * stride_rh
        do_head = do_ptr + head * stride_doh
        stats = rows_ptr + head * stride_rowsh + (start_q + batch * 128) // 128 * 128
        for i in tl.range(start, end, BLOCK_M):
            rows = i + in_tile
            in_q = rows < seqlen_q
            q_block = q_head + tl.cast(i, tl.int64) * stride_qm
            r_block = r_head + tl.cast(i, tl.int64) * stride_rm
            do_block = do_head + tl.cast(i, tl.int64) * stride_dom
            q = tl.load(q_block + q_offsets, mask=in_q[:, None] & in_head, other=0.0)  # [BLOCK_M, 128]
            r = tl.load(r_block + r_offsets, mask=in_q[:, None] & in_head, other=0.0)
            do = tl.load(do_block + do_offsets, mask=in_q[:, None] & in_head, other=0.0)

            # -- p = softmax, with keys as rows: what comes of it enters the next matmuls from registers. The numbers of
            #    a query row are loaded where they are used: along columns, all together would fill the registers
            lse = tl.load(stats + rows)  # times log2(e); inf, behind the last row too, makes p 0
            s = tl.dot(k, tl.trans(q))  # [BLOCK_N, BLOCK_M]
            p = tl.exp2(s * scale_log2 - lse[None, :])
            if (i < sees_last) | (i + BLOCK_M - 1 > sees_first):
                last = rows[None, :] + shift
                p = tl.where((cols[:, None] <= last) & (cols[:, None] > last - window_size), p, 0.0)

            # -- dv sums p w, with w = softmax_scale (1 + t_mean - t), and is scaled back at the end
            t1 = tl.load(stats + stride_rows + rows)
            t = tl.dot(k, tl.trans(r))  # [BLOCK_N, BLOCK_M]
            w = t1[None, :] - t * softmax_scale
            pw = (p * w).to(q.dtype)
            dv = tl.dot(pw, do, acc=dv)

            # -- gt = p (b - a) is the gradient of t, gs = p c - w gt that of q.k, with c = softmax_scale (b - T)
            b = tl.load(stats + 2 * stride_rows + rows)
            a = tl.dot(v, tl.trans(do))  # [BLOCK_N, BLOCK_M]
            gt = p * (b[None, :] - a)
            gt_in = gt.to(q.dtype)
            c = tl.load(stats + 3 * stride_rows + rows)
            gs = (p * c[None, :] - w * gt).to(q.dtype)
            dk = tl.dot(gt_in, r, acc=dk)
            dk = tl.dot(gs, q, acc=dk)
    dv *= 1.0 / softmax_scale
    dk_offsets = kv_head * stride_dkh + at * stride_dkn + dims[None, :]
    tl.store(dk_ptr + dk_offsets, dk.to(dk_ptr.dtype.element_ty), mask=in_kv[:, None] & in_head)
    dv_offsets = kv_head * stride_dvh + at * stride_dvn + dims[None, :]
    tl.store(dv_ptr + dv_offsets, dv.to(dv_ptr.dtype.element_ty), mask=in_kv[:, None] & in_head)


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    rows: torch.Tensor,
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
    rows          (4, heads, padded) fp32, contiguous: what preprocess wrote
    cu_seqlens    (batch + 1,) int32: where each sequence begins in q and in k, and where the last one ends
                  dk and dv are 0 in rows that no sequence has
    max_seqlen_k  at least the length of the longest sequence
    window_size   the keys that a query sees at the most, 1 or more
    """
    batch, kv_heads = cu_seqlens_k.shape[0] - 1, k.shape[1]
    tiles = -(-max_seqlen_k // 128)
    dkdv_kernel[(tiles * batch * kv_heads,)](
        q,
        r,
        k,
        v,
        do,
        rows,
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
        *rows.stride()[:2],
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
