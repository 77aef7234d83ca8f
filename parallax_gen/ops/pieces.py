"""A row of head_dim numbers as tensor cores can take it: tiles whose widths are powers of two."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Some neighbouring dimensions of a head: those from `start`, `width` of them, of which `real` are there.

    suffix  of the names of this piece's tiles: "" where there is only one piece
    dims    the name of its dimensions' numbers
    size    its width as kernels write it: by name where it has one
    begin   where it begins, as kernels write it: "" for 0
    about   what a kernel says of its dimensions
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
        """What masks add to rows that are there: in a padded piece, dimensions that are."""
        return f" & in_head{self.suffix}" if self.padded else ""


def power_of_2(size: int) -> int:
    """The least one that is no less."""
    return 1 << (size - 1).bit_length()


def pieces_of(head_dim: int, how: str) -> list[Piece]:
    """The pieces of a head: `how` is "native", "padded" or "chunked" (96 = 64 + 32), as a config's HEAD_DIM_LAYOUT.

    No piece is narrower than 16, the least that tensor cores take, so the last one may be padded.
    """
    if how != "chunked":
        width = max(16, power_of_2(head_dim))
        return [Piece("", 0, width, head_dim, "dims", "HEAD_DIM" if width == head_dim else str(width))]
    left = -(-head_dim // 16) * 16
    found: list[Piece] = []
    start = 0
    while left:
        width = 1 << (left.bit_length() - 1)
        suffix = f"_{len(found)}"
        real = min(width, head_dim - start)
        found.append(Piece(suffix, start, width, real, f"dims{suffix}", str(width), str(start or "")))
        start, left = start + width, left - width
    return found


def half_of(head_dim: int, suffix: str = "") -> Piece:
    """The half of a wide head that a program sums, where two share a tile. Which one it is, it learns when it runs."""
    width = head_dim // 2
    about = "the dimensions that this program sums"
    return Piece(suffix, 0, width, width, "mine", "HALF", "half * HALF", about)


def other_half_of(head_dim: int) -> Piece:
    """The other program's; `start` is that of the first program's."""
    width = head_dim // 2
    about = "those that it needs for scores alone"
    return Piece("_other", width, width, width, "others", "HALF", "(1 - half) * HALF", about)


def forms_of(head_dim: int) -> tuple[str, ...]:
    """The values that HEAD_DIM_LAYOUT may have. Tensor cores want 16 numbers at the least."""
    in_sixteens = -(-head_dim // 16) * 16
    if in_sixteens & (in_sixteens - 1):
        return ("chunked", "padded")
    if head_dim != in_sixteens:
        return ("padded",)
    return ("native", "split") if head_dim > 128 else ("native",)


def width_of(head_dim: int, form: str) -> int:
    """What a row of head_dim numbers takes in a tile, of the form HEAD_DIM_LAYOUT: padding counts."""
    return max(16, power_of_2(head_dim)) if form == "padded" else -(-head_dim // 16) * 16
