"""Where the weights of a model are to lie: with every worker, or shared out among them."""
from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ...telemetry import emit
from .crew import Crew
from .freight import Freight
from .settings import WHOLE, Settings
from .workers import Failed, Worker

_MEASURING = 60.0  # seconds
_FAR = 4  # so many times less is worth that only some workers are busy at the ends of a pipeline
_NUMBER = 2  # bytes of a number that goes from block to block
# Modes with the next best, for a model that they are not for.
_AND_ELSE = {"pipeline": ("pipeline", "blocks"), "fsdp2": ("fsdp2", "blocks")}


class Weights:
    """Chooses a mode for each model."""

    def __init__(self, settings: Settings, crew: Crew) -> None:
        self._settings, self._crew = settings, crew
        self._chosen: dict[str, tuple[str, ...]] = {}  # by model
        self._lock = threading.Lock()

    def of(self, freight: Freight, shape: Sequence[int], workers: Sequence[Worker]) -> tuple[str, ...]:
        """Of `worker.weights.MODES`, in the order in which they are tried; none where every worker has all weights.

        Args:
            shape: of the latents, (rows, channels, ...).
            workers: all of them.

        Raises:
            Lost: a worker died.
        """
        named = self._settings.weights
        modes: tuple[str, ...] = _AND_ELSE.get(named, (named,))
        if named == "auto":
            with self._lock:
                if freight.key not in self._chosen:
                    self._chosen[freight.key] = self._choose(freight, shape, workers)
            modes = self._chosen[freight.key]
        return () if len(workers) < 2 else tuple(mode for mode in modes if mode not in WHOLE)

    def _choose(self, freight: Freight, shape: Sequence[int], workers: Sequence[Worker]) -> tuple[str, ...]:
        """By what is measured, and says so."""
        asked = {worker: worker.ask("measure", freight.key) for worker in workers}
        try:
            found = self._crew.gather(asked, _MEASURING)
        except Failed as failed:
            emit("shard.weights", model=freight.name, mode="stream", reason=f"nothing could be measured: {failed}")
            return ("stream",)
        modes, why = choose(found, shape)
        measured = {"weights_bytes": found[0]["bytes"], "link_mb_per_second": round(min(one["link"] for one in found) / 1e6)}
        if not all(fits(one) for one in found):
            measured |= {"room_bytes": min(int(one["room"]) for one in found),
                         "file_mb_per_second": round(min(one["file"] for one in found) / 1e6)}
        emit("shard.weights", model=freight.name, mode=modes[0], **measured, reason=why)
        return modes


def fits(found: Mapping[str, Any]) -> bool:
    """Whether a device has room for the whole model."""
    return bool(found["bytes"] <= found["room"])


def choose(found: Sequence[dict[str, Any]], shape: Sequence[int]) -> tuple[tuple[str, ...], str]:
    """(modes, of which the second is for a model that the first is not for; why).

    What travels for a step is compared by the seconds it takes: for "blocks" the weights that a worker does not have, for
    "stream" those that its device has no room for, for "pipeline" the hidden states at each border, of one token for each
    position of the latents (most models have fewer).

    Args:
        found: by worker, what `Program.measure` found.
    """
    count, size = len(found), found[0]["bytes"]
    if all(map(fits, found)):
        return ("replicate",), "it fits each device"
    link, file = min(one["link"] for one in found), min(one["file"] for one in found)
    stream = max(one["bytes"] - one["room"] for one in found) / file
    if not found[0]["blocks"]:
        return ("stream",), "it has no lists of blocks"
    if size / count > min(one["room"] for one in found):
        return ("stream",), "a share of it does not fit each device"
    blocks = size * (count - 1) / count / link
    numbers = shape[0] * found[0]["width"]
    for length in shape[2:]:
        numbers *= length
    pipeline = numbers * _NUMBER * (count - 1) / link
    least = "blocks" if blocks < stream else "stream"
    if shape[0] > 1 and pipeline * _FAR < min(blocks, stream):
        why = f"hidden states travel in {pipeline:.3f} s, blocks in {blocks:.3f} s, a file in {stream:.3f} s"
        return ("pipeline", least), why
    return (least,), f"blocks travel in {blocks:.3f} s, what does not fit in {stream:.3f} s"
