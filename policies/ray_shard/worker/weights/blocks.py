"""Each block lies with one worker, which sends its bytes to all before it is computed. It is the mode for uneven devices."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..mail import Pending, broadcast
from . import sheets
from .fetched import Fetched
from .units import by_turns


class Blocks(Fetched):
    """See `Owned`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._flats: dict[int, torch.Tensor] = {}  # by own block: all its bytes
        self._sizes: dict[int, int] = {}  # by block: how many

    def _taken_off(self) -> None:
        self._flats.clear()

    def _owners(self, sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
        return by_turns(sizes, shares)

    def _placed(self) -> dict[int, tuple[int, bytes]]:
        told = {}
        for index, owner in enumerate(self.owners):
            if owner == self.group.rank:
                unit = self.units[index]
                flat, sheet = sheets.write(unit.weights(), self._patcher.load_device)
                # ComfyUI takes back parameters alone; anything else over these bytes would keep all of them.
                unit.lay({slot: value for slot, value in sheets.read(sheet, flat).items() if slot[1] == "_parameters"})
                self._flats[index] = flat
                told[index] = flat.nbytes, sheet
        return told

    def _told(self, rank: int, news: dict[int, tuple[int, bytes]]) -> None:
        for index, (size, sheet) in news.items():
            self._sizes[index], self._sheets[index] = size, sheet

    def _begin(self, index: int) -> Pending:
        mine = self._flats.get(index)
        data = self._sizes[index] if mine is None else mine
        return broadcast(self.group, self.owners[index], data, self._patcher.load_device)

    def _done(self, index: int) -> None: ...
