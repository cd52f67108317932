"""Each block lies with one worker, which sends its bytes to all before it is computed; the next one's travel meanwhile.

It is the mode for every format of weights: what travels are bytes, with whatever ComfyUI's patcher made of them, LoRA included.
All workers compute the same, or share heads or tokens.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..mail import Pending, broadcast
from . import sheets
from .owned import Owned, Predict
from .units import Slot, by_turns


class Blocks(Owned):
    """See `Owned`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._flats: dict[int, torch.Tensor] = {}  # by own block: all its bytes
        self._sheets: dict[int, tuple[int, bytes]] = {}  # by block: how many bytes it has, and what they are
        self._coming: tuple[int, Pending] | None = None
        self._after: dict[int, int] = {}  # by block: which one was computed next, the last time
        self._before: int | None = None
        self._instead: dict[Slot, Any] = {}  # what a block of another has while it is not computed

    def _taken_off(self) -> None:
        self._flats.clear()

    def drop(self) -> None:
        super().drop()
        self._sheets.clear()
        self._coming = None

    def _owners(self, sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
        self._after = self._after or {index: index + 1 for index in range(len(sizes) - 1)}
        return by_turns(sizes, shares)

    def _placed(self) -> dict[int, tuple[int, bytes]]:
        told = {}
        for index, owner in enumerate(self.owners):
            if owner == self.group.rank:
                unit = self.units[index]
                flat, sheet = sheets.write(unit.weights(), self._patcher.load_device)
                unit.lay(sheets.read(sheet, flat))
                self._flats[index] = flat
                told[index] = flat.nbytes, sheet
        return told

    def _told(self, rank: int, news: dict[int, tuple[int, bytes]]) -> None:
        self._sheets.update(news)

    def _run(self, predict: Predict, x: torch.Tensor, arguments: dict[str, Any], apart: bool) -> torch.Tensor:
        self._before = self._coming = None
        with self._watched():
            answer = predict(x, arguments)
        if self._coming is not None:  # a block that was not computed this time
            self._coming[1].wait()
            self._coming = None
        return answer

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Weights come before a block is computed, and go afterwards."""
        with contextlib.ExitStack() as stack:
            for index, unit in enumerate(self.units):
                stack.enter_context(unit.module.register_forward_pre_hook(partial(self._enter, index)))
                if index in self._away:
                    stack.enter_context(unit.module.register_forward_hook(partial(self._leave, index), always_call=True))
            yield

    def _enter(self, index: int, module: torch.nn.Module, args: Any) -> None:
        coming = self._coming
        if coming is None or coming[0] != index:
            if coming is not None:
                coming[1].wait()
            coming = index, self._begin(index)
        self._coming = None
        flat = coming[1].wait()
        if index in self._away:
            self._instead = self.units[index].lay(sheets.read(self._sheets[index][1], flat))
        if self._before is not None:
            self._after[self._before] = index
        self._before = index
        if index in self._after:
            self._coming = self._after[index], self._begin(self._after[index])

    def _leave(self, index: int, module: torch.nn.Module, args: Any, result: Any) -> None:
        self.units[index].lay(self._instead)

    def _begin(self, index: int) -> Pending:
        mine = self._flats.get(index)
        data = self._sheets[index][0] if mine is None else mine
        return broadcast(self.group, self.owners[index], data, self._patcher.load_device)
