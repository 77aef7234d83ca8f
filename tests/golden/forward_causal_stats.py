"""Parallax attention, forward.

spec       forward, head_dim 128, bf16, MHA, causal, stats
config     BLOCK_M=128 BLOCK_N=64 GROUP_HEADS=1 num_warps=8 num_stages=3
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 44998aa5341a

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij.
The running state of a row is (m, d1, d2, t_mean, o1, o2): the maximum m of scale_log2 s, the sums d1 of p and d2 of
p t, the center t_mean = d2 / d1, and the sums o1 of p v and o2 of p (t - t_mean) v, where p = 2^(scale_log2 s - m) is
not normalised, s = q.k and scale_log2 = log2(e) softmax_scale.
Where few keys have most of a row's weight, o is a small difference of large sums of p v and p t v, and rounding p t for
the matmul would spoil it; p (t - t_mean) is small there.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["heads", "seqlen_q", "seqlen_kv"])
def forward_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    t_mean_ptr,
    v_mean_ptr,
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
    stride_ob,
    stride_om,
    stride_oh,
    scale_log2,
    heads,
    seqlen_q,
    seqlen_kv,
):
    HEAD_DIM: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 128  # query rows per program
    BLOCK_N: tl.constexpr = 64  # keys per iteration
    MIN_D1: tl.constexpr = 1e-30  # stands in for d1 while it is 0, so that d2 / d1 is 0 and not NaN
    LN_2: tl.constexpr = 0.6931471805599453
    LOWEST_M: tl.constexpr = -3.0e38  # finite: a row that has seen no key must not compute exp2(-inf + inf) = NaN

    # -- this program's tile of query rows. Tiles that see the most keys are launched first
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(seqlen_q, BLOCK_M)
    tile = num_tiles - 1 - pid % num_tiles
    bh = pid // num_tiles
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    start_m = tile * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < seqlen_q
    range_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)

    # -- load q and r
    rows64 = offs_m[:, None].to(tl.int64)
    q_offsets = batch * stride_qb + head * stride_qh + rows64 * stride_qm + offs_d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
    r_offsets = batch * stride_rb + head * stride_rh + rows64 * stride_rm + offs_d[None, :]
    r = tl.load(r_ptr + r_offsets, mask=mask_m[:, None], other=0.0)
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    k_offsets = range_n[:, None] * stride_kn + offs_d[None, :]
    v_offsets = range_n[:, None] * stride_vn + offs_d[None, :]

    # -- the keys that these rows see: row i sees keys up to i + causal_offset. Blocks that reach past unmasked_end
    #    need a mask
    causal_offset = seqlen_kv - seqlen_q
    last_key = offs_m + causal_offset
    unmasked_end = start_m + causal_offset + 1
    key_end = tl.minimum(start_m + BLOCK_M + causal_offset, seqlen_kv)

    # -- the running maximum and the sums before any key
    m = tl.full([BLOCK_M], LOWEST_M, tl.float32)
    d1 = tl.zeros([BLOCK_M], tl.float32)
    d2 = tl.zeros([BLOCK_M], tl.float32)
    t_mean = tl.zeros([BLOCK_M], tl.float32)
    o1 = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    o2 = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    # -- loop over blocks of keys; the last block may reach past the end
    for start_n in tl.range(0, key_end, BLOCK_N):
        offs_n = start_n + range_n
        mask_n = offs_n < seqlen_kv
        start_n64 = tl.cast(start_n, tl.int64)
        k_block = k_ptr + start_n64 * stride_kn
        v_block = v_ptr + start_n64 * stride_vn
        k = tl.load(k_block + k_offsets, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_block + v_offsets, mask=mask_n[:, None], other=0.0)

        # -- scores, and the online softmax
        s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        if start_n + BLOCK_N > unmasked_end:
            s = tl.where(offs_n[None, :] <= last_key[:, None], s, float("-inf"))
        t = tl.dot(r, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale_log2 - m_new[:, None])

        # -- the sums of p and p t, and the new center of t: their quotient
        pt = p * t
        d1 = d1 * alpha + tl.sum(p, 1)
        d2 = d2 * alpha + tl.sum(pt, 1)
        inv_sqrt_d1 = tl.rsqrt(tl.maximum(d1, MIN_D1))  # its square replaces a division of ten instructions
        t_mean_new = d2 * inv_sqrt_d1 * inv_sqrt_d1
        shift = t_mean - t_mean_new
        p_operand = p.to(v.dtype)
        pt_operand = (pt - p * t_mean_new[:, None]).to(v.dtype)

        # -- the products with v. Lowering the center by shift adds shift * o1 to o2
        o1 *= alpha[:, None]
        o2 = o2 * alpha[:, None] + shift[:, None] * o1
        o1 = tl.dot(p_operand, v, acc=o1)
        o2 = tl.dot(pt_operand, v, acc=o2)
        t_mean = t_mean_new
        m = m_new

    # -- o = (o1 - o2) / d1, where o1/d1 is v_mean; 0 for a row that saw no key
    inv_d1 = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
    v_mean = o1 * inv_d1[:, None]
    o = (o1 - o2) * inv_d1[:, None]

    # -- store o, and the statistics for the backward
    o_offsets = batch * stride_ob + head * stride_oh + rows64 * stride_om + offs_d[None, :]
    tl.store(o_ptr + o_offsets, o.to(o_ptr.dtype.element_ty), mask=mask_m[:, None])
    tl.store(v_mean_ptr + o_offsets, v_mean.to(v_mean_ptr.dtype.element_ty), mask=mask_m[:, None])
    stat_offsets = bh.to(tl.int64) * seqlen_q + offs_m
    tl.store(lse_ptr + stat_offsets, (m + tl.log2(d1)) * LN_2, mask=mask_m)
    tl.store(t_mean_ptr + stat_offsets, t_mean, mask=mask_m)


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    t_mean: torch.Tensor,
    v_mean: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the attention of q and r over k and v to out, on the current stream.

    q, r, out    (batch, seqlen_q, heads, 128) bf16, any strides with a contiguous last dimension
    k, v         (batch, seqlen_kv, heads, 128) bf16, likewise
    lse, t_mean  (batch, heads, seqlen_q) fp32, contiguous: log(sum_j exp(softmax_scale q.k_j)) and t_mean
    v_mean       like out, with its strides: plain softmax attention
    """
    batch, seqlen_q, heads, _ = q.shape
    num_tiles = triton.cdiv(seqlen_q, 128)
    forward_kernel[(num_tiles * batch * heads,)](
        q,
        r,
        k,
        v,
        out,
        lse,
        t_mean,
        v_mean,
        *q.stride()[:3],
        *r.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        softmax_scale * LOG2_E,
        heads,
        seqlen_q,
        k.shape[1],
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
