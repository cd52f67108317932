"""Models giving memory back. None of these is ever suppressed: `ModelPatcher.__del__` calls `detach` from garbage
collection at any moment, in any thread.

`partially_unload` picks its modules as it goes and calls `Module.to` on each: that is a hot seam, hooked only while a
policy answers it.
"""
from __future__ import annotations

from typing import Any

import torch

from ..policies.requests import FreeMemory, MoveModule, OffloadPart, OffloadWeights, ReleaseModel
from ..telemetry import emit
from .call import HostCall
from .registry import Hook
from .seam import Seam
from .weights import PatcherWeights


def _unpatch(call: HostCall) -> OffloadWeights | None:
    if not call["unpatch_weights"]:
        return None
    return OffloadWeights(PatcherWeights(call.instance), _device(call["device_to"]))


def _device(device: Any) -> torch.device | None:
    return None if device is None else torch.device(device)


def _to(call: HostCall) -> MoveModule | None:
    device = torch._C._nn._parse_to(*call["args"], **call["kwargs"])[0]
    return None if device is None or call.instance is None else MoveModule(call.instance, device)


def _unload(call: HostCall) -> ReleaseModel | None:
    patcher = call.instance.model
    return None if patcher is None else _release(patcher, call["memory_to_free"])


def _detach(call: HostCall) -> ReleaseModel | None:
    # Clones come and go without touching the weights (`unpatch_all=False`).
    return _release(call.instance, None) if call["unpatch_all"] else None


def _release(patcher: Any, wanted: float | None) -> ReleaseModel:
    weights = PatcherWeights(patcher)
    return ReleaseModel(weights, weights.on_device(), wanted)


def _released(call: HostCall, request: Any, answer: Any, seconds: float) -> None:
    left = request.weights.on_device()
    if request.device_bytes > left:
        emit("model.released", model=request.weights.name, device=request.weights.load_device(),
             bytes=request.device_bytes - left, seconds=seconds, partly=left > 0)


def _unloaded(call: HostCall, request: Any, answer: Any, seconds: float) -> None:
    if answer is False:  # only a part left; a full unload goes through detach, which tells of it
        _released(call, request, answer, seconds)


def _freed(call: HostCall, request: FreeMemory, answer: Any, seconds: float) -> None:
    if answer:
        emit("memory.freed", device=request.device, wanted_bytes=request.bytes_wanted, models=len(answer), seconds=seconds)


HOOKS = (
    Hook(Seam("comfy.model_management", "free_memory", ("memory_required", "device")), FreeMemory,
         lambda call: FreeMemory(str(call["device"]), float(call["memory_required"])),
         lambda request: {"memory_required": request.bytes_wanted}, report=_freed),
    Hook(Seam("comfy.model_management", "LoadedModel.model_unload", ("memory_to_free",)), ReleaseModel, _unload,
         report=_unloaded),
    Hook(Seam("comfy.model_patcher", "ModelPatcher.detach", ("unpatch_all",)), ReleaseModel, _detach, report=_released),
    Hook(Seam("comfy.model_patcher", "ModelPatcher.unpatch_model", ("device_to", "unpatch_weights")), OffloadWeights,
         _unpatch),
    Hook(Seam("comfy.model_patcher", "ModelPatcher.partially_unload", ("device_to",)), OffloadPart,
         lambda call: OffloadPart(PatcherWeights(call.instance), _device(call["device_to"]))),
    Hook(Seam("torch.nn.modules.module", "Module.to", ("args", "kwargs")), MoveModule, _to),
)
