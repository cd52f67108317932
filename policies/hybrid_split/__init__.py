"""How much of a model is on its device, and what happens when that was too much.

ComfyUI splits a model itself, by a byte budget that it estimates. Here the budget can be stated, for all models or by rules; a
device that runs out of memory all the same costs a repeated step, not the prompt.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..policy import Decision, Policy
from ..requests import PlaceModel, Request
from .rescue import Rescue
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
        self._rescue = Rescue(tools) if settings.rescue else None
        self._rules: dict[type[Request], Any] = {PlaceModel: self._place, **(self._rescue.rules if self._rescue else {})}
        self.answers = frozenset(self._rules)

    def decide(self, request: Request) -> Decision | None:
        rule: Any = self._rules.get(type(request))
        return rule(request) if rule else None

    def emptied(self) -> None:
        if self._rescue:
            self._rescue.headroom.clear()

    def _place(self, request: PlaceModel) -> Decision | None:
        return self._rescue.place(request) if self._rescue else None
