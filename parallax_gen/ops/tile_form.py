"""What the templates of forward, dkdv and dqdr ask of a spec and a config together: sizes, names, and facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from parallax_gen.ops.pieces import Piece, power_of_2
from parallax_gen.ops.signature import SOFTCAP_ABOUT, Constant, Padding
from parallax_gen.ops.tiles import TileConfig, TiledOp, programs_a_head
from parallax_gen.problem.spec import KernelSpec

PRECISIONS = {"fp32": ', input_precision="ieee"', "tf32": ', input_precision="tf32"'}


class Side(NamedTuple):
    """Query rows, or keys: how kernels write what is of them.

    of      the tensor that they are rows of
    row     the letter of a row's stride
    rows    their numbers
    inside  which of those a sequence has
    block   how many a tile has
    length  how many a sequence has
    """

    of: str
    row: str
    rows: str
    inside: str
    block: str
    length: str


QUERIES = Side("q", "m", "rows", "in_q", "BLOCK_M", "seqlen_q")
KEYS = Side("k", "n", "cols", "in_kv", "BLOCK_N", "seqlen_kv")


@dataclass(frozen=True)
class TileForm:
    """What all three have. A program owns a tile of one side and steps over blocks of the other.

    pieces   of a head: scores are summed over them
    summed   those that a program has sums of: all, or with halves its own
    vectors  kernels' names of tensors that they write rows of head_dim numbers to
    """

    op: TiledOp[Any]
    spec: KernelSpec
    config: TileConfig
    pieces: tuple[Piece, ...]
    summed: tuple[Piece, ...]
    vectors: tuple[str, ...]

    # -- sides

    @property
    def owned(self) -> Side:
        """What a program owns a tile of."""
        return KEYS if self.op.owns_keys else QUERIES

    @property
    def stepped(self) -> Side:
        """What it steps over."""
        return QUERIES if self.op.owns_keys else KEYS

    @property
    def head(self) -> str:
        """The head whose tile it owns."""
        return "kv_head" if self.op.owns_keys else "head"

    @property
    def stepped_head(self) -> str:
        """The head whose rows, or keys, it steps over."""
        if self.spec.group == 1:
            return self.head
        return "head" if self.op.owns_keys else "head // GROUP"

    @property
    def tile(self) -> str:
        """The shape of a tile of scores: rows are those of the owned side."""
        return f"[{self.owned.block}, {self.stepped.block}]"

    @property
    def by_row(self) -> str:
        """Index that broadcasts one number a query row over a tile of scores."""
        return "[None, :]" if self.op.owns_keys else "[:, None]"

    @property
    def by_key(self) -> str:
        """Index that broadcasts one number a key over it."""
        return "[:, None]" if self.op.owns_keys else "[None, :]"

    @property
    def last(self) -> str:
        """The last key that each row sees, to broadcast over it."""
        return f"rows{self.by_row} + shift"

    @property
    def last_kept(self) -> bool:
        """Whether that is found before the loop, not where it is needed."""
        return False

    @property
    def keeps_slope(self) -> bool:
        """Whether the derivative of capped scores is needed."""
        return False

    @property
    def marks(self) -> bool:
        """Whether a mask is put on some blocks alone."""
        return True

    @property
    def crossed(self) -> str:
        """Tells in the loop whether a block has a key that some row does not see."""
        if self.op.owns_keys:
            return "(i < sees_last) | (i + BLOCK_M - 1 > sees_first)" if self.spec.window else "i < sees_last"
        if not self.spec.causal:
            return "n + BLOCK_N > seqlen_kv"
        return "(n + BLOCK_N > seen_by_all) | (n < unseen_by_some)" if self.spec.window else "n + BLOCK_N > seen_by_all"

    # -- heads in pieces, and matmuls

    @property
    def halves(self) -> bool:
        """Whether two programs share a tile, and sum one half of the dimensions each."""
        return programs_a_head(self.config) == 2

    @property
    def head_dim_named(self) -> bool:
        """Whether kernels have a name for head_dim: where a tile is as wide, or is padded."""
        return len(self.pieces) == 1 or self.pieces[-1].padded

    @property
    def dims(self) -> tuple[Piece, ...]:
        """Pieces by the names of their dimensions' numbers: each name once."""
        return tuple({piece.dims: piece for piece in (*self.pieces, *self.summed)}.values())

    @property
    def casts(self) -> bool:
        """Whether what was found in fp32 enters a matmul in 16 bits."""
        return self.spec.bytes_per_element == 2

    @property
    def precision(self) -> str:
        """What matmuls of fp32 operands take besides."""
        return PRECISIONS.get(self.spec.dtype, "")

    def constants(self, grouped: bool = True) -> list[Constant]:
        """At the top of a kernel; grouped: of one that finds its tile among those of GROUP_HEADS heads."""
        spec, config = self.spec, self.config
        owned, stepped = "per program", "per iteration"
        rows, keys = (stepped, owned) if self.op.owns_keys else (owned, stepped)
        found = [Constant("HEAD_DIM", spec.head_dim)] if self.head_dim_named else []
        if self.halves:
            about = "dimensions per program: two programs share a tile"
            found.append(Constant("HALF", spec.head_dim // 2, about))
        found.append(Constant("BLOCK_M", config.BLOCK_M, f"query rows {rows}"))
        found.append(Constant("BLOCK_N", config.BLOCK_N, f"keys {keys}"))
        if spec.group > 1:
            found.append(Constant("GROUP", spec.group, "query heads per kv head"))
        if grouped and config.GROUP_HEADS > 1:
            kind = "kv" if self.op.owns_keys else "query"
            found.append(Constant("GROUP_HEADS", config.GROUP_HEADS, f"{kind} heads whose tiles are launched together"))
        return found

    # -- launches

    @property
    def last_first(self) -> bool:
        """Whether the last tile is launched first."""
        return self.op.last_first(self.spec)

    @property
    def counts_tiles(self) -> bool:
        """Whether a program needs to know how many tiles there are."""
        return self.config.GROUP_HEADS > 0 or self.last_first

    @property
    def longest(self) -> str:
        """What tiles are counted by in a kernel: the rows, or keys, of the longest sequence."""
        return "max_seqlen" if self.spec.varlen else self.owned.length

    @property
    def tiled(self) -> str:
        """The same in `launch`."""
        return f"max_seqlen_{self.owned.of}" if self.spec.varlen else self.owned.length

    @property
    def programs(self) -> str:
        """How many programs a launch has."""
        return f"{'2 * ' * self.halves}tiles * batch * {self.op.heads}"

    @property
    def options(self) -> tuple[str, ...]:
        """What a launch takes besides arguments."""
        config = self.config
        limit = (f"maxnreg={config.maxnreg}",) * (config.maxnreg > 0)
        return (f"num_warps={config.num_warps}", f"num_stages={config.num_stages}", *limit, "enable_fp_fusion=True")

    # -- packed sequences, and what `launch` says of its arguments

    @property
    def padding(self) -> Padding:
        """What is written to rows of packed tensors that no sequence has."""
        spec, width = self.spec, power_of_2(self.spec.head_dim)
        return Padding(self.vectors, self.owned.row, self.owned.of, spec.stats, width, width != spec.head_dim)

    @property
    def q(self) -> str:
        """What q is, and what is like it."""
        heads = "heads" if self.spec.group == 1 else f"kv_heads*{self.spec.group}"
        return self._tensor(QUERIES, heads)

    @property
    def k(self) -> str:
        """What k is, and what is like it."""
        return self._tensor(KEYS, "heads" if self.spec.group == 1 else "kv_heads")

    def _tensor(self, side: Side, heads: str) -> str:
        rows = f"total_{side.of}" if self.spec.varlen else f"batch, {side.length}"
        dtype = "fp32" if self.spec.dtype == "tf32" else self.spec.dtype
        return f"({rows}, {heads}, {self.spec.head_dim}) {dtype}"

    @property
    def sizes_about(self) -> list[tuple[str, str]]:
        """Numbers and lengths that `launch` takes, and what each is."""
        found = []
        if self.spec.varlen:
            where = "the first row of each sequence in q and in k, and the end of the last one"
            found.append(("cu_seqlens", f"(batch + 1,) int32: {where}"))
            found.append(("", f"{self.left_out} in rows of no sequence"))
            found.append((f"max_seqlen_{self.owned.of}", "at least the length of the longest sequence"))
        if self.spec.softcap:
            found.append(("softcap", SOFTCAP_ABOUT))
        if self.spec.window:
            found.append(("window_size", "the number of last keys that a query sees, 1 or more"))
        return found

    @property
    def left_out(self) -> str:
        """What is written to rows that no sequence has, in words."""
        return f"{' and '.join(self.vectors)} are 0"


def basics(
    op: TiledOp[Any], spec: KernelSpec, config: TileConfig, vectors: tuple[str, ...]
) -> tuple[TiledOp[Any], KernelSpec, TileConfig, tuple[Piece, ...], tuple[Piece, ...], tuple[str, ...]]:
    """The fields of a TileForm."""
    pieces, summed = op.scored_and_summed(spec.head_dim, config.HEAD_DIM_LAYOUT)
    return op, spec, config, tuple(pieces), tuple(summed), vectors


@dataclass(frozen=True)
class Pass:
    """How a kernel of the forward's file does a tile.

    again    whether it does so in a loop over tiles whose sums ran over
    running  whether scores are measured against a running maximum; if not, against one key's
    shifted  whether that may be another key's than the first, which then has a weight other than 1
    base     how pointers that it steps from end: k_ptr or k_head
    """

    again: bool
    running: bool
    shifted: bool
    base: str

    @property
    def scaled(self) -> str:
        """What a sum is scaled by before it is added to."""
        return " * alpha[:, None]" if self.running else ""


@dataclass(frozen=True)
class ForwardForm(TileForm):
    """The forward's.

    fixed  whether scores are measured against those of one key: the first, or with a window each row's own; of rows
           that see few keys, against the largest. A second kernel does tiles again whose sums ran over
    """

    fixed: bool

    @property
    def first(self) -> Pass:
        """forward_kernel's."""
        return Pass(False, not self.fixed, self.spec.causal and self.fixed, "_ptr")

    @property
    def again(self) -> Pass:
        """fixup_kernel's."""
        return Pass(True, True, False, "_head")

    @property
    def again_options(self) -> tuple[str, ...]:
        """What its launch takes besides arguments."""
        return (f"num_warps={self.config.num_warps}", "num_stages=1", "enable_fp_fusion=True")

    @property
    def last(self) -> str:
        return "last[:, None]"

    @property
    def last_kept(self) -> bool:
        return True

    @property
    def keys_may_lack(self) -> bool:
        """Whether a row may see no key."""
        return self.spec.causal or self.spec.varlen

    @property
    def span(self) -> str:
        """The keys that a program steps over: the first one is taken before."""
        return "start + 1, end" if self.spec.window else "1, end" if self.spec.causal else "1, seqlen_kv"

    @property
    def of_first_key(self) -> list[tuple[str, Piece]]:
        """Pieces that are loaded of the first key and of its value, in order."""
        if self.halves:
            return [*(("k", piece) for piece in self.pieces), *(("v", piece) for piece in self.summed)]
        return [(name, piece) for piece in self.pieces for name in "kv"]

    @property
    def first_end(self) -> str:
        """head_dim, by name where it has one."""
        return "HEAD_DIM" if self.head_dim_named else str(self.spec.head_dim)

    @property
    def left_out(self) -> str:
        return "out, t_mean and v_mean are 0, and lse is -inf," if self.spec.stats else "out is 0"


@dataclass(frozen=True)
class GradientForm(TileForm):
    """dkdv's and dqdr's.

    mask   the config's MASK: "after_exp" or "before_exp", in blocks that the diagonal or a window's edge crosses;
           "after_exp always", in every block; "" for none
    apart  whether each number of a query row is loaded where it is used
    """

    mask: str
    apart: bool = False

    @property
    def keeps_slope(self) -> bool:
        return True

    @property
    def marks(self) -> bool:
        return self.mask != "after_exp always"

    @property
    def span(self) -> str:
        """What a program steps over."""
        if self.op.owns_keys:
            return "start, end" if self.spec.window else "start, seqlen_q" if self.spec.causal else "0, seqlen_q"
        return "start, end" if self.spec.window else "0, end" if self.spec.causal else "0, seqlen_kv"

    @property
    def stats_head(self) -> str:
        """Which of all heads of a dense batch this is: what preprocess left lies head after head."""
        grouped = self.op.owns_keys and self.spec.group > 1
        return "(batch * kv_heads * GROUP + head)" if grouped else "bh.to(tl.int64)"
