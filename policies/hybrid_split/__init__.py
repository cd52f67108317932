"""How much of a model is on its device, and what happens when that was too much.

ComfyUI splits a model itself, by a byte budget that it estimates. Here the budget can be stated, for all models or by rules; a
device that runs out of memory all the same costs a repeated step, not the prompt.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..policy import Decision, Effect, Policy
from ..requests import FreeMemory, LoadModel, MoveWeights, PlaceModel, PlaceModels, Request
from .choosing import Chooser
from .settings import Settings
from .split import Splitter

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
        chooser = Chooser(settings, tools)
        self._splitter = Splitter(settings, tools, chooser)
        self._rules: dict[type[Request], Any] = {PlaceModel: self._splitter.place}
        if settings.rules:
            self._rules |= {LoadModel: chooser.load, MoveWeights: self._splitter.move,
                            PlaceModels: self._splitter.place_models, FreeMemory: self._splitter.free}
        self.answers = frozenset(self._rules)

    def decide(self, request: Request) -> Decision | None:
        rule: Any = self._rules.get(type(request))
        return rule(request) if rule else None

    def prompt_ended(self) -> Effect | None:
        return self._splitter.take_effect()
