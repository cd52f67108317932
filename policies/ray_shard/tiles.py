"""A VAE's tiles, computed by the workers, blended by the host.

The host asks a function for one tile after another. It gets another function, which has the workers' answer for the tile, so
that the result is the host's to the last bit; where there is none, the host's own function computes that one tile.
"""
from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch

from ...telemetry import emit
from ..computing import ScaleTiles
from ..policy import Proceed
from .ahead import Ahead
from .comparing import difference, tolerance
from .crew import Crew
from .freight import UNSENDABLE, Freight, Freighter
from .parcels import Parcel, pack, unpack
from .score import Score
from .settings import Settings
from .workers import Failed, Lost, Worker, in_a_line

TILES = "tiles"
_LARGEST = 2**20  # bytes of tensors in a function: it travels with every tile


class Tiler:
    """Answers `ScaleTiles`."""

    def __init__(self, settings: Settings, crew: Crew, freighter: Freighter, score: Score) -> None:
        self._settings, self._crew, self._freighter, self.score = settings, crew, freighter, score
        self._refused: WeakSet[torch.nn.Module] = WeakSet()
        self._verified: set[tuple[Any, ...]] = set()
        self._told: set[tuple[str, str]] = set()

    def act(self, request: ScaleTiles, proceed: Proceed) -> Any:
        tiles = request.tiles()
        if len(tiles) < 2 or request.remote.module in self._refused:
            return proceed()
        workers = self._crew.ready()
        if not workers:
            self.tell(request, self._crew.broken)
            return proceed()
        try:
            freight = self._deliver(request, workers)
            function = self._function(request)
        except Lost as lost:
            self._crew.lose(lost.workers, str(lost))
            self.tell(request, str(lost))
            return proceed()
        except Failed as failed:
            self.refuse(request, str(failed))
            return proceed()
        except UNSENDABLE as error:
            self.refuse(request, f"it cannot be sent: {in_a_line(error)}")
            return proceed()
        tiling = Tiling(self, request, tiles, workers, freight, function)
        try:
            return proceed(replace(request, function=tiling))
        finally:
            tiling.end()

    def ahead(self, workers: Sequence[Worker], count: int, ask: Callable[[Worker, int], Any],
              fallen: Callable[[str], None]) -> Ahead:
        return Ahead(self._crew, workers, count, ask, self._settings.timeout_seconds, fallen)

    def compare(self, request: ScaleTiles, tile: torch.Tensor, answer: torch.Tensor,
                own: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The workers' answer, or the host's own where both were computed to be compared."""
        module = request.remote.module
        kind = (type(module).__name__, getattr(request.function, "__qualname__", ""), *tile.shape, tile.dtype)
        if self._settings.verify == "off" or (self._settings.verify == "first_step" and kind in self._verified):
            return answer
        expected = own(tile)
        found = difference(answer, expected)
        if found <= tolerance({tile.dtype, *(parameter.dtype for parameter in module.parameters())}):
            self._verified.add(kind)
        else:
            self.refuse(request, f"a worker's tile differs by {found:.1e}")
        return expected

    def refuse(self, request: ScaleTiles, reason: str) -> None:
        """No tile of this VAE is computed elsewhere any more."""
        self._refused.add(request.remote.module)
        self.tell(request, reason)

    def is_refused(self, request: ScaleTiles) -> bool:
        return request.remote.module in self._refused

    def tell(self, request: ScaleTiles, reason: str) -> None:
        """Once for each reason."""
        model = type(request.remote.module).__name__
        self.score.passed_over(TILES, reason)
        if (model, reason) not in self._told:
            self._told.add((model, reason))
            emit("shard.demoted", model=model, way=TILES, reason=reason)

    def _deliver(self, request: ScaleTiles, workers: Sequence[Worker]) -> Freight:
        """The VAE is packed when it is first needed; until then its weights may be on a device."""
        if self._freighter.of(request.remote) is None:
            request.weights.take_off()
            try:
                self._freighter.pack(request.remote)
            finally:
                request.remote.place()
        return self._freighter.deliver(request.remote, workers)

    def _function(self, request: ScaleTiles) -> Parcel:
        parcel = pack(request.function, files=False, known=request.remote.known())
        if parcel.copied_bytes > _LARGEST:
            raise pickle.PicklingError(f"its function has {parcel.copied_bytes / 2**20:.0f} MB of tensors")
        return parcel


class Tiling:
    """The function that the host asks, once for each tile and in order."""

    def __init__(self, tiler: Tiler, request: ScaleTiles, tiles: Sequence[torch.Tensor], workers: Sequence[Worker],
                 freight: Freight, function: Parcel) -> None:
        self._tiler, self._request, self._tiles, self._freight, self._function = tiler, request, tiles, freight, function
        self._ahead: Ahead | None = tiler.ahead(workers, len(tiles), self._ask, lambda reason: tiler.tell(request, reason))
        self._busy = self._ahead.busy
        self._room = max(map(request.room, {tile.shape for tile in tiles}))
        self._place = self._sent = self._received = 0
        self._elsewhere = 0  # tiles that workers computed
        self._seconds = 0.0  # that the host waited for them

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        place, self._place = self._place, self._place + 1
        if self._ahead is not None and not (place < len(self._tiles) and _is_same(tile, self._tiles[place])):
            self._tiler.tell(self._request, "the host asked for another tile than was foretold")
            self._stop()
        found = self._ahead.take(place) if self._ahead is not None else None
        if found is None:
            return self._here(tile)
        answer: torch.Tensor = unpack(found["answer"], writable=True)
        self._elsewhere += 1
        self._received += found["answer"].copied_bytes
        self._seconds += time.perf_counter() - started
        answer = self._tiler.compare(self._request, tile, answer, self._here)
        if self._tiler.is_refused(self._request):
            self._stop()
        return answer

    def end(self) -> None:
        """The host is done, or was stopped."""
        self._stop()
        if self._elsewhere:
            busiest = max(self._busy.values(), key=lambda one: one.seconds)
            self._tiler.score.tiles(self._elsewhere, self._seconds, busiest, self._sent, self._received)

    def _ask(self, worker: Worker, place: int) -> Any:
        tile = self._tiles[place]
        parcel = pack((tile, tile.stride()), files=False)
        self._sent += parcel.copied_bytes + len(parcel.data) + len(self._function.data)
        return worker.ask("tile", self._freight.key, self._freight.digest, self._function, parcel, self._room)

    def _here(self, tile: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        answer = self._request.function(tile)
        self._tiler.score.here((TILES, *tile.shape), time.perf_counter() - started)
        return answer

    def _stop(self) -> None:
        if self._ahead is not None:
            self._ahead.end()
            self._ahead = None


def as_it_lay(tile: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """A tile, which travels without its gaps, with its gaps again: sums over it round by how it lies in memory."""
    if tile.stride() == tuple(stride):
        return tile
    return torch.empty_strided(tile.shape, tuple(stride), dtype=tile.dtype).copy_(tile)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two views are of the same memory."""
    return (one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
            and one.dtype == other.dtype and one.device == other.device)
