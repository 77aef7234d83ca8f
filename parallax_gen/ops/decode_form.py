"""The config of both decode ops, and what their templates derive from it and a spec; decode_varlen_form has more."""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.pieces import power_of_2
from parallax_gen.ops.signature import Constant
from parallax_gen.problem.spec import KernelSpec


@dataclass(frozen=True)
class DecodeConfig(KernelConfig):
    """Choices of decode.

    BLOCK_N      keys a program takes a step
    BLOCK_H      query heads a program serves, or (query, head) pairs: their queries and probes fill one tile of
                 2*BLOCK_H rows
    NUM_SPLITS   programs that share one sequence's keys; on the average where each has its own length
    merge        who joins the splits: "none" (one split), "last" (the last to arrive), "kernel" (a second kernel)
    num_warps    warps a program
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
    """Sizes, facts and short texts that the templates of both decode ops derive from a spec and a config."""

    spec: KernelSpec
    config: DecodeConfig

    @property
    def width(self) -> int:
        """The width of a row in a tile: a power of two, with an 8-bit cache at least 64: 16 words of four numbers."""
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
        """The mask of a store of one row, which leaves out the padding."""
        return ", mask=dims < HEAD_DIM" if self.padded else ""

    @property
    def short(self) -> bool:
        """Whether a tile holds 8 queries and 8 probes. A taller one takes such eights in turn."""
        return self.config.BLOCK_H == 8

    @property
    def tiles(self) -> int:
        """How many tiles the heads of a group fill, with one query each."""
        return -(-self.spec.group // self.config.BLOCK_H)

    @property
    def tiled(self) -> bool:
        """Whether a sequence can have several tiles."""
        return self.spec.many_queries or self.tiles > 1

    @property
    def heads(self) -> str:
        """The number of query heads, as the docstring of `launch` writes it."""
        return f"kv_heads*{self.spec.group}" if self.spec.group > 1 else "heads"

    @property
    def kv_heads(self) -> str:
        """The number of kv heads, as it writes that."""
        return "kv_heads" if self.spec.group > 1 else "heads"

    @property
    def precision(self) -> str:
        """An argument for matmuls of fp32: tensor cores would round the operands to tf32."""
        return ', input_precision="ieee"' if self.spec.dtype == "fp32" else ""

    @property
    def as_value(self) -> str:
        """The cast of probabilities to the type of values, for the second matmul."""
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
        """How many numbers the partial state of a row has: o1 and o2, and m, d1, d2 padded to four."""
        return 2 * self.spec.head_dim + 4

    @property
    def merge_warps(self) -> int:
        """Warps of a program that joins splits."""
        return self.config.num_warps if self.config.merge == "last" else 4

    @property
    def vectors_held(self) -> int:
        """How many partial vectors such a program holds at a time: they take at most 64 registers a thread."""
        return 64 * 32 * self.merge_warps // self.width


@dataclass(frozen=True)
class DecodeForm(CacheForm):
    """The same for decode alone: each sequence has one query, and all sequences have one length."""

    @property
    def dims(self) -> str:
        """The width of a row as the kernel writes it."""
        return str(self.width) if self.padded else "HEAD_DIM"

    @property
    def key_mask(self) -> str:
        """Hides the padding of keys and values. A mask of keys would cost registers, and slow some lengths down."""
        return ", mask=in_head[None, :], other=0.0" if self.padded else ""

    @property
    def group_at(self) -> str:
        """The name of the number that counts kv heads, sequence by sequence."""
        return "kv_bh" if self.tiled else "bh"

    @property
    def row0(self) -> str:
        """Comes before the number of a head in its tile, and makes it the number in the group."""
        return "head0 + " if self.tiled else ""

    @property
    def keys(self) -> tuple[str, str]:
        """Where the keys of a program begin and end."""
        return ("start", "end") if self.split else ("0", "seqlen_kv")

    @property
    def splits_width(self) -> int:
        """NUM_SPLITS, rounded up to a power of two for a tile."""
        return power_of_2(self.config.NUM_SPLITS)

    @property
    def chunk(self) -> int:
        """How many splits' vectors are joined at a time."""
        return min(self.splits_width, max(self.vectors_held, 1))

    @property
    def chunked(self) -> bool:
        """Whether joining takes several chunks."""
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
        """How many programs `launch` starts."""
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
