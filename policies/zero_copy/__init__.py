"""Weights stay in the file's memory mapping instead of being copied into RAM.

The path of the bytes: file, page cache, device. ComfyUI's classic patcher goes file, page cache, private RAM, device, and
on offload device, private RAM. Here a parameter *is* the file's mapping where the file's dtype is the parameter's, and on
offload it is pointed at the mapping again: nothing is copied, and the page cache holds the only copy in RAM.

It pays wherever the classic patcher runs, and little for weights that are converted on load (an fp8 `weight_dtype` of a bf16
file): those need their private copy. With dynamic VRAM ComfyUI maps files itself, but does not know GGUF: there only those are
read here, and each weight says where in the file it is, so that ComfyUI streams it as it does its own formats.

Windows: a copy-on-write view is charged to the commit limit in full, so a file that does not fit there is left to ComfyUI.
Nothing guards against a file that is overwritten while a prompt runs; between prompts it is noticed, and the models rebuilt.
"""
from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ... import settings as settings_module
from ...telemetry import emit
from ..files.bank import MappedFile
from ..files.identity import overwritten
from ..files.parameters import Homes
from ..memory import GB, Residency
from ..policy import Decision, Effect, Policy, Proceed, Refusal, Unfit
from ..requests import (
    BuildModel,
    FillModule,
    FreeMemory,
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
from . import gguf
from .building import Builder
from .copies import Copies
from .dense import DenseWeights
from .offload import Offloader
from .reading import Reader

if TYPE_CHECKING:
    from .. import Tools

NAME = "zero_copy"
_DYNAMIC = "ComfyUI's dynamic VRAM maps files itself, there is nothing to save"


@dataclass(frozen=True)
class Settings:
    keep_file_dtype: bool = False
    keep_gb: settings_module.Auto = field(default="auto", metadata=settings_module.AUTO)
    read_ahead: bool = True
    keep_dense_gb: settings_module.Auto = field(default="auto", metadata=settings_module.AUTO)


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
        self._reader = Reader(tools, settings.read_ahead)
        self._copies = Copies(homes, tools)
        self._offloader = Offloader(homes, self._copies, tools.bank, self._builder.widen)
        self._dense = DenseWeights(tools, settings.keep_dense_gb)
        self._told: WeakSet[MappedFile] = WeakSet()
        self._rules = {
            ReadWeights: self._reader.read,
            OpenModel: self._reader.open,
            BuildModel: self._builder.build,
            FillModule: self._builder.fill,
            PlaceModel: self._place,
            FreeMemory: self._dense.free,
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
        reading, formats = self._tools.host.reading, self._tools.host.formats
        if reading.mmap_disabled():
            raise Unfit("ComfyUI was started with --disable-mmap")
        no_gguf, maps_itself = gguf.unavailable(formats), reading.maps_files_itself()
        if no_gguf:
            emit("policy.declined", policy=f"{NAME}, GGUF files", reason=no_gguf)
        if maps_itself:
            if no_gguf:
                raise Unfit(_DYNAMIC)
            emit("policy.declined", policy=f"{NAME}, all but GGUF files", reason=_DYNAMIC)
        self._reader.takes_gguf, self._reader.takes_others = not no_gguf, not maps_itself
        if not no_gguf:
            formats.offer_gguf(True)

    def decide(self, request: Request) -> Decision | None:
        rule: Any = self._rules.get(type(request))
        return rule(request) if rule else None

    def prompt_ended(self) -> Effect:
        self._sweep()
        return self._builder.take_effect()

    def emptied(self) -> None:
        self._dense.drop()
        self._bank.empty()
        if self._bank.live():
            gc.collect()  # models die in cycles; the host collects right after us, too late for the check below
        self._sweep()

    def close(self) -> None:
        self._dense.drop()
        if self._reader.takes_gguf:
            self._reader.takes_gguf = False
            self._tools.host.formats.offer_gguf(False)
        self._bank.empty()

    def _sweep(self) -> None:
        room = self._tools.ledger.room(NAME, Residency.MAPPED)
        if not isinstance(self.settings.keep_gb, str):
            room = min(room, int(self.settings.keep_gb * GB))
        self._tools.ledger.book(NAME, Residency.MAPPED, self._bank.sweep(room))
        self._copies.book()

    def _place(self, request: PlaceModel) -> Decision | None:
        files = self._offloader.files_of(request.weights.module)
        for file in files:
            if overwritten(file.path, file.identity):
                return Decision(f"{file.name} was overwritten", partial(_refuse, file))
        if any(file.path.lower().endswith(".gguf") for file in files):
            return self._dense.place(request)
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
