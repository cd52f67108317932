"""Models being made ready on their device.

`LoadedModel.model_load` is the door above every patcher class; `ModelPatcher.load` is where the classic patcher moves
weights (dynamic patchers override it and do not come here). `lowvram_model_memory` of 0 means *no limit* in both.
"""
from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import torch

from ..policies.files.bank import Bank
from ..policies.memory import Residency
from ..policies.requests import MoveWeights, PatchWeight, PinMemory, PinWeight, PlaceModel, PlaceModels, WriteInPlace
from ..telemetry import emit
from .call import HostCall
from .gguf_weights import keeps_file_format
from .registry import Hook
from .remote import remote_of
from .seam import Seam
from .weights import PatcherWeights


class Stopwatch:
    """Seconds spent placing models since it was last read: prompts say how much of their time that was."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def add(self, call: HostCall, request: PlaceModels, answer: Any, seconds: float) -> None:
        self._seconds += seconds

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def census(module: torch.nn.Module, bank: Bank, device: torch.device) -> Counter[Residency | str]:
    """Where a model's bytes are: on its device, on others by their names, and in RAM."""
    where: Counter[Residency | str] = Counter()
    for parameter in module.parameters():
        there = parameter.device
        if there.type != "cpu":
            own = (there.type, there.index or 0) == (device.type, device.index or 0)
            where[Residency.DEVICE if own else str(there)] += parameter.nbytes
        elif bank.file_of(parameter) is not None:
            where[Residency.MAPPED] += parameter.nbytes
        else:
            where[Residency.HOST] += parameter.nbytes
    return where


def hooks(bank: Bank, stopwatch: Stopwatch) -> tuple[Hook, ...]:
    """The hooks of this file; `bank` tells which weights are a file's mapping."""
    # Bytes on the device and in all: when a call came in, and when we last spoke of a model.
    came: WeakKeyDictionary[HostCall, tuple[int, int]] = WeakKeyDictionary()
    told: WeakKeyDictionary[torch.nn.Module, tuple[int, int]] = WeakKeyDictionary()

    def place(call: HostCall) -> PlaceModel | None:
        patcher = call.instance.model
        if patcher is None:
            return None
        budget = float(call["lowvram_model_memory"])
        weights = PatcherWeights(patcher)
        came[call] = (weights.on_device(), weights.size())
        return PlaceModel(weights, call.instance.device, budget or None, remote=remote_of(patcher))

    def placed(call: HostCall, request: PlaceModel, answer: Any, seconds: float) -> None:
        weights = request.weights
        assert isinstance(weights, PatcherWeights)
        state = (weights.on_device(), weights.size())
        if came[call] == state == told.get(weights.module):
            return  # nothing moved: a warm prompt
        told[weights.module] = state
        where = census(weights.module, bank, request.device)
        if weights.streamed_by_host:  # its own pages there; the parameters stay where they are
            where[Residency.DEVICE] = weights.on_device()
        lent = {place: size for place, size in where.items() if isinstance(place, str)}
        emit("model.placed", model=weights.name, device=str(request.device), seconds=seconds,
             device_bytes=where[Residency.DEVICE], mapped_bytes=where[Residency.MAPPED], host_bytes=where[Residency.HOST],
             **({"donor_bytes": lent} if lent else {}))

    return (
        Hook(Seam("comfy.model_management", "load_models_gpu", ("models",)), PlaceModels,
             lambda call: PlaceModels(tuple(PatcherWeights(patcher) for patcher in call["models"])), report=stopwatch.add),
        Hook(Seam("comfy.model_management", "LoadedModel.model_load", ("lowvram_model_memory", "force_patch_weights")),
             PlaceModel, place, _budget, report=placed),
        Hook(Seam("comfy.model_patcher", "ModelPatcher.load", ("device_to", "full_load")), MoveWeights,
             lambda call: MoveWeights(PatcherWeights(call.instance), call["device_to"], call["full_load"]),
             lambda request: {"full_load": request.whole}),
        Hook(Seam("comfy.model_patcher", "ModelPatcher.pin_weight_to_device", ("key",)), PinWeight,
             lambda call: PinWeight(PatcherWeights(call.instance), call["key"])),
        Hook(Seam("comfy.model_management", "pin_memory", ("tensor",)), PinMemory,
             lambda call: PinMemory(call["tensor"]) if comfy.model_management.MAX_PINNED_MEMORY > 0 else None),
        Hook(Seam("comfy.utils", "copy_to_param", ("obj", "attr", "value")), WriteInPlace, _write),
        Hook(Seam("comfy.model_patcher", "ModelPatcher.patch_weight_to_device", ("key", "return_weight")), PatchWeight, _patch),
    )


def _budget(request: PlaceModel) -> dict[str, Any]:
    # Nothing is a tenth of a byte, as the host says it itself.
    more = 0 if request.more_bytes is None else request.more_bytes or 0.1
    return {"lowvram_model_memory": more, **({"force_patch_weights": True} if request.patch_all else {})}


def _write(call: HostCall) -> WriteInPlace:
    owner, _, name = call["attr"].rpartition(".")
    module = call["obj"].get_submodule(owner)
    beside = partial(module.write, call["value"]) if name == "weight" and keeps_file_format(module) else None
    return WriteInPlace(module, name, beside)


def _patch(call: HostCall) -> PatchWeight | None:
    patcher, key = call.instance, call["key"]
    if key not in patcher.patches or call["return_weight"]:
        return None
    owner, _, name = key.rpartition(".")
    module = patcher.model.get_submodule(owner)
    if name != "weight" or not keeps_file_format(module):
        return None
    return PatchWeight(partial(module.patch_at_use, key, patcher))
