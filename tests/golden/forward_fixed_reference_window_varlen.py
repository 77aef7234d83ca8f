"""Parallax attention, forward.

spec       forward, head_dim 128, bf16, GQA 2:1, window, varlen
config     BLOCK_M=128 BLOCK_N=64 GROUP_HEADS=1 num_warps=8 num_stages=3 SOFTMAX=fixed_reference
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 85ec98cb69da

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij.
The running state of a row is (d1, d2, o1, o2): the sums of 2^(scale_log2 s - m) times 1, t, v and t v, with
s = q.k and scale_log2 = log2(e) softmax_scale, and with m = scale_log2 s of the row's last key.
In tiles whose first row sees few keys, m is at least the largest scale_log2 s of the first block of keys.
Where the sums overflow, since other keys' s are far larger, a second kernel redoes the tile with m the running maximum.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def _fill_padding(
    o_ptr,
    stride_om,
    stride_oh,
    heads,
    used_begin,
    used_end,
    total,
):
    """Write 0 to the rows that belong to no sequence: [0, used_begin) and [used_end, total).

    The programs of the launch share these rows.
    """
    HEAD_DIM: tl.constexpr = 128
    BLOCK_HEADS: tl.constexpr = 16  # heads per iteration
    offs_d = tl.arange(0, HEAD_DIM)
    for i in tl.range(tl.program_id(0), total - used_end + used_begin, tl.num_programs(0)):
        row = (used_end + i).to(tl.int64)
        row = tl.where(row < total, row, row - total)  # after the last row, continue at row 0
        for first_head in tl.range(0, heads, BLOCK_HEADS):
            offs_h = (first_head + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
            mask_h = offs_h < heads
            o_offsets = row * stride_om + (offs_h * stride_oh)[:, None] + offs_d[None, :]
            tl.store(o_ptr + o_offsets, 0.0, mask=mask_h[:, None])


@triton.jit(do_not_specialize=["heads", "window_size", "max_seqlen"])
def forward_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
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
    stride_om,
    stride_oh,
    scale_log2,
    heads,
    window_size,
    max_seqlen,
):
    HEAD_DIM: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 128  # query rows per program
    BLOCK_N: tl.constexpr = 64  # keys per iteration
    GROUP: tl.constexpr = 2  # query heads per kv head

    # -- this program's tile of query rows. Tiles that see the most keys are launched first
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(max_seqlen, BLOCK_M)
    tile = pid % num_tiles
    bh = pid // num_tiles
    tile = num_tiles - 1 - tile
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    start_m = tile * BLOCK_M
    seq_start_q = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
    seqlen_q = (tl.load(cu_seqlens_q_ptr + batch + 1) - seq_start_q).to(tl.int32)
    seq_start_k = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
    seqlen_kv = (tl.load(cu_seqlens_k_ptr + batch + 1) - seq_start_k).to(tl.int32)
    if start_m >= seqlen_q:  # the launch has tiles for the longest sequence
        return

    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < seqlen_q
    range_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)

    # -- load q and r
    rows64 = (seq_start_q + offs_m)[:, None].to(tl.int64)
    q_offsets = head * stride_qh + rows64 * stride_qm + offs_d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
    r_offsets = head * stride_rh + rows64 * stride_rm + offs_d[None, :]
    r = tl.load(r_ptr + r_offsets, mask=mask_m[:, None], other=0.0)
    k_ptr += seq_start_k * stride_kn + head // GROUP * stride_kh
    v_ptr += seq_start_k * stride_vn + head // GROUP * stride_vh
    k_offsets = range_n[:, None] * stride_kn + offs_d[None, :]
    v_offsets = range_n[:, None] * stride_vn + offs_d[None, :]

    # -- the keys that these rows see: row i sees the window_size keys up to i + causal_offset. Blocks outside
    #    [unmasked_begin, unmasked_end) need a mask
    causal_offset = seqlen_kv - seqlen_q
    last_key = offs_m + causal_offset
    unmasked_end = start_m + causal_offset + 1
    unmasked_begin = start_m + BLOCK_M + causal_offset - window_size
    key_begin = tl.maximum(start_m + causal_offset - window_size + 1, 0) // BLOCK_N * BLOCK_N
    key_end = tl.minimum(start_m + BLOCK_M + causal_offset, seqlen_kv)

    # -- the first key, k0, is added in fp32, outside the matmuls. Where it has nearly all the weight, its t is
    #    close to t_mean and o depends on their small difference: rounding its p t for a matmul would dominate the
    #    error
    key_begin64 = key_begin.to(tl.int64)
    end_d = tl.minimum(seqlen_kv, 1) * HEAD_DIM  # 0 for a sequence without keys
    k0 = tl.load(k_ptr + key_begin64 * stride_kn + offs_d, mask=offs_d < end_d, other=0.0).to(tl.float32)
    v0 = tl.load(v_ptr + key_begin64 * stride_vn + offs_d, mask=offs_d < end_d, other=0.0).to(tl.float32)
    s0 = tl.sum(q * k0[None, :], 1)
    t0 = tl.sum(r * k0[None, :], 1)

    # -- m, the fixed reference in the exponent: the score of each row's last visible key. In a tile whose first
    #    row sees at most BLOCK_N keys, m is at least the largest score of the first BLOCK_N keys: where that key has
    #    nearly all the weight, its weight is 1, which is not rounded
    last_key64 = tl.maximum(last_key, 0)[:, None].to(tl.int64)
    k_last = tl.load(
        k_ptr + last_key64 * stride_kn + offs_d[None, :],
        mask=((last_key >= 0) & mask_m)[:, None],
        other=0.0,
    )
    s_last = tl.sum(q.to(tl.float32) * k_last, 1)
    m = s_last * scale_log2
    if start_m + causal_offset < BLOCK_N:
        mask_n = range_n < seqlen_kv
        k = tl.load(k_ptr + k_offsets, mask=mask_n[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        visible = (range_n[None, :] <= last_key[:, None]) & (range_n[None, :] > last_key[:, None] - window_size)
        s = tl.where(visible, s, float("-inf"))
        m = tl.maximum(m, tl.max(s, 1) * scale_log2)
    sees_k0 = (key_begin <= last_key) & (key_begin > last_key - window_size)
    p0 = tl.where(sees_k0, tl.exp2(s0 * scale_log2 - m), 0.0)
    d1 = p0
    d2 = p0 * t0
    o1 = p0[:, None] * v0[None, :]
    o2 = t0[:, None] * o1

    # -- the other keys, block by block; the last block may reach past the end
    for start_n in tl.range(key_begin + 1, key_end, BLOCK_N):
        offs_n = start_n + range_n
        mask_n = offs_n < seqlen_kv
        k_block = k_ptr + tl.cast(start_n, tl.int64) * stride_kn
        v_block = v_ptr + tl.cast(start_n, tl.int64) * stride_vn
        k = tl.load(k_block + k_offsets, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_block + v_offsets, mask=mask_n[:, None], other=0.0)

        # -- scores, and the softmax with a fixed reference
        s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        if (start_n + BLOCK_N > unmasked_end) | (start_n < unmasked_begin):
            visible = (offs_n[None, :] <= last_key[:, None]) & (offs_n[None, :] > last_key[:, None] - window_size)
            s = tl.where(visible, s, float("-inf"))
        t = tl.dot(r, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale_log2 - m[:, None])
        pt = p * t
        d1 += tl.sum(p, 1)
        d2 += tl.sum(pt, 1)
        p = p.to(v.dtype)
        pt = pt.to(v.dtype)
        o1 = tl.dot(p, v, acc=o1)
        o2 = tl.dot(pt, v, acc=o2)

    # -- o = o1/d1 (1 + d2/d1) - o2/d1, where o1/d1 is v_mean and d2/d1 is t_mean; 0 for a row that saw no key
    inv_d1 = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
    MAX_SUM: tl.constexpr = 1.8446744e19  # 2^64: above it p t or the sums of p t v may have overflowed fp32
    inv_d1 = tl.where(tl.max(d1) > MAX_SUM, float("nan"), inv_d1)  # fixup_kernel recomputes such tiles
    t_mean = d2 * inv_d1
    o = o1 * (inv_d1 * (1.0 + t_mean))[:, None] - o2 * inv_d1[:, None]

    # -- store o
    o_offsets = head * stride_oh + rows64 * stride_om + offs_d[None, :]
    tl.store(o_ptr + o_offsets, o.to(o_ptr.dtype.element_ty), mask=mask_m[:, None])


@triton.jit(do_not_specialize=["batch_heads", "heads", "window_size", "num_seqs", "total_q"])
def fixup_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
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
    stride_om,
    stride_oh,
    scale_log2,
    batch_heads,
    heads,
    window_size,
    num_seqs,
    total_q,
):
    HEAD_DIM: tl.constexpr = 128
    BLOCK_M: tl.constexpr = 128  # query rows per program
    BLOCK_N: tl.constexpr = 64  # keys per iteration
    GROUP: tl.constexpr = 2  # query heads per kv head
    BLOCK_HEADS: tl.constexpr = 16  # heads per program; a program checks one tile of each
    used_begin = tl.load(cu_seqlens_q_ptr)
    used_end = tl.load(cu_seqlens_q_ptr + num_seqs)

    # -- rows that belong to no sequence
    if used_end - used_begin < total_q:
        _fill_padding(
            o_ptr,
            stride_om,
            stride_oh,
            heads,
            used_begin,
            used_end,
            total_q,
        )

    # -- which of these tiles overflowed: those whose first element is not finite, since forward_kernel writes NaN
    head_blocks = tl.cdiv(batch_heads, BLOCK_HEADS)
    tile = tl.program_id(0) // head_blocks
    first_bh = tl.program_id(0) % head_blocks * BLOCK_HEADS
    range_h = tl.arange(0, BLOCK_HEADS)
    mask_h = first_bh + range_h < batch_heads
    batch_ids = ((first_bh + range_h) // heads).to(tl.int64)
    head_ids = ((first_bh + range_h) % heads).to(tl.int64)
    first_rows = tl.load(cu_seqlens_q_ptr + batch_ids, mask=mask_h, other=0).to(tl.int64) + tile * BLOCK_M
    mask_h &= first_rows < tl.load(cu_seqlens_q_ptr + batch_ids + 1, mask=mask_h, other=0)
    first_offsets = head_ids * stride_oh + first_rows * stride_om
    first_elements = tl.load(o_ptr + first_offsets, mask=mask_h, other=0.0).to(tl.float32)
    overflowed = tl.where(tl.abs(first_elements) < float("inf"), 0, 1)

    # -- recompute each of those with a running maximum
    while tl.max(overflowed) > 0:
        i = tl.argmax(overflowed, 0)
        overflowed = tl.where(range_h == i, 0, overflowed)
        bh = first_bh + i
        batch = (bh // heads).to(tl.int64)
        head = (bh % heads).to(tl.int64)
        start_m = tile * BLOCK_M
        seq_start_q = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
        seqlen_q = (tl.load(cu_seqlens_q_ptr + batch + 1) - seq_start_q).to(tl.int32)
        seq_start_k = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
        seqlen_kv = (tl.load(cu_seqlens_k_ptr + batch + 1) - seq_start_k).to(tl.int32)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < seqlen_q
        range_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, HEAD_DIM)

        # -- load q and r
        rows64 = (seq_start_q + offs_m)[:, None].to(tl.int64)
        q_offsets = head * stride_qh + rows64 * stride_qm + offs_d[None, :]
        q = tl.load(q_ptr + q_offsets, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
        r_offsets = head * stride_rh + rows64 * stride_rm + offs_d[None, :]
        r = tl.load(r_ptr + r_offsets, mask=mask_m[:, None], other=0.0)
        k_head = k_ptr + seq_start_k * stride_kn + head // GROUP * stride_kh
        v_head = v_ptr + seq_start_k * stride_vn + head // GROUP * stride_vh
        k_offsets = range_n[:, None] * stride_kn + offs_d[None, :]
        v_offsets = range_n[:, None] * stride_vn + offs_d[None, :]

        # -- the keys that these rows see: row i sees the window_size keys up to i + causal_offset. Blocks outside
        #    [unmasked_begin, unmasked_end) need a mask
        causal_offset = seqlen_kv - seqlen_q
        last_key = offs_m + causal_offset
        unmasked_end = start_m + causal_offset + 1
        unmasked_begin = start_m + BLOCK_M + causal_offset - window_size
        key_begin = tl.maximum(start_m + causal_offset - window_size + 1, 0) // BLOCK_N * BLOCK_N
        key_end = tl.minimum(start_m + BLOCK_M + causal_offset, seqlen_kv)

        # -- the first key, k0, is added in fp32, outside the matmuls. Where it has nearly all the weight, its t is
        #    close to t_mean and o depends on their small difference: rounding its p t for a matmul would dominate the
        #    error
        key_begin64 = key_begin.to(tl.int64)
        end_d = tl.minimum(seqlen_kv, 1) * HEAD_DIM  # 0 for a sequence without keys
        k0 = tl.load(k_head + key_begin64 * stride_kn + offs_d, mask=offs_d < end_d, other=0.0).to(tl.float32)
        v0 = tl.load(v_head + key_begin64 * stride_vn + offs_d, mask=offs_d < end_d, other=0.0).to(tl.float32)
        s0 = tl.sum(q * k0[None, :], 1)
        t0 = tl.sum(r * k0[None, :], 1)
        sees_k0 = (key_begin <= last_key) & (key_begin > last_key - window_size)
        m = tl.where(sees_k0, s0 * scale_log2, -3.0e38)  # finite: a row that sees no key must not give NaN
        d1 = tl.where(sees_k0, 1.0, 0.0)
        d2 = tl.where(sees_k0, t0, 0.0)
        o1 = tl.where(sees_k0[:, None], v0[None, :], 0.0)
        o2 = d2[:, None] * o1

        # -- the other keys, block by block; the last block may reach past the end
        for start_n in tl.range(key_begin + 1, key_end, BLOCK_N):
            offs_n = start_n + range_n
            mask_n = offs_n < seqlen_kv
            k_block = k_head + tl.cast(start_n, tl.int64) * stride_kn
            v_block = v_head + tl.cast(start_n, tl.int64) * stride_vn
            k = tl.load(k_block + k_offsets, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
            v = tl.load(v_block + v_offsets, mask=mask_n[:, None], other=0.0)

            # -- scores, and the online softmax
            s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
            if (start_n + BLOCK_N > unmasked_end) | (start_n < unmasked_begin):
                visible = (offs_n[None, :] <= last_key[:, None]) & (offs_n[None, :] > last_key[:, None] - window_size)
                s = tl.where(visible, s, float("-inf"))
            t = tl.dot(r, tl.trans(k))  # [BLOCK_M, BLOCK_N]
            m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
            alpha = tl.exp2(m - m_new)
            p = tl.exp2(s * scale_log2 - m_new[:, None])
            pt = p * t
            d1 = d1 * alpha + tl.sum(p, 1)
            d2 = d2 * alpha + tl.sum(pt, 1)
            p = p.to(v.dtype)
            pt = pt.to(v.dtype)
            o1 = tl.dot(p, v, acc=o1 * alpha[:, None])
            o2 = tl.dot(pt, v, acc=o2 * alpha[:, None])
            m = m_new

        # -- o = o1/d1 (1 + d2/d1) - o2/d1, where o1/d1 is v_mean and d2/d1 is t_mean; 0 for a row that saw no key
        inv_d1 = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
        t_mean = d2 * inv_d1
        o = o1 * (inv_d1 * (1.0 + t_mean))[:, None] - o2 * inv_d1[:, None]

        # -- store o
        o_offsets = head * stride_oh + rows64 * stride_om + offs_d[None, :]
        tl.store(o_ptr + o_offsets, o.to(o_ptr.dtype.element_ty), mask=mask_m[:, None])


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    window_size: int,
    max_seqlen_q: int,
) -> None:
    """Write the attention of q and r over k and v to out, on the current stream.

    q, r, out    (total_q, kv_heads*2, 128) bf16, any strides with a contiguous last dimension
    k, v         (total_k, kv_heads, 128) bf16, likewise
    cu_seqlens_q (batch + 1,) int32: the first row of each sequence in q, and the end of the last one
    cu_seqlens_k the same for k
                 In rows that belong to no sequence out is 0
    max_seqlen_q at least the most queries of a sequence
    window_size  a query sees its last window_size keys; 1 or more
    """
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    num_tiles = -(-max_seqlen_q // 128)
    arguments = (
        q,
        r,
        k,
        v,
        out,
        cu_seqlens_q,
        cu_seqlens_k,
        *q.stride()[:2],
        *r.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        softmax_scale * LOG2_E,
    )
    forward_kernel[(num_tiles * batch * heads,)](
        *arguments,
        heads,
        window_size,
        max_seqlen_q,
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
    # one program for a tile of each of 16 heads (BLOCK_HEADS)
    fixup_kernel[(num_tiles * -(-batch * heads // 16),)](
        *arguments,
        batch * heads,
        heads,
        window_size,
        batch,
        q.shape[0],
        num_warps=8,
        num_stages=1,
        enable_fp_fusion=True,
    )
