"""Parallax attention of queries against a KV cache, with per-sequence lengths.

spec       decode, head_dim 128, bf16, GQA 4:1, per-sequence lengths, pages of 64
config     BLOCK_N=32 BLOCK_H=8 NUM_SPLITS=1 merge=last num_warps=2 num_stages=4
gpu        NVIDIA H200 SXM
generator  parallax_gen 0.1.0, kernel 93aae1e8a32b

o_i = sum_j p_ij (1 + t_mean_i - t_ij) v_j  with  p_ij = softmax_j(softmax_scale q_i.k_j),  t_ij = r_i.k_j,
t_mean_i = sum_j p_ij t_ij. The running state of a row is (m, d1, d2, o1, o2): the maximum m of scale_log2 s, and the
sums of 2^(scale_log2 s - m) times 1, t, v and t v, with s = q.k and scale_log2 = log2(e) softmax_scale.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634

NUM_SPLITS = 1  # splits per sequence, on average
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
    seqlen_kv = tl.load(cache_seqlens_ptr + seq, mask=mask, other=0)
    seqlen_kv = tl.maximum(tl.minimum(seqlen_kv, max_seqlen_kv), 0)  # clamped to the cache
    seqlen_q = tl.where(mask, 1, 0)
    return seqlen_kv, seqlen_q, tl.cdiv(seqlen_kv, BLOCK_N)


@triton.jit
def _attend_block(qr, k, v, visible, scale_log2, m, d1, d2, o):
    """Update the rows' state (m, d1, d2, o) by a block of keys and values [BLOCK_N, HEAD_DIM]."""
    BLOCK_N: tl.constexpr = k.shape[0]
    st = tl.dot(qr, tl.trans(k))
    s, t = tl.split(tl.permute(tl.reshape(st, [2, 8, BLOCK_N]), [1, 2, 0]))  # [8, BLOCK_N] each
    s = tl.where(visible, s, float("-inf"))

    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    pt = p * t
    d1 = d1 * alpha + tl.sum(p, 1)
    d2 = d2 * alpha + tl.sum(pt, 1)

    p_pt = tl.join(p.to(v.dtype), pt.to(v.dtype))
    p_pt = tl.reshape(tl.permute(p_pt, [2, 0, 1]), [16, BLOCK_N])  # stacked like qr
    alpha = tl.reshape(tl.permute(tl.join(alpha, alpha), [1, 0]), [16])
    o = tl.dot(p_pt, v, acc=o * alpha[:, None])  # [2*BLOCK_H, HEAD_DIM]
    return m_new, d1, d2, o


@triton.jit
def _normalize(d1, d2, o1, o2):
    """o = o1/d1 (1 + d2/d1) - o2/d1, and 0 for a row without keys."""
    inv_d1 = tl.where(d1 > 0.0, 1.0 / d1, 0.0)
    return o1 * (inv_d1 * (1.0 + d2 * inv_d1)) - o2 * inv_d1


@triton.jit
def _merge(states_ptr, stride, num_splits, row):
    """Merge the states of a row's splits, `stride` floats apart: rescale each to the largest m, and add."""
    HEAD_DIM: tl.constexpr = 128
    STATE_ROWS: tl.constexpr = 4
    offs_d = tl.arange(0, 128)
    m = -3.0e38
    d1 = 0.0
    d2 = 0.0
    o1 = tl.zeros([128], tl.float32)
    o2 = tl.zeros([128], tl.float32)
    for first_split in range(0, num_splits, 32):  # as many splits at a time as fit in registers
        offs_s = first_split + tl.arange(0, 32)
        mask_s = offs_s < num_splits  # lanes past the last split get the lowest m, hence weight 0
        state_ptrs = states_ptr + offs_s.to(tl.int64) * stride
        stat_ptrs = state_ptrs + STATE_ROWS * 2 * HEAD_DIM + row
        m_splits = tl.load(stat_ptrs, mask=mask_s, other=-3.0e38, cache_modifier=".cg")
        d1_splits = tl.load(stat_ptrs + STATE_ROWS, mask=mask_s, other=0.0, cache_modifier=".cg")
        d2_splits = tl.load(stat_ptrs + 2 * STATE_ROWS, mask=mask_s, other=0.0, cache_modifier=".cg")
        o_ptrs = state_ptrs[:, None] + row * (2 * HEAD_DIM) + offs_d[None, :]
        mask_sd = mask_s[:, None]
        o1_splits = tl.load(o_ptrs, mask=mask_sd, other=0.0, cache_modifier=".cg")  # [splits, HEAD_DIM]
        o2_splits = tl.load(o_ptrs + HEAD_DIM, mask=mask_sd, other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m, tl.max(m_splits, 0))
        alpha = tl.exp2(m - m_new)
        weight = tl.exp2(m_splits - m_new)
        d1 = d1 * alpha + tl.sum(weight * d1_splits, 0)
        d2 = d2 * alpha + tl.sum(weight * d2_splits, 0)
        o1 = o1 * alpha + tl.sum(weight[:, None] * o1_splits, 0)
        o2 = o2 * alpha + tl.sum(weight[:, None] * o2_splits, 0)
        m = m_new
    return m, d1, d2, o1, o2


@triton.jit(do_not_specialize=["kv_heads", "batch", "max_seqlen_kv", "stride_tableb"])
def decode_varlen_kernel(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    cache_seqlens_ptr,
    page_table_ptr,
    scratch_ptr,
    arrival_counters_ptr,
    stride_qb,
    stride_qh,
    stride_rb,
    stride_rh,
    stride_tableb,
    stride_kvp,
    stride_kvn,
    stride_kvh,
    stride_ob,
    stride_oh,
    scale_log2,
    batch,
    kv_heads,
    max_seqlen_kv,
):
    HEAD_DIM: tl.constexpr = 128
    GROUP: tl.constexpr = 4  # query heads per kv head
    BLOCK_H: tl.constexpr = 8  # query heads per program
    BLOCK_N: tl.constexpr = 32  # keys per iteration
    PAGE_SIZE: tl.constexpr = 64  # keys per page of the cache
    SPARE_SPLIT_EVERY: tl.constexpr = 8
    STATE_ROWS: tl.constexpr = 4  # rows of a split's state
    SPLIT_FLOATS: tl.constexpr = STATE_ROWS * (2 * HEAD_DIM + 4)  # m, d1, d2 and one unused: 16-byte alignment
    BLOCK_SEQS: tl.constexpr = 32  # sequences per step of a scan, one per lane: a sum needs no shared memory
    MIN_BLOCKS_PER_SPLIT: tl.constexpr = 2  # fewer are not worth a program

    # -- blocks per split, equal for all sequences: long sequences get many splits, short ones one. Rounding up adds at
    #    most one split per sequence; the grid has room for these
    lane_blocks = tl.zeros([BLOCK_SEQS], tl.int32)
    for block_start in range(0, batch, BLOCK_SEQS):
        seqs = block_start + tl.arange(0, BLOCK_SEQS)
        _, _, num_blocks = _load_lengths(
            seqs,
            seqs < batch,
            cache_seqlens_ptr,
            max_seqlen_kv,
            BLOCK_N,
        )
        lane_blocks += num_blocks
    extra_splits = tl.cdiv(batch, SPARE_SPLIT_EVERY)
    blocks_per_split = tl.maximum(tl.cdiv(tl.sum(lane_blocks, 0), extra_splits), MIN_BLOCKS_PER_SPLIT)

    # -- the sequence of this program's work item: each sequence has num_tiles * tile_splits work items, in order
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    work_item = tl.program_id(0) // kv_heads
    seq = 0
    first_work_item = 0
    num_work_items = 0
    for block_start in range(0, batch, BLOCK_SEQS):
        seqs = block_start + tl.arange(0, BLOCK_SEQS)
        _, seqlen_q, num_blocks = _load_lengths(
            seqs,
            seqs < batch,
            cache_seqlens_ptr,
            max_seqlen_kv,
            BLOCK_N,
        )
        num_tiles = seqlen_q
        work_items = num_tiles * tl.maximum(tl.cdiv(num_blocks, blocks_per_split), 1)
        ends = num_work_items + tl.cumsum(work_items, 0)
        is_before = (ends <= work_item) & (seqs < batch)
        seq += tl.sum(is_before.to(tl.int32), 0)
        first_work_item = tl.maximum(first_work_item, tl.max(tl.where(is_before, ends, 0), 0))
        num_work_items += tl.sum(work_items, 0)
    if work_item >= num_work_items:
        return

    # -- the tile of its rows, and the split of the tile's keys
    seqlen_kv, seqlen_q, num_blocks = _load_lengths(
        seq,
        True,
        cache_seqlens_ptr,
        max_seqlen_kv,
        BLOCK_N,
    )
    tile_splits = tl.maximum(tl.cdiv(num_blocks, blocks_per_split), 1)
    split = work_item - first_work_item
    keys_per_split = tl.cdiv(num_blocks, tile_splits) * BLOCK_N
    key_begin = split * keys_per_split
    key_end = tl.minimum(key_begin + keys_per_split, seqlen_kv)

    # -- load one tile that stacks q and r: 8 rows of each in turn, so that rows i and i + 8 of 16 are in one thread
    offs_stack = tl.arange(0, 2 * BLOCK_H)
    offs_h = offs_stack % 8
    is_query = offs_stack < 8
    mask_h = offs_h < GROUP
    offs_d = tl.arange(0, 128)
    seq64 = seq.to(tl.int64)
    q_row_ptrs = q_ptr + seq64 * stride_qb + (kv_head * GROUP + offs_h) * stride_qh
    r_row_ptrs = r_ptr + seq64 * stride_rb + (kv_head * GROUP + offs_h) * stride_rh
    q = tl.load(q_row_ptrs[:, None] + offs_d[None, :], mask=(mask_h & is_query)[:, None], other=0.0)
    r = tl.load(r_row_ptrs[:, None] + offs_d[None, :], mask=(mask_h & ~is_query)[:, None], other=0.0)
    qr = q + r  # [2*BLOCK_H, HEAD_DIM]: in every row one of the two is 0

    # -- the softmax state: a row for each query head
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < GROUP
    range_n = tl.arange(0, BLOCK_N)
    stride_kvn64 = tl.cast(stride_kvn, tl.int64)  # offsets within a block fit 32 bits, those of a page may not
    m = tl.full([BLOCK_H], -3.0e38, tl.float32)  # finite: rows without keys must not give NaN
    d1 = tl.zeros([BLOCK_H], tl.float32)
    d2 = tl.zeros([BLOCK_H], tl.float32)
    o = tl.zeros([2 * BLOCK_H, 128], tl.float32)

    # -- loop over the keys, page by page. Past its end, a sequence's cache and page table may hold anything, so the
    #    last key is read again and masked. The pages of a block are looked up one step ahead: a key load that depends
    #    on a load of the same step would leave fewer loads in flight
    k_ptr += kv_head * stride_kvh
    v_ptr += kv_head * stride_kvh
    page_table_ptr += seq64 * stride_tableb
    final_key = tl.maximum(seqlen_kv - 1, 0)
    page = tl.load(page_table_ptr + tl.minimum(key_begin, final_key) // PAGE_SIZE)  # of the whole block
    # The loop counts from 0: Triton 3.7 and later do not pipeline a loop whose start is computed after an early return.
    for i in tl.range(0, key_end - key_begin, BLOCK_N):
        start_n = key_begin + i
        offs_n = start_n + range_n
        clamped_n = tl.minimum(offs_n, final_key)
        block_offset = page.to(tl.int64) * stride_kvp + start_n % PAGE_SIZE * stride_kvn64
        offsets = (clamped_n - start_n)[:, None] * stride_kvn + offs_d[None, :]
        k = tl.load(k_ptr + block_offset + offsets)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_ptr + block_offset + offsets)
        page = tl.load(page_table_ptr + tl.minimum(start_n + BLOCK_N, final_key) // PAGE_SIZE)
        visible = offs_n < key_end
        m, d1, d2, o = _attend_block(qr, k, v, visible[None, :], scale_log2, m, d1, d2, o)

    # -- o1 and o2, from the stacked accumulator
    o1, o2 = tl.split(tl.permute(tl.reshape(o, [2, 8, 128]), [1, 2, 0]))  # [8, HEAD_DIM] each

    # -- the output, or the state of a split
    o_ptr += seq64 * stride_ob + kv_head * GROUP * stride_oh
    if tile_splits == 1:
        # this is the only split of its tile
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
        tl.debug_barrier()
        first_state = (work_item - split) * kv_heads + kv_head
        if tl.atomic_add(arrival_counters_ptr + first_state, 1, sem="acq_rel") == tile_splits - 1:
            tl.store(arrival_counters_ptr + first_state, 0)
            state_ptr = scratch_ptr + first_state.to(tl.int64) * SPLIT_FLOATS
            for head in range(GROUP):
                row_offset = head * stride_oh
                _, d1_row, d2_row, o1_row, o2_row = _merge(state_ptr, kv_heads * SPLIT_FLOATS, tile_splits, head)
                out_row = _normalize(d1_row, d2_row, o1_row, o2_row)
                tl.store(o_ptr + row_offset + offs_d, out_row.to(o_ptr.dtype.element_ty))


def launch(
    q: torch.Tensor,
    r: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
    scratch: torch.Tensor,
    arrival_counters: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Write the attention of each sequence's queries over its cached keys to out, on the current stream.

    q, r, out         (batch, 1, kv_heads*4, 128) bf16, any strides with a contiguous last dimension
    k_cache, v_cache  (pages, 64, kv_heads, 128) bf16, the same strides likewise
    cache_seqlens     (batch,) int32: keys in each sequence, 0 to what its pages hold; nothing past them is read
    page_table        (batch, most pages of a sequence) int32: each sequence's pages, in order
    scratch           work_items * kv_heads * 1040 fp32 numbers, work_items as computed below
    arrival_counters  work_items * kv_heads int32, 0 before and after every launch
    """
    batch, kv_heads = cache_seqlens.shape[0], k_cache.shape[2]
    work_items = batch * NUM_SPLITS + triton.cdiv(batch, SPARE_SPLIT_EVERY)  # an upper bound
    decode_varlen_kernel[(work_items * kv_heads,)](
        q,
        r,
        k_cache,
        v_cache,
        out,
        cache_seqlens,
        page_table,
        scratch,
        arrival_counters,
        q.stride(0),
        q.stride(2),
        r.stride(0),
        r.stride(2),
        page_table.stride(0),
        *k_cache.stride()[:3],
        out.stride(0),
        out.stride(2),
        softmax_scale * LOG2_E,
        batch,
        kv_heads,
        page_table.shape[1] * 64,
        num_warps=2,
        num_stages=4,
        enable_fp_fusion=True,
    )
