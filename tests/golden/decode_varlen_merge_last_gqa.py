"""Parallax attention, decode_varlen: queries against a KV cache, with per-sequence lengths.

spec       decode, head_dim 128, bf16, GQA 12:1, per-sequence lengths
config     BLOCK_N=32 BLOCK_H=8 NUM_SPLITS=6 merge=last num_warps=2 num_stages=4
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel a8eab1f52f1e

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
NUM_SPLITS = 6  # splits per sequence, on average
SPARE_SPLIT_EVERY = 8  # one spare split per 8 sequences, for the long ones


@triton.jit
def _load_lengths(
    seq,
    mask,
    cache_seqlens_ptr,
    max_seqlen_kv,
    BLOCK_N: tl.constexpr,
):
    """Return, for each sequence: seqlen_kv, seqlen_q, and the number of blocks of visible keys."""
    cache_seqlen = tl.load(cache_seqlens_ptr + seq, mask=mask, other=0)
    seqlen_kv = tl.maximum(tl.minimum(cache_seqlen, max_seqlen_kv), 0)  # clamped to the cache
    seqlen_q = tl.where(mask, 1, 0)
    return seqlen_kv, seqlen_q, tl.cdiv(seqlen_kv, BLOCK_N)


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


@triton.jit
def _normalize(d1, d2, o1, o2):
    """o = o1/d1 (1 + d2/d1) - o2/d1, and 0 for a row without keys."""
    inv_d1 = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
    return o1 * (inv_d1 * (1.0 + d2 * inv_d1)) - o2 * inv_d1


@triton.jit
def _merge(states_ptr, stride, num_splits, row):
    """Merge the states of a row's splits, `stride` floats apart: rescale each to the largest m, and add."""
    HEAD_DIM: tl.constexpr = 128
    STATE_ROWS: tl.constexpr = 8
    BLOCK_SPLITS: tl.constexpr = 32  # splits per iteration: as many as fit in registers
    LOWEST_M: tl.constexpr = -3.0e38  # finite: a row that has seen no key must not compute exp2(-inf + inf) = NaN

    offs_d = tl.arange(0, HEAD_DIM)
    m = LOWEST_M
    d1 = 0.0
    d2 = 0.0
    o1 = tl.zeros([HEAD_DIM], tl.float32)
    o2 = tl.zeros([HEAD_DIM], tl.float32)
    for first_split in range(0, num_splits, BLOCK_SPLITS):
        # -- load the states by .cg: from L2, where other programs' stores are visible
        offs_s = first_split + tl.arange(0, BLOCK_SPLITS)
        mask_s = offs_s < num_splits  # lanes past the last split get the lowest m, hence weight 0
        state_ptrs = states_ptr + offs_s.to(tl.int64) * stride
        stat_ptrs = state_ptrs + STATE_ROWS * 2 * HEAD_DIM + row
        m_splits = tl.load(stat_ptrs, mask=mask_s, other=LOWEST_M, cache_modifier=".cg")
        d1_splits = tl.load(stat_ptrs + STATE_ROWS, mask=mask_s, other=0.0, cache_modifier=".cg")
        d2_splits = tl.load(stat_ptrs + 2 * STATE_ROWS, mask=mask_s, other=0.0, cache_modifier=".cg")
        o_ptrs = state_ptrs[:, None] + row * (2 * HEAD_DIM) + offs_d[None, :]
        mask_sd = mask_s[:, None]
        o1_splits = tl.load(o_ptrs, mask=mask_sd, other=0.0, cache_modifier=".cg")  # [BLOCK_SPLITS, HEAD_DIM]
        o2_splits = tl.load(o_ptrs + HEAD_DIM, mask=mask_sd, other=0.0, cache_modifier=".cg")

        # -- rescale and add
        m_new = tl.maximum(m, tl.max(m_splits, 0))
        alpha = tl.exp2(m - m_new)
        weight = tl.exp2(m_splits - m_new)
        d1 = d1 * alpha + tl.sum(weight * d1_splits, 0)
        d2 = d2 * alpha + tl.sum(weight * d2_splits, 0)
        o1 = o1 * alpha + tl.sum(weight[:, None] * o1_splits, 0)
        o2 = o2 * alpha + tl.sum(weight[:, None] * o2_splits, 0)
        m = m_new
    return d1, d2, o1, o2


@triton.jit(do_not_specialize=["kv_heads", "batch", "max_seqlen_kv"])
def decode_varlen_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    cache_seqlens_ptr,
    scratch_ptr,
    arrival_counters_ptr,
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
    batch,
    kv_heads,
    max_seqlen_kv,
):
    HEAD_DIM: tl.constexpr = 128
    GROUP: tl.constexpr = 12  # query heads per kv head
    BLOCK_H: tl.constexpr = 8  # query heads per program
    BLOCK_N: tl.constexpr = 32  # keys per iteration
    NUM_SPLITS: tl.constexpr = 6
    SPARE_SPLIT_EVERY: tl.constexpr = 8
    STATE_ROWS: tl.constexpr = 8  # rows of a split's state
    SPLIT_FLOATS: tl.constexpr = STATE_ROWS * (2 * HEAD_DIM + 4)  # + 4: m, d1, d2 and one unused, for 16-byte alignment
    LOWEST_M: tl.constexpr = -3.0e38  # finite: a row that has seen no key must not compute exp2(-inf + inf) = NaN
    BLOCK_SEQS: tl.constexpr = 32  # sequences per step of a scan, one per lane: a sum needs no shared memory
    MIN_BLOCKS_PER_SPLIT: tl.constexpr = 2  # fewer are not worth a program
    TILES_PER_GROUP: tl.constexpr = 2  # tiles per group of query heads

    # -- blocks per split, equal for all sequences: long sequences get many splits, short ones one. Rounding up adds at
    #    most one split per sequence; the grid has room for these
    lane_blocks = tl.zeros([BLOCK_SEQS], tl.int32)
    for first_seq in range(0, batch, BLOCK_SEQS):
        seqs = first_seq + tl.arange(0, BLOCK_SEQS)
        _, _, seq_blocks = _load_lengths(
            seqs,
            seqs < batch,
            cache_seqlens_ptr,
            max_seqlen_kv,
            BLOCK_N,
        )
        lane_blocks += seq_blocks
    extra_splits = batch * (NUM_SPLITS - 1) + tl.cdiv(batch, SPARE_SPLIT_EVERY)
    blocks_per_split = tl.maximum(tl.cdiv(tl.sum(lane_blocks, 0), extra_splits), MIN_BLOCKS_PER_SPLIT)

    # -- the sequence of this program's work item: each sequence has seq_tiles * tile_splits work items, in order
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    work_item = tl.program_id(0) // kv_heads
    seq = 0
    first_work_item = 0
    num_work_items = 0
    for first_seq in range(0, batch, BLOCK_SEQS):
        seqs = first_seq + tl.arange(0, BLOCK_SEQS)
        _, seqlens_q, seq_blocks = _load_lengths(
            seqs,
            seqs < batch,
            cache_seqlens_ptr,
            max_seqlen_kv,
            BLOCK_N,
        )
        seq_tiles = seqlens_q * TILES_PER_GROUP
        work_items = seq_tiles * tl.maximum(tl.cdiv(seq_blocks, blocks_per_split), 1)
        ends = num_work_items + tl.cumsum(work_items, 0)
        is_before = (ends <= work_item) & (seqs < batch)
        seq += tl.sum(is_before.to(tl.int32), 0)
        first_work_item = tl.maximum(first_work_item, tl.max(tl.where(is_before, ends, 0), 0))
        num_work_items += tl.sum(work_items, 0)
    if work_item >= num_work_items:  # the grid is an upper bound
        return

    # -- the work item's tile of rows, and its split of the tile's keys
    seqlen_kv, _, num_blocks = _load_lengths(
        seq,
        True,
        cache_seqlens_ptr,
        max_seqlen_kv,
        BLOCK_N,
    )
    tile_splits = tl.maximum(tl.cdiv(num_blocks, blocks_per_split), 1)
    tile = (work_item - first_work_item) // tile_splits
    split = (work_item - first_work_item) % tile_splits
    start_h = tile * BLOCK_H
    keys_per_split = tl.cdiv(num_blocks, tile_splits) * BLOCK_N
    key_begin = split * keys_per_split
    key_end = tl.minimum(key_begin + keys_per_split, seqlen_kv)

    # -- load one tile that stacks q and r: 8 rows of each in turn, so that rows i and i + 8 of 16 are in one thread
    offs_stack = tl.arange(0, 2 * BLOCK_H)
    offs_h_stack = start_h + offs_stack % STACK_ROWS
    is_query = offs_stack < STACK_ROWS
    mask_h_stack = offs_h_stack < GROUP
    offs_d = tl.arange(0, HEAD_DIM)
    seq64 = seq.to(tl.int64)
    q_row_ptrs = q_ptr + seq64 * stride_qb + (kv_head * GROUP + offs_h_stack) * stride_qh
    r_row_ptrs = r_ptr + seq64 * stride_rb + (kv_head * GROUP + offs_h_stack) * stride_rh
    q_ptrs = q_row_ptrs[:, None] + offs_d[None, :]
    r_ptrs = r_row_ptrs[:, None] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=(mask_h_stack & is_query)[:, None], other=0.0)
    r = tl.load(r_ptrs, mask=(mask_h_stack & ~is_query)[:, None], other=0.0)
    qr = q + r  # [2*BLOCK_H, HEAD_DIM]: in every row one of the two is 0

    # -- the softmax state: a row for each query head
    offs_h = start_h + tl.arange(0, BLOCK_H)
    mask_h = offs_h < GROUP
    range_n = tl.arange(0, BLOCK_N)
    stride_kn64 = tl.cast(stride_kn, tl.int64)  # offsets within a block fit 32 bits, those of a cache may not
    stride_vn64 = tl.cast(stride_vn, tl.int64)
    m = tl.full([BLOCK_H], LOWEST_M, tl.float32)
    d1 = tl.zeros([BLOCK_H], tl.float32)
    d2 = tl.zeros([BLOCK_H], tl.float32)
    t_mean = tl.zeros([BLOCK_H], tl.float32)
    o = tl.zeros([2 * BLOCK_H, HEAD_DIM], tl.float32)

    # -- loop over the keys. A block that would reach past the end is moved back, and the keys that it repeats are
    #    masked, so that loads need no mask and nothing past a sequence's end is read
    k_ptr += seq64 * stride_kb + kv_head * stride_kh
    v_ptr += seq64 * stride_vb + kv_head * stride_vh
    # a sequence shorter than a block repeats its last key
    clamped_n = tl.minimum(range_n, seqlen_kv - 1)[:, None]
    k_offsets = clamped_n * stride_kn + offs_d[None, :]
    v_offsets = clamped_n * stride_vn + offs_d[None, :]
    last_block_start = tl.maximum(seqlen_kv - BLOCK_N, 0)
    # The loop counts from 0: Triton 3.7 and later do not pipeline a loop whose start is computed after an early return.
    for i in tl.range(0, key_end - key_begin, BLOCK_N):
        start_n = key_begin + i
        block_start = tl.minimum(start_n, last_block_start)
        k = tl.load(k_ptr + block_start * stride_kn64 + k_offsets)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_ptr + block_start * stride_vn64 + v_offsets)
        offs_n = block_start + range_n
        visible = (offs_n >= start_n) & (offs_n < key_end)
        m, d1, d2, t_mean, o = _attend_block(qr, k, v, visible, scale_log2, m, d1, d2, t_mean, o)

    # -- o1 and o2, from the stacked accumulator
    o1, o2 = _unstack(o)
    o2 += t_mean[:, None] * o1  # from p (t - t_mean) v to p t v

    # -- the output, or the state of a split
    o_ptr += seq64 * stride_ob + kv_head * GROUP * stride_oh
    if tile_splits == 1:  # no other program has keys of this tile
        row_offsets = offs_h * stride_oh
        out = _normalize(d1[:, None], d2[:, None], o1, o2)
        o_ptrs = o_ptr + row_offsets[:, None] + offs_d[None, :]
        tl.store(o_ptrs, out.to(o_ptr.dtype.element_ty), mask=mask_h[:, None])
    else:
        # this split's state: o1 and o2 as [STATE_ROWS, 2, HEAD_DIM], then m, d1 and d2 as [3, STATE_ROWS]
        range_h = tl.arange(0, BLOCK_H)
        state_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * SPLIT_FLOATS
        state_o_ptrs = state_ptr + range_h[:, None] * (2 * HEAD_DIM) + offs_d[None, :]
        tl.store(state_o_ptrs, o1, mask=mask_h[:, None])
        tl.store(state_o_ptrs + HEAD_DIM, o2, mask=mask_h[:, None])
        state_stat_ptrs = state_ptr + STATE_ROWS * 2 * HEAD_DIM + range_h
        tl.store(state_stat_ptrs, m, mask=mask_h)
        tl.store(state_stat_ptrs + STATE_ROWS, d1, mask=mask_h)
        tl.store(state_stat_ptrs + 2 * STATE_ROWS, d2, mask=mask_h)

        # -- the last split to arrive merges all of them, and resets the counter for the next launch
        tl.debug_barrier()  # all threads have stored before one of them increments the counter
        first_state = (work_item - split) * kv_heads + kv_head
        if tl.atomic_add(arrival_counters_ptr + first_state, 1, sem="acq_rel") == tile_splits - 1:
            tl.store(arrival_counters_ptr + first_state, 0)
            states_ptr = scratch_ptr + first_state.to(tl.int64) * SPLIT_FLOATS
            for row in range(tl.minimum(GROUP - start_h, BLOCK_H)):
                head = start_h + row
                row_offset = head * stride_oh
                d1_row, d2_row, o1_row, o2_row = _merge(states_ptr, kv_heads * SPLIT_FLOATS, tile_splits, row)
                out_row = _normalize(d1_row, d2_row, o1_row, o2_row)
                tl.store(o_ptr + row_offset + offs_d, out_row.to(o_ptr.dtype.element_ty))


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    cache_seqlens: torch.Tensor,
    scratch: torch.Tensor,
    arrival_counters: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the attention of each sequence's queries over its cached keys to out, on the current stream.

    q, r, out         (batch, 1, kv_heads*12, 128) bf16, any strides with a contiguous last dimension
    k_cache, v_cache  (batch, seqlen, kv_heads, 128) bf16, likewise
    cache_seqlens     (batch,) int32: keys in each sequence, 0 to seqlen; nothing past them is read
    scratch           work_items * kv_heads * 2080 fp32 numbers, work_items as computed below
    arrival_counters  work_items * kv_heads int32, 0 before and after every launch
    """
    batch, kv_heads = cache_seqlens.shape[0], k_cache.shape[2]
    work_items = 2 * (batch * NUM_SPLITS + triton.cdiv(batch, SPARE_SPLIT_EVERY))  # an upper bound
    decode_varlen_kernel[(work_items * kv_heads,)](
        q,
        r,
        k_cache,
        v_cache,
        out,
        cache_seqlens,
        scratch,
        arrival_counters,
        q.stride(0),
        q.stride(2),
        r.stride(0),
        r.stride(2),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        out.stride(0),
        out.stride(2),
        softmax_scale * LOG2_E,
        batch,
        kv_heads,
        k_cache.shape[1],
        num_warps=2,
        num_stages=4,
        enable_fp_fusion=True,
    )
