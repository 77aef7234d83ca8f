"""A row of head_dim numbers as tensor cores can take it: tiles whose widths are powers of two."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Some neighbouring dimensions of a head: those from `start`, `width` of them, of which `real` are there.

    suffix  of the names of this piece's tiles: "" where there is only one piece
    dims    the name of its dimensions' numbers
    """

    suffix: str
    start: int
    width: int
    real: int
    dims: str

    @property
    def padded(self) -> bool:
        return self.real < self.width


def power_of_2(size: int) -> int:
    """The least one that is no less."""
    return 1 << (size - 1).bit_length()


def pieces_of(head_dim: int, how: str) -> list[Piece]:
    """The pieces of a head: `how` is "whole", "padded" or "pieces" (96 = 64 + 32), as a config's HEAD_DIM_AS.

    No piece is narrower than 16, the least that tensor cores take, so the last one may be padded.
    """
    if how != "pieces":
        width = max(16, power_of_2(head_dim))
        return [Piece("", 0, width, head_dim, "dims")]
    left = -(-head_dim // 16) * 16
    found: list[Piece] = []
    start = 0
    while left:
        width = 1 << (left.bit_length() - 1)
        suffix = f"_{len(found)}"
        found.append(Piece(suffix, start, width, min(width, head_dim - start), f"dims{suffix}"))
        start, left = start + width, left - width
    return found


def forms_of(head_dim: int) -> tuple[str, ...]:
    """The values that HEAD_DIM_AS may have. Tensor cores want 16 numbers at the least."""
    in_sixteens = -(-head_dim // 16) * 16
    if in_sixteens & (in_sixteens - 1):
        return ("pieces", "padded")
    if head_dim != in_sixteens:
        return ("padded",)
    return ("whole", "halves") if head_dim > 128 else ("whole",)


def width_of(head_dim: int, form: str) -> int:
    """What a row of head_dim numbers takes in a tile, of the form HEAD_DIM_AS: padding counts."""
    return max(16, power_of_2(head_dim)) if form == "padded" else -(-head_dim // 16) * 16
