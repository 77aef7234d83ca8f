"""The values that the templates of forward, dkdv and dqdr derive from a spec and a config: sizes, names, conditions.

The forward's own are in forward_form.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parallax_gen.ops.base import PADDED_TO_IN_KERNELS
from parallax_gen.ops.descriptors import Descriptor
from parallax_gen.ops.head_dim import Chunk, width_of
from parallax_gen.ops.signature import SOFTCAP_ABOUT, Constant, Index, Padding, dim_constants
from parallax_gen.ops.tiles import TileConfig, TiledOp, programs_per_tile
from parallax_gen.problem.shapes import Shape
from parallax_gen.problem.spec import KernelSpec

PRECISIONS = {"fp32": ', input_precision="ieee"', "tf32": ', input_precision="tf32"'}


@dataclass(frozen=True)
class Side(Index):
    """Query rows, or keys.

    tensor  the input that has them as rows
    length  the kernels' name for their number in a sequence
    """

    tensor: str
    length: str


QUERIES = Side("m", "q", "seqlen_q")
KEYS = Side("n", "k", "seqlen_kv")


@dataclass(frozen=True)
class TileForm:
    """The base of the forms of all three ops. A program owns a tile of one side and streams blocks of the other.

    score_chunks   the chunks of a head, over which scores are summed
    output_chunks  the chunks whose outputs a program accumulates: all, or with HEAD_DIM_LAYOUT "split" its half
    vectors        the kernel's names for the tensors whose rows of head_dim elements it writes
    """

    op: TiledOp[Any]
    spec: KernelSpec
    config: TileConfig
    score_chunks: tuple[Chunk, ...]
    output_chunks: tuple[Chunk, ...]
    vectors: tuple[str, ...]

    # -- sides

    @property
    def owned(self) -> Side:
        """The side that a program owns a tile of."""
        return KEYS if self.op.owns_keys else QUERIES

    @property
    def streamed(self) -> Side:
        """The side that it streams."""
        return QUERIES if self.op.owns_keys else KEYS

    @property
    def owned_head(self) -> str:
        """The index of the head whose tile it owns."""
        return "kv_head" if self.op.owns_keys else "head"

    @property
    def streamed_head(self) -> str:
        """The index of the head whose rows, or keys, it streams."""
        if self.spec.group == 1:
            return self.owned_head
        return "head" if self.op.owns_keys else "head // GROUP"

    @property
    def tile_shape(self) -> str:
        """The shape of a tile of scores, whose rows are those of the owned side: for comments."""
        return f"[{self.owned.block}, {self.streamed.block}]"

    @property
    def broadcast_rows(self) -> str:
        """The index that broadcasts one number per query row over a tile of scores."""
        return "[None, :]" if self.op.owns_keys else "[:, None]"

    @property
    def broadcast_keys(self) -> str:
        """The index that broadcasts one number per key over a tile of scores."""
        return "[:, None]" if self.op.owns_keys else "[None, :]"

    @property
    def last_key(self) -> str:
        """The last key that each row sees, broadcast over a tile of scores."""
        return f"offs_m{self.broadcast_rows} + causal_offset"

    @property
    def last_key_before_loop(self) -> bool:
        """Whether the last keys are computed before the loop, not at each use."""
        return False

    @property
    def needs_slope(self) -> bool:
        """Whether the derivative of capped scores is needed."""
        return False

    @property
    def stacks_qr(self) -> bool:
        """Whether rows of q and r are stacked in one tile, so that one matmul gives s and t."""
        return getattr(self.config, "QR_TILE", "separate") == "stacked"

    @property
    def by_descriptors(self) -> bool:
        """Whether blocks are loaded by descriptors."""
        return bool(self.descriptors)

    @property
    def descriptors(self) -> tuple[Descriptor, ...]:
        """The descriptors that `launch` makes."""
        return self.op.descriptors(self.spec, self.config)

    @property
    def describes_qr(self) -> bool:
        """Whether a descriptor has q and r as the two parts of one tensor."""
        return any(descriptor.stacks_qr for descriptor in self.descriptors)

    def descriptor_of(self, name: str, chunk: Chunk) -> str:
        """The name of the descriptor that loads a chunk of the tiles `name`: q, or qr for q and r stacked."""
        tensors = tuple(name) if name == "qr" else (name,)
        return next(d.name for d in self.descriptors if (d.tensors, d.width) == (tensors, chunk.width))

    @property
    def masks_edge_blocks_only(self) -> bool:
        """Whether only blocks that the diagonal or a window's edge crosses are masked, not every block."""
        return True

    @property
    def block_needs_mask(self) -> str:
        """The condition, in the loop, that some row does not see some key of a block."""
        if self.op.owns_keys:
            before, after = "start_m < unmasked_begin", "start_m + BLOCK_M - 1 > unmasked_last"
            return f"({before}) | ({after})" if self.spec.window else before
        if not self.spec.causal:
            return "start_n + BLOCK_N > seqlen_kv"
        before, after = "start_n < unmasked_begin", "start_n + BLOCK_N > unmasked_end"
        return f"({after}) | ({before})" if self.spec.window else after

    # -- heads in chunks, and matmuls

    @property
    def splits_head_dim(self) -> bool:
        """Whether two programs share a tile and each accumulates one half of head_dim."""
        return programs_per_tile(self.config) == 2

    @property
    def names_head_dim(self) -> bool:
        """Whether kernels have the constant HEAD_DIM: if a tile is as wide, or the last chunk is padded."""
        return len(self.score_chunks) == 1 or self.score_chunks[-1].padded

    @property
    def indexed_chunks(self) -> tuple[Chunk, ...]:
        """One chunk for each name of dimension indices."""
        return tuple({chunk.offs_d: chunk for chunk in (*self.score_chunks, *self.output_chunks)}.values())

    @property
    def casts_operands(self) -> bool:
        """Whether fp32 results are cast to 16 bits for the next matmul."""
        return self.spec.bytes_per_element == 2

    @property
    def dot_precision(self) -> str:
        """The argument for the precision of matmuls with fp32 operands."""
        return PRECISIONS.get(self.spec.dtype, "")

    def constants(self, grouped: bool = True) -> list[Constant]:
        """The constants of a kernel. grouped: whether it launches the tiles of GROUP_HEADS heads together."""
        spec, config = self.spec, self.config
        owned, streamed = "per program", "per iteration"
        rows, keys = (streamed, owned) if self.op.owns_keys else (owned, streamed)
        row_width = width_of(spec.head_dim, config.HEAD_DIM_LAYOUT) if len(self.score_chunks) == 1 else spec.head_dim
        constants = list(dim_constants(spec.head_dim, row_width)) if self.names_head_dim else []
        if self.splits_head_dim:
            about = "dimensions per program: two programs share a tile"
            constants.append(Constant("HALF_DIM", spec.head_dim // 2, about))
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
    def reverses_tiles(self) -> bool:
        """Whether the tiles of a head are launched in reverse order."""
        return self.op.reverses_tiles(self.spec)

    @property
    def needs_num_tiles(self) -> bool:
        """Whether a program needs to know how many tiles there are."""
        return self.config.GROUP_HEADS > 0 or self.reverses_tiles

    @property
    def length_in_kernel(self) -> str:
        """The length that determines the number of tiles, in a kernel: that of the longest sequence."""
        return "max_seqlen" if self.spec.varlen else self.owned.length

    @property
    def length_in_launch(self) -> str:
        """That length in `launch`."""
        return f"max_seqlen_{self.owned.tensor}" if self.spec.varlen else self.owned.length

    @property
    def grid(self) -> str:
        """The number of programs of a launch; `programs_of` computes it."""
        return f"{'2 * ' * self.splits_head_dim}num_tiles * batch * {self.op.heads}"

    @property
    def launch_options(self) -> tuple[str, ...]:
        """The launch's options after the arguments."""
        config = self.config
        limit = (f"maxnreg={config.maxnreg}",) * (config.maxnreg > 0)
        return (f"num_warps={config.num_warps}", f"num_stages={config.num_stages}", *limit, "enable_fp_fusion=True")

    # -- packed sequences, and what `launch` says of its arguments

    @property
    def padding(self) -> Padding:
        """What the kernel writes to rows of no sequence."""
        owned, spec = self.owned, self.spec
        return Padding(self.vectors, owned.letter, owned.tensor, spec.stats, spec.head_dim)

    @property
    def q_doc(self) -> str:
        """The description of q and of tensors like it."""
        heads = "heads" if self.spec.group == 1 else f"kv_heads*{self.spec.group}"
        return self._tensor(QUERIES, heads)

    @property
    def k_doc(self) -> str:
        """The description of k and of tensors like it."""
        return self._tensor(KEYS, "heads" if self.spec.group == 1 else "kv_heads")

    def _tensor(self, side: Side, heads: str) -> str:
        rows = f"total_{side.tensor}" if self.spec.varlen else f"batch, {side.length}"
        dtype = "fp32" if self.spec.dtype == "tf32" else self.spec.dtype
        return f"({rows}, {heads}, {self.spec.head_dim}) {dtype}"

    @property
    def argument_docs(self) -> list[tuple[str, str]]:
        """The descriptions of lengths and integers that `launch` takes."""
        about = self._descriptor_docs
        if self.spec.varlen:
            where = "the first row of each sequence in q, and the end of the last one"
            about.append(("cu_seqlens_q", f"(batch + 1,) int32: {where}"))
            about.append(("cu_seqlens_k", "the same for k"))
            about.append(("", f"In rows that belong to no sequence {self.padding_rows_doc}"))
            most = "keys" if self.op.owns_keys else "queries"
            about.append((f"max_seqlen_{self.owned.tensor}", f"at least the number of {most} of the longest sequence"))
        if self.spec.softcap:
            about.append(("softcap", SOFTCAP_ABOUT))
        if self.spec.window:
            about.append(("window_size", "a query sees its last window_size keys; 1 or more"))
        return about

    @property
    def _descriptor_docs(self) -> list[tuple[str, str]]:
        """What descriptors require of the tensors that they describe."""
        if not self.descriptors:
            return []
        *others, last = dict.fromkeys(tensor for descriptor in self.descriptors for tensor in descriptor.tensors)
        what = f"{', '.join(others)} and {last}"
        same = [("", "q and r have the same strides, and q is at the lower address")] * self.describes_qr
        return [("", f"{what} start at multiples of 16 bytes, as do their rows, heads and sequences"), *same]

    @property
    def padding_rows_doc(self) -> str:
        """What the kernel writes to rows of no sequence, in words."""
        return f"{' and '.join(self.vectors)} are 0"


def programs_of(op: TiledOp[Any], config: TileConfig, shape: Shape) -> int:
    """The number of programs of a launch: the value of `TileForm.grid`."""
    heads, length = (shape.kv_heads, shape.seqlen_kv) if op.owns_keys else (shape.heads, shape.seqlen_q)
    num_tiles = -(-length // op.owned_and_streamed(config)[0])
    return programs_per_tile(config) * num_tiles * shape.batch * heads


def tile_fields(
    op: TiledOp[Any], spec: KernelSpec, config: TileConfig, vectors: tuple[str, ...]
) -> tuple[TiledOp[Any], KernelSpec, TileConfig, tuple[Chunk, ...], tuple[Chunk, ...], tuple[str, ...]]:
    """The fields of a TileForm, in order."""
    score_chunks, output_chunks = op.score_and_output_chunks(spec.head_dim, config.HEAD_DIM_LAYOUT)
    return op, spec, config, tuple(score_chunks), tuple(output_chunks), vectors


@dataclass(frozen=True)
class GradientForm(TileForm):
    """The form of dkdv and dqdr.

    mask            the config's MASK: "after_exp" or "before_exp", in blocks that the diagonal or a window's edge
                    crosses; "after_exp always", in every block; "" for no mask
    separate_stats  whether each of a query row's four statistics is loaded where it is used
    """

    mask: str
    separate_stats: bool = False

    @property
    def needs_slope(self) -> bool:
        return True

    @property
    def masks_edge_blocks_only(self) -> bool:
        return self.mask != "after_exp always"

    @property
    def loop_range(self) -> str:
        """The range that a program streams."""
        name, length = ("row", "seqlen_q") if self.op.owns_keys else ("key", "seqlen_kv")
        if self.spec.window:
            return f"{name}_begin, {name}_end"
        if self.spec.causal:
            return f"row_begin, {length}" if self.op.owns_keys else "0, key_end"
        return f"0, {length}"

    def constants(self, grouped: bool = True) -> list[Constant]:
        return [*super().constants(grouped), *(PADDED_TO_IN_KERNELS,) * self.spec.varlen]

    @property
    def stats_head_index(self) -> str:
        """The index of a head among all of a dense batch: the order in which preprocess writes row statistics."""
        grouped = self.op.owns_keys and self.spec.group > 1
        return "(batch * kv_heads * GROUP + head)" if grouped else "bh.to(tl.int64)"
