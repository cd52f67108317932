"""Dense copies of GGUF weights on their device, where memory would lie idle: repeated steps do not dequantise again.

How much lies idle is ComfyUI's own figure: the budget that it gives a model's weights, by which it would load a larger model.
Half of what the blocks leave of it is used, because that figure is an estimate. The copies go as soon as anything else is
short of memory, before ComfyUI unloads a model for it.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ..memory import GB
from ..policy import Decision, Proceed
from ..requests import FreeMemory, PlaceModel
from ..weights import DenseRoom

if TYPE_CHECKING:
    from .. import Tools


class DenseWeights:
    """Decides on `PlaceModel` of models over blocks, and on `FreeMemory`.

    Args:
        keep_gb: a limit for each model, or "auto".
    """

    def __init__(self, tools: Tools, keep_gb: float | str) -> None:
        self._free_bytes: Callable[[str], int] = tools.host.memory.free_bytes
        self._keep_gb = keep_gb
        self._rooms: WeakSet[Any] = WeakSet()

    def place(self, request: PlaceModel) -> Decision | None:
        if self._keep_gb == 0:
            return None
        return Decision("", partial(self._place, request))

    def _place(self, request: PlaceModel, proceed: Proceed) -> Any:
        room = request.weights.dense_room()
        missing = request.weights.size() - request.weights.on_device()
        answer = proceed()
        if room is not None:
            room.resize(self._size(request, room, missing))
            self._rooms.add(room)
        return answer

    def _size(self, request: PlaceModel, room: DenseRoom, missing: int) -> int:
        if not isinstance(self._keep_gb, str):
            return int(self._keep_gb * GB)
        if request.more_bytes is None or request.device.type == "cpu":
            return 0  # no limit is no figure
        return max(0, int(request.more_bytes) - missing + room.held) // 2

    def free(self, request: FreeMemory) -> Decision | None:
        rooms = [room for room in self._rooms if room.held and room.device == request.device]
        if not rooms:
            return None

        def act(proceed: Proceed) -> Any:
            if self._free_bytes(request.device) < request.bytes_wanted:
                for room in rooms:
                    room.resize(0)
            return proceed()

        return Decision("", act)

    def drop(self) -> None:
        for room in self._rooms:
            room.resize(0)
