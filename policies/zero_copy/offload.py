"""Leaving the device without a copy: a parameter that nobody changed there is pointed at its home in the file again.

Mapped weights are not page-locked in place. `cudaHostRegister` takes pages for writing, which turns each page of a
copy-on-write mapping into a private copy first: RAM doubles behind everybody's back, and the kernel does it page by page.
Weights that stay off the device while sampling are copied instead, once, within the budget for pinned memory, and the host
pins the copy: they stream as fast as without us. Beyond the budget they stream from the mapping, unpinned.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ...telemetry import emit
from ..files.bank import MappedFile
from ..memory import Residency
from ..policy import Decision, Proceed
from ..requests import (
    MoveModule,
    MoveWeights,
    OffloadPart,
    OffloadWeights,
    PinMemory,
    PinWeight,
    Weights,
    WriteInPlace,
)
from .parameters import Home, Homes, fingerprints, is_plain, parts, put

if TYPE_CHECKING:
    from .. import Tools

OWNER = "zero_copy"
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
        return sum(_bytes(parameter) for name, parameter in self._weights.module.named_parameters()
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
    """Decides on everything that moves, overwrites or pins a parameter."""

    def __init__(self, homes: Homes, tools: Tools, widen: Callable[[torch.nn.Module, set[str]], None]) -> None:
        self._homes, self._bank, self._ledger, self._host = homes, tools.bank, tools.ledger, tools.host
        self._widen = widen
        self._written: WeakKeyDictionary[torch.nn.Module, set[str]] = WeakKeyDictionary()
        self._pinned: WeakKeyDictionary[torch.nn.Module, dict[str, int]] = WeakKeyDictionary()

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
        return proceed()

    def offload(self, request: OffloadWeights) -> Decision | None:
        if request.weights.streamed_by_host or request.device is None or request.device.type != "cpu":
            return None
        if not self._homes.files(request.weights.module):
            return None
        return Decision("", partial(self._offload, request.weights))

    def _offload(self, weights: Weights, proceed: Proceed) -> Any:
        leaving = _Leaving(weights)
        for leaf, name, _, home in self._unchanged(weights):
            put(leaf, name, home.tensor)
            leaving.restored += _bytes(home.tensor)
        answer = proceed()
        self._adopt_unchanged(weights.module)
        leaving.tell()
        return answer

    def offload_part(self, request: OffloadPart) -> Decision | None:
        if request.weights.streamed_by_host or request.device is None or request.device.type != "cpu":
            return None
        return Decision("", partial(self._offload_part, request.weights))

    def _offload_part(self, weights: Weights, proceed: Proceed) -> Any:
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
                    leaving.restored += _bytes(home.tensor)
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
            self._pinned.get(leaf, {}).pop(name, None)
            if mark is not None and mark == home.mark:
                unchanged.append(placed)
            else:
                self._homes.forget(leaf, name)
        return unchanged

    def write(self, request: WriteInPlace) -> Decision | None:
        parameter = request.module._parameters.get(request.name)
        if parameter is None or not is_plain(parameter) or self._bank.file_of(parameter) is None:
            return None

        def act(proceed: Proceed) -> Any:
            self._homes.note(request.module, request.name, parameter)
            put(request.module, request.name, parameter.detach().clone())
            self._written.setdefault(request.module, set()).add(request.name)
            return proceed()

        return Decision("", act)

    def _adopt_unchanged(self, module: torch.nn.Module) -> None:
        """Private copies that were written to and put back (hooks) end as the mapping again, if their bytes are the same."""
        for leaf in module.modules():
            for name in self._written.pop(leaf, ()):
                parameter, home = leaf._parameters.get(name), self._homes.get(leaf).get(name)
                if parameter is None or home is None or parameter.device.type != "cpu" or not home.fits(parameter):
                    continue
                mark, home_mark = fingerprints([parameter, home.tensor])
                if mark is not None and mark == home_mark:
                    put(leaf, name, home.tensor)

    def pin(self, request: PinWeight) -> Decision | None:
        leaf_name, _, name = request.name.rpartition(".")
        leaf = request.weights.module.get_submodule(leaf_name)
        parameter = leaf._parameters.get(name)
        if (parameter is None or not is_plain(parameter) or self._bank.file_of(parameter) is None
                or not self._host.memory.can_pin()):
            return None
        booked = self._pinned_bytes() - self._pinned.get(leaf, {}).get(name, 0)
        if booked + parameter.nbytes > self._ledger.room(OWNER, Residency.PINNED):
            return None

        def act(proceed: Proceed) -> Any:
            self._homes.note(leaf, name, parameter)
            put(leaf, name, parameter.detach().clone())
            self._pinned.setdefault(leaf, {})[name] = parameter.nbytes
            self.book()
            return proceed()

        return Decision("", act)

    def book(self) -> None:
        """Tells the ledger which copies are left: models die, and weights go home."""
        self._ledger.book(OWNER, Residency.PINNED, self._pinned_bytes())

    def _pinned_bytes(self) -> int:
        return sum(sum(names.values()) for names in self._pinned.values())

    def pin_memory(self, request: PinMemory) -> Decision | None:
        if not any(self._bank.file_of(part) for part in parts(request.tensor)):
            return None
        return Decision("", lambda proceed: False)


def _bytes(tensor: torch.Tensor) -> int:
    return sum(part.nbytes for part in parts(tensor))
