"""Page-locked RAM for weights that stay off the device while sampling, within one budget for all models.

A device fetches from page-locked memory at the full speed of its bus, and beside its computations. ComfyUI page-locks what it
leaves in RAM, the largest weights first, up to 90 % of the RAM (40 % on Windows). Here it stops at `[memory] pinned_gb` too,
counted over all models and with zero_copy's copies of mapped weights; smaller weights, for which it matters least, are left.

The platform's limit is the host's own figure, and whatever the driver refuses: CUDA's and HIP's register call lock pages in the
driver, which does not charge them to RLIMIT_MEMLOCK. A refusal costs an error on the device each time, so a model that met one
is left alone until the prompt ends, and then one event tells how much of it stayed unlocked.
"""
from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ...telemetry import emit
from ..files.parameters import parts, size
from ..policy import Decision, Proceed
from ..requests import PinMemory, PinWeight

if TYPE_CHECKING:
    from .. import Tools


@dataclass
class Failed:
    """What of a model could not be page-locked since the last prompt ended."""

    model: str
    reason: str = ""
    bytes: int = 0


_trying: ContextVar[Failed | None] = ContextVar("residency_pinning", default=None)


class Pinning:
    """Decides on `PinWeight` and on `PinMemory`."""

    def __init__(self, tools: Tools) -> None:
        self._bank, self._memory, self._ledger = tools.bank, tools.host.memory, tools.ledger
        self._failed: WeakKeyDictionary[torch.nn.Module, Failed] = WeakKeyDictionary()

    def weight(self, request: PinWeight, proceed: Proceed) -> Any:
        """Lets the host page-lock a weight, if there is room for it."""
        leaf, _, name = request.name.rpartition(".")
        parameter = request.weights.module.get_submodule(leaf)._parameters.get(name)
        if parameter is None or parameter.device.type != "cpu" or not self._memory.can_pin():
            return proceed()
        failed = self._failed.get(request.weights.module)
        if failed is None:
            if not self._fits(size(parameter)):
                return None
            failed = Failed(request.weights.name)
            token = _trying.set(failed)
            try:
                answer = proceed()
            finally:
                _trying.reset(token)
            if not failed.reason:
                return answer
            self._failed[request.weights.module] = failed
        failed.bytes += size(parameter)
        return None

    def memory(self, request: PinMemory) -> Decision | None:
        """Whoever asks, the budget holds."""
        if not self._memory.can_pin():
            return None
        if not self._fits(request.tensor.nbytes):
            return Decision("", lambda proceed: False)
        failed = _trying.get()
        return None if failed is None else Decision("", partial(self._try, request.tensor, failed))

    def _try(self, tensor: torch.Tensor, failed: Failed, proceed: Proceed) -> Any:
        try:
            pinned = proceed()
        except RuntimeError as error:  # the driver's, which newer hosts pass on
            failed.reason = str(error) or type(error).__name__
            return False
        if not pinned and self._lockable(tensor):
            failed.reason = "the driver refused to page-lock it; the system's limit may be reached"
        return pinned

    def _lockable(self, tensor: torch.Tensor) -> bool:
        """Whether the host had no reason of its own to leave it: it takes no mapping, and nothing twice."""
        memory = parts(tensor)
        return bool(memory) and tensor.is_contiguous() and not any(
            part.is_pinned() or not part.numel() or self._bank.file_of(part) is not None for part in memory)

    def _fits(self, wanted: int) -> bool:
        now, most = self._memory.pinned()
        return now + wanted <= (most if self._ledger.limits.pinned is None else min(most, self._ledger.limits.pinned))

    def prompt_ended(self) -> None:
        for failed in self._failed.values():
            emit("pin.failed", model=failed.model, bytes=failed.bytes, reason=failed.reason)
        self._failed.clear()
