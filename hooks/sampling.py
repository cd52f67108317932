"""A sampling step, and what the model predicts in it: where another process can do the work.

`BaseModel._apply_model` lies below samplers, guidance, ControlNets, context windows and all wrappers but those of the
diffusion model itself, so that these go on in the host's process. Both seams are passed at every step.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..policies.sampling import BatchRoom, Predict, SampleStep
from .call import HostCall
from .computing import rewinder
from .registry import Hook
from .remote import remote_of
from .seam import Seam
from .weights import PatcherWeights

# What packs hang into a step, in the host's options; the wrappers that are called inside of the step.
_GUESTS = ("patches", "patches_replace")
_INNER_WRAPPERS = ("apply_model", "diffusion_model")
# Of the host's options: what it has called already when the model predicts.
_OUTER = ("wrappers", "callbacks")
_STATEFUL = ("control", "hooks", "default")  # of a conditioning
_PLAIN = (type(None), bool, int, float, str, bytes, torch.Tensor, torch.dtype, torch.device)


def _step(call: HostCall) -> SampleStep | None:
    options = call["model_options"]
    inner = options.get("transformer_options", {})
    wrappers = inner.get("wrappers", {})
    guests = (options.get("model_function_wrapper"), *map(inner.get, _GUESTS),
              *(found for kind in _INNER_WRAPPERS for found in wrappers.get(kind, {}).values()))
    patcher = call["model"].current_patcher
    device = getattr(patcher, "load_device", None)
    if device is None or not hasattr(patcher, "partially_unload"):
        return None
    alone = not any(guests)
    apart = alone and not _callables({name: value for name, value in inner.items() if name not in _OUTER})
    return SampleStep("a sampling step", PatcherWeights(patcher), device, rewinder(device), alone, remote_of(patcher),
                      call["x_in"], lambda: _branches(call) if apart else {})


def _branches(call: HostCall) -> Mapping[int, Callable[[], list[torch.Tensor]]]:
    """One for each conditioning. What has a state of its own, ControlNets and hooks, is not asked from two threads."""
    conds = call["conds"]
    there = [index for index, cond in enumerate(conds) if cond]
    stateful = any(entry.get(name) is not None for index in there for entry in conds[index] for name in _STATEFUL)
    if len(there) < 2 or stateful or "multigpu_clones" in call["model_options"]:
        return {}
    return {one: call.part(conds=[cond if index == one else None for index, cond in enumerate(conds)]) for one in there}


def _predict(call: HostCall) -> Predict | None:
    patcher = getattr(call.instance, "current_patcher", None)
    remote = remote_of(patcher)
    if remote is None or remote.module is not call.instance:
        return None
    arguments = dict(call.arguments())
    arguments |= arguments.pop("kwargs", {})
    options = dict(arguments["transformer_options"])
    inner = options.get("wrappers", {}).get("diffusion_model", {})
    for name in _OUTER:
        options.pop(name, None)
    if any(inner.values()):
        options["wrappers"] = {"diffusion_model": inner}
    arguments["transformer_options"] = options
    guests = tuple(sorted({*_callables(options), *remote.altered()}))
    return Predict(remote, PatcherWeights(patcher), arguments.pop("x"), arguments, guests)


def _callables(value: Any) -> set[str]:
    """The names of what is in it beside numbers, names and tensors: it may be called."""
    if isinstance(value, Mapping):
        return set().union(*map(_callables, value.values()))
    if isinstance(value, (list, tuple, set)):
        return set().union(*map(_callables, value))
    if isinstance(value, _PLAIN) or type(value).__module__ in ("uuid", "numpy"):
        return set()
    named = value if hasattr(value, "__qualname__") else type(value)
    return {f"{getattr(named, '__module__', '')}.{named.__qualname__}"}


def _room(call: HostCall) -> BatchRoom | None:
    remote = remote_of(call.instance)
    return None if remote is None else BatchRoom(remote.module)


HOOKS = (
    Hook(Seam("comfy.samplers", "_calc_cond_batch", ("model", "conds", "x_in", "model_options")), SampleStep, _step,
         instead=lambda request: request.run()),
    Hook(Seam("comfy.model_base", "BaseModel._apply_model", ("x", "t", "transformer_options")), Predict, _predict),
    Hook(Seam("comfy.model_patcher", "ModelPatcher.get_free_memory", ("device",)), BatchRoom, _room),
)
