"""The host's stock loaders, asked by name: implements `policies.models.Models`."""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.sd
import folder_paths
import nodes
import torch

from ..policies.models import Recipe
from . import devices
from .loading import vae_files

# Its nodes are there on a machine with the driver, and asking for them touches no device.
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd")


class Models:
    """Implements `policies.models.Models`."""

    def __init__(self) -> None:
        self._accelerator = _has_accelerator()

    def choices(self, kind: str) -> Sequence[str]:
        return list(nodes.VAELoader.vae_list(nodes.VAELoader) if kind == "vaes" else folder_paths.get_filename_list(kind))

    def options(self, name: str) -> Sequence[str]:
        if name == "weight_dtype":
            return list(nodes.UNETLoader.INPUT_TYPES()["required"]["weight_dtype"][0])
        return ["default", "cpu"] if name == "device" else [kind.name.lower() for kind in comfy.sd.CLIPType]

    def paths(self, recipe: Recipe) -> tuple[str, ...]:
        if recipe.kind == "vaes":
            return vae_files(recipe.names[0])
        return tuple(folder_paths.get_full_path_or_raise(recipe.kind, name) for name in recipe.names)

    def load(self, recipe: Recipe) -> Any:
        with torch.inference_mode():  # as a prompt does; threads of ours are outside of it
            return _LOADERS[recipe.kind](recipe)

    def devices(self) -> Mapping[str, str]:
        return devices.chosen()

    def wake(self) -> Mapping[str, str]:
        before = devices.chosen()
        if not self._accelerator and _has_accelerator() and comfy.cli_args.args.cpu and torch.cuda.is_available():
            comfy.model_management.cpu_state = comfy.model_management.CPUState.GPU
            comfy.model_management.vram_state = comfy.model_management.VRAMState.NORMAL_VRAM
        now = devices.chosen()
        return {kind: now[kind] for kind in now if now[kind] != before[kind]}


def _has_accelerator() -> bool:
    return any(map(os.path.exists, _ACCELERATORS))


def _text_encoder(recipe: Recipe) -> Any:
    """As the nodes for one, two, three and four files do."""
    cpu = {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    return comfy.sd.load_clip(
        ckpt_paths=[folder_paths.get_full_path_or_raise("text_encoders", name) for name in recipe.names],
        embedding_directory=folder_paths.get_folder_paths("embeddings"), clip_type=comfy.sd.CLIPType[recipe.type.upper()],
        model_options=cpu if recipe.device == "cpu" else {})


_LOADERS: dict[str, Callable[[Recipe], Any]] = {
    "checkpoints": lambda recipe: nodes.CheckpointLoaderSimple().load_checkpoint(recipe.names[0]),
    "diffusion_models": lambda recipe: nodes.UNETLoader().load_unet(recipe.names[0], recipe.weight_dtype),
    "text_encoders": _text_encoder,
    "vaes": lambda recipe: nodes.VAELoader().load_vae(recipe.names[0]),
}
