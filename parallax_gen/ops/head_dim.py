"""Splits a row of head_dim elements into tiles that tensor cores can take: their widths are powers of two."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """A range of a head's dimensions: `width` of them from `start`. `real` of them exist, the rest is padding.

    suffix   of the names of this chunk's tiles; "" if there is only one chunk
    offs_d   the kernel's name for the indices of its dimensions
    size     its width as kernels write it: by name if it has one
    begin    its start as kernels write it: "" for 0
    comment  the kernel's comment on its dimensions
    """

    suffix: str
    start: int
    width: int
    real: int
    offs_d: str
    size: str
    begin: str = ""
    comment: str = ""

    @property
    def padded(self) -> bool:
        return self.real < self.width

    @property
    def and_mask_d(self) -> str:
        """The part of a tile's mask that excludes the padding of a padded chunk."""
        return f" & mask_d{self.suffix}[None, :]" if self.padded else ""


def power_of_2(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def chunks_of(head_dim: int, head_dim_layout: str) -> list[Chunk]:
    """The chunks of a head in the layout "native", "padded" or "chunked" (96 = 64 + 32), a config's HEAD_DIM_LAYOUT.

    No chunk is narrower than 16, the least that tensor cores take, so the last one may be padded.
    """
    if head_dim_layout != "chunked":
        width = max(16, power_of_2(head_dim))
        return [Chunk("", 0, width, head_dim, "offs_d", "HEAD_DIM" if width == head_dim else "PADDED_DIM")]
    left = -(-head_dim // 16) * 16
    chunks: list[Chunk] = []
    start = 0
    while left:
        width = 1 << (left.bit_length() - 1)
        suffix = f"_{len(chunks)}"
        real = min(width, head_dim - start)
        chunks.append(Chunk(suffix, start, width, real, f"offs_d{suffix}", str(width), str(start or "")))
        start, left = start + width, left - width
    return chunks


def this_half_of(head_dim: int, suffix: str = "") -> Chunk:
    """The half of a wide head that a program accumulates, if two share a tile. `half` is known only at run time."""
    width = head_dim // 2
    comment = "the dimensions that this program accumulates"
    return Chunk(suffix, 0, width, width, "offs_d_this", "HALF_DIM", "half * HALF_DIM", comment)


def other_half_of(head_dim: int) -> Chunk:
    """The half that the other program accumulates. `start` is that of the first program's other half."""
    width = head_dim // 2
    comment = "those that it needs for scores alone"
    return Chunk("_other", width, width, width, "offs_d_other", "HALF_DIM", "(1 - half) * HALF_DIM", comment)


def head_dim_layouts(head_dim: int) -> tuple[str, ...]:
    """The possible values of HEAD_DIM_LAYOUT. Tensor cores take no fewer than 16 elements."""
    multiple_of_16 = -(-head_dim // 16) * 16
    if multiple_of_16 & (multiple_of_16 - 1):
        return ("chunked", "padded")
    if head_dim != multiple_of_16:
        return ("padded",)
    return ("native", "split") if head_dim > 128 else ("native",)


def width_of(head_dim: int, head_dim_layout: str) -> int:
    """The width of a row of head_dim elements in a tile, with its padding."""
    return max(16, power_of_2(head_dim)) if head_dim_layout == "padded" else -(-head_dim // 16) * 16
