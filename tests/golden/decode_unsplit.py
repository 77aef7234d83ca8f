"""Parallax attention, decode: one query per sequence against a KV cache.

spec       decode, head_dim 128, bf16, MHA
config     BLOCK_N=32 BLOCK_H=8 NUM_SPLITS=1 merge=none num_warps=2 num_stages=4
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 0f712be49797

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
STACK_ROWS = tl.constexpr(8)  # a stacked tile has 8 rows of q, the same 8 rows of r, the next 8 rows of q, ...
MIN_D1 = tl.constexpr(1e-30)  # stands in for d1 while it is 0, so that d2 / d1 is 0 and not NaN


@triton.jit
def _unstack(x):
    """The halves of a stacked tile [2*BLOCK_H, N]: q's rows and r's, [BLOCK_H, N] each."""
    BLOCK_H: tl.constexpr = x.shape[0] // 2
    N: tl.constexpr = x.shape[1]
    pairs = tl.permute(tl.reshape(x, [BLOCK_H // STACK_ROWS, 2, STACK_ROWS, N]), [0, 2, 3, 1])
    return tl.split(tl.reshape(pairs, [BLOCK_H, N, 2]))


@triton.jit
def _stack(of_q, of_r):
    """The stacked tile [2*BLOCK_H, N] whose halves are these [BLOCK_H, N]."""
    BLOCK_H: tl.constexpr = of_q.shape[0]
    N: tl.constexpr = of_q.shape[1]
    pairs = tl.reshape(tl.join(of_q, of_r), [BLOCK_H // STACK_ROWS, STACK_ROWS, N, 2])
    return tl.reshape(tl.permute(pairs, [0, 3, 1, 2]), [2 * BLOCK_H, N])


@triton.jit
def _repeat(x):
    """x [BLOCK_H, N] stacked with itself."""
    BLOCK_H: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    once = tl.reshape(x, [BLOCK_H // STACK_ROWS, 1, STACK_ROWS, N])
    return tl.reshape(tl.broadcast_to(once, [BLOCK_H // STACK_ROWS, 2, STACK_ROWS, N]), [2 * BLOCK_H, N])


@triton.jit
def _rescale(o, alpha, shift):
    """Lower the center by shift in o, the stacked o1 and o2, and multiply both by alpha."""
    o1, o2 = _unstack(o)
    o2 += shift[:, None] * o1
    return _stack(o1 * alpha[:, None], o2 * alpha[:, None])


@triton.jit
def _attend_block(qr, k, v, visible, scale_log2, m, d1, d2, t_mean, o):
    """Update the rows' state (m, d1, d2, t_mean, o) by a block of keys and values [BLOCK_N, HEAD_DIM]."""
    # -- scores
    st = tl.dot(qr, tl.trans(k))
    s, _ = _unstack(st)  # [BLOCK_H, BLOCK_N] each
    s = tl.where(visible[None, :], s, float("-inf"))

    # -- the online softmax
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s * scale_log2 - m_new[:, None])

    # -- the sums, and the new center of t. Multiplying q's rows by 1 and r's by t stacks p and p t in fewer
    #    instructions than a join
    p_twice = _repeat(p)
    is_query = (tl.arange(0, st.shape[0]) % (2 * STACK_ROWS) < STACK_ROWS)[:, None]
    sum_p, sum_pt = _unstack(tl.sum(p_twice * tl.where(is_query, 1.0, st), 1, keep_dims=True))  # [BLOCK_H, 1] each
    d1 = d1 * alpha + tl.reshape(sum_p, d1.shape)
    d2 = d2 * alpha + tl.reshape(sum_pt, d2.shape)
    t_mean_new = d2 / tl.maximum(d1, MIN_D1)
    p_pt = (p_twice * tl.where(is_query, 1.0, st - _repeat(t_mean_new[:, None]))).to(v.dtype)

    # -- the products with v
    o = tl.dot(p_pt, v, acc=_rescale(o, alpha, t_mean - t_mean_new))  # [2*BLOCK_H, HEAD_DIM]
    return m_new, d1, d2, t_mean_new, o


@triton.jit(do_not_specialize=["kv_heads", "seqlen_kv"])
def decode_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    stride_qb,
    stride_qh,
    stride_rb,
    stride_rh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_oh,
    scale_log2,
    kv_heads,
    seqlen_kv,
):
    HEAD_DIM: tl.constexpr = 128
    GROUP: tl.constexpr = 1  # query heads per kv head
    BLOCK_H: tl.constexpr = 8  # query heads per program
    BLOCK_N: tl.constexpr = 32  # keys per iteration
    LOWEST_M: tl.constexpr = -3.0e38  # finite: a row that has seen no key must not compute exp2(-inf + inf) = NaN

    # -- this program's sequence and kv head
    pid = tl.program_id(0)
    bh = pid
    batch = (bh // kv_heads).to(tl.int64)
    kv_head = (bh % kv_heads).to(tl.int64)

    # -- load one tile that stacks q and r: 8 rows of each in turn, so that rows i and i + 8 of 16 are in one thread
    offs_stack = tl.arange(0, 2 * BLOCK_H)
    offs_h_stack = offs_stack % STACK_ROWS
    is_query = offs_stack < STACK_ROWS
    mask_h_stack = offs_h_stack < GROUP
    offs_d = tl.arange(0, HEAD_DIM)
    q_ptrs = q_ptr + batch * stride_qb + (kv_head * GROUP + offs_h_stack)[:, None] * stride_qh + offs_d[None, :]
    r_ptrs = r_ptr + batch * stride_rb + (kv_head * GROUP + offs_h_stack)[:, None] * stride_rh + offs_d[None, :]
    q = tl.load(q_ptrs, mask=(mask_h_stack & is_query)[:, None], other=0.0)
    r = tl.load(r_ptrs, mask=(mask_h_stack & ~is_query)[:, None], other=0.0)
    qr = q + r  # [2*BLOCK_H, HEAD_DIM]: in every row one of the two is 0

    # -- the softmax state, and the addresses of this sequence's keys
    range_n = tl.arange(0, BLOCK_N)
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    clamped_n = tl.minimum(range_n, seqlen_kv - 1)[:, None]  # a sequence shorter than a block repeats its last key
    k_offsets = clamped_n * stride_kn + offs_d[None, :]
    v_offsets = clamped_n * stride_vn + offs_d[None, :]
    stride_kn64 = tl.cast(stride_kn, tl.int64)  # offsets within a block fit 32 bits, those of a cache may not
    stride_vn64 = tl.cast(stride_vn, tl.int64)
    m = tl.full([BLOCK_H], LOWEST_M, tl.float32)
    d1 = tl.zeros([BLOCK_H], tl.float32)
    d2 = tl.zeros([BLOCK_H], tl.float32)
    t_mean = tl.zeros([BLOCK_H], tl.float32)
    o = tl.zeros([2 * BLOCK_H, HEAD_DIM], tl.float32)

    # -- loop over the keys. A block that would reach past the end is moved back, and the keys that it repeats are
    #    masked, so that loads need no mask and nothing past the end is read
    last_block_start = tl.maximum(seqlen_kv - BLOCK_N, 0)
    for start_n in tl.range(0, seqlen_kv, BLOCK_N):
        block_start = tl.minimum(start_n, last_block_start)
        k = tl.load(k_ptr + block_start * stride_kn64 + k_offsets)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_ptr + block_start * stride_vn64 + v_offsets)
        offs_n = block_start + range_n
        visible = (offs_n >= start_n) & (offs_n < seqlen_kv)
        m, d1, d2, t_mean, o = _attend_block(qr, k, v, visible, scale_log2, m, d1, d2, t_mean, o)

    # -- o1 and o2, from the stacked accumulator
    o1, o2 = _unstack(o)
    o2 += t_mean[:, None] * o1  # from p (t - t_mean) v to p t v
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < GROUP

    # -- o = o1/d1 (1 + d2/d1) - o2/d1
    inv_d1 = 1.0 / d1
    out = o1 * (inv_d1 * (1.0 + d2 * inv_d1))[:, None] - o2 * inv_d1[:, None]
    o_ptrs = o_ptr + batch * stride_ob + (kv_head * GROUP + offs_h)[:, None] * stride_oh + offs_d[None, :]
    tl.store(o_ptrs, out.to(o_ptr.dtype.element_ty), mask=mask_h[:, None])


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the attention of one query per sequence over its cached keys to out, on the current stream.

    q, r, out         (batch, 1, heads, 128) bf16, any strides with a contiguous last dimension
    k_cache, v_cache  (batch, seqlen, heads, 128) bf16, likewise
    """
    batch, kv_heads = k_cache.shape[0], k_cache.shape[2]
    stride_qb, _, stride_qh, _ = q.stride()
    stride_rb, _, stride_rh, _ = r.stride()
    stride_ob, _, stride_oh, _ = out.stride()
    decode_kernel[(batch * kv_heads,)](
        q,
        r,
        k_cache,
        v_cache,
        out,
        stride_qb,
        stride_qh,
        stride_rb,
        stride_rh,
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        stride_ob,
        stride_oh,
        softmax_scale * LOG2_E,
        kv_heads,
        k_cache.shape[1],
        num_warps=2,
        num_stages=4,
        enable_fp_fusion=True,
    )
