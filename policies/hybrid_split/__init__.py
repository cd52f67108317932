"""How much of a model is on its device, and what happens when that was too much.

ComfyUI splits a model itself, by a byte budget that it estimates. Here the budget can be stated, for all models or by rules; a
device that runs out of memory all the same costs a repeated step, not the prompt.
"""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..policy import Decision, Policy, Proceed
from ..requests import FreeMemory, PinMemory, PinWeight, PlaceModel, Request
from .allocation import Allocation
from .donors import Donors
from .pinning import Pinning
from .settings import Settings

if TYPE_CHECKING:
    from .. import Tools

NAME = "hybrid_split"
__all__ = ["NAME", "HybridSplit", "Settings", "create"]


def create(settings: Settings, tools: Tools) -> Policy:
    return HybridSplit(settings, tools)


class HybridSplit(Policy):
    """Answers by the parts that the settings turn on."""

    name = NAME

    def __init__(self, settings: Settings, tools: Tools) -> None:
        self.settings: Settings = settings
        self._memory = tools.host.memory
        self._donors, self._allocation, self._pinning = Donors(tools), Allocation.parse(settings.devices), Pinning(tools)
        self._rules: dict[type[Request], Any] = {PlaceModel: self._place, PinWeight: self._pin, PinMemory: self._pinning.memory}
        if self._allocation:
            self._rules[FreeMemory] = self._donors.free
        self.answers = frozenset(self._rules)

    def decide(self, request: Request) -> Decision | None:
        rule: Any = self._rules.get(type(request))
        return rule(request) if rule else None

    def prompt_ended(self) -> None:
        self._donors.prompt_ended()
        self._pinning.prompt_ended()

    def close(self) -> None:
        self._donors.close()

    def _place(self, request: PlaceModel) -> Decision | None:
        return Decision("", partial(self._place_by_devices, request)) if self._allocation else None

    def _place_by_devices(self, request: PlaceModel, proceed: Proceed) -> Any:
        weights, amended = request.weights, request
        share = self._allocation.bytes_for(str(request.device), weights.size(), self._memory.total_bytes)
        if share is not None and not weights.streamed_by_host:
            amended = replace(request, more_bytes=share - weights.on_device() or 0.1)
        return self._donors.around(request, self._allocation, lambda: proceed(amended))

    def _pin(self, request: PinWeight) -> Decision:
        def act(proceed: Proceed) -> Any:
            self._donors.before_pinning()
            return self._pinning.weight(request, proceed)

        return Decision("", act)
