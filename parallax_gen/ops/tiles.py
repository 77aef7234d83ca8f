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


def pieces_of(head_dim: int, how: str) -> list[Piece]:
    """The pieces of a head: `how` is "whole", "padded" or "pieces" (96 = 64 + 32), as a config's HEAD_DIM_AS.

    No piece is narrower than 16, the least that tensor cores take, so the last one may be padded.
    """
    if how != "pieces":
        width = max(16, 1 << (head_dim - 1).bit_length())
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


def scored_and_summed(op: str, head_dim: int, how: str) -> tuple[list[Piece], list[Piece]]:
    """What a program needs of a head to find scores, and the dimensions that it sums.

    They are the same, but where HEAD_DIM_AS is "halves" and two programs share the sums. The backward multiplies by
    the very tiles that scores come from, so its own half is a piece of its own there; which one is, it learns when it
    runs: `start` is that of the first program's.
    """
    if how != "halves":
        pieces = pieces_of(head_dim, how)
        return pieces, pieces
    width = head_dim // 2
    if op == "forward":
        return pieces_of(head_dim, "whole"), [Piece("", 0, width, width, "mine")]
    mine, others = Piece("_mine", 0, width, width, "mine"), Piece("_other", width, width, width, "others")
    return [mine, others], [mine]
