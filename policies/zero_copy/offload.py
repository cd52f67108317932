"""Leaving the device without a copy: a parameter that nobody changed there is pointed at its home in the file again.

Mapped weights are not page-locked in place. `cudaHostRegister` takes pages for writing, which turns each page of a
copy-on-write mapping into a private copy first: RAM doubles behind everybody's back, and the kernel does it page by page.
Weights that stay off the device while sampling are copied instead, once, within the budget for pinned memory, and the host
pins the copy: they stream as fast as without us. Beyond the budget they stream from the mapping, unpinned.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable
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
from .parameters import Home, Homes, fingerprint, is_plain, parts, put

if TYPE_CHECKING:
    from .. import Tools

OWNER = "zero_copy"
Placed = tuple[torch.nn.Module, str, torch.nn.Parameter, Home]


class Offloader:
    """Decides on everything that moves, overwrites or pins a parameter."""

    def __init__(self, homes: Homes, tools: Tools, widen: Callable[[torch.nn.Module, set[str]], None]) -> None:
        self._homes, self._bank, self._ledger, self._host = homes, tools.bank, tools.ledger, tools.host
        self._widen = widen
        self._written: WeakKeyDictionary[torch.nn.Module, set[str]] = WeakKeyDictionary()
        self._pinned: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()

    def files_of(self, module: torch.nn.Module) -> set[MappedFile]:
        return self._homes.files(module)

    def move(self, request: MoveWeights) -> Decision | None:
        if request.weights.streamed_by_host:
            return None
        return Decision("", partial(self._move, request.weights))

    def _move(self, weights: Weights, proceed: Proceed) -> Any:
        self._widen(weights.module, weights.patched())
        strangers = self._strangers(weights.module)
        self._homes.note_all(weights.module)
        answer = proceed()
        patched = weights.restored_by_host()
        for name, leaf, own_name, parameter, home in list(self._homes.of(weights.module)):
            if parameter.device.type == "cpu" or home.mark is not None or name in patched:
                continue
            home.mark = fingerprint(parameter)
            if name in strangers and not _same(home.mark, fingerprint(home.tensor)):
                self._homes.forget(leaf, own_name)
        return answer

    def _strangers(self, module: torch.nn.Module) -> set[str]:
        """Parameters in RAM that are not at home: our private copies, which may have been written to since, and
        parameters that somebody exchanged."""
        return {name for name, _, _, parameter, home in self._homes.of(module)
                if parameter.device.type == "cpu" and not home.holds(parameter)}

    def offload(self, request: OffloadWeights) -> Decision | None:
        if request.weights.streamed_by_host or request.device is None or request.device.type != "cpu":
            return None
        if not self._homes.files(request.weights.module):
            return None
        return Decision("", partial(self._offload, request.weights))

    def _offload(self, weights: Weights, proceed: Proceed) -> Any:
        started = time.perf_counter()
        patched = weights.restored_by_host()
        restored = self._swap([placed for full_name, *placed in self._homes.of(weights.module) if full_name not in patched])
        copied = sum(_bytes(parameter) for name, parameter in weights.module.named_parameters()
                     if parameter.device.type != "cpu" and name not in patched)
        answer = proceed()
        self._adopt_unchanged(weights.module)
        if copied or restored:
            emit("weights.restored", model=weights.name, bytes=restored, copied_bytes=copied,
                 seconds=time.perf_counter() - started)
        return answer

    def offload_part(self, request: OffloadPart) -> Decision | None:
        if request.weights.streamed_by_host or request.device is None or request.device.type != "cpu":
            return None
        return Decision("", partial(self._offload_part, request.weights))

    def _offload_part(self, weights: Weights, proceed: Proceed) -> Any:
        started = time.perf_counter()
        before = self._on_device(weights.module)
        answer = proceed()
        emit("weights.restored", model=weights.name, bytes=before - self._on_device(weights.module), copied_bytes=0,
             seconds=time.perf_counter() - started)
        return answer

    def move_module(self, request: MoveModule) -> Decision | None:
        if request.device is None or request.device.type != "cpu":
            return None
        homes = self._homes.get(request.module)
        placed = [(request.module, name, parameter, home) for name, home in homes.items()
                  if (parameter := request.module._parameters.get(name)) is not None and home.fits(parameter)
                  and parameter.device.type != "cpu"]
        if not placed:
            return None

        def act(proceed: Proceed) -> Any:
            self._swap(placed)
            return proceed()

        return Decision("", act)

    def _swap(self, placed: Iterable[Placed]) -> int:
        """Points parameters that are unchanged on the device at their homes, with one small read from the device.

        Returns the bytes that need no copy. A parameter that was changed has no home any more.
        """
        candidates = [(item, mark) for item in placed if item[2].device.type != "cpu" and item[3].mark is not None
                      and (mark := fingerprint(item[2])) is not None]
        if not candidates:
            return 0
        restored = 0
        now = torch.stack([mark for _, mark in candidates])
        then = torch.stack([item[3].mark.to(now.device) for item, _ in candidates if item[3].mark is not None])
        for (leaf, name, _, home), same in zip((item for item, _ in candidates), (now == then).tolist(), strict=True):
            home.mark = None
            if same:
                put(leaf, name, home.tensor)
                restored += _bytes(home.tensor)
            else:
                self._homes.forget(leaf, name)
        return restored

    def _on_device(self, module: torch.nn.Module) -> int:
        return sum(_bytes(home.tensor) for *_, parameter, home in self._homes.of(module) if parameter.device.type != "cpu")

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
                if (parameter is not None and home is not None and parameter.device.type == "cpu" and home.fits(parameter)
                        and torch.equal(parameter, home.tensor)):
                    put(leaf, name, home.tensor)

    def pin(self, request: PinWeight) -> Decision | None:
        leaf_name, _, name = request.name.rpartition(".")
        leaf = request.weights.module.get_submodule(leaf_name)
        parameter = leaf._parameters.get(name)
        if (parameter is None or not is_plain(parameter) or self._bank.file_of(parameter) is None
                or not self._host.memory.can_pin()):
            return None
        booked = sum(self._pinned.values())
        if booked + parameter.nbytes > self._ledger.room(OWNER, Residency.PINNED):
            return None

        def act(proceed: Proceed) -> Any:
            self._homes.note(leaf, name, parameter)
            put(leaf, name, parameter.detach().clone())
            self._pinned[leaf] = self._pinned.get(leaf, 0) + parameter.nbytes
            self._ledger.book(OWNER, Residency.PINNED, booked + parameter.nbytes)
            return proceed()

        return Decision("", act)

    def pin_memory(self, request: PinMemory) -> Decision | None:
        if not any(self._bank.file_of(part) for part in parts(request.tensor)):
            return None
        return Decision("", lambda proceed: False)


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.item() == other.item()


def _bytes(tensor: torch.Tensor) -> int:
    return sum(part.nbytes for part in parts(tensor))
