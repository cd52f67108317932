"""What the workers did for one prompt, for telemetry."""
from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...telemetry import emit


@dataclass
class Busy:
    """How long a worker was at its tiles, and computed meanwhile."""

    seconds: float = 0.0
    compute_seconds: float = 0.0

    def add(self, answer: Mapping[str, Any]) -> None:
        self.seconds += answer["seconds"]
        self.compute_seconds += answer["compute_seconds"]


class Score:
    """Counts predictions, here and elsewhere, from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here: dict[Hashable, float] = {}  # seconds of the last prediction here, by shape
        self._clear()

    def _clear(self) -> None:
        self._calls: Counter[str] = Counter()
        self._dispatch = self._compute = self._transfer = 0.0
        self._why: dict[str, str] = {}  # the last reason not to take a way
        self._sent = self._received = 0
        self._seconds: list[tuple[float, float]] = []  # of a prediction elsewhere, and of the last one like it here

    def elsewhere(self, way: str, kind: Hashable, seconds: float, answers: Sequence[dict[str, Any]], sent: int) -> None:
        """A prediction by workers. What the slowest was at is no dispatch: it computed, and took tensors in and out."""
        slowest = max(answers, key=lambda answer: float(answer["seconds"]))
        with self._lock:
            self._calls[way] += 1
            self._compute += slowest["compute_seconds"]
            self._transfer += slowest["seconds"] - slowest["compute_seconds"]
            self._dispatch += seconds - slowest["seconds"]
            self._sent += sent
            self._received += sum(answer["answer"].copied_bytes for answer in answers)
            if kind in self._here:
                self._seconds.append((seconds, self._here[kind]))

    def tiles(self, count: int, seconds: float, busiest: Busy, sent: int, received: int) -> None:
        """A VAE's tiles by workers, of which the busiest was at it so long; the host waited for `seconds`."""
        with self._lock:
            self._calls["tiles"] += count
            self._compute += busiest.compute_seconds
            self._transfer += busiest.seconds - busiest.compute_seconds
            self._dispatch += max(0.0, seconds - busiest.seconds)
            self._sent += sent
            self._received += received

    def passed_over(self, way: str, reason: str) -> None:
        """Why a way was not taken, however often that was said."""
        with self._lock:
            self._why[way] = reason

    def here(self, kind: Hashable, seconds: float) -> None:
        """A prediction by the host."""
        with self._lock:
            self._calls["local"] += 1
            self._here[kind] = seconds

    def tell(self) -> bool:
        """Tells telemetry, and starts anew. Whether there was anything to tell."""
        with self._lock:
            calls = dict(self._calls)
            if not calls:
                return False
            compared = {} if not self._seconds else {
                "speedup": sum(here for _, here in self._seconds) / sum(elsewhere for elsewhere, _ in self._seconds)}
            emit("shard.finished", calls=calls, dispatch_seconds=self._dispatch, compute_seconds=self._compute,
                 transfer_seconds=self._transfer, sent_bytes=self._sent, received_bytes=self._received, **compared,
                 **({"why": self._why} if self._why else {}))
            self._clear()
        return True
