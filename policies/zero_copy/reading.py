"""Reading weight files: what a loader gets is the file's mapping."""
from __future__ import annotations

import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import safetensors

from ...telemetry import emit, log
from ..files import pages
from ..files.bank import Lease, MappedFile
from ..files.parameters import is_plain
from ..memory import Residency
from ..policy import Decision, Proceed, Refusal
from ..requests import OpenModel, ReadWeights
from . import gguf, opening

if TYPE_CHECKING:
    from .. import Tools

OWNER = "zero_copy"
SAFETENSORS = (".safetensors", ".sft")


class Reader:
    """Decides on `ReadWeights` and `OpenModel`.

    Attributes:
        takes_gguf: whether GGUF files can be opened.
        takes_others: whether all other files are mapped here; with dynamic VRAM the host does that.
    """

    def __init__(self, tools: Tools, reads_ahead: bool) -> None:
        self._tools, self._bank, self._reads_ahead = tools, tools.bank, reads_ahead
        self.takes_gguf, self.takes_others = False, True

    def read(self, request: ReadWeights) -> Decision | None:
        if not request.on_cpu:
            return None
        if request.path.lower().endswith(".gguf"):
            if not self.takes_gguf:
                return None
            return Decision(f"{request.path}: blocks stay in the mapping", partial(self._lease, request))
        if not self.takes_others:
            return None
        if request.path.lower().endswith(SAFETENSORS):
            if not pages.may_map(request.path):
                return None
            return Decision(f"{request.path}: the mapping is the copy", partial(self._lease, request))
        if zipfile.is_zipfile(request.path):
            return Decision(f"{request.path}: torch can map this file", partial(self._map_torch_file, request))
        return None

    def open(self, request: OpenModel) -> Decision | None:
        return opening.decide(request) if self.takes_gguf else None

    def _lease(self, request: ReadWeights, proceed: Proceed) -> Any:
        started = time.perf_counter()
        try:
            lease = self._bank.lease(request.path)
            tensors = lease.tensors if lease.gguf is None else self._gguf(lease)
        except gguf.GGUFError as error:
            emit("file.unreadable", file=request.path, reason=str(error))
            raise Refusal(str(error)) from None  # the host cannot read it either, and would say something else
        except (OSError, safetensors.SafetensorError) as error:
            # The host meets the same file and raises its own error, which does not always name it.
            emit("file.unreadable", file=request.path,
                 reason=f"{error}. If it exists, it is damaged: download or copy it again")
            return proceed()
        self._read_ahead(lease.file)
        emit("weights.read", file=lease.file.name, bytes=lease.file.identity.size,
             seconds=time.perf_counter() - started, source="file" if lease.fresh else "bank")
        return (tensors, lease.metadata) if request.with_metadata else tensors

    def _gguf(self, lease: Lease) -> dict[str, Any]:
        if not self.takes_others:
            gguf.locate(lease, self._tools.host.reading)
        return gguf.weights(lease, self._tools.host.formats, self._bank.lease)

    def _map_torch_file(self, request: ReadWeights, proceed: Proceed) -> Any:
        with self._tools.host.reading.torch_files_mapped():
            answer = proceed()
        state_dict = answer[0] if request.with_metadata else answer
        # Some files (textual inversions) hold a list.
        tensors = [value for value in state_dict.values() if is_plain(value)] if isinstance(state_dict, Mapping) else []
        if tensors:
            with suppress(OSError):  # gone already; what was read is good
                self._bank.adopt(request.path, tensors)
        return answer

    def _read_ahead(self, file: MappedFile) -> None:
        if not self._reads_ahead or file.end == 0:
            return
        resident = pages.resident_fraction(file.start, file.end, file.path)
        if resident is None or resident > 0.95:
            return
        started = time.perf_counter()
        tell = pages.Reporter(lambda percent: log.info("[residency] reading %s: %d %%", file.name, percent))

        def progress(done: int, total: int) -> None:
            self._tools.host.lifecycle.raise_if_cancelled()
            tell(done, total)

        size = pages.read_ahead(file.path, self._tools.ledger.room(OWNER, Residency.MAPPED), progress)
        emit("weights.read_ahead", file=file.name, bytes=size, seconds=time.perf_counter() - started)
