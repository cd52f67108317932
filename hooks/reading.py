"""Weight files being read: `comfy.utils.load_torch_file`.

Everything that ComfyUI and most packs load from disk passes here: checkpoints, diffusion models, text encoders, VAEs, LoRA.
`comfy.clip_vision` and `comfy.bg_removal_model` hold a copy of the name. Where this declines, files are read as usual.
"""
from __future__ import annotations

from typing import Any

from ..policies.requests import ReadWeights
from .call import HostCall
from .registry import Hook
from .seam import Seam


def _translate(call: HostCall) -> ReadWeights:
    device = call["device"]
    return ReadWeights(str(call["ckpt"]), bool(call["return_metadata"]), device is None or str(device).startswith("cpu"))


def _amend(request: ReadWeights) -> dict[str, Any]:
    return {"ckpt": request.path, "return_metadata": request.with_metadata}


HOOKS = (
    Hook(
        Seam("comfy.utils", "load_torch_file", needs=("ckpt", "device", "return_metadata"),
             aliases=("comfy.clip_vision:load_torch_file", "comfy.bg_removal_model:load_torch_file")),
        ReadWeights, _translate, _amend,
    ),
)
