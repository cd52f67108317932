"""Weights that live on devices other than the one that computes with them: other cards lend their memory.

ComfyUI loads what the budget lets it and casts the rest at each use, from wherever it is: its cast copies a weight to the
device of the input. So blocks that would wait in RAM are put on the other devices once, in the order in which they run, and
stay there. Over a fast link between cards that beats RAM, over a slow one RAM is better. ComfyUI does not count these bytes as
the model's, and does not know of them when it makes room on that device: then they go back to RAM first.

A block that was a file's mapping is the mapping again when it comes back, if nobody wrote to it; all else is copied.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from ...telemetry import emit
from ..policy import Decision, Proceed
from ..requests import FreeMemory, PlaceModel
from ..weights import Weights
from .allocation import RAM, Allocation, Share, normal
from .blocks import by_device, fill, footprint, place_of
from .lending import Block, Lent

if TYPE_CHECKING:
    from .. import Tools

MB = 2**20
_settle: ContextVar[Callable[[], Any] | None] = ContextVar("residency_settle", default=None)


class Donors:
    """The blocks of all models that live on other devices than their model."""

    def __init__(self, tools: Tools) -> None:
        self._memory = tools.host.memory
        self._lent = Lent(tools.bank)
        self._wanted: dict[str, tuple[float, int]] = {}  # by device: the room that was asked for, and what was free
        self._told: set[tuple[str, str]] = set()

    def around(self, request: PlaceModel, allocation: Allocation, proceed: Callable[[], Any]) -> Any:
        """Lets the next in line place a model, and then puts what it left in RAM where the allocation says."""
        settle = partial(self.settle, request.weights, allocation, request.device)
        token = _settle.set(settle)
        try:
            answer = proceed()
        finally:
            _settle.reset(token)
        settle()
        return answer

    @staticmethod
    def before_pinning() -> None:
        """The host, which places a model, is about to page-lock what it left in RAM: what lives elsewhere goes there first."""
        settle = _settle.get()
        if settle is not None:
            settle()

    def settle(self, weights: Weights, allocation: Allocation, compute: torch.device) -> dict[str, int]:
        """Puts what the host casts at each use, and is in RAM, on the donors. What is on one already stays there.

        Args:
            compute: the model's own device.

        Returns:
            The model's bytes by donor, as they are found there.
        """
        own = normal(str(compute))
        if own == RAM or self._declined(weights, allocation, own):
            return {}
        self._lent.forget_on(weights.module, own)
        started, module = time.perf_counter(), weights.module
        shares = allocation.donors(own, weights.size(), self._memory.total_bytes)
        moves = self._plan(weights, [share for share in shares if share.device in (RAM, *self._memory.devices())])
        moves = {share.device: self._admitted(share, weights, moves[share.device]) for share in shares if share.device in moves}
        if any(moves.values()):
            predicted = by_device(module, own)
            for device, blocks in moves.items():
                predicted[device] = predicted.get(device, 0) + sum(footprint(leaf) for _, leaf in blocks)
            self._move(weights, moves)
            emit("donors.placed", model=weights.name, seconds=time.perf_counter() - started, predicted_bytes=predicted,
                 observed_bytes=by_device(module, own))
        return by_device(module, own)

    def free(self, request: FreeMemory) -> Decision:
        """Blocks leave a device before the host unloads models there, or finds that it cannot."""
        return Decision("", partial(self._free, normal(request.device), request.bytes_wanted))

    def _free(self, device: str, wanted: float, proceed: Proceed) -> Any:
        if any(self._lent.on(device)):
            missing = wanted - self._memory.free_bytes(device)
            if missing > 0:
                self._leave(device, missing, "room is needed there")
        answer = proceed()
        if device in self._memory.devices() and wanted <= self._memory.total_bytes(device):  # more is a wish to empty it
            self._wanted[device] = (wanted, self._memory.free_bytes(device))
        return answer

    def prompt_ended(self) -> None:
        self._wanted.clear()
        self._told = {(device, about) for device, about in self._told if not about}

    def close(self) -> None:
        """All blocks go back to RAM."""
        for device in self._memory.devices():
            self._leave(device, float("inf"), "it is not lent any more")

    def _declined(self, weights: Weights, allocation: Allocation, own: str) -> bool:
        if weights.streamed_by_host:
            self._tell_once("", "ComfyUI's dynamic VRAM moves weights itself, and only between a model's device and RAM, so "
                                "other devices lend nothing. They do with --disable-dynamic-vram")
            return True
        here = self._memory.devices()
        for place in allocation.places:
            if place.device not in (RAM, own, *here):
                self._tell_once(place.device, f"there is no {place.device} here, there are {', '.join(here)}")
        return False

    def _tell_once(self, device: str, reason: str) -> None:
        if (device, "") not in self._told:
            self._told.add((device, ""))
            emit("policy.declined", policy="hybrid_split, devices", reason=reason)

    def _plan(self, weights: Weights, shares: Sequence[Share]) -> dict[str, list[Block]]:
        """By donor, the blocks that are in RAM and should be there. Those that are away already are planned for as well, so
        that the plan is the same each time."""
        lent = self._lent.of(weights.module)
        streamed = [(name, leaf, place) for name, leaf in weights.cast_at_use()
                    if (place := place_of(leaf)) is not None and place in (RAM, lent.get(leaf))]
        places = fill([footprint(leaf) for _, leaf, _ in streamed], [share[:2] for share in shares])
        moves: dict[str, list[Block]] = {}
        for target, (name, leaf, place) in zip(places, streamed, strict=True):
            if place == RAM != target:
                moves.setdefault(target, []).append((name, leaf))
        return moves

    def _admitted(self, share: Share, weights: Weights, blocks: list[Block]) -> list[Block]:
        """The first of the blocks, as many as the share and the device have room for.

        What other models have there leaves where the share is of the device, and not of each model.
        """
        device, wished = share.device, sum(footprint(leaf) for _, leaf in blocks)
        on_it = [(model is weights.module, footprint(leaf)) for model, leaf in self._lent.on(device)]
        held, others = (sum(size for own, size in on_it if own is mine) for mine in (True, False))
        too_much = others + held + wished - share.bytes
        if others and too_much > 0 and not share.of_model:
            self._leave(device, too_much, "another model is placed", but=weights.module)
        free = self._memory.free_bytes(device)
        wanted, free_then = self._wanted.get(device, (0.0, 0))
        free -= max(0, int(wanted) - max(0, free_then - free))
        room, admitted = min(share.bytes - held, free), []
        for name, leaf in blocks:
            room -= footprint(leaf)
            if room < 0:
                break
            admitted.append((name, leaf))
        if free < min(wished, share.bytes - held):
            left = sum(footprint(leaf) for _, leaf in blocks[len(admitted):])
            self._refuse(weights, device, left, f"{max(0, free) / MB:.0f} MB are free there")
        return admitted

    def _refuse(self, weights: Weights, device: str, size: int, reason: str) -> None:
        if (device, weights.name) not in self._told:
            self._told.add((device, weights.name))
            emit("donors.refused", model=weights.name, device=device, bytes=size, reason=reason)

    def _move(self, weights: Weights, moves: Mapping[str, Sequence[Block]]) -> None:
        pinned = weights.pinned()
        for device, blocks in moves.items():
            for name, leaf in blocks:
                for key in pinned & {f"{name}.{own}" for own in leaf._parameters}:
                    weights.unpin(key)
            moved, reason = self._lent.place(weights.module, [leaf for _, leaf in blocks], device)
            self._lent_bytes(device, sum(footprint(leaf) for _, leaf in blocks[:moved]))
            if reason:
                self._refuse(weights, device, sum(footprint(leaf) for _, leaf in blocks[moved:]), reason)

    def _lent_bytes(self, device: str, size: int) -> None:
        """What is lent takes nothing from the room that was asked for."""
        if device in self._wanted:
            wanted, free_then = self._wanted[device]
            self._wanted[device] = (wanted, free_then - size)

    def _leave(self, device: str, wanted: float, reason: str, but: torch.nn.Module | None = None) -> None:
        """Takes at least so many bytes off a device, or all: of each model the blocks that run last."""
        started, size, leaving = time.perf_counter(), 0, []
        for _, blocks in groupby(self._lent.on(device), key=lambda lent: lent[0]):
            for model, leaf in reversed(list(blocks)):
                if size < wanted and model is not but:
                    size += footprint(leaf)
                    leaving.append(leaf)
        if leaving:
            self._lent.take_home(leaving)
            self._lent_bytes(device, -size)
            emit("donors.left", device=device, bytes=size, seconds=time.perf_counter() - started, reason=reason)
