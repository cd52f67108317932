"""What is said of a budget before a model is loaded with it."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ...telemetry import emit
from ..memory import ram
from ..requests import PlaceModel
from ..weights import Weights
from . import budget, rules
from .allocation import RAM, Allocation
from .settings import Rule

if TYPE_CHECKING:
    from .. import Tools

_NOWHERE = Allocation()


@dataclass(frozen=True)
class Choice:
    """A budget and whose it is.

    Attributes:
        limit: bytes of weights on the device, at most.
        total: bytes for weights and the host's buffer for streaming; None where `limit` says it, or nothing limits it.
        ours: the host would have chosen another one.
        allocation: where the rest lives.
    """

    figure: str
    limit: int | None = None
    total: float | None = None
    ours: bool = True
    allocation: Allocation = _NOWHERE


class Herald:
    """Tells once of each change."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._told: WeakKeyDictionary[torch.nn.Module, tuple[Any, ...]] = WeakKeyDictionary()
        self._paging_told = False

    def tell(self, request: PlaceModel, rule: Rule | None, choice: Choice, predicted: int) -> None:
        """What will be where, and whether that is enough.

        Args:
            predicted: bytes of weights on the device.
        """
        weights = request.weights
        if not self._is_news(weights.module, (choice.figure, rule, predicted)):
            return
        allowed = choice.limit if choice.limit is not None else choice.total
        lent, ram_room = self._elsewhere(weights, choice.allocation)
        found = budget.verdict(weights.size(), predicted + lent, ram_room)
        about: dict[str, Any] = {"model": weights.name, "device": str(request.device)}
        emit("split.planned", **about, mode=found.mode, figure=choice.figure, predicted_bytes=predicted,
             streamed_bytes=weights.size() - predicted, **({} if rule is None else {"rule": rules.label(rule)}),
             **({} if allowed is None else {"budget_bytes": int(allowed)}))
        if found.shortfall:
            emit("split.insufficient", **about, shortfall_bytes=found.shortfall,
                 reason="the device and RAM together do not hold it; a smaller file, or a smaller memory.pad_gb, would")

    def tell_of_pages(self, request: PlaceModel, choice: Choice, limit: int, kept: bool) -> None:
        """The same where the host pages weights itself."""
        weights = request.weights
        if kept and self._is_news(weights.module, (choice.figure, limit)):
            emit("split.capped", model=weights.name, device=str(request.device), figure=choice.figure, budget_bytes=limit)
        elif not kept and not self._paging_told:
            self._paging_told = True
            emit("policy.declined", policy="hybrid_split, dynamic VRAM",
                 reason="this ComfyUI's paging library takes no limit for a model; --reserve-vram or a newer ComfyUI does")

    def _is_news(self, module: torch.nn.Module, state: tuple[Any, ...]) -> bool:
        told, self._told[module] = self._told.get(module), state
        return told != state

    def _elsewhere(self, weights: Weights, allocation: Allocation) -> tuple[int, int]:
        """What other devices and RAM may hold of a model."""
        memory, lent, ram_room = self._tools.host.memory, 0, self._ram_room(weights.module)
        here = memory.devices()
        for share in allocation.donors(weights.load_device(), weights.size(), memory.total_bytes):
            lent += share.bytes if share.device in here else 0
            ram_room = min(ram_room, share.bytes) if share.device == RAM else ram_room
        return lent, ram_room

    def _ram_room(self, module: torch.nn.Module) -> int:
        private = sum(parameter.nbytes for parameter in module.parameters()
                      if parameter.device.type == "cpu" and self._tools.bank.file_of(parameter) is None)
        return ram()[1] - self._tools.ledger.pad() + private
