"""Is a file on another machine the one that tensors were mapped from here?

Inode and time say nothing there: a copy has others. What tells one set of weights from another is in the tensors themselves:
training, merging and quantising change every page of a tensor that they touch. So two files are taken for the same if they are
of one size, and alike in three pages of each tensor that is used of them: its first, its middle and its last one. All of a file
would have to be read to know it for sure, over the network as often as not. What this takes for the same and is not: a file of
the same size in which somebody changed a few rows of a tensor, and left the others and the tensor's ends.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from .identity import Identity
from .provenance import FileChanged

PAGE = 4096  # bytes


@dataclass(frozen=True)
class Likeness:
    """What a file is known by on another machine.

    Attributes:
        places: (bytes from the file's start, bytes) of each tensor that is used.
        digest: of the file's size, and of the pages.
    """

    path: str
    places: tuple[tuple[int, int], ...]
    digest: str

    @classmethod
    def of(cls, path: str, identity: Identity, places: Sequence[tuple[int, int]]) -> Likeness:
        """
        Raises:
            FileChanged: it is another file by now, or none.
        """
        try:
            before, digest, after = Identity.of(path), _digest(path, places), Identity.of(path)
        except OSError:
            raise FileChanged(path) from None
        if not before == identity == after:
            raise FileChanged(path)
        return cls(path, tuple(places), digest)

    def here(self) -> Identity | None:
        """Of the file that is under the path on this machine, if it is alike."""
        try:
            identity = Identity.of(self.path)
            return identity if _digest(self.path, self.places) == self.digest else None
        except OSError:
            return None


def _digest(path: str, places: Sequence[tuple[int, int]]) -> str:
    with open(path, "rb", buffering=0) as file:
        made = hashlib.sha256(str(Identity.of(file).size).encode())
        for offset, size in places:
            for start in sorted({offset, offset + max(0, size - PAGE) // 2, offset + max(0, size - PAGE)}):
                file.seek(start)
                made.update(file.read(min(PAGE, size)))
        return made.hexdigest()
