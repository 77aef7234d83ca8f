"""Parallax attention, backward: the gradients of k and v.

spec       dkdv, head_dim 128, bf16, MHA, causal
config     BLOCK_M=64 BLOCK_N=128 GROUP_HEADS=4 num_warps=8 num_stages=3
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel a084c6b6219c

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


@triton.jit(do_not_specialize=["batch_heads", "kv_heads", "seqlen_q", "seqlen_kv"])
def dkdv_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    rows_ptr,
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
    stride_rows,
    stride_rowsh,
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

    # -- which tile of which kv head: the keys that most rows see first
    pid = tl.program_id(0)
    tiles = tl.cdiv(seqlen_kv, BLOCK_N)
    first = pid // (tiles * GROUP_HEADS) * GROUP_HEADS
    together = tl.minimum(GROUP_HEADS, batch_heads - first)  # the last group may be smaller
    tile = (pid - first * tiles) // together
    bh = first + (pid - first * tiles) % together
    batch = (bh // kv_heads).to(tl.int64)
    kv_head = (bh % kv_heads).to(tl.int64)
    n0 = tile * BLOCK_N
    cols = n0 + tl.arange(0, BLOCK_N)
    in_kv = cols < seqlen_kv
    in_tile = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)

    # -- load this program's tile of k and v
    row_ids = cols[:, None].to(tl.int64)
    k_offsets = batch * stride_kb + kv_head * stride_kh + row_ids * stride_kn + dims[None, :]
    k = tl.load(k_ptr + k_offsets, mask=in_kv[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
    v_offsets = batch * stride_vb + kv_head * stride_vh + row_ids * stride_vn + dims[None, :]
    v = tl.load(v_ptr + v_offsets, mask=in_kv[:, None], other=0.0)
    q_ptr += batch * stride_qb
    r_ptr += batch * stride_rb
    do_ptr += batch * stride_dob
    q_offsets = in_tile[:, None] * stride_qm + dims[None, :]
    r_offsets = in_tile[:, None] * stride_rm + dims[None, :]
    do_offsets = in_tile[:, None] * stride_dom + dims[None, :]
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)

    # -- the rows that see these keys: row i sees keys up to i + shift. A block that begins before the first row that
    #    sees the last key needs a mask
    shift = seqlen_kv - seqlen_q
    start = tl.maximum(n0 - shift, 0) // BLOCK_M * BLOCK_M
    sees_last = n0 + BLOCK_N - 1 - shift
    stride_rows = tl.cast(stride_rows, tl.int64)  # from one of the four row_stats to the next
    q_head = q_ptr + kv_head * stride_qh
    r_head = r_ptr + kv_head * stride_rh
    do_head = do_ptr + kv_head * stride_doh
    stats = rows_ptr + bh.to(tl.int64) * stride_rowsh
    for i in tl.range(start, seqlen_q, BLOCK_M):
        rows = i + in_tile
        in_q = rows < seqlen_q
        q_block = q_head + tl.cast(i, tl.int64) * stride_qm
        r_block = r_head + tl.cast(i, tl.int64) * stride_rm
        do_block = do_head + tl.cast(i, tl.int64) * stride_dom
        q = tl.load(q_block + q_offsets, mask=in_q[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
        r = tl.load(r_block + r_offsets, mask=in_q[:, None], other=0.0)
        do = tl.load(do_block + do_offsets, mask=in_q[:, None], other=0.0)

        # -- p = softmax, with keys as rows, so that it enters the next matmuls from registers. Each of
        #    the row_stats is loaded where it is used: laid out along columns, all four would fill the registers
        lse = tl.load(stats + rows)  # times log2(e). It is inf past the last row, where p becomes 0
        s = tl.dot(k, tl.trans(q))  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(s * scale_log2 - lse[None, :])
        if i < sees_last:
            p = tl.where(cols[:, None] <= rows[None, :] + shift, p, 0.0)

        # -- dv sums p w with w = softmax_scale (1 + t_mean - t); the scale is divided out at the end
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
    dk_offsets = batch * stride_dkb + kv_head * stride_dkh + row_ids * stride_dkn + dims[None, :]
    tl.store(dk_ptr + dk_offsets, dk.to(dk_ptr.dtype.element_ty), mask=in_kv[:, None])
    dv_offsets = batch * stride_dvb + kv_head * stride_dvh + row_ids * stride_dvn + dims[None, :]
    tl.store(dv_ptr + dv_offsets, dv.to(dv_ptr.dtype.element_ty), mask=in_kv[:, None])


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    rows: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the gradients of k and v to dk and dv, on the current stream. do is the gradient of the output.

    q, r, do      (batch, seqlen_q, heads, 128) bf16, any strides with a contiguous last dimension
    k, v, dk, dv  (batch, seqlen_kv, heads, 128) bf16, likewise
    rows          (4, batch, heads, padded) fp32, contiguous: written by preprocess
    """
    batch, seqlen_q = q.shape[:2]
    _, seqlen_kv, kv_heads, _ = k.shape
    tiles = -(-seqlen_kv // 128)
    dkdv_kernel[(tiles * batch * kv_heads,)](
        q,
        r,
        k,
        v,
        do,
        rows,
        dk,
        dv,
        *q.stride()[:3],
        *r.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *do.stride()[:3],
        *dk.stride()[:3],
        *dv.stride()[:3],
        *rows.stride()[:3:2],
        softmax_scale,
        softmax_scale * LOG2_E,
        batch * kv_heads,
        kv_heads,
        seqlen_q,
        k.shape[1],
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
