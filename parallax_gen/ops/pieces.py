"""Splits a row of head_dim elements into tiles that tensor cores can take: their widths are powers of two."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A range of a head's dimensions: `width` of them from `start`, padded if only `real` of them exist.

    suffix  of the names of this piece's tiles; "" if there is only one piece
    dims    the kernel's name for the indices of its dimensions
    size    its width as kernels write it: by name if it has one
    begin   its start as kernels write it: "" for 0
    about   the kernel's comment on its dimensions
    """

    suffix: str
    start: int
    width: int
    real: int
    dims: str
    size: str
    begin: str = ""
    about: str = ""

    @property
    def padded(self) -> bool:
        return self.real < self.width

    @property
    def in_head(self) -> str:
        """The part of a tile's mask that hides the padding of a padded piece."""
        return f" & in_head{self.suffix}" if self.padded else ""


def power_of_2(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def pieces_of(head_dim: int, head_dim_layout: str) -> list[Piece]:
    """The pieces of a head in the layout "native", "padded" or "chunked" (96 = 64 + 32), a config's HEAD_DIM_LAYOUT.

    No piece is narrower than 16, the least that tensor cores take, so the last one may be padded.
    """
    if head_dim_layout != "chunked":
        width = max(16, power_of_2(head_dim))
        return [Piece("", 0, width, head_dim, "dims", "HEAD_DIM" if width == head_dim else str(width))]
    left = -(-head_dim // 16) * 16
    pieces: list[Piece] = []
    start = 0
    while left:
        width = 1 << (left.bit_length() - 1)
        suffix = f"_{len(pieces)}"
        real = min(width, head_dim - start)
        pieces.append(Piece(suffix, start, width, real, f"dims{suffix}", str(width), str(start or "")))
        start, left = start + width, left - width
    return pieces


def half_of(head_dim: int, suffix: str = "") -> Piece:
    """The half of a wide head that a program sums, if two programs share a tile. `half` is known only at run time."""
    width = head_dim // 2
    about = "the dimensions that this program sums"
    return Piece(suffix, 0, width, width, "mine", "HALF", "half * HALF", about)


def other_half_of(head_dim: int) -> Piece:
    """The half that the other program sums; `start` is right for the first program."""
    width = head_dim // 2
    about = "those that it needs for scores alone"
    return Piece("_other", width, width, width, "others", "HALF", "(1 - half) * HALF", about)


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
