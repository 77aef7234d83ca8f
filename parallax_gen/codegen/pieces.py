"""A row of head_dim numbers as tensor cores can take it: tiles whose widths are powers of two."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Some neighbouring dimensions of a head: those from `start`, `width` of them, of which `real` are there.

    suffix  of the names of this piece's tiles: "" where there is only one piece
    """

    suffix: str
    start: int
    width: int
    real: int

    @property
    def padded(self) -> bool:
        return self.real < self.width


def pieces_of(head_dim: int, how: str) -> list[Piece]:
    """The pieces of a head: `how` is a config's HEAD_DIM_AS, "whole", "padded" or "pieces" (96 = 64 + 32).

    No piece is narrower than 16, the least that tensor cores take, so the last one may be padded.
    """
    if how != "pieces":
        width = max(16, 1 << (head_dim - 1).bit_length())
        return [Piece("", 0, width, head_dim)]
    left = -(-head_dim // 16) * 16
    found: list[Piece] = []
    start = 0
    while left:
        width = 1 << (left.bit_length() - 1)
        found.append(Piece(f"_{len(found)}", start, width, min(width, head_dim - start)))
        start, left = start + width, left - width
    return found
