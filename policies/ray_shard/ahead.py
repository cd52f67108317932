"""Tiles computed by the workers before the host asks for them, and never many before.

Each worker has one tile that it computes and one that waits, so that it is never idle; who is faster comes for the next one
sooner. A worker that fails gets no more; what it was not at yet the others compute.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from .crew import Crew
from .score import Busy
from .workers import Failed, Lost, Worker, answer_of, in_a_line

_QUEUE = 2  # tiles asked of a worker at a time
_AHEAD = 3  # tiles for each worker that may be asked for, or wait as answers, before the host takes them


class Ahead:
    """The answers of the workers, by the place of the tile.

    Args:
        count: tiles in all.
        ask: asks a worker for the tile at a place; a reference to its answer.
        fallen: told why a worker fell out.

    Attributes:
        busy: each worker with its answers.
    """

    def __init__(self, crew: Crew, workers: Sequence[Worker], count: int, ask: Callable[[Worker, int], Any], seconds: float,
                 fallen: Callable[[str], None]) -> None:
        self._crew, self._workers, self._ask, self._seconds = crew, list(workers), ask, seconds
        self._fallen = fallen
        self._waiting: list[int] = list(range(count))
        self._asked: dict[Any, tuple[Worker, int]] = {}  # by reference, in the order of asking
        self._answers: dict[int, Any] = {}
        self.busy: dict[Worker, Busy] = {worker: Busy() for worker in workers}

    def take(self, place: int) -> dict[str, Any] | None:
        """The answer for a tile, asked for once each and in order; None where no worker can give it.

        Raises:
            BaseException: the host's Cancel.
        """
        while place not in self._answers:
            self._send(place)
            if not self._is_coming(place):
                self._waiting = [one for one in self._waiting if one > place]
                return None
            self._receive()
        answer: dict[str, Any] = self._answers.pop(place)
        self._send(place + 1)
        return answer

    def end(self) -> None:
        """Nothing more is wanted; the workers are told so."""
        if self._asked:
            self._crew.call_off({worker: reference for reference, (worker, _) in self._asked.items()})
        self._asked.clear()
        self._answers.clear()
        self._waiting.clear()

    def _send(self, place: int) -> None:
        """Gives everybody something to do, the next tiles first."""
        while self._waiting and self._waiting[0] < place + _AHEAD * max(1, len(self._workers)):
            busy = [worker for worker, _ in self._asked.values()]
            free = [worker for worker in self._workers if busy.count(worker) < _QUEUE]
            if not free:
                return
            # Of those with as little to do the heavier first: it is the faster one.
            worker = min(free, key=lambda one: (busy.count(one), -one.weight))
            try:
                reference = self._ask(worker, self._waiting[0])
            except ray.exceptions.RayError as error:  # as where its store is full
                return self._drop(self._workers, f"a tile cannot be sent: {in_a_line(error)}")
            self._asked[reference] = worker, self._waiting.pop(0)

    def _is_coming(self, place: int) -> bool:
        return any(place == asked for _, asked in self._asked.values()) or (bool(self._workers) and place in self._waiting)

    def _receive(self) -> None:
        """Waits until somebody answers, or falls out."""
        try:
            found = self._crew.any({reference: worker for reference, (worker, _) in self._asked.items()}, self._seconds)
        except Lost as lost:
            return self._lose(lost)
        for reference in found:
            if reference in self._asked:  # else its worker died a moment ago
                self._open(reference)

    def _open(self, reference: Any) -> None:
        worker, place = self._asked[reference]
        try:
            answer = answer_of(worker, reference)
        except Lost as lost:
            return self._lose(lost)
        except Failed as failed:
            self._drop([worker], str(failed))
        else:
            self._answers[place] = answer
            self.busy[worker].add(answer)
        del self._asked[reference]

    def _lose(self, lost: Lost) -> None:
        """What a dead worker was yet to do the others do, but for the tile that it was at, which may be what it died of."""
        self._crew.lose(lost.workers, str(lost))
        self._drop(lost.workers, str(lost))
        for worker in lost.workers:
            mine = {reference: place for reference, (one, place) in self._asked.items() if one is worker}
            for reference in mine:
                del self._asked[reference]
            self._waiting = sorted([*self._waiting, *list(mine.values())[1:]])

    def _drop(self, workers: Sequence[Worker], reason: str) -> None:
        """Asks these workers no more."""
        self._workers = [worker for worker in self._workers if worker not in workers]
        self._fallen(reason)
