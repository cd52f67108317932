"""The budget that a model is placed with, whether it was kept, and how much room is made for it."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from ...telemetry import emit
from ..policy import Decision, Effect, Proceed
from ..requests import FreeMemory, MoveWeights, PlaceModel, PlaceModels
from ..weights import Weights
from . import budget, rules
from .choosing import Chooser
from .donors import Donors
from .headroom import Headroom
from .heralding import Choice, Herald
from .settings import Rule, Settings

if TYPE_CHECKING:
    from .. import Tools

TOLERANCE = 0.02  # of the model's size: what may lie between foretold and found
_STOCK_SHARE = 1.1  # of a model's size: what ComfyUI makes room for
_split: ContextVar[torch.nn.Module | None] = ContextVar("residency_split", default=None)  # being placed with a limit
_spare: ContextVar[dict[str, float] | None] = ContextVar("residency_spare", default=None)


class Splitter:
    """Decides on `PlaceModel`, and on `PlaceModels` and `FreeMemory` for models with a limit of their own.

    Args:
        headroom: what models gave back when they ran out of memory.
    """

    def __init__(self, settings: Settings, tools: Tools, chooser: Chooser, donors: Donors,
                 headroom: Headroom) -> None:
        self._settings, self._tools, self._chooser, self._donors = settings, tools, chooser, donors
        self._headroom, self._herald = headroom, Herald(tools)
        self._given_up: WeakSet[torch.nn.Module] = WeakSet()
        self._effect: Effect | None = None

    def place(self, request: PlaceModel) -> Decision | None:
        weights = request.weights
        if request.more_bytes is None or request.device.type == "cpu" or weights.module in self._given_up:
            return None  # the host loads it whole: it cannot be split, or the user said so
        if self._settings.skip_clip and weights.component == "text_encoder":
            return None
        rule = self._chooser.rule(weights)
        choice = dataclasses.replace(self._choose(request, rule), allocation=self._chooser.allocation(rule))
        if not choice.ours and not choice.allocation and (weights.streamed_by_host or weights.on_device() == weights.size()):
            return None  # nothing to do, and nothing new to say
        return Decision("", partial(self._place, request, rule, choice))

    def _choose(self, request: PlaceModel, rule: Rule | None) -> Choice:
        weights, device = request.weights, str(request.device)
        limit, reserve = self._limit(rule, weights), self._headroom.reserve_of(weights.module)
        if limit is not None:
            figure = "the rule's" if rule is not None else "that of hybrid_split.devices"
            return Choice(figure, limit=max(0, min(limit, weights.size()) - reserve))
        if rule is not None and rule.residency == "device":
            return Choice("the rule's")
        factor = self._settings.conservative_factor if rule is None or isinstance(rule.conservative_factor, str) \
            else rule.conservative_factor
        if self._settings.mode == "conservative" or (rule is not None and not isinstance(rule.conservative_factor, str)):
            memory = self._tools.host.memory
            free = memory.free_bytes(device) + weights.on_device()
            total = budget.conservative(memory.total_bytes(device), free, self._settings.overhead_percent, factor)
            return Choice("conservative", total=max(0, total - reserve))
        assert request.more_bytes is not None
        stock = weights.on_device() + request.more_bytes
        return Choice("ComfyUI's, less what it lacked before", total=max(0, stock - reserve)) if reserve \
            else Choice("ComfyUI's", total=stock, ours=False)

    def _limit(self, rule: Rule | None, weights: Weights) -> int | None:
        """What is stated, whatever is free."""
        own, total_of = rules.limit(rule), self._tools.host.memory.total_bytes
        return own if own is not None \
            else self._chooser.allocation(rule).bytes_for(weights.load_device(), weights.size(), total_of)

    def _place(self, request: PlaceModel, rule: Rule | None, choice: Choice, proceed: Proceed) -> Any:
        weights = request.weights
        if weights.streamed_by_host:
            return self._cap(request, choice, proceed)
        more, split = self._more(weights, choice), choice.limit is not None and choice.limit < weights.size()
        if choice.ours and more is not None and weights.left_over(more, split):
            weights.take_off()
            more = self._more(weights, choice)
        predicted = weights.size() if more is None else weights.foreseen(more, split)
        self._herald.tell(request, rule, choice, predicted)
        token, times = _split.set(weights.module if split else None), self._headroom.times
        try:
            answer = self._lend(request, choice, lambda: proceed(dataclasses.replace(request, more_bytes=more)))
        finally:
            _split.reset(token)
        if self._headroom.times == times:  # it did not run out of memory
            self._check(weights, str(request.device), predicted, choice)
        return answer

    def _lend(self, request: PlaceModel, choice: Choice, proceed: Callable[[], Any]) -> Any:
        return self._donors.around(request, choice.allocation, proceed) if choice.allocation else proceed()

    def move(self, request: MoveWeights) -> Decision | None:
        """A limit is of weights alone; with its buffer it may be more than the model, which the host would load whole."""
        if not request.whole or _split.get() is not request.weights.module:
            return None
        return Decision("", lambda proceed: proceed(dataclasses.replace(request, whole=False)))

    @staticmethod
    def _more(weights: Weights, choice: Choice) -> float | None:
        if choice.limit is not None:
            return weights.more_for(choice.limit)
        return None if choice.total is None else choice.total - weights.on_device()

    def _check(self, weights: Weights, device: str, predicted: int, choice: Choice) -> None:
        observed = weights.by_device().get(device, 0)
        before = self._effect or Effect(0, 0)
        self._effect = Effect(before.predicted_bytes + predicted, before.observed_bytes + observed)
        if choice.ours and abs(observed - predicted) > TOLERANCE * weights.size():
            self._given_up.add(weights.module)
            emit("policy.ineffective", policy="hybrid_split", reason=f"{weights.name} was split in another way",
                 predicted_bytes=predicted, observed_bytes=observed)

    def _cap(self, request: PlaceModel, choice: Choice, proceed: Proceed) -> Any:
        """The host pages these weights itself: its pages get a limit, where its library has one."""
        weights = request.weights
        limit = choice.limit if choice.limit is not None or choice.total is None else int(choice.total)
        answer = self._lend(request, choice, proceed)
        if limit is None:
            return answer
        self._herald.tell_of_pages(request, choice, limit, weights.cap(limit))
        return answer

    def place_models(self, request: PlaceModels) -> Decision | None:
        """Models that need less than all of their size there spare others. Where a device's share is stated they do not: it is
        of all models together."""
        spare: dict[str, float] = {}
        for weights in request.weights:
            limit = rules.limit(self._chooser.rule(weights))
            if limit is not None and not weights.streamed_by_host:
                unused = weights.size() - max(limit, weights.on_device())
                spare[weights.load_device()] = spare.get(weights.load_device(), 0) + max(0, unused)
        if not any(spare.values()):
            return None

        def act(proceed: Proceed) -> Any:
            token = _spare.set(spare)
            try:
                return proceed()
            finally:
                _spare.reset(token)

        return Decision("", act)

    def spared(self, request: FreeMemory) -> FreeMemory:
        """The room that is really needed."""
        spare = _spare.get()
        unused = spare.pop(request.device, 0) if spare else 0  # the first room made is for the weights, later ones for the rest
        wanted = max(0.0, request.bytes_wanted - _STOCK_SHARE * unused)
        return dataclasses.replace(request, bytes_wanted=wanted) if unused else request

    def take_effect(self) -> Effect | None:
        """What was foretold and found since the last time."""
        effect, self._effect = self._effect, None
        return effect
