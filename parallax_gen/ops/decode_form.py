"""The config of both decode ops, and the values that their templates derive from it and a spec.

decode_varlen_form.py has those that only decode_varlen needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.head_dim import power_of_2
from parallax_gen.ops.signature import LOWEST_M, MIN_D1, Constant, Index, dim_constants
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class DecodeConfig(KernelConfig):
    """The config of decode and decode_varlen.

    BLOCK_N      keys per step of a program
    BLOCK_H      query heads per program, or (query, head) pairs with multi-token queries: their queries and probes fill
                 one tile of 2*BLOCK_H rows
    NUM_SPLITS   programs that share one sequence's keys; the average number with per-sequence lengths
    merge        what merges the splits: "none" (there is one split), "last" (the last program to arrive), "kernel" (a
                 second kernel)
    num_warps    warps per program
    num_stages   key blocks in flight
    """

    BLOCK_N: int
    BLOCK_H: int
    NUM_SPLITS: int
    merge: str
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class CacheForm:
    """The values and short texts that the templates of both decode ops derive from a spec and a config."""

    spec: KernelSpec
    config: DecodeConfig

    @property
    def row_width(self) -> int:
        """The width of a row in a tile: a power of two; with an 8-bit cache at least 64, or 16 words of 4 elements."""
        return power_of_2(max(self.spec.head_dim, 64 if self.spec.cache_dtype else 16))

    @property
    def padded(self) -> bool:
        """Whether a tile's rows are wider than head_dim."""
        return self.row_width != self.spec.head_dim

    @property
    def row_width_text(self) -> str:
        """The width of a row as the kernel writes it."""
        return "PADDED_DIM" if self.padded else "HEAD_DIM"

    @property
    def dim_constants(self) -> tuple[Constant, ...]:
        """head_dim, and the width of a row if that is another."""
        return dim_constants(self.spec.head_dim, self.row_width)

    @property
    def rows(self) -> Index:
        """A tile's rows: query heads of the group, or with multi-token queries (query, head) pairs of the sequence."""
        return Index("m" if self.spec.multi_token else "h")

    @property
    def masks_rows(self) -> bool:
        """Whether rows of a tile are masked, as there may be more than query heads or (query, head) pairs."""
        return True

    @property
    def and_mask_d(self) -> str:
        """The part of a tile's mask that excludes the padding of its rows."""
        return " & mask_d[None, :]" if self.padded else ""

    @property
    def tile_mask(self) -> str:
        """The mask argument of a store of a tile."""
        masks = [f"{self.rows.mask}[:, None]"] * self.masks_rows + ["mask_d[None, :]"] * self.padded
        return f", mask={' & '.join(masks)}" if masks else ""

    @property
    def rows_mask(self) -> str:
        """The mask argument of a store of one number per row of a tile."""
        return f", mask={self.rows.mask}" if self.masks_rows else ""

    @property
    def out_mask(self) -> str:
        """The mask argument of a store of one row, which excludes its padding."""
        return ", mask=mask_d" if self.padded else ""

    @property
    def is_one_stack(self) -> bool:
        """Whether a tile is one stack of 8 rows of q and the same 8 rows of r. A taller tile repeats such stacks."""
        return self.config.BLOCK_H == 8

    @property
    def tiles_per_group(self) -> int:
        """The number of tiles that the query heads of a kv head fill, with one query each."""
        return -(-self.spec.group // self.config.BLOCK_H)

    @property
    def has_several_tiles(self) -> bool:
        """Whether a sequence may have several tiles per kv head."""
        return self.spec.multi_token or self.tiles_per_group > 1

    @property
    def heads_doc(self) -> str:
        """The number of query heads, as the docstring of `launch` writes it."""
        return f"kv_heads*{self.spec.group}" if self.spec.group > 1 else "heads"

    @property
    def kv_heads_doc(self) -> str:
        """The number of kv heads, as the docstring of `launch` writes it."""
        return "kv_heads" if self.spec.group > 1 else "heads"

    @property
    def dot_precision(self) -> str:
        """The argument that keeps fp32 matmuls exact: by default tensor cores round the operands to tf32."""
        return ', input_precision="ieee"' if self.spec.dtype == "fp32" else ""

    @property
    def is_centered(self) -> bool:
        """Whether t is centered at its running mean before p·t is rounded. In fp32 that would gain little."""
        return self.spec.dtype != "fp32"

    @property
    def min_d1(self) -> Constant:
        """The least divisor of d2. d1 stays 0 where a row sees no key of a block, or all scores overflow to -inf."""
        return MIN_D1

    @property
    def state(self) -> str:
        """The names of the rows' running state, without o."""
        return "m, d1, d2, t_mean" if self.is_centered else "m, d1, d2"

    @property
    def masks_by_row(self) -> bool:
        """Whether the rows of a tile see different keys. Then a row may see none of the first blocks."""
        return False

    @property
    def key_mask_name(self) -> str:
        """The name of the mask of the block's keys that some row sees: `visible` if all rows see the same keys."""
        return "mask_n" if self.masks_by_row else "visible"

    @property
    def visible(self) -> str:
        """Which keys each row sees, [1 or BLOCK_H, BLOCK_N]."""
        return "visible" if self.masks_by_row else "visible[None, :]"

    @property
    def block_comment(self) -> str:
        """A comment with the shape of a block of keys, if it fits on the line."""
        return "" if self.padded or self.spec.cache_dtype else "  # [BLOCK_N, HEAD_DIM]"

    @property
    def score_scale(self) -> str:
        """The name of the factor of q·k."""
        return "cap_scale" if self.spec.softcap else "scale_log2"

    @property
    def scale_parameters(self) -> str:
        """The parameters of `_attend_block` that scores are scaled by."""
        return "cap_scale, scale_log2" if self.spec.softcap else "scale_log2"

    @property
    def is_split(self) -> bool:
        """Whether several programs share the keys of a sequence."""
        return self.config.NUM_SPLITS > 1

    @property
    def floats_per_row(self) -> int:
        """The fp32 elements of a row's state in the split-KV scratch: o1 and o2, and m, d1, d2 padded to four."""
        return 2 * self.spec.head_dim + 4

    @property
    def merge_warps(self) -> int:
        """Warps of a program that merges splits."""
        return self.config.num_warps if self.config.merge == "last" else 4

    @property
    def rows_in_registers(self) -> int:
        """How many splits' rows of o1 or o2 such a program holds at a time, in at most 64 registers per thread."""
        return 64 * 32 * self.merge_warps // self.row_width


@dataclass(frozen=True)
class DecodeForm(CacheForm):
    """The form of decode alone: one query per sequence, and one length for all sequences."""

    @property
    def masks_rows(self) -> bool:
        """Whether the last tile of a group has more rows than query heads.

        decode_varlen always masks rows: without the mask its merge spills a register where a block is a few pages.
        """
        return self.spec.group % self.config.BLOCK_H > 0

    @property
    def key_mask(self) -> str:
        """The mask argument that excludes the padding of keys and values.

        Keys are not masked: that would cost registers, and some lengths would take longer.
        """
        return ", mask=mask_d[None, :], other=0.0" if self.padded else ""

    @property
    def tile(self) -> str:
        """The name of the index of a tile: with one tile per (sequence, kv head) pair, that of the pair."""
        return "tile" if self.has_several_tiles else "bh"

    @property
    def start_plus(self) -> str:
        """The prefix that turns a head's index in its tile into its index in the group."""
        return "start_h + " if self.has_several_tiles else ""

    @property
    def key_range(self) -> tuple[str, str]:
        """The first key of a program, and the end of its keys."""
        return ("key_begin", "key_end") if self.is_split else ("0", "seqlen_kv")

    @property
    def padded_splits(self) -> int:
        """NUM_SPLITS, rounded up to a power of two for a tile."""
        return power_of_2(self.config.NUM_SPLITS)

    @property
    def merge_chunk(self) -> int:
        """How many splits' rows are merged at a time."""
        return min(self.padded_splits, max(self.rows_in_registers, 1))

    @property
    def merges_in_chunks(self) -> bool:
        """Whether merging takes several chunks."""
        return self.merge_chunk < self.padded_splits

    @property
    def all_splits(self) -> str:
        """padded_splits as the kernel writes it."""
        return "PADDED_SPLITS" if self.pads_splits else "NUM_SPLITS"

    @property
    def pads_splits(self) -> bool:
        """Whether padded_splits is more than NUM_SPLITS."""
        return self.padded_splits != self.config.NUM_SPLITS

    @property
    def split_masks(self) -> tuple[str, ...]:
        """The mask of a load from all splits, if a tile has room for more."""
        return ("mask_s",) * self.pads_splits

    @property
    def chunk_masks(self) -> tuple[str, ...]:
        """The mask of a load from a chunk of splits, if the last chunk has room for more."""
        return ("mask_chunk",) * (self.config.NUM_SPLITS % self.merge_chunk > 0)

    @property
    def row_masks(self) -> tuple[str, ...]:
        """The masks of a load of splits' rows of o1 or o2: of splits and of dimensions."""
        masks = self.chunk_masks if self.merges_in_chunks else self.split_masks
        return (*(f"{mask}[:, None]" for mask in masks), *("mask_d[None, :]",) * self.padded)

    @property
    def grid(self) -> str:
        """The number of programs that `launch` starts."""
        tiles, splits = [str(self.tiles_per_group)] * self.has_several_tiles, ["NUM_SPLITS"] * self.is_split
        return " * ".join(("batch", "kv_heads", *tiles, *splits))

    @property
    def constants(self) -> tuple[Constant, ...]:
        """The constants of decode_kernel."""
        return (
            *self.dim_constants,
            Constant("GROUP", self.spec.group, "query heads per kv head"),
            Constant("BLOCK_H", self.config.BLOCK_H, "query heads per program"),
            Constant("BLOCK_N", self.config.BLOCK_N, "keys per iteration"),
            *[Constant("NUM_SPLITS", self.config.NUM_SPLITS), self.head_floats] * self.is_split,
            *[Constant("TILES_PER_GROUP", self.tiles_per_group, "tiles per group of query heads")]
            * self.has_several_tiles,
            LOWEST_M,
        )

    @property
    def head_floats(self) -> Constant:
        """The size of the states of a query head's splits."""
        about = "+ 4: m, d1, d2 and one unused, for 16-byte alignment"
        return Constant("HEAD_FLOATS", "NUM_SPLITS * (2 * HEAD_DIM + 4)", about)

    @property
    def merge_constants(self) -> tuple[Constant, ...]:
        """The constants of the function that merges splits."""
        rounded_up = Constant("PADDED_SPLITS", self.padded_splits, "NUM_SPLITS rounded up to a power of two")
        chunk = Constant("BLOCK_SPLITS", self.merge_chunk, "splits per iteration: as many as fit in registers")
        return (
            *self.dim_constants,
            Constant("NUM_SPLITS", self.config.NUM_SPLITS),
            *[rounded_up] * self.pads_splits,
            *[chunk] * self.merges_in_chunks,
            *[LOWEST_M] * self.pads_splits,
        )

    @property
    def merge_kernel_constants(self) -> tuple[Constant, ...]:
        """The constants of the second kernel."""
        head_floats = Constant(self.head_floats.name, self.head_floats.value)
        return (*self.dim_constants, Constant("NUM_SPLITS", self.config.NUM_SPLITS), head_floats)
