"""The config of both kinds of decode; what both templates derive of it and a spec, and what that of one length does."""

from __future__ import annotations

from dataclasses import dataclass

from parallax_gen.ops.base import KernelConfig
from parallax_gen.ops.pieces import power_of_2
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
class Constant:
    """A named number at the top of a kernel, and what is said of it there."""

    name: str
    value: int | float | str
    about: str = ""

    @property
    def line(self) -> str:
        return f"{self.name}: tl.constexpr = {self.value}" + (f"  # {self.about}" if self.about else "")


@dataclass(frozen=True)
class CacheForm:
    """What the templates of both kinds of decode derive of a spec and a config: sizes, facts, and texts of them."""

    spec: KernelSpec
    config: DecodeConfig

    @property
    def width(self) -> int:
        """What a row takes in a tile: a power of two, and at least 16 words where four numbers are one."""
        return power_of_2(max(self.spec.head_dim, 64 if self.spec.cache_dtype else 16))

    @property
    def padded(self) -> bool:
        """Whether that is more than head_dim."""
        return self.width != self.spec.head_dim

    @property
    def in_head(self) -> str:
        """What a mask of a tile's rows says of dimensions besides."""
        return " & in_head[None, :]" if self.padded else ""

    @property
    def out_mask(self) -> str:
        """Of a store of one row."""
        return ", mask=dims < HEAD_DIM" if self.padded else ""

    @property
    def short(self) -> bool:
        """Whether a tile is 8 queries and 8 probes; else it is such eights in turn."""
        return self.config.BLOCK_H == 8

    @property
    def tiles(self) -> int:
        """Tiles that a group of heads fills with one query each."""
        return -(-self.spec.group // self.config.BLOCK_H)

    @property
    def heads(self) -> str:
        """How many query heads there are, as `launch` says it."""
        return f"kv_heads*{self.spec.group}" if self.spec.group > 1 else "heads"

    @property
    def kv_heads(self) -> str:
        """How many kv heads."""
        return "kv_heads" if self.spec.group > 1 else "heads"

    @property
    def precision(self) -> str:
        """What a matmul says where operands are fp32, which tensor cores would round to tf32."""
        return ', input_precision="ieee"' if self.spec.dtype == "fp32" else ""

    @property
    def as_value(self) -> str:
        """How probabilities enter the second matmul: in the values' type."""
        return "" if self.spec.dtype == "fp32" else ".to(v.dtype)"

    @property
    def split(self) -> bool:
        """Whether several programs share a sequence's keys."""
        return self.config.NUM_SPLITS > 1

    @property
    def merge_warps(self) -> int:
        """Those of a program that joins splits."""
        return self.config.num_warps if self.config.merge == "last" else 4

    @property
    def vectors_held(self) -> int:
        """Partial vectors that such a program can hold at a time: 64 registers a thread at the most."""
        return 64 * 32 * self.merge_warps // self.width


@dataclass(frozen=True)
class DecodeForm(CacheForm):
    """What decode's template derives: one query a sequence, and all sequences of one length."""

    @property
    def dims(self) -> str:
        """A row's width as the kernel writes it."""
        return str(self.width) if self.padded else "HEAD_DIM"

    @property
    def key_mask(self) -> str:
        """Of loads of keys and values. One of keys would cost registers, and make some lengths slower than others."""
        return ", mask=in_head[None, :], other=0.0" if self.padded else ""

    @property
    def group_at(self) -> str:
        """The name of a program's sequence and kv head, as one number."""
        return "kv_bh" if self.tiles > 1 else "bh"

    @property
    def row0(self) -> str:
        """In front of a head's number in its tile, for that in its group."""
        return "head0 + " if self.tiles > 1 else ""

    @property
    def keys(self) -> tuple[str, str]:
        """Where the keys that a program takes begin and end."""
        return ("start", "end") if self.split else ("0", "seqlen_kv")

    @property
    def splits_width(self) -> int:
        """NUM_SPLITS as a tile has it: a power of two."""
        return power_of_2(self.config.NUM_SPLITS)

    @property
    def chunk(self) -> int:
        """Splits whose vectors are joined at a time."""
        return min(self.splits_width, max(self.vectors_held, 1))

    @property
    def chunked(self) -> bool:
        """Whether that is not all of them."""
        return self.chunk < self.splits_width

    @property
    def there(self) -> tuple[str, ...]:
        """The mask of a load from all splits, where a tile has places for more than there are."""
        return ("there",) * (self.splits_width != self.config.NUM_SPLITS)

    @property
    def there_in_chunk(self) -> tuple[str, ...]:
        """The same for a chunk of them."""
        return ("there",) * (self.config.NUM_SPLITS % self.chunk > 0)

    @property
    def vectors_there(self) -> tuple[str, ...]:
        """Masks of a load of partial vectors."""
        there = self.there_in_chunk if self.chunked else self.there
        return (*(f"{mask}[:, None]" for mask in there), *("in_head",) * self.padded)

    @property
    def programs(self) -> str:
        """How many decode_kernel is launched with."""
        factors = ("batch", "kv_heads", *[str(self.tiles)] * (self.tiles > 1), *["NUM_SPLITS"] * self.split)
        return " * ".join(factors)

    @property
    def constants(self) -> tuple[Constant, ...]:
        """Of decode_kernel."""
        return (
            Constant("HEAD_DIM", self.spec.head_dim),
            Constant("GROUP", self.spec.group, "query heads that share a kv head"),
            Constant("BLOCK_H", self.config.BLOCK_H, "of which one program serves so many"),
            Constant("BLOCK_N", self.config.BLOCK_N, "keys it takes a step"),
            *[Constant("NUM_SPLITS", self.config.NUM_SPLITS)] * self.split,
            *[Constant("HEAD_BLOCKS", self.tiles, "programs that serve a group")] * (self.tiles > 1),
        )
