"""Device memory that models are denied, since they ran out of it once."""
from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from ..requests import PlaceModel
from ..weights import Weights


class Headroom:
    """What each model gave back stays free at its next placings, or the next prompt would run out as this one did.

    It binds where the device is tight: where the budget is larger than the model by as much, all of it is loaded.

    Attributes:
        times: how often some model gave something back.
    """

    def __init__(self) -> None:
        self._reserves: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
        self.times = 0

    def reserve_of(self, module: torch.nn.Module) -> int:
        """Bytes of its budget that a model shall not use."""
        return self._reserves.get(module, 0)

    def add(self, weights: Weights, size: int) -> None:
        """The model gave back `size` bytes more."""
        self.times += 1
        self._reserves[weights.module] = min(weights.size(), self.reserve_of(weights.module) + size)

    def within(self, request: PlaceModel) -> PlaceModel:
        """The request with so much less; as it is where there is no limit, or nothing was given back."""
        reserve = self.reserve_of(request.weights.module)
        if request.more_bytes is None or not reserve:
            return request
        held = request.weights.on_device()
        return replace(request, more_bytes=max(0, request.more_bytes + held - reserve) - held)

    def clear(self) -> None:
        self._reserves.clear()
