"""The values that the template of decode_varlen derives from a spec and a config."""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.ops.decode_form import CacheForm
from parallax_gen.ops.fp8 import WIDENINGS, Widening
from parallax_gen.ops.pieces import power_of_2
from parallax_gen.ops.signature import Constant, Padding

MAX_LINE = 120  # characters
LN_2 = "0.6931471805599453"


@dataclass(frozen=True)
class Queries:
    """The memory layout of a batch's queries, as expressions for kernels.

    at        the indices of a row's query in q, each with the letter of its stride
    sequence  the offset of a sequence in out
    query     the offset of a query within its sequence there, without its head's
    stats     the offset of a (sequence, kv head) pair in lse and t_mean
    stat      the offset of a (query, head) pair within that
    count     the number of queries per sequence, if all have the same number
    length    the parameters from which kernels compute a sequence's number of queries
    most      the largest number of queries of a sequence, in `launch`
    shape     the leading dimensions of q, in the docstring of `launch`
    """

    at: tuple[tuple[str, str], ...]
    sequence: str
    query: str
    stats: str
    stat: str
    count: str
    length: tuple[str, ...]
    most: str
    shape: str


# One query a sequence.
ONE = Queries(
    at=(("seq64", "b"),),
    sequence="seq64 * stride_ob",
    query="",
    stats="(seq64 * kv_heads + kv_head) * GROUP",
    stat="{head}",
    count="1",
    length=(),
    most="1",
    shape="batch, 1",
)
# Multi-token queries, the same number in each sequence.
MANY = Queries(
    at=(("seq64", "b"), ("queries", "n")),
    sequence="seq64 * stride_ob",
    query="queries * stride_on + ",
    stats="(seq64 * kv_heads + kv_head) * GROUP * seqlen_q",
    stat="{query} + {head} * seqlen_q",
    count="seqlen_q",
    length=("seqlen_q",),
    most="q.shape[1]",
    shape="batch, seqlen_q",
)
# Packed sequences of queries.
PACKED = Queries(
    at=(("(start_q + queries)", "n"),),
    sequence="start_q * stride_on",
    query="queries * stride_on + ",
    stats="start_q + kv_head * GROUP * total_q",
    stat="{query} + {head} * total_q",
    count="",
    length=("cu_seqlens_q_ptr",),
    most="max_seqlen_q",
    shape="total_q",
)


@dataclass(frozen=True)
class VarlenForm(CacheForm):
    """The values and short texts that the template of decode_varlen derives from a spec and a config.

    spare  the op's sequences_per_spare
    """

    spare: int

    # -- the rows of a tile

    @property
    def dims(self) -> str:
        """The width of a row as the kernel writes it."""
        return str(self.width)

    @property
    def owner(self) -> str:
        """What is split: its keys are shared by several programs."""
        return "tile" if self.spec.many_queries else "sequence"

    @property
    def rows(self) -> int:
        """The number of rows of a tile's partial state."""
        return self.config.BLOCK_H if self.spec.many_queries else min(self.spec.group, self.config.BLOCK_H)

    @property
    def row_name(self) -> str:
        """The name of a tile's rows: pairs of a query and a head, or heads alone."""
        return "rows" if self.spec.many_queries else "heads"

    @property
    def row0(self) -> str:
        """The prefix that turns a row's index in its tile into its index in the sequence or group."""
        return "row0 + " if self.tiled else ""

    @property
    def padding(self) -> Padding:
        """What the kernel writes to rows of no sequence."""
        width = power_of_2(self.spec.head_dim)
        return Padding(("o",), "n", "q", self.spec.stats, width, width != self.spec.head_dim)

    @property
    def queries(self) -> Queries:
        """The memory layout of the queries."""
        return PACKED if self.spec.varlen else MANY if self.spec.many_queries else ONE

    def stat_of(self, query: str, head: str) -> str:
        """The offset of a (query, head) pair in lse, from that of its sequence and kv head."""
        return self.queries.stat.format(query=query, head=head)

    # -- the keys of a tile

    @property
    def lower(self) -> bool:
        """Whether a sequence's first keys may be hidden from all its queries."""
        return self.spec.leftpad or self.spec.window

    @property
    def by_row(self) -> bool:
        """Whether the rows of a tile see different keys."""
        return self.spec.many_queries and self.spec.causal

    @property
    def one_page(self) -> bool:
        """Whether a block of keys lies in one page."""
        return self.spec.page_size > 0 and self.spec.page_size % self.config.BLOCK_N == 0

    @property
    def pages(self) -> int:
        """The number of whole pages that a block of keys covers; 0 if it does not cover whole pages."""
        size = self.spec.page_size
        return self.config.BLOCK_N // size if size and self.config.BLOCK_N % size == 0 else 0

    @property
    def few_pages(self) -> bool:
        """Whether a block covers few enough pages to keep each page's index in a scalar."""
        return 2 <= self.pages <= 8 and self.spec.page_size > 1

    @property
    def blocks_lie_in(self) -> str:
        """How blocks lie in the cache: a key of the table in parts/paging.j2."""
        if self.one_page or self.few_pages:
            return "one page" if self.one_page else "few pages"
        return "any pages" if self.spec.page_size else "piece"

    @property
    def keys_before_page(self) -> tuple[str, ...]:
        """For each of the few pages: the text that added to a block's first key gives the page's first key."""
        return ("", " + PAGE_SIZE", *(f" + {page} * PAGE_SIZE" for page in range(2, self.pages)))

    @property
    def block_unit(self) -> str:
        """The first key of a block is a multiple of this; "" if of nothing."""
        return "BLOCK_N" if self.one_page else "PAGE_SIZE" if self.few_pages else ""

    @property
    def first_block(self) -> str:
        """The prefix of a split's offset among the keys of a tile: the start of the tile's first block."""
        if not self.lower:
            return ""
        return "lower_block + " if self.block_unit else "lower + "

    @property
    def seen(self) -> str:
        """The number of keys that the last row of a tile sees."""
        return "seen" if self.by_row else "length"

    @property
    def window_begins(self) -> str:
        """The first key in the window of a sequence's first query."""
        return "length - window" + " - len_q + 1" * self.spec.many_queries

    @property
    def long_strides(self) -> tuple[str, ...]:
        """The strides between keys that are needed in 64 bits too."""
        if self.one_page:
            return ("stride_n",)
        return () if self.spec.page_size else ("stride_kn", "stride_vn")

    @property
    def piece(self) -> str:
        """What these strides step through."""
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
    def cached_scales(self) -> str:
        """What `_step` gets for `scales` with an 8-bit cache: the factor of q·k includes the scale of the keys."""
        return f"k_{self.scales}"

    @property
    def words(self) -> int:
        """The number of 32-bit words in a row, each with four 8-bit elements."""
        return self.width // 4

    @property
    def key_dims(self) -> str:
        """The name of the index over a key's elements, or words."""
        return "words" if self.spec.cache_dtype else "dims"

    @property
    def key_mask(self) -> str:
        """The mask argument that hides the padding of keys and values."""
        return f", mask={'in_row' if self.spec.cache_dtype else 'in_head'}[None, :], other=0" if self.padded else ""

    @property
    def block_shape(self) -> str:
        """A comment with the shape of a block of keys, if it fits on the line."""
        return "" if self.padded or self.spec.cache_dtype else "  # [BLOCK_N, HEAD_DIM]"

    # -- the schedule

    @property
    def tiles_of_sequence(self) -> str:
        """The number of tiles of a sequence; 0 if it has no queries."""
        if self.spec.many_queries:
            return "tl.cdiv(len_q * GROUP, BLOCK_H)"
        return "len_q * TILES" if self.tiles > 1 else "len_q"

    @property
    def items(self) -> str:
        """The number of work items that `launch` provides."""
        if self.spec.many_queries:
            return "tiles * NUM_SPLITS + triton.cdiv(tiles, SPARE_EVERY)"
        items = "batch * NUM_SPLITS + triton.cdiv(batch, SPARE_EVERY)"
        return f"{self.tiles} * ({items})" if self.tiles > 1 else items

    @property
    def lengths(self) -> tuple[str, ...]:
        """The parameters of `_lengths` that lengths come from, which have the same names in both kernels."""
        return (
            "cache_seqlens_ptr",
            *["cache_leftpad_ptr"] * self.spec.leftpad,
            *self.queries.length,
            "seqlen_kv",
            *["window"] * self.spec.window,
        )

    @property
    def sizes_returned(self) -> tuple[str, ...]:
        """What `_lengths` returns."""
        return ("length", *["lower"] * self.lower, "len_q", "blocks")

    def sizes(self, indent: int, seq: str, there: str, *used: str) -> str:
        """The call of `_lengths` for the sequences `seq`, if `there`. The results that are not `used` are named _."""
        names = ", ".join(name if name in used else "_" for name in self.sizes_returned)
        passed = ", ".join((seq, there, *self.lengths, "BLOCK_N"))
        call = f"{names} = _lengths({passed})"
        if indent + len(call) <= MAX_LINE:
            return call
        return f"{names} = _lengths(\n{' ' * (indent + 4)}{passed}\n{' ' * indent})"

    @property
    def least(self) -> int:
        """The least number of key blocks that is worth a program of its own."""
        return max(1, 64 // self.config.BLOCK_N)

    # -- merging

    @property
    def row_mask(self) -> str:
        """The mask argument of a store of one row, which hides the padding."""
        return ", mask=in_head" if self.padded else ""

    @property
    def chunk(self) -> int:
        """How many splits are merged at a time."""
        return min(max(self.vectors_held, 2), 32 if self.config.merge == "last" else 64)

    @property
    def constants(self) -> tuple[Constant, ...]:
        """The constants of the first kernel."""
        spec, config = self.spec, self.config
        pairs = "(query, head) pairs per tile"
        return (
            Constant("HEAD_DIM", spec.head_dim),
            Constant("GROUP", spec.group, "query heads per kv head"),
            Constant("BLOCK_H", config.BLOCK_H, pairs if spec.many_queries else "query heads per program"),
            Constant("BLOCK_N", config.BLOCK_N, "keys per iteration"),
            *[Constant("PAGE_SIZE", spec.page_size, "keys per page of the cache")] * (spec.page_size > 0),
            *[Constant("PAGES", "BLOCK_N // PAGE_SIZE", "pages per block of keys")] * self.few_pages,
            *[Constant("NUM_SPLITS", config.NUM_SPLITS)] * self.split,
            Constant("SPARE_EVERY", self.spare),
            Constant("ROWS", self.rows, "rows of a split's state"),
            Constant("STATE", "ROWS * (2 * HEAD_DIM + 4)", "its floats; 4, not 3, for alignment to 16 bytes"),
            *[Constant("LN_2", LN_2)] * spec.stats,
            Constant("SEQUENCES", 32, "sequences scanned at a time, one a lane: no exchange between warps"),
            Constant("MIN_BLOCKS", self.least, "blocks of keys that a split has at least"),
            *[Constant("TILES", self.tiles, "tiles per group of query heads")]
            * (self.tiles > 1 and not spec.many_queries),
        )

    @property
    def merge_constants(self) -> tuple[Constant, ...]:
        """The constants of the second kernel."""
        as_before = "this and the constants below are those of decode_varlen_kernel"
        tiles = (Constant("BLOCK_H", self.config.BLOCK_H), Constant("TILES", self.tiles))
        return (
            Constant("HEAD_DIM", self.spec.head_dim),
            Constant("GROUP", self.spec.group, "query heads per kv head"),
            Constant("BLOCK_N", self.config.BLOCK_N, as_before),
            *[Constant("NUM_SPLITS", self.config.NUM_SPLITS)] * self.split,
            Constant("SPARE_EVERY", self.spare),
            Constant("ROWS", self.rows),
            Constant("STATE", "ROWS * (2 * HEAD_DIM + 4)"),
            Constant("SEQUENCES", 32),
            Constant("MIN_BLOCKS", self.least),
            *(tiles if self.tiles > 1 else ()),
            *[Constant("LN_2", LN_2)] * self.spec.stats,
        )
