"""How much of a model is on its device, and what happens when that was too much.

ComfyUI splits a model itself, by a byte budget that it estimates. Here the budget can be stated, for all models or by rules; a
device that runs out of memory all the same costs a repeated step, not the prompt.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..chunking import Chunking, Ineffective
from ..policy import Decision, Effect, Policy, Proceed
from ..requests import FreeMemory, LoadModel, MoveWeights, PinMemory, PinWeight, PlaceModel, PlaceModels, Request
from ..sampling import Predict
from .choosing import Chooser
from .donors import Donors
from .headroom import Headroom
from .pinning import Pinning
from .rescue import Rescue
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
        self._donors, self._pinning = Donors(tools), Pinning(tools)
        self._rescue = Rescue(tools) if settings.rescue else None
        self._splitter = Splitter(settings, tools, chooser, self._donors,
                                  self._rescue.headroom if self._rescue else Headroom())
        self._rules: dict[type[Request], Any] = {PlaceModel: self._place, PinWeight: self._pin,
                                                 PinMemory: self._pinning.memory}
        if self._rescue:
            self._rules |= self._rescue.rules
        if settings.rules or settings.devices:
            self._rules |= {LoadModel: chooser.load, MoveWeights: self._splitter.move,
                            PlaceModels: self._splitter.place_models, FreeMemory: self._free}
        if settings.ffn_chunks > 1:
            self._chunking, self._ineffective = Chunking(settings.ffn_chunks), Ineffective(NAME)
            self._rules[Predict] = self._predict
        self.answers = frozenset(self._rules)

    def decide(self, request: Request) -> Decision | None:
        rule: Any = self._rules.get(type(request))
        return rule(request) if rule else None

    def prompt_ended(self) -> Effect | None:
        self._donors.prompt_ended()
        self._pinning.prompt_ended()
        return self._splitter.take_effect()

    def emptied(self) -> None:
        if self._rescue:
            self._rescue.headroom.clear()

    def close(self) -> None:
        self._donors.close()

    def _place(self, request: PlaceModel) -> Decision | None:
        """The budget by what is stated; and if that was too much, by what was learned."""
        if request.elsewhere:
            return None
        split, rescue = self._splitter.place(request), self._rescue
        if rescue is None or request.device.type == "cpu":
            return split
        if split is None:
            return rescue.place(request)
        return Decision("", lambda proceed: split.act(lambda asked=None: rescue.load(asked or request, proceed)))

    def _free(self, request: FreeMemory) -> Decision:
        """Less room where a limit needs less, and what is lent there leaves before the host's models do."""
        amended = self._splitter.spared(request)
        leave = self._donors.free(amended)
        return Decision(leave.reason, lambda proceed: leave.act(lambda asked=None: proceed(amended)))

    def _predict(self, request: Predict) -> Decision:
        """What is computed in this process, in pieces; who has it computed elsewhere comes before us."""
        def act(proceed: Proceed) -> Any:
            with self._chunking.during(request.remote.module) as tally:
                answer = proceed()
            self._ineffective.tell(request.weights.name, tally.ineffective())
            return answer

        return Decision("", act)

    def _pin(self, request: PinWeight) -> Decision:
        def act(proceed: Proceed) -> Any:
            self._donors.before_pinning()
            return self._pinning.weight(request, proceed)

        return Decision("", act)
