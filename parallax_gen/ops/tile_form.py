"""The values that the templates of forward, dkdv and dqdr derive from a spec and a config: sizes, names, conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from parallax_gen.ops.pieces import Piece, power_of_2
from parallax_gen.ops.signature import SOFTCAP_ABOUT, Constant, Padding
from parallax_gen.ops.tiles import TileConfig, TiledOp, programs_per_tile
from parallax_gen.problem.spec import KernelSpec

PRECISIONS = {"fp32": ', input_precision="ieee"', "tf32": ', input_precision="tf32"'}


class Side(NamedTuple):
    """The kernels' names for query rows, or for keys.

    of      the tensor whose rows they are
    row     the letter of the row stride
    rows    their indices
    inside  the mask of the indices within a sequence
    block   the number in a tile
    length  the number in a sequence
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
    """The base of the forms of all three ops. A program owns a tile of one side and steps over blocks of the other.

    pieces   the pieces of a head, over which scores are summed
    summed   the pieces whose outputs a program accumulates: all, or with HEAD_DIM_LAYOUT "split" its half
    vectors  the kernel's names for the tensors whose rows of head_dim elements it writes
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
        """The side that a program owns a tile of."""
        return KEYS if self.op.owns_keys else QUERIES

    @property
    def stepped(self) -> Side:
        """The side that it steps over."""
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
        """The index that broadcasts one number per query row over a tile of scores."""
        return "[None, :]" if self.op.owns_keys else "[:, None]"

    @property
    def by_key(self) -> str:
        """The index that broadcasts one number per key over it."""
        return "[:, None]" if self.op.owns_keys else "[None, :]"

    @property
    def last(self) -> str:
        """The last key that each row sees, to broadcast over a tile of scores."""
        return f"rows{self.by_row} + shift"

    @property
    def last_before_loop(self) -> bool:
        """Whether the last keys are computed before the loop, not at each use."""
        return False

    @property
    def keeps_slope(self) -> bool:
        """Whether the derivative of capped scores is needed."""
        return False

    @property
    def masks_some_blocks(self) -> bool:
        """Whether a mask is put on some blocks alone."""
        return True

    @property
    def crossed(self) -> str:
        """The condition, in the loop, that some row does not see some key of a block."""
        if self.op.owns_keys:
            return "(i < sees_last) | (i + BLOCK_M - 1 > sees_first)" if self.spec.window else "i < sees_last"
        if not self.spec.causal:
            return "n + BLOCK_N > seqlen_kv"
        return "(n + BLOCK_N > seen_by_all) | (n < unseen_by_some)" if self.spec.window else "n + BLOCK_N > seen_by_all"

    # -- heads in pieces, and matmuls

    @property
    def halves(self) -> bool:
        """Whether two programs share a tile and each sums one half of the dimensions."""
        return programs_per_tile(self.config) == 2

    @property
    def head_dim_named(self) -> bool:
        """Whether kernels have the constant HEAD_DIM: if a tile is as wide, or the last piece is padded."""
        return len(self.pieces) == 1 or self.pieces[-1].padded

    @property
    def dims(self) -> tuple[Piece, ...]:
        """One piece for each name of dimension indices."""
        return tuple({piece.dims: piece for piece in (*self.pieces, *self.summed)}.values())

    @property
    def casts(self) -> bool:
        """Whether fp32 results are cast to 16 bits for the next matmul."""
        return self.spec.bytes_per_element == 2

    @property
    def precision(self) -> str:
        """The argument for the precision of matmuls with fp32 operands."""
        return PRECISIONS.get(self.spec.dtype, "")

    def constants(self, grouped: bool = True) -> list[Constant]:
        """The constants of a kernel. grouped: whether it launches the tiles of GROUP_HEADS heads together."""
        spec, config = self.spec, self.config
        owned, stepped = "per program", "per iteration"
        rows, keys = (stepped, owned) if self.op.owns_keys else (owned, stepped)
        constants = [Constant("HEAD_DIM", spec.head_dim)] if self.head_dim_named else []
        if self.halves:
            about = "dimensions per program: two programs share a tile"
            constants.append(Constant("HALF", spec.head_dim // 2, about))
        constants.append(Constant("BLOCK_M", config.BLOCK_M, f"query rows {rows}"))
        constants.append(Constant("BLOCK_N", config.BLOCK_N, f"keys {keys}"))
        if spec.group > 1:
            constants.append(Constant("GROUP", spec.group, "query heads per kv head"))
        if grouped and config.GROUP_HEADS > 1:
            kind = "kv" if self.op.owns_keys else "query"
            constants.append(
                Constant("GROUP_HEADS", config.GROUP_HEADS, f"{kind} heads whose tiles are launched together")
            )
        return constants

    # -- launches

    @property
    def last_first(self) -> bool:
        """Whether the tiles of a head are launched in reverse order."""
        return self.op.last_first(self.spec)

    @property
    def counts_tiles(self) -> bool:
        """Whether a program needs to know how many tiles there are."""
        return self.config.GROUP_HEADS > 0 or self.last_first

    @property
    def kernel_length(self) -> str:
        """The length that determines the number of tiles, in a kernel: that of the longest sequence."""
        return "max_seqlen" if self.spec.varlen else self.owned.length

    @property
    def launch_length(self) -> str:
        """That length in `launch`."""
        return f"max_seqlen_{self.owned.of}" if self.spec.varlen else self.owned.length

    @property
    def programs(self) -> str:
        """The number of programs of a launch."""
        return f"{'2 * ' * self.halves}tiles * batch * {self.op.heads}"

    @property
    def options(self) -> tuple[str, ...]:
        """The launch's options after the arguments."""
        config = self.config
        limit = (f"maxnreg={config.maxnreg}",) * (config.maxnreg > 0)
        return (f"num_warps={config.num_warps}", f"num_stages={config.num_stages}", *limit, "enable_fp_fusion=True")

    # -- packed sequences, and what `launch` says of its arguments

    @property
    def padding(self) -> Padding:
        """What the kernel writes to rows of no sequence."""
        spec, width = self.spec, power_of_2(self.spec.head_dim)
        return Padding(self.vectors, self.owned.row, self.owned.of, spec.stats, width, width != spec.head_dim)

    @property
    def q(self) -> str:
        """The description of q and of tensors like it."""
        heads = "heads" if self.spec.group == 1 else f"kv_heads*{self.spec.group}"
        return self._tensor(QUERIES, heads)

    @property
    def k(self) -> str:
        """The description of k and of tensors like it."""
        return self._tensor(KEYS, "heads" if self.spec.group == 1 else "kv_heads")

    def _tensor(self, side: Side, heads: str) -> str:
        rows = f"total_{side.of}" if self.spec.varlen else f"batch, {side.length}"
        dtype = "fp32" if self.spec.dtype == "tf32" else self.spec.dtype
        return f"({rows}, {heads}, {self.spec.head_dim}) {dtype}"

    @property
    def sizes_about(self) -> list[tuple[str, str]]:
        """The descriptions of lengths and integers that `launch` takes."""
        about = []
        if self.spec.varlen:
            where = "the first row of each sequence in q and in k, and the end of the last one"
            about.append(("cu_seqlens", f"(batch + 1,) int32: {where}"))
            about.append(("", f"{self.left_out} in rows of no sequence"))
            about.append((f"max_seqlen_{self.owned.of}", "at least the length of the longest sequence"))
        if self.spec.softcap:
            about.append(("softcap", SOFTCAP_ABOUT))
        if self.spec.window:
            about.append(("window_size", "the number of last keys that a query sees, 1 or more"))
        return about

    @property
    def left_out(self) -> str:
        """What the kernel writes to rows of no sequence, in words."""
        return f"{' and '.join(self.vectors)} are 0"


def tile_fields(
    op: TiledOp[Any], spec: KernelSpec, config: TileConfig, vectors: tuple[str, ...]
) -> tuple[TiledOp[Any], KernelSpec, TileConfig, tuple[Piece, ...], tuple[Piece, ...], tuple[str, ...]]:
    """The fields of a TileForm, in order."""
    pieces, summed = op.scored_and_summed(spec.head_dim, config.HEAD_DIM_LAYOUT)
    return op, spec, config, tuple(pieces), tuple(summed), vectors


@dataclass(frozen=True)
class ForwardKernel:
    """The variant of the tile computation in forward_kernel or fixup_kernel.

    fixup    whether it is fixup_kernel's, which loops over the tiles whose sums overflowed
    running  whether a row's running maximum is subtracted from its scores; if not, the score of one key, the reference
    shifted  whether the reference may be another key than the first, whose weight is then not 1
    base     the suffix of the pointers that it steps from: k_ptr or k_head
    """

    fixup: bool
    running: bool
    shifted: bool
    base: str

    @property
    def scaled(self) -> str:
        """The factor that rescales a sum before the next term is added."""
        return " * alpha[:, None]" if self.running else ""


@dataclass(frozen=True)
class ForwardForm(TileForm):
    """The form of the forward.

    fixed  whether SOFTMAX is "fixed_reference": the reference is the first key, or with a window each row's own key;
           rows that see few keys subtract their largest score. fixup_kernel recomputes tiles whose sums overflowed
    """

    fixed: bool

    @property
    def main(self) -> ForwardKernel:
        """The variant in forward_kernel."""
        return ForwardKernel(False, not self.fixed, self.spec.causal and self.fixed, "_ptr")

    @property
    def fixup(self) -> ForwardKernel:
        """The variant in fixup_kernel."""
        return ForwardKernel(True, True, False, "_head")

    @property
    def fixup_options(self) -> tuple[str, ...]:
        """The options of fixup_kernel's launch."""
        return (f"num_warps={self.config.num_warps}", "num_stages=1", "enable_fp_fusion=True")

    @property
    def last(self) -> str:
        return "last[:, None]"

    @property
    def last_before_loop(self) -> bool:
        return True

    @property
    def rows_may_see_no_key(self) -> bool:
        """Whether some row may see no key."""
        return self.spec.causal or self.spec.varlen

    @property
    def span(self) -> str:
        """The range of keys that a program steps over: without the first key, if that precedes the loop."""
        if self.spec.accurate:
            return "start, end" if self.spec.window else "0, end" if self.spec.causal else "0, seqlen_kv"
        return "start + 1, end" if self.spec.window else "1, end" if self.spec.causal else "1, seqlen_kv"

    @property
    def of_first_key(self) -> list[tuple[str, Piece]]:
        """The pieces of the first key and its value that are loaded, in order."""
        if self.halves:
            return [*(("k", piece) for piece in self.pieces), *(("v", piece) for piece in self.summed)]
        return [(name, piece) for piece in self.pieces for name in "kv"]

    @property
    def first_end(self) -> str:
        """head_dim: by name if kernels have the constant."""
        return "HEAD_DIM" if self.head_dim_named else str(self.spec.head_dim)

    @property
    def left_out(self) -> str:
        return "out, t_mean and v_mean are 0, and lse is -inf," if self.spec.stats else "out is 0"


@dataclass(frozen=True)
class GradientForm(TileForm):
    """The form of dkdv and dqdr.

    mask            the config's MASK: "after_exp" or "before_exp", in blocks that the diagonal or a window's edge
                    crosses; "after_exp always", in every block; "" for no mask
    separate_stats  whether each statistic of a query row is loaded where it is used
    """

    mask: str
    separate_stats: bool = False

    @property
    def keeps_slope(self) -> bool:
        return True

    @property
    def masks_some_blocks(self) -> bool:
        return self.mask != "after_exp always"

    @property
    def span(self) -> str:
        """The range that a program steps over."""
        if self.op.owns_keys:
            return "start, end" if self.spec.window else "start, seqlen_q" if self.spec.causal else "0, seqlen_q"
        return "start, end" if self.spec.window else "0, end" if self.spec.causal else "0, seqlen_kv"

    @property
    def stats_head(self) -> str:
        """The index of a head among all heads of a dense batch, in which order preprocess writes row statistics."""
        grouped = self.op.owns_keys and self.spec.group > 1
        return "(batch * kv_heads * GROUP + head)" if grouped else "bh.to(tl.int64)"
