"""The config of both decode ops, and the values that their templates derive from it and a spec.

decode_varlen_form.py has those that only decode_varlen needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.pieces import power_of_2
from parallax_gen.ops.signature import Constant
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
    def width(self) -> int:
        """The width of a row in a tile: a power of two; with an 8-bit cache at least 64, or 16 words of 4 elements."""
        return power_of_2(max(self.spec.head_dim, 64 if self.spec.cache_dtype else 16))

    @property
    def padded(self) -> bool:
        """Whether a tile's rows are wider than head_dim."""
        return self.width != self.spec.head_dim

    @property
    def in_head(self) -> str:
        """The part of a tile's mask that hides the padding."""
        return " & in_head[None, :]" if self.padded else ""

    @property
    def out_mask(self) -> str:
        """The mask argument of a store of one row, which hides the padding."""
        return ", mask=dims < HEAD_DIM" if self.padded else ""

    @property
    def short(self) -> bool:
        """Whether a tile holds 8 queries and 8 probes. A taller tile alternates 8 queries and 8 probes."""
        return self.config.BLOCK_H == 8

    @property
    def tiles(self) -> int:
        """The number of tiles that the heads of a group fill, with one query each."""
        return -(-self.spec.group // self.config.BLOCK_H)

    @property
    def tiled(self) -> bool:
        """Whether a sequence may have several tiles per kv head."""
        return self.spec.many_queries or self.tiles > 1

    @property
    def heads(self) -> str:
        """The number of query heads, as the docstring of `launch` writes it."""
        return f"kv_heads*{self.spec.group}" if self.spec.group > 1 else "heads"

    @property
    def kv_heads(self) -> str:
        """The number of kv heads, as the docstring of `launch` writes it."""
        return "kv_heads" if self.spec.group > 1 else "heads"

    @property
    def precision(self) -> str:
        """The argument that keeps fp32 matmuls exact: by default tensor cores round the operands to tf32."""
        return ', input_precision="ieee"' if self.spec.dtype == "fp32" else ""

    @property
    def as_value(self) -> str:
        """The cast of probabilities to v's dtype, for the second matmul."""
        return "" if self.spec.dtype == "fp32" else ".to(v.dtype)"

    @property
    def score_scale(self) -> str:
        """The name of the factor of q·k."""
        return "cap_scale" if self.spec.softcap else "scale_log2"

    @property
    def scales(self) -> str:
        """The parameters of `_step` that scores are scaled by."""
        return "cap_scale, scale_log2" if self.spec.softcap else "scale_log2"

    @property
    def split(self) -> bool:
        """Whether several programs share the keys of a sequence."""
        return self.config.NUM_SPLITS > 1

    @property
    def state(self) -> int:
        """The fp32 elements of a row's partial state: o1 and o2, and m, d1, d2 padded to four."""
        return 2 * self.spec.head_dim + 4

    @property
    def merge_warps(self) -> int:
        """Warps of a program that merges splits."""
        return self.config.num_warps if self.config.merge == "last" else 4

    @property
    def vectors_held(self) -> int:
        """How many partial vectors such a program holds at a time, in at most 64 registers per thread."""
        return 64 * 32 * self.merge_warps // self.width


@dataclass(frozen=True)
class DecodeForm(CacheForm):
    """The form of decode alone: one query a sequence, and one length for all sequences."""

    @property
    def dims(self) -> str:
        """The width of a row as the kernel writes it."""
        return str(self.width) if self.padded else "HEAD_DIM"

    @property
    def key_mask(self) -> str:
        """The mask argument that hides the padding of keys and values.

        A mask of keys would cost registers, and slow down some lengths.
        """
        return ", mask=in_head[None, :], other=0.0" if self.padded else ""

    @property
    def group_at(self) -> str:
        """The name of the index of a (sequence, kv head) pair."""
        return "kv_bh" if self.tiled else "bh"

    @property
    def row0(self) -> str:
        """The prefix that turns a head's index in its tile into its index in the group."""
        return "head0 + " if self.tiled else ""

    @property
    def keys(self) -> tuple[str, str]:
        """The first key of a program, and the end of its keys."""
        return ("start", "end") if self.split else ("0", "seqlen_kv")

    @property
    def splits_width(self) -> int:
        """NUM_SPLITS, rounded up to a power of two for a tile."""
        return power_of_2(self.config.NUM_SPLITS)

    @property
    def chunk(self) -> int:
        """How many splits' vectors are merged at a time."""
        return min(self.splits_width, max(self.vectors_held, 1))

    @property
    def chunked(self) -> bool:
        """Whether merging takes several chunks."""
        return self.chunk < self.splits_width

    @property
    def there(self) -> tuple[str, ...]:
        """The mask of a load from all splits, if a tile has room for more."""
        return ("valid",) * (self.splits_width != self.config.NUM_SPLITS)

    @property
    def there_in_chunk(self) -> tuple[str, ...]:
        """The mask of a load from a chunk of splits, if the last chunk has room for more."""
        return ("valid",) * (self.config.NUM_SPLITS % self.chunk > 0)

    @property
    def vectors_there(self) -> tuple[str, ...]:
        """The masks of a load of partial vectors."""
        there = self.there_in_chunk if self.chunked else self.there
        return (*(f"{mask}[:, None]" for mask in there), *("in_head",) * self.padded)

    @property
    def programs(self) -> str:
        """The number of programs that `launch` starts."""
        factors = ("batch", "kv_heads", *[str(self.tiles)] * self.tiled, *["NUM_SPLITS"] * self.split)
        return " * ".join(factors)

    @property
    def constants(self) -> tuple[Constant, ...]:
        """The constants of decode_kernel."""
        return (
            Constant("HEAD_DIM", self.spec.head_dim),
            Constant("GROUP", self.spec.group, "query heads per kv head"),
            Constant("BLOCK_H", self.config.BLOCK_H, "query heads per program"),
            Constant("BLOCK_N", self.config.BLOCK_N, "keys per iteration"),
            *[Constant("NUM_SPLITS", self.config.NUM_SPLITS)] * self.split,
            *[Constant("HEAD_BLOCKS", self.tiles, "programs per group of query heads")] * self.tiled,
        )
