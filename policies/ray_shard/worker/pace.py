"""In how many lots an attention's heads are exchanged: while one is computed the next is on its way, but each costs an
exchange.

It is tried: the first attentions of each kind are timed, on every rank, in one lot and in several, and what was quickest for
the slowest rank is kept. All ranks come to the same answer, since all see all times.
"""
from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from .group import Exchange

LOTS = (1, 2, 4)
_WARM, _TRIES = 1, 2  # attentions that are not counted, and that are, for each number of lots
_WORTH = 0.97  # of the time in one lot; a smaller gain may be chance


class Pace:
    """
    Args:
        always: so many lots, without trying.

    Attributes:
        lots: of the attention that is computed now.
        chosen: by kind of attention, once it is known.
    """

    def __init__(self, group: Exchange, always: int = 0) -> None:
        self._group, self._always = group, always
        self._seconds: dict[Any, list[float]] = defaultdict(list)
        self.chosen: dict[Any, int] = {}
        self.lots = always or 1

    @contextlib.contextmanager
    def timed(self, total: int | tuple[int, int], q: torch.Tensor) -> Iterator[None]:
        """The attention in the `with` is of so many tokens, and to so many; `q` are this rank's queries, (batch, heads, tokens,
        dim)."""
        if self._always:
            yield
            return
        kind = (total, q.shape[0], q.shape[1], q.shape[3], q.dtype)
        self.lots = self.chosen.get(kind) or LOTS[max(0, len(self._seconds[kind]) - _WARM) // _TRIES]
        if kind in self.chosen:
            yield
            return
        _finish(q.device)
        started = time.perf_counter()
        yield
        _finish(q.device)
        self._seconds[kind].append(time.perf_counter() - started)
        if len(self._seconds[kind]) == _WARM + _TRIES * len(LOTS):
            self.chosen[kind] = self._quickest(self._seconds.pop(kind)[_WARM:])

    def _quickest(self, seconds: list[float]) -> int:
        mine = torch.tensor([[min(seconds[start:start + _TRIES]) for start in range(0, len(seconds), _TRIES)]])
        slowest = self._group.gather(mine, 0, [1] * self._group.world).amax(0).tolist()
        best = min(range(len(LOTS)), key=slowest.__getitem__)
        return LOTS[best] if slowest[best] < _WORTH * slowest[0] else LOTS[0]


def _finish(device: torch.device) -> None:
    """Waits for what a card is at."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
