"""Dense weights that outlive one use, and what becoming dense costs."""
from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakSet

import torch

_EVERY = 13  # weights; a model's layers repeat in other numbers


class Keeper(Protocol):
    """A layer that may keep its dense weight."""

    def drop_dense(self) -> None: ...


class DenseRoom:
    """Implements `policies.weights.DenseRoom` over a model's layers."""

    def __init__(self, device: str, layers: Iterable[Keeper]) -> None:
        self.device, self.held, self._bytes = device, 0, 0
        self._layers: WeakSet[Any] = WeakSet(layers)

    def take(self, size: int) -> bool:
        """Whether a weight of so many bytes may be kept; it is counted then."""
        if self.held + size > self._bytes:
            return False
        self.held += size
        return True

    def give_back(self, size: int) -> None:
        self.held -= size

    def resize(self, size: int) -> None:
        self._bytes = size
        if self.held > size:
            for layer in self._layers:
                layer.drop_dense()


class Meter:
    """Counts bytes that became dense, and times some of them: a clock around each would cost more than it tells."""

    def __init__(self) -> None:
        self._bytes = self._uses = self._sampled_bytes = 0
        self._seconds = 0.0
        self._waiting: list[tuple[Any, Any, int]] = []

    def start(self, device: torch.device) -> Any:
        """A mark for `stop`; None where this use is not timed, or the device tells no time without being waited for."""
        self._uses += 1
        if self._uses % _EVERY:
            return None
        if device.type == "cpu":
            return time.perf_counter()
        kind = getattr(getattr(torch, device.type, None), "Event", None)
        if kind is None or len(self._waiting) > 999:
            return None
        mark = kind(enable_timing=True)
        mark.record()
        return mark

    def stop(self, mark: Any, size: int) -> None:
        """
        Args:
            size: bytes that were written.
        """
        self._bytes += size
        if mark is None:
            return
        if isinstance(mark, float):
            self._count(time.perf_counter() - mark, size)
        else:
            end = type(mark)(enable_timing=True)
            end.record()
            self._waiting.append((mark, end, size))

    def _count(self, seconds: float, size: int) -> None:
        self._seconds += seconds
        self._sampled_bytes += size

    def take(self) -> tuple[int, float | None]:
        """Bytes since it was last asked, and about how many seconds they took; None where no use was timed."""
        for start, end, size in self._waiting:
            if end.query():  # the prompt is over; what is not done by now is left out
                self._count(start.elapsed_time(end) / 1000, size)
        done = self._bytes, self._seconds * self._bytes / self._sampled_bytes if self._sampled_bytes else None
        self.__init__()  # type: ignore[misc]
        return done


METER = Meter()
