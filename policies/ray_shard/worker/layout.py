"""Which rank has which tokens of a sequence.

A sequence is made of segments: text, image, reference images. Every rank has a piece of each, in the order of the segments.
What a model does with a segment's length it so does with the piece's, and nothing has to be padded. Attention does not mind the
order of tokens, but masks and packs do: what attends is put together in the order of the whole.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch

from .heads import split


class Layout:
    """
    Args:
        segments: their lengths, in tokens.
        shares: of the tokens, one for each rank, in any unit.

    Attributes:
        pieces: by rank and segment, which tokens of the whole; empty where a segment has fewer tokens than there are ranks.
        lengths: of a rank's pieces together.
        total: tokens of the whole.
    """

    def __init__(self, segments: Sequence[int], shares: Sequence[float]) -> None:
        self.segments, self._shares = tuple(segments), tuple(shares)
        self.pieces: list[list[range]] = [[] for _ in shares]
        self.total = 0
        for segment in segments:
            ends = accumulate(split(segment, shares), initial=self.total)
            for rank, (start, stop) in enumerate(pairwise(ends)):
                self.pieces[rank].append(range(start, stop))
            self.total += segment
        self.lengths = [sum(map(len, pieces)) for pieces in self.pieces]

    def __add__(self, other: Layout) -> Layout:
        """One sequence after the other."""
        return Layout((*self.segments, *other.segments), self._shares)

    def take(self, tensor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
        """A rank's part of what has all tokens along `dim`."""
        parts = [tensor.narrow(dim, piece.start, len(piece)) for piece in self.pieces[rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """The whole, of every rank's part."""
        if len(self.segments) == 1:
            return torch.cat(list(parts), dim)
        shape = list(parts[0].shape)
        shape[dim] = self.total
        whole = parts[0].new_empty(shape)
        for rank, part in enumerate(parts):
            for piece, here in zip(self.pieces[rank], self.local(rank), strict=True):
                whole.narrow(dim, piece.start, len(piece)).copy_(part.narrow(dim, here.start, len(here)))
        return whole

    def local(self, rank: int) -> Iterator[range]:
        """For each segment, where a rank's piece lies among all that the rank has."""
        ends = accumulate(map(len, self.pieces[rank]), initial=0)
        return (range(start, stop) for start, stop in pairwise(ends))
