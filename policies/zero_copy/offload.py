"""Leaving the device without a copy: a parameter that nobody changed there is pointed at its home in the file again."""
from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from ...telemetry import emit
from ..files.bank import Bank, MappedFile
from ..files.parameters import Home, Homes, fingerprints, parts, put, size
from ..policy import Decision, Proceed
from ..requests import MoveModule, MoveWeights, OffloadPart, OffloadWeights
from ..weights import Weights
from .copies import Copies

Placed = tuple[torch.nn.Module, str, torch.nn.Parameter, Home]


class _Leaving:
    """A model on its way off the device: what may go home without a copy, and the score."""

    def __init__(self, weights: Weights) -> None:
        self.ready: dict[torch.nn.Module, list[Placed]] = {}
        self.restored = 0
        self._weights, self._started = weights, time.perf_counter()
        self._patched = weights.restored_by_host()
        self._before = self._on_device()

    def _on_device(self) -> int:
        return sum(size(parameter) for name, parameter in self._weights.module.named_parameters()
                   if parameter.device.type != "cpu" and name not in self._patched)

    def tell(self) -> None:
        """`copied_bytes` is what left the device in another way than by going home; what the host restores itself, by its
        backups, is neither."""
        copied = self._before - self._on_device() - self.restored
        if copied or self.restored:
            emit("weights.restored", model=self._weights.name, bytes=self.restored, copied_bytes=copied,
                 seconds=time.perf_counter() - self._started)


_leaving: ContextVar[_Leaving | None] = ContextVar("residency_leaving", default=None)


class Offloader:
    """Decides on everything that moves a parameter."""

    def __init__(self, homes: Homes, copies: Copies, bank: Bank, widen: Callable[[torch.nn.Module, set[str]], None]) -> None:
        self._homes, self._copies, self._bank, self._widen = homes, copies, bank, widen

    def files_of(self, module: torch.nn.Module) -> set[MappedFile]:
        """The files that its parameters are, or were before they moved."""
        mapped = (self._bank.file_of(part) for parameter in module.parameters() for part in parts(parameter))
        return self._homes.files(module) | {file for file in mapped if file is not None}

    def move(self, request: MoveWeights) -> Decision | None:
        if request.weights.streamed_by_host:
            return None
        return Decision("", partial(self._move, request.weights))

    def _move(self, weights: Weights, proceed: Proceed) -> Any:
        self._widen(weights.module, weights.patched())
        self._homes.note_all(weights.module)
        if self._homes.files(weights.module):
            weights.keep_mapping()
        return proceed()

    def offload(self, request: OffloadWeights) -> Decision | None:
        if request.weights.streamed_by_host or not self._homes.files(request.weights.module):
            return None
        if request.device is None or request.device.type != "cpu":
            return Decision("", partial(self._unpatch, request.weights))
        return Decision("", partial(self._offload, request.weights))

    @staticmethod
    def _unpatch(weights: Weights, proceed: Proceed) -> Any:
        weights.end_patches()
        return proceed()

    def _offload(self, weights: Weights, proceed: Proceed) -> Any:
        weights.end_patches()
        weights.drop_dense()
        leaving = _Leaving(weights)
        for leaf, name, _, home in self._unchanged(weights):
            put(leaf, name, home.tensor)
            leaving.restored += size(home.tensor)
        answer = proceed()
        self._copies.adopt_unchanged(weights.module)
        leaving.tell()
        return answer

    def offload_part(self, request: OffloadPart) -> Decision | None:
        if request.weights.streamed_by_host or request.device is None or request.device.type != "cpu":
            return None
        return Decision("", partial(self._offload_part, request.weights))

    def _offload_part(self, weights: Weights, proceed: Proceed) -> Any:
        weights.drop_dense()
        # Compared all at once, though the host may take only some: one wait for the device instead of one for each module.
        leaving = _Leaving(weights)
        for placed in self._unchanged(weights):
            leaving.ready.setdefault(placed[0], []).append(placed)
        token = _leaving.set(leaving)
        try:
            answer = proceed()
        finally:
            _leaving.reset(token)
        leaving.tell()
        return answer

    def move_module(self, request: MoveModule) -> Decision | None:
        leaving = _leaving.get()
        if leaving is None or request.device is None or request.device.type != "cpu":
            return None
        placed = leaving.ready.pop(request.module, None)
        if placed is None:
            return None

        def act(proceed: Proceed) -> Any:
            for leaf, name, parameter, home in placed:
                if leaf._parameters.get(name) is parameter and parameter.device.type != "cpu":
                    put(leaf, name, home.tensor)
                    leaving.restored += size(home.tensor)
            return proceed()

        return Decision("", act)

    def _unchanged(self, weights: Weights) -> list[Placed]:
        """The parameters on the device that nobody wrote to there, found with one small read from the device.

        One that was changed has no home any more. Those that the host restores itself are not looked at.
        """
        patched = weights.restored_by_host()
        candidates = [(leaf, own_name, parameter, home)
                      for name, leaf, own_name, parameter, home in self._homes.of(weights.module)
                      if parameter.device.type != "cpu" and name not in patched]
        unknown = [home for *_, home in candidates if home.mark is None]
        for home, mark in zip(unknown, fingerprints([home.tensor for home in unknown]), strict=True):
            home.mark = mark
        unchanged: list[Placed] = []
        for placed, mark in zip(candidates, fingerprints([parameter for _, _, parameter, _ in candidates]), strict=True):
            leaf, name, _, home = placed
            self._copies.gone(leaf, name)
            if mark is not None and mark == home.mark:
                unchanged.append(placed)
            else:
                self._homes.forget(leaf, name)
        return unchanged
