"""What the workers did for one prompt, for telemetry."""
from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from ...telemetry import emit


class Score:
    """Counts predictions, here and elsewhere, from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here: dict[Hashable, float] = {}  # seconds of the last prediction here, by shape
        self._clear()

    def _clear(self) -> None:
        self._calls: Counter[str] = Counter()
        self._dispatch = self._compute = 0.0
        self._sent = self._received = 0
        self._seconds: list[tuple[float, float]] = []  # of a prediction elsewhere, and of the last one like it here

    def elsewhere(self, way: str, kind: Hashable, seconds: float, answers: Sequence[dict[str, Any]], sent: int) -> None:
        """A prediction by workers. What the slowest computed is no dispatch."""
        slowest = max(answer["compute_seconds"] for answer in answers)
        with self._lock:
            self._calls[way] += 1
            self._compute += slowest
            self._dispatch += seconds - slowest
            self._sent += sent
            self._received += sum(answer["answer"].copied_bytes for answer in answers)
            if kind in self._here:
                self._seconds.append((seconds, self._here[kind]))

    def tiles(self, count: int, seconds: float, compute_seconds: float, sent: int, received: int) -> None:
        """A VAE's tiles by workers, of which the busiest computed so long; the host waited for `seconds`."""
        with self._lock:
            self._calls["tiles"] += count
            self._compute += compute_seconds
            self._dispatch += max(0.0, seconds - compute_seconds)
            self._sent += sent
            self._received += received

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
                 sent_bytes=self._sent, received_bytes=self._received, **compared)
            self._clear()
        return True
