"""A thread that fills guards and watches for memory that runs short. It ends when nothing is kept any more."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from ..files.guard import Guard
from ..memory import Ledger, Pressure, pressure, ram

SHARE = 0.1  # of the time that tasks may wait for memory before we give some back
STEP = 512 * 2**20


class Shortage:
    """How short of RAM this process's container, or the machine, is. The numbers behind `Watch`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._last: tuple[float, Pressure] | None = None

    def look(self) -> int:
        """Bytes that should be given back now: what the pad lacks; where tasks wait for memory all the same, a step."""
        short = max(0, self._ledger.pad() - ram()[1])
        now, found = time.monotonic(), pressure()
        before, self._last = self._last, None if found is None else (now, found)
        if found is not None and before is not None and found.scanned > before[1].scanned and (
                found.stalled - before[1].stalled > SHARE * (now - before[0])):
            short = max(short, STEP)
        return short


class Watch:
    """Runs while something is kept.

    Args:
        pending: the guards that are to be filled; None when there is nothing to watch over any more.
        short: called with the bytes that should be given back.
    """

    def __init__(self, ledger: Ledger, pending: Callable[[], Iterable[Guard] | None], short: Callable[[int], None],
                 every: float = 1.0) -> None:
        self._shortage, self._pending, self._short, self._every = Shortage(ledger), pending, short, every
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There is something to do; the thread starts if it does not run."""
        self._wake.set()
        if not self._stop.is_set() and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, name="residency-watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._every)
            self._wake.clear()
            guards = self._pending()
            if guards is None:
                return
            short = self._shortage.look()
            if short:
                self._short(short)
            for guard in guards:
                self._fill(guard)

    def _fill(self, guard: Guard) -> None:
        try:
            guard.populate(lambda: not self._stop.is_set() and not self._shortage.look())
        except OSError:  # gone, or no address space: the file is then cached as any other
            guard.close()
