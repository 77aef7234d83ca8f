"""What decode_varlen's template derives of a spec and a config."""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.ops.decode_form import CacheForm, Constant
from parallax_gen.ops.pieces import power_of_2
from parallax_gen.ops.signature import Padding

LINE = 120  # characters, at the most
LN_2 = "0.6931471805599453"


@dataclass(frozen=True)
class Widening:
    """How numbers of eight bits become numbers of sixteen, and what is made good for it.

    wide     the type of sixteen bits, as the kernel writes it
    shift    the seven bits below the sign go so many to the right from the upper byte; 0 where exponents are alike
    bias     what stands there is the number in units of 2^-bias, by which the exponents' biases differ. To multiply
             each would cost as much again: sums of them are brought out of their units when all keys are in
    lift_qr  till then q and r are taken so many powers of two larger, so that no product is too small for fp32. What
             bf16 can hold of them ends at 2^31 so
    lift_p   the same of p, which is at most 1
    """

    wide: str
    shift: int = 0
    bias: int = 0
    lift_qr: int = 0
    lift_p: int = 0

    @property
    def digits(self) -> str:
        """Where the bits below the sign are in a word of two numbers."""
        return f"0x{0x7F007F00 >> self.shift:08X}"

    @property
    def of_scores(self) -> str:
        """In front of the scale of scores, and below of the caches' scales in each sum: the units' factor."""
        return _power(self.bias - self.lift_qr)

    @property
    def of_d2(self) -> str:
        return _power(self.bias - self.lift_qr - self.lift_p)

    @property
    def of_o1(self) -> str:
        return _power(self.bias - self.lift_p)

    @property
    def of_o2(self) -> str:
        return _power(2 * self.bias - self.lift_qr - self.lift_p)


def _power(exponent: int) -> str:
    return f"2.0**{exponent} * " if exponent else ""


_WIDENINGS = {
    ("e4m3", "bf16"): Widening("tl.bfloat16", 4, 120, 96, 64),
    ("e5m2", "bf16"): Widening("tl.bfloat16", 3, 112, 96, 64),
    ("e4m3", "fp16"): Widening("tl.float16", 1, 8, 0, 8),
    ("e5m2", "fp16"): Widening("tl.float16"),
}


@dataclass(frozen=True)
class Queries:
    """How a batch's queries lie: one a sequence, as many of each, or packed. All are texts of kernels.

    at        indices of a row's query in q, each with the letter of its stride
    sequence  where a sequence begins in out
    query     where a query does from there on, in front of its heads
    stats     where a sequence's and a kv head's begin in lse and t_mean
    stat      where a query's and a head's is from there on
    count     how many a sequence has, where all have as many
    length    what kernels find that from
    most      what the longest sequence has, as `launch` knows it
    shape     of q, as far as heads, as `launch` describes it
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
    """What decode_varlen's template derives of a spec and a config.

    spare  of the op
    """

    spare: int

    # -- a tile's rows

    @property
    def dims(self) -> str:
        """A row's width as the kernel writes it."""
        return str(self.width)

    @property
    def tiled(self) -> bool:
        """Whether a sequence may have several tiles."""
        return self.spec.many_queries or self.tiles > 1

    @property
    def owner(self) -> str:
        """Whose keys programs share."""
        return "tile" if self.spec.many_queries else "sequence"

    @property
    def rows(self) -> int:
        """Those that a tile's partial state has."""
        return self.config.BLOCK_H if self.spec.many_queries else min(self.spec.group, self.config.BLOCK_H)

    @property
    def row_name(self) -> str:
        """What a tile's rows are: pairs of a query and a head, or heads alone."""
        return "rows" if self.spec.many_queries else "heads"

    @property
    def row0(self) -> str:
        """In front of a row's number in its tile, for that in its sequence or group."""
        return "row0 + " if self.tiled else ""

    @property
    def padding(self) -> Padding:
        """What is written to rows that no sequence has."""
        width = power_of_2(self.spec.head_dim)
        return Padding(("o",), "n", "q", self.spec.stats, width, width != self.spec.head_dim)

    @property
    def queries(self) -> Queries:
        """How they lie."""
        return PACKED if self.spec.varlen else MANY if self.spec.many_queries else ONE

    def stat_of(self, query: str, head: str) -> str:
        """Where a query's and a head's lse is, from its sequence's and kv head's on."""
        return self.queries.stat.format(query=query, head=head)

    # -- its keys

    @property
    def lower(self) -> bool:
        """Whether a sequence's first keys may be hidden from all its queries."""
        return self.spec.leftpad or self.spec.window

    @property
    def by_row(self) -> bool:
        """Whether its rows see different keys."""
        return self.spec.many_queries and self.spec.causal

    @property
    def one_page(self) -> bool:
        """Whether a block of keys lies in one page."""
        return self.spec.page_size > 0 and self.spec.page_size % self.config.BLOCK_N == 0

    @property
    def pages(self) -> int:
        """Whole pages that it falls into; 0 where it does not."""
        size = self.spec.page_size
        return self.config.BLOCK_N // size if size and self.config.BLOCK_N % size == 0 else 0

    @property
    def few_pages(self) -> bool:
        """Whether those are so few that each has a scalar of its own."""
        return 2 <= self.pages <= 8 and self.spec.page_size > 1

    @property
    def blocks_lie_in(self) -> str:
        """How blocks of keys are read, of parts/paging.j2."""
        if self.one_page or self.few_pages:
            return "one page" if self.one_page else "few pages"
        return "any pages" if self.spec.page_size else "piece"

    @property
    def keys_before_page(self) -> tuple[str, ...]:
        """Of each of the few pages: what is added to the block's first key for its own."""
        return ("", " + PAGE_SIZE", *(f" + {page} * PAGE_SIZE" for page in range(2, self.pages)))

    @property
    def block_unit(self) -> str:
        """Of what a block's first key is a multiple, where of anything."""
        return "BLOCK_N" if self.one_page else "PAGE_SIZE" if self.few_pages else ""

    @property
    def first_block(self) -> str:
        """In front of a split's place among a tile's keys: where the tile's first block begins."""
        if not self.lower:
            return ""
        return "lower_block + " if self.block_unit else "lower + "

    @property
    def seen(self) -> str:
        """The key past the last that any row of a tile sees."""
        return "seen" if self.by_row else "length"

    @property
    def window_begins(self) -> str:
        """The first key in the window of a sequence's first query."""
        return "length - window" + " - len_q + 1" * self.spec.many_queries

    @property
    def long_strides(self) -> tuple[str, ...]:
        """Strides of keys that are needed in 64 bits, too."""
        if self.one_page:
            return ("stride_n",)
        return () if self.spec.page_size else ("stride_kn", "stride_vn")

    @property
    def piece(self) -> str:
        """In what those are."""
        return "page" if self.spec.page_size else "cache"

    # -- its keys and values as numbers

    @property
    def softmax_part(self) -> str:
        """The part that has the step from one state to the next."""
        return "parts/fp8.j2" if self.spec.cache_dtype else "parts/softmax_stacked.j2"

    @property
    def fp8(self) -> Widening:
        return _WIDENINGS[self.spec.cache_dtype, self.spec.dtype]

    @property
    def words(self) -> int:
        """A row's, of four numbers in eight bits each."""
        return self.width // 4

    @property
    def key_dims(self) -> str:
        """The numbers of a row of keys' elements."""
        return "words" if self.spec.cache_dtype else "dims"

    @property
    def key_mask(self) -> str:
        """Of loads of keys and values."""
        return f", mask={'in_row' if self.spec.cache_dtype else 'in_head'}[None, :], other=0" if self.padded else ""

    @property
    def block_shape(self) -> str:
        """What is said of a block of keys where there is room for it."""
        return "" if self.padded or self.spec.cache_dtype else "  # [BLOCK_N, HEAD_DIM]"

    # -- the schedule

    @property
    def tiles_of_sequence(self) -> str:
        """How many tiles a sequence has: none where it has no queries."""
        if self.spec.many_queries:
            return "tl.cdiv(len_q * GROUP, BLOCK_H)"
        return "len_q * TILES" if self.tiles > 1 else "len_q"

    @property
    def slots(self) -> str:
        """How many slots `launch` provides for."""
        if self.spec.many_queries:
            return "tiles * NUM_SPLITS + triton.cdiv(tiles, SPARE)"
        slots = "batch * NUM_SPLITS + triton.cdiv(batch, SPARE)"
        return f"{self.tiles} * ({slots})" if self.tiles > 1 else slots

    @property
    def lengths(self) -> tuple[str, ...]:
        """What lengths are found from: parameters of `_sizes`, by the names that kernels have for them."""
        return (
            "cache_seqlens_ptr",
            *["cache_leftpad_ptr"] * self.spec.leftpad,
            *self.queries.length,
            "seqlen_kv",
            *["window"] * self.spec.window,
        )

    @property
    def found(self) -> tuple[str, ...]:
        """What `_sizes` returns."""
        return ("length", *["lower"] * self.lower, "len_q", "blocks")

    def sizes(self, indent: int, seq: str, there: str, *used: str) -> str:
        """Its call for the sequences `seq`, those of them that are `there`, of whose results some are `used`."""
        names = ", ".join(name if name in used else "_" for name in self.found)
        passed = ", ".join((seq, there, *self.lengths, "BLOCK_N"))
        call = f"{names} = _sizes({passed})"
        if indent + len(call) <= LINE:
            return call
        return f"{names} = _sizes(\n{' ' * (indent + 4)}{passed}\n{' ' * indent})"

    @property
    def least(self) -> int:
        """Blocks that are worth a program of their own."""
        return max(1, 64 // self.config.BLOCK_N)

    # -- merging

    @property
    def row_of_tile(self) -> str:
        """A row's number in its tile, where rows are joined one by one."""
        return "i" if self.tiled else "head"

    @property
    def row_mask(self) -> str:
        """Of a store of one row, where its dimensions have a mask."""
        return ", mask=in_head" if self.padded else ""

    def m_or_not(self, name: str) -> str:
        """The name of a joined maximum, where it is needed."""
        return name if self.spec.stats else "_"

    @property
    def chunk(self) -> int:
        """Splits that are joined at a time."""
        return min(max(self.vectors_held, 2), 32 if self.config.merge == "last" else 64)

    @property
    def constants(self) -> tuple[Constant, ...]:
        """Of the first kernel."""
        spec, config = self.spec, self.config
        pairs = "(query, head) pairs that a tile has"
        return (
            Constant("HEAD_DIM", spec.head_dim),
            Constant("GROUP", spec.group, "query heads that share a kv head"),
            Constant("BLOCK_H", config.BLOCK_H, pairs if spec.many_queries else "of which one program serves so many"),
            Constant("BLOCK_N", config.BLOCK_N, "keys a program takes a step"),
            *[Constant("PAGE_SIZE", spec.page_size, "keys a page of the cache")] * (spec.page_size > 0),
            *[Constant("PAGES", "BLOCK_N // PAGE_SIZE", "that a block of keys falls into")] * self.few_pages,
            *[Constant("NUM_SPLITS", config.NUM_SPLITS)] * self.split,
            Constant("SPARE", self.spare),
            Constant("ROWS", self.rows, "that a tile's partial state has"),
            Constant("SLOT", "ROWS * (2 * HEAD_DIM + 4)", "floats of it; 4, not 3, keeps it 16-byte aligned"),
            *[Constant("LN_2", LN_2)] * spec.stats,
            Constant("SEQUENCES", 32, "looked at a time: each warp can do that by itself"),
            Constant("LEAST", self.least, "blocks that are worth a program of their own"),
            *[Constant("TILES", self.tiles, "that serve a group")] * (self.tiles > 1 and not spec.many_queries),
        )

    @property
    def merge_constants(self) -> tuple[Constant, ...]:
        """Of the second."""
        as_before = "what follows is as in ragged_kernel, which left the states"
        tiles = (Constant("BLOCK_H", self.config.BLOCK_H), Constant("TILES", self.tiles))
        return (
            Constant("HEAD_DIM", self.spec.head_dim),
            Constant("GROUP", self.spec.group, "query heads that share a kv head"),
            Constant("BLOCK_N", self.config.BLOCK_N, as_before),
            *[Constant("NUM_SPLITS", self.config.NUM_SPLITS)] * self.split,
            Constant("SPARE", self.spare),
            Constant("ROWS", self.rows),
            Constant("SLOT", "ROWS * (2 * HEAD_DIM + 4)"),
            Constant("SEQUENCES", 32),
            Constant("LEAST", self.least),
            *(tiles if self.tiles > 1 else ()),
            *[Constant("LN_2", LN_2)] * self.spec.stats,
        )
