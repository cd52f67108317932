"""Weights stay in the file's memory mapping instead of being copied into RAM.

The path of the bytes: file, page cache, device. ComfyUI's classic patcher goes file, page cache, private RAM, device, and
on offload device, private RAM. Here a parameter *is* the file's mapping where the file's dtype is the parameter's, and on
offload it is pointed at the mapping again: nothing is copied, and the page cache holds the only copy in RAM.

It pays wherever the classic patcher runs. It does nothing with dynamic VRAM, where ComfyUI maps files itself, and little
for weights that are converted on load (an fp8 `weight_dtype` of a bf16 file): those need their private copy.

Windows: a copy-on-write view is charged to the commit limit in full, so a file that does not fit there is left to ComfyUI.
Nothing guards against a file that is overwritten while a prompt runs; between prompts it is noticed, and the models rebuilt.
"""
from __future__ import annotations

import gc
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import safetensors

from ... import settings as settings_module
from ...telemetry import emit, log
from ..files import pages
from ..files.bank import MappedFile
from ..files.identity import overwritten
from ..memory import GB, Residency
from ..policy import Decision, Effect, Policy, Proceed, Refusal, Unfit
from ..requests import (
    BuildModel,
    FillModule,
    MoveModule,
    MoveWeights,
    OffloadPart,
    OffloadWeights,
    OpenModel,
    PatchWeight,
    PinMemory,
    PinWeight,
    PlaceModel,
    ReadWeights,
    Request,
    RunPrompt,
    WriteInPlace,
)
from . import gguf, opening
from .building import Builder
from .copies import Copies
from .offload import Offloader
from .parameters import Homes, is_plain

if TYPE_CHECKING:
    from .. import Tools

NAME = "zero_copy"
SAFETENSORS = (".safetensors", ".sft")


@dataclass(frozen=True)
class Settings:
    keep_file_dtype: bool = False
    keep_gb: settings_module.Auto = field(default="auto", metadata=settings_module.AUTO)
    read_ahead: bool = True


def create(settings: Settings, tools: Tools) -> Policy:
    return ZeroCopy(settings, tools)


class ZeroCopy(Policy):
    """Reads through the bank, fills modules with mappings, and swaps back to them on offload."""

    name = NAME

    def __init__(self, settings: Settings, tools: Tools) -> None:
        self.settings: Settings = settings
        self._tools, self._bank = tools, tools.bank
        homes = Homes(tools.bank)
        self._builder = Builder(tools.bank, homes, settings.keep_file_dtype)
        self._copies = Copies(homes, tools)
        self._offloader = Offloader(homes, self._copies, tools.bank, self._builder.widen)
        self._told: WeakSet[MappedFile] = WeakSet()
        self._reads_gguf = False
        self._rules = {
            ReadWeights: self._read,
            OpenModel: self._open,
            BuildModel: self._builder.build,
            FillModule: self._builder.fill,
            PlaceModel: self._place,
            MoveWeights: self._offloader.move,
            OffloadWeights: self._offloader.offload,
            OffloadPart: self._offloader.offload_part,
            MoveModule: self._offloader.move_module,
            WriteInPlace: self._copies.write,
            PatchWeight: _patch_at_use,
            PinWeight: self._copies.pin,
            PinMemory: self._copies.pin_memory,
            RunPrompt: self._run_prompt,
        }
        self.answers = frozenset(self._rules)

    def start(self) -> None:
        reading = self._tools.host.reading
        if reading.maps_files_itself():
            raise Unfit("ComfyUI's dynamic VRAM maps the files itself, there is nothing to save")
        if reading.mmap_disabled():
            raise Unfit("ComfyUI was started with --disable-mmap")
        reason = gguf.unavailable(self._tools.host.formats)
        if reason is None:
            self._tools.host.formats.offer_gguf(True)
            self._reads_gguf = True
        else:
            emit("policy.declined", policy=f"{NAME}, GGUF files", reason=reason)

    def decide(self, request: Request) -> Decision | None:
        rule: Any = self._rules.get(type(request))
        return rule(request) if rule else None

    def prompt_ended(self) -> Effect:
        self._sweep()
        return self._builder.take_effect()

    def emptied(self) -> None:
        self._bank.empty()
        if self._bank.live():
            gc.collect()  # models die in cycles; the host collects right after us, too late for the check below
        self._sweep()

    def close(self) -> None:
        if self._reads_gguf:
            self._reads_gguf = False
            self._tools.host.formats.offer_gguf(False)
        self._bank.empty()

    def _sweep(self) -> None:
        room = self._tools.ledger.room(NAME, Residency.MAPPED)
        if not isinstance(self.settings.keep_gb, str):
            room = min(room, int(self.settings.keep_gb * GB))
        self._tools.ledger.book(NAME, Residency.MAPPED, self._bank.sweep(room))
        self._copies.book()

    def _read(self, request: ReadWeights) -> Decision | None:
        if not request.on_cpu:
            return None
        if request.path.lower().endswith(SAFETENSORS):
            if not pages.may_map(request.path):
                return None
            return Decision(f"{request.path}: the mapping is the copy", partial(self._lease, request))
        if request.path.lower().endswith(".gguf"):
            if not self._reads_gguf:
                return None
            return Decision(f"{request.path}: blocks stay in the mapping", partial(self._lease, request))
        if zipfile.is_zipfile(request.path):
            return Decision(f"{request.path}: torch can map this file", partial(self._map_torch_file, request))
        return None

    def _open(self, request: OpenModel) -> Decision | None:
        return opening.decide(request) if self._reads_gguf else None

    def _lease(self, request: ReadWeights, proceed: Proceed) -> Any:
        started = time.perf_counter()
        try:
            lease = self._bank.lease(request.path)
            is_gguf = lease.gguf is not None
            tensors = gguf.weights(lease, self._tools.host.formats, self._bank.lease) if is_gguf else lease.tensors
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
        if not self.settings.read_ahead or file.end == 0:
            return
        resident = pages.resident_fraction(file.start, file.end, file.path)
        if resident is None or resident > 0.95:
            return
        started = time.perf_counter()
        tell = pages.Reporter(lambda percent: log.info("[residency] reading %s: %d %%", file.name, percent))

        def progress(done: int, total: int) -> None:
            self._tools.host.lifecycle.raise_if_cancelled()
            tell(done, total)

        size = pages.read_ahead(file.path, self._tools.ledger.room(NAME, Residency.MAPPED), progress)
        emit("weights.read_ahead", file=file.name, bytes=size, seconds=time.perf_counter() - started)

    def _place(self, request: PlaceModel) -> Decision | None:
        for file in self._offloader.files_of(request.weights.module):
            if overwritten(file.path, file.identity):
                return Decision(f"{file.name} was overwritten", partial(_refuse, file))
        return None

    def _run_prompt(self, request: RunPrompt) -> Decision | None:
        changed = [file for file in self._bank.live() if file not in self._told and overwritten(file.path, file.identity)]
        if not changed:
            return None

        def rebuild(proceed: Proceed) -> Any:
            for file in changed:
                self._told.add(file)
                emit("file.changed", file=file.name, reason=f"{file.path} was overwritten; the models are loaded again")
            request.rebuild_models()
            gc.collect()
            return proceed()

        return Decision(f"{', '.join(file.name for file in changed)} changed on disk", rebuild)


def _patch_at_use(request: PatchWeight) -> Decision:
    return Decision("", lambda proceed: request.at_use())


def _refuse(file: MappedFile, proceed: Proceed) -> Any:
    raise Refusal(f"{file.path} was overwritten while a model that was loaded from it is in use. "
                  "Queue the prompt again: the model is then loaded anew.")
