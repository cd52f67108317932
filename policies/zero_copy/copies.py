"""The few private copies of mapped weights that zero_copy makes: for page-locking, and for writes in place.

Mapped weights are not page-locked where they are. `cudaHostRegister` takes pages for writing, which turns each page of a
copy-on-write mapping into a private copy first: RAM doubles behind everybody's back, and the kernel does it page by page.
No run on a GPU has shown otherwise. Weights that stay off the device while sampling are copied instead, once, within the budget
for pinned memory, and the host pins the copy: they stream as fast as without us. Beyond the budget they stream unpinned.

What the host writes in place (scheduled LoRA) goes to a copy too, so that the mapping keeps the file's bytes.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ..files.parameters import Homes, fingerprints, is_plain, parts, put, size
from ..files.subclasses import has_own_memory
from ..memory import Residency
from ..policy import Decision, Proceed
from ..requests import PinMemory, PinWeight, WriteInPlace

if TYPE_CHECKING:
    from .. import Tools

OWNER = "zero_copy"


class Copies:
    """Decides on writes and on page-locking, and keeps count of the copies."""

    def __init__(self, homes: Homes, tools: Tools) -> None:
        self._homes, self._bank, self._ledger, self._memory = homes, tools.bank, tools.ledger, tools.host.memory
        self._written: WeakKeyDictionary[torch.nn.Module, set[str]] = WeakKeyDictionary()
        self._pinned: WeakKeyDictionary[torch.nn.Module, dict[str, int]] = WeakKeyDictionary()

    def write(self, request: WriteInPlace) -> Decision | None:
        beside = request.beside
        if beside is not None:
            return Decision("", lambda proceed: beside())
        parameter = request.module._parameters.get(request.name)
        if parameter is None or not is_plain(parameter) or self._bank.file_of(parameter) is None:
            return None

        def act(proceed: Proceed) -> Any:
            self._homes.note(request.module, request.name, parameter)
            put(request.module, request.name, parameter.detach().clone())
            self._written.setdefault(request.module, set()).add(request.name)
            return proceed()

        return Decision("", act)

    def adopt_unchanged(self, module: torch.nn.Module) -> None:
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
        if not self._memory.can_pin():  # asked for every weight that leaves, so the cheap question comes first
            return None
        leaf_name, _, name = request.name.rpartition(".")
        leaf = request.weights.module.get_submodule(leaf_name)
        parameter = leaf._parameters.get(name)
        if parameter is None or not any(self._bank.file_of(part) for part in parts(parameter)):
            return None
        if has_own_memory(parameter):  # the host page-locks only tensors of its own kinds
            return None
        booked = self._pinned_bytes() - self._pinned.get(leaf, {}).get(name, 0)
        if booked + size(parameter) > self._ledger.room(OWNER, Residency.PINNED):
            return None

        def act(proceed: Proceed) -> Any:
            self._homes.note(leaf, name, parameter)
            put(leaf, name, parameter.detach().clone())
            self._pinned.setdefault(leaf, {})[name] = size(parameter)
            self.book()
            answer = proceed()
            home = self._homes.get(leaf).get(name)
            if home is not None and request.name not in request.weights.pinned():
                put(leaf, name, home.tensor)  # a copy that is not page-locked would only cost RAM
                self.gone(leaf, name)
                self.book()
            return answer

        return Decision("", act)

    def gone(self, leaf: torch.nn.Module, name: str) -> None:
        """A parameter went to the device, so a pinned copy of it is no more."""
        self._pinned.get(leaf, {}).pop(name, None)

    def book(self) -> None:
        """Tells the ledger which copies are left: models die, and weights go home."""
        self._ledger.book(OWNER, Residency.PINNED, self._pinned_bytes())

    def _pinned_bytes(self) -> int:
        return sum(sum(names.values()) for names in self._pinned.values())

    def pin_memory(self, request: PinMemory) -> Decision | None:
        if not any(self._bank.file_of(part) for part in parts(request.tensor)):
            return None
        return Decision("", lambda proceed: False)
