"""Models being built from state dicts, and modules being filled.

The functions below are where every loader node ends, ours or a pack's: they take state dicts, so a model that a pack read
in its own way is seen too. `Module.load_state_dict` is a hot seam: it exists in every torch program, so it is hooked only
while a policy answers it, and asks only for what the host fills while it builds.
"""
from __future__ import annotations

from typing import Any

import comfy.ops
import torch

from ..policies.requests import BuildModel, FillModule
from ..telemetry import emit, log
from .call import HostCall
from .gguf_weights import is_gguf
from .registry import Hook
from .seam import Seam

# Where weights are the second and third operand of one kernel, which the host casts to the input's dtype at each use.
_CASTABLE = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)


def _built(call: HostCall, request: BuildModel, answer: Any, seconds: float) -> None:
    if answer is None and request.gguf:  # the host raises an error that names the file
        says = (call.arguments().get("metadata") or {}).get("general.architecture", "nothing")
        log.error("[residency] ComfyUI knows no model with these tensors. The GGUF file says that it is: %s", says)
        return
    emit("model.built", model=request.kind, seconds=seconds)


def _building(module: str, path: str, needs: str, kind: str) -> Hook:
    return Hook(Seam(module, path, (needs,)), BuildModel, lambda call: BuildModel(kind), report=_built)


def _building_of_layers(module: str, path: str, needs: str, kind: str) -> Hook:
    """A loader that can be told what layers to build the model of."""

    def translate(call: HostCall) -> BuildModel:
        state_dicts = call[needs] if isinstance(call[needs], (list, tuple)) else [call[needs]]
        gguf = any(is_gguf(value) for state_dict in state_dicts
                   for value in state_dict.values())
        return BuildModel(kind, call["model_options"], gguf)

    return Hook(Seam(module, path, (needs, "model_options")), BuildModel, translate, _of_gguf_layers, report=_built)


def _of_gguf_layers(request: BuildModel) -> dict[str, Any]:
    if not request.bind_gguf:
        return {}
    from .gguf_weights.ops import Ops

    options = dict(request.options)
    dtype = options.pop("dtype", None)
    if dtype is not None:
        log.warning("[residency] weight_dtype %s is not applied: the weights of a GGUF file stay as they are in the file, and "
                    "are computed with in the dtype that ComfyUI chooses for the model", dtype)
    return {"model_options": options | {"custom_operations": Ops}}


def _castable(module: torch.nn.Module) -> bool:
    return isinstance(module, _CASTABLE) and isinstance(module, comfy.ops.CastWeightBiasOp)


def _cast_at_use(module: torch.nn.Module) -> None:
    setattr(module, "comfy_cast_weights", True)  # noqa: B010  torch types every attribute of a module as a tensor or a module


def _fill(call: HostCall) -> FillModule:
    return FillModule(call.instance, call["state_dict"], bool(call["assign"]), _castable, _cast_at_use)


def _amend(request: FillModule) -> dict[str, Any]:
    return {"state_dict": request.state_dict, "assign": request.assign}


HOOKS = (
    _building_of_layers("comfy.sd", "load_diffusion_model_state_dict", "sd", "diffusion model"),
    _building("comfy.sd", "load_state_dict_guess_config", "sd", "checkpoint"),
    _building_of_layers("comfy.sd", "load_text_encoder_state_dicts", "state_dicts", "text encoder"),
    _building("comfy.sd", "VAE.__init__", "sd", "VAE"),
    _building("comfy.controlnet", "load_controlnet_state_dict", "state_dict", "ControlNet"),
    _building("comfy.clip_vision", "load_clipvision_from_sd", "sd", "CLIP vision"),
    Hook(Seam("torch.nn.modules.module", "Module.load_state_dict", needs=("state_dict", "assign")),
         FillModule, _fill, _amend),
)
