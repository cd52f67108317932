"""Each hook that can be exercised without a prompt is, once, at start: a hook that cannot prove that it fires is worthless.

A tiny model on the CPU goes through the host's own functions while hooks only count. Building and prompts need real files;
their hooks count from the first prompt on.
"""
from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import safetensors.torch
import torch

from ..telemetry import log
from .registry import HookRegistry


class _Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.device = torch.device("cpu")


def exercise(registry: HookRegistry) -> None:
    """Runs the tiny model past every hook that it reaches. Says nothing, changes nothing, raises nothing of the host's.

    A host that fails half way leaves the rest unexercised, which the ledger shows.
    """
    cpu = torch.device("cpu")
    quiet = logging.getLogger()
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # "loaded completely …" about a model that no user knows
    try:
        with registry.probing(), torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "probe.safetensors")
            model = _Tiny()
            safetensors.torch.save_file(dict(model.state_dict()), file)
            model.load_state_dict(comfy.clip_vision.load_torch_file(file))
            patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
            loaded = comfy.model_management.LoadedModel(patcher)
            loaded.model_load()
            patcher.pin_weight_to_device("layer.weight")
            comfy.utils.copy_to_param(model, "layer.bias", model.layer.bias.clone())
            patcher.partially_unload(cpu, 0)
            model.to(cpu)
            loaded.model_unload()
            comfy.model_management.free_memory(0, cpu)
            comfy.model_management.load_models_gpu([])
            comfy.utils.tiled_scale(torch.zeros(1, 3, 2, 2), lambda tile: tile, 2, 2, 0, upscale_amount=1)
    except Exception as error:  # a host that moved must not cost the hooks that still resolve
        log.debug("the self-test stopped half way", exc_info=error)
    finally:
        quiet.setLevel(level)
