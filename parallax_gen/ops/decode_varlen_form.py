"""The values that the template of decode_varlen derives from a spec and a config."""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.ops.decode_form import CacheForm
from parallax_gen.ops.fp8 import WIDENINGS, Widening
from parallax_gen.ops.signature import LN_2, LOWEST_M, Constant, Padding


@dataclass(frozen=True)
class QueryLayout:
    """The memory layout of a batch's queries, as expressions for kernels.

    indices           the indices in q of the query of each row of the stack, each with the letter of its stride
    sequence_offset   the offset of a sequence in out
    query_offset      the offset of a query within its sequence in out, without its head's
    stats_base        the offset of a (sequence, kv head) pair in lse and t_mean
    stat_offset       the offset of a (query, head) pair from stats_base
    count             the number of queries per sequence, if all have the same number
    count_parameters  the parameters from which kernels compute a sequence's number of queries
    max_count         the largest number of queries of a sequence, in `launch`
    shape             the leading dimensions of q, in the docstring of `launch`
    """

    indices: tuple[tuple[str, str], ...]
    sequence_offset: str
    query_offset: str
    stats_base: str
    stat_offset: str
    count: str
    count_parameters: tuple[str, ...]
    max_count: str
    shape: str


SINGLE_QUERY = QueryLayout(
    indices=(("seq64", "b"),),
    sequence_offset="seq64 * stride_ob",
    query_offset="",
    stats_base="(seq64 * kv_heads + kv_head) * GROUP",
    stat_offset="{head}",
    count="1",
    count_parameters=(),
    max_count="1",
    shape="batch, 1",
)
# The same number of queries in each sequence.
MULTI_TOKEN_QUERIES = QueryLayout(
    indices=(("seq64", "b"), ("offs_q_stack", "m")),
    sequence_offset="seq64 * stride_ob",
    query_offset="offs_q * stride_om + ",
    stats_base="(seq64 * kv_heads + kv_head) * GROUP * queries_per_seq",
    stat_offset="{query} + {head} * queries_per_seq",
    count="queries_per_seq",
    count_parameters=("queries_per_seq",),
    max_count="q.shape[1]",
    shape="batch, seqlen_q",
)
# Each sequence has its own number of queries.
PACKED_QUERIES = QueryLayout(
    indices=(("(seq_start_q + offs_q_stack)", "m"),),
    sequence_offset="seq_start_q * stride_om",
    query_offset="offs_q * stride_om + ",
    stats_base="seq_start_q + kv_head * GROUP * total_q",
    stat_offset="{query} + {head} * total_q",
    count="",
    count_parameters=("cu_seqlens_q_ptr",),
    max_count="max_seqlen_q",
    shape="total_q",
)


@dataclass(frozen=True)
class VarlenForm(CacheForm):
    """The values and short texts that the template of decode_varlen derives from a spec and a config.

    spare_split_every  a launch has one spare split for this many split units
    """

    spare_split_every: int

    # -- the rows of a tile

    @property
    def split_unit(self) -> str:
        """The unit whose keys are split: a tile, or a sequence."""
        return "tile" if self.spec.multi_token else "sequence"

    @property
    def state_rows(self) -> int:
        """The number of rows of a split's state."""
        return self.config.BLOCK_H if self.spec.multi_token else min(self.spec.group, self.config.BLOCK_H)

    @property
    def start_plus(self) -> str:
        """The prefix that turns a row's index in its tile into its index in the sequence, or the group."""
        return f"{self.rows.start} + " if self.has_several_tiles else ""

    @property
    def padding(self) -> Padding:
        """What the kernel writes to rows of no sequence."""
        return Padding(("o",), "m", "q", self.spec.stats, self.spec.head_dim)

    @property
    def queries(self) -> QueryLayout:
        """The memory layout of the queries."""
        if self.spec.varlen:
            return PACKED_QUERIES
        return MULTI_TOKEN_QUERIES if self.spec.multi_token else SINGLE_QUERY

    def stat_offset(self, query: str, head: str) -> str:
        """The offset of a (query, head) pair in lse, from that of its sequence and kv head."""
        return self.queries.stat_offset.format(query=query, head=head)

    # -- the keys of a tile

    @property
    def has_visible_begin(self) -> bool:
        """Whether a sequence's first keys may be invisible to all its queries."""
        return self.spec.leftpad or self.spec.window

    @property
    def masks_by_row(self) -> bool:
        return self.spec.multi_token and self.spec.causal

    @property
    def one_page(self) -> bool:
        """Whether a block of keys lies in one page."""
        return self._blocks_fit_pages and self.spec.page_size > 0 and self.spec.page_size % self.config.BLOCK_N == 0

    @property
    def _blocks_fit_pages(self) -> bool:
        """Whether blocks may begin at page borders: batch-invariant ones begin at the sequence's first key."""
        return not (self.spec.batch_invariant and self.spec.leftpad)

    @property
    def blocks_begin_early(self) -> bool:
        """Whether a tile's first block may have keys before the first visible one, whose pages may be freed."""
        return self.spec.batch_invariant and self.spec.window

    @property
    def pages_per_block(self) -> int:
        """The number of whole pages that a block of keys covers; 0 if it does not cover whole pages."""
        size = self.spec.page_size
        return self.config.BLOCK_N // size if size and self.config.BLOCK_N % size == 0 else 0

    @property
    def few_pages(self) -> bool:
        """Whether a block covers few enough pages to keep each page's index in a scalar."""
        if self.spec.batch_invariant and self.has_visible_begin:  # a window may begin in any of a block's pages
            return False
        return 2 <= self.pages_per_block <= 8 and self.spec.page_size > 1

    @property
    def block_layout(self) -> str:
        """How a block of keys lies in the cache: a key of the table in parts/paging.j2."""
        if self.one_page or self.few_pages:
            return "one page" if self.one_page else "few pages"
        return "any pages" if self.spec.page_size else "contiguous"

    @property
    def keys_before_page(self) -> tuple[str, ...]:
        """For each of the few pages: the text to append to a block's first key to get the page's."""
        return ("", " + PAGE_SIZE", *(f" + {page} * PAGE_SIZE" for page in range(2, self.pages_per_block)))

    @property
    def block_alignment(self) -> str:
        """The first key of a block is a multiple of this; "" if blocks begin anywhere."""
        return "BLOCK_N" if self.one_page else "PAGE_SIZE" if self.few_pages else ""

    @property
    def first_block_plus(self) -> str:
        """What is added to the offset of a split among the keys of its tile: the start of the tile's first block."""
        if not self.has_visible_begin:
            return ""
        return "first_block_start + " if self.block_alignment or self.blocks_begin_early else "visible_begin + "

    @property
    def visible_begin(self) -> str:
        """The name of the first key that some query of a sequence sees. A tile's own first key may come later."""
        return "seq_visible_begin" if self.masks_by_row and self.spec.window else "visible_begin"

    @property
    def tile_blocks(self) -> str:
        """The name of the number of blocks that some row of a tile sees: the sequence's, if all rows see all keys."""
        return "tile_blocks" if self.has_visible_begin or self.masks_by_row else "num_blocks"

    @property
    def visible_end(self) -> str:
        """The end of the keys that some row of a tile sees."""
        return "visible_end" if self.masks_by_row else "seqlen_kv"

    @property
    def window_begin(self) -> str:
        """The first key in the window of a sequence's first query."""
        return "seqlen_kv - window_size" + " - seqlen_q + 1" * self.spec.multi_token

    @property
    def strides_in_64_bits(self) -> tuple[str, ...]:
        """The strides between keys that are needed in 64 bits too."""
        if self.one_page:
            return ("stride_kvn",)
        return () if self.spec.page_size else ("stride_kn", "stride_vn")

    @property
    def key_storage(self) -> str:
        """What these strides step through: a page, or the cache."""
        return "page" if self.spec.page_size else "cache"

    # -- keys and values in 8 or 16 bits

    @property
    def softmax_part(self) -> str:
        """The template part with the softmax step over a block of keys."""
        return "parts/fp8.j2" if self.spec.cache_dtype else "parts/softmax_stacked.j2"

    @property
    def fp8(self) -> Widening:
        """How the elements of an 8-bit cache are widened to 16 bits."""
        return WIDENINGS[self.spec.cache_dtype, self.spec.dtype]

    @property
    def scale_arguments(self) -> str:
        """The arguments for `scale_parameters` with an 8-bit cache: the factor of q·k includes the keys' scale."""
        return f"k_{self.scale_parameters}"

    @property
    def words(self) -> str:
        """The number of 32-bit words in a row, each with four 8-bit elements, as the kernel writes it."""
        return f"{self.row_width_text} // 4"

    @property
    def key_offs(self) -> str:
        """The name of the indices of a key's elements, or words."""
        return "offs_w" if self.spec.cache_dtype else "offs_d"

    @property
    def key_mask(self) -> str:
        """The mask argument that excludes the padding of keys and values."""
        return f", mask=mask_{'w' if self.spec.cache_dtype else 'd'}[None, :], other=0" if self.padded else ""

    # -- the schedule

    @property
    def seq_tiles(self) -> str:
        """The number of tiles of each of several sequences; 0 if it has no queries."""
        if self.spec.multi_token:
            return "tl.cdiv(seqlens_q * GROUP, BLOCK_H)"
        return "seqlens_q * TILES_PER_GROUP" if self.tiles_per_group > 1 else "seqlens_q"

    @property
    def max_work_items(self) -> str:
        """The number of work items that `launch` provides."""
        if self.spec.batch_invariant:
            tiles = f"{self.tiles_per_group} * " * (self.tiles_per_group > 1)
            return "batch * work_items_per_seq" if self.spec.multi_token else f"{tiles}batch * NUM_SPLITS"
        if self.spec.multi_token:
            return "num_tiles * NUM_SPLITS + triton.cdiv(num_tiles, SPARE_SPLIT_EVERY)"
        work_items = "batch * NUM_SPLITS + triton.cdiv(batch, SPARE_SPLIT_EVERY)"
        return f"{self.tiles_per_group} * ({work_items})" if self.tiles_per_group > 1 else work_items

    @property
    def length_parameters(self) -> tuple[str, ...]:
        """The parameters of `_load_lengths` that lengths come from, which have the same names in both kernels."""
        return (
            "cache_seqlens_ptr",
            *["cache_leftpad_ptr"] * self.spec.leftpad,
            *self.queries.count_parameters,
            "max_seqlen_kv",
            *["window_size"] * self.spec.window,
        )

    @property
    def lengths_of_seq(self) -> dict[str, str]:
        """The results of `_load_lengths` that a program needs -> its names for them."""
        names = {"seqlen_kv": "seqlen_kv", "visible_begin": self.visible_begin, "num_blocks": "num_blocks"}
        if self.spec.batch_invariant and self.tile_blocks != "num_blocks":
            del names["num_blocks"]
        return {**names, "seqlen_q": "seqlen_q"} if self.spec.multi_token else names

    @property
    def lengths_of_splits(self) -> dict[str, str]:
        """`lengths_of_seq` for a merge kernel, which only counts splits."""
        return {"num_blocks": "num_blocks"} if self.tile_blocks == "num_blocks" else self.lengths_of_seq

    def name_lengths(self, names: dict[str, str]) -> str:
        """The variables that the results of `_load_lengths` are assigned to: `_` for a result not in `names`."""
        returned = ("seqlen_kv", *["visible_begin"] * self.has_visible_begin, "seqlen_q", "num_blocks")
        return ", ".join(names.get(length, "_") for length in returned)

    @property
    def min_blocks_per_split(self) -> int:
        """The least number of key blocks that is worth a program of its own."""
        return max(1, (128 if self.spec.batch_invariant else 64) // self.config.BLOCK_N)

    # -- merging

    @property
    def merge_chunk(self) -> int:
        """How many splits are merged at a time."""
        return min(max(self.rows_in_registers, 2), 32 if self.config.merge == "last" else 64)

    @property
    def constants(self) -> tuple[Constant, ...]:
        """The constants of the first kernel."""
        spec, config = self.spec, self.config
        pairs = "(query, head) pairs per tile"
        layout = "+ 4: m, d1, d2 and one unused, for 16-byte alignment"
        return (
            *self.dim_constants,
            Constant("GROUP", spec.group, "query heads per kv head"),
            Constant("BLOCK_H", config.BLOCK_H, pairs if spec.multi_token else "query heads per program"),
            Constant("BLOCK_N", config.BLOCK_N, "keys per iteration"),
            *[Constant("PAGE_SIZE", spec.page_size, "keys per page of the cache")] * (spec.page_size > 0),
            *[Constant("PAGES_PER_BLOCK", "BLOCK_N // PAGE_SIZE", "pages per block of keys")] * self.few_pages,
            *self._schedule,
            Constant("STATE_ROWS", self.state_rows, "rows of a split's state"),
            Constant("SPLIT_FLOATS", "STATE_ROWS * (2 * HEAD_DIM + 4)", layout),
            LOWEST_M,
            *[LN_2] * spec.stats,
            *[Constant("BLOCK_SEQS", 32, "sequences per step of a scan, one per lane: a sum needs no shared memory")]
            * (not spec.batch_invariant),
            Constant("MIN_BLOCKS_PER_SPLIT", self.min_blocks_per_split, "fewer are not worth a program"),
            *[Constant("TILES_PER_GROUP", self.tiles_per_group, "tiles per group of query heads")]
            * (self.tiles_per_group > 1 and not spec.multi_token),
        )

    @property
    def _schedule(self) -> tuple[Constant, ...]:
        """The constants of how many splits there are."""
        splits = Constant("NUM_SPLITS", self.config.NUM_SPLITS)
        if self.spec.batch_invariant:
            return (splits,)
        return (*[splits] * self.is_split, Constant("SPARE_SPLIT_EVERY", self.spare_split_every))

    @property
    def merge_constants(self) -> tuple[Constant, ...]:
        """The constants of the function that merges splits."""
        return (
            *self.dim_constants,
            Constant("STATE_ROWS", self.state_rows),
            Constant("BLOCK_SPLITS", self.merge_chunk, "splits per iteration: as many as fit in registers"),
            LOWEST_M,
        )

    @property
    def merge_kernel_constants(self) -> tuple[Constant, ...]:
        """The constants of the second kernel."""
        as_before = "must equal decode_varlen_kernel's, as must the constants below"
        tiles = (Constant("BLOCK_H", self.config.BLOCK_H), Constant("TILES_PER_GROUP", self.tiles_per_group))
        return (
            *self.dim_constants,
            Constant("GROUP", self.spec.group, "query heads per kv head"),
            Constant("BLOCK_N", self.config.BLOCK_N, as_before),
            *self._schedule,
            Constant("STATE_ROWS", self.state_rows),
            Constant("SPLIT_FLOATS", "STATE_ROWS * (2 * HEAD_DIM + 4)"),
            *[Constant("BLOCK_SEQS", 32)] * (not self.spec.batch_invariant),
            Constant("MIN_BLOCKS_PER_SPLIT", self.min_blocks_per_split),
            *(tiles if self.tiles_per_group > 1 else ()),
            *[LN_2] * self.spec.stats,
        )
