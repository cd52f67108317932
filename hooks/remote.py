"""ComfyUI's diffusion models and VAEs as another process needs them: implements `policies.models.Remote`."""
from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ref

import comfy.model_base
import comfy.model_management
import comfy.sd
import torch

from ..policies.models import ITSELF

# What a patcher holds beside the model's weights, and what it is when nothing is patched. Each is there in every release.
_PATCHED = ("patches", "object_patches", "weight_wrapper_patches", "injections", "attachments", "hook_patches", "hook_mode",
            "force_cast_weights")
# Of the model: the patcher that has it now, and what a patcher notes about where its weights are.
_PLACED: dict[str, Any] = {"current_patcher": None, "dynamic_vbars": {}, "dynamic_pins": {}, "device": None,
                           "model_lowvram": False, "model_loaded_weight_memory": 0, "lowvram_patch_counter": 0,
                           "current_weight_patches_uuid": None, "model_offload_buffer_memory": 0}


# Of a layer: what dynamic VRAM notes of its own pages and pinned copies, addresses of this process among them, and of LoRA.
_PAGED = re.compile(r"_v(_.*)?|_pins?(_.*)?|_prefetch|.*_lowvram_function|_lowvram")


class RemoteModel:
    """Implements `policies.models.Remote` over a patcher of a diffusion model."""

    kind = "diffusion_model"

    def __init__(self, patcher: Any) -> None:
        self._patcher = patcher

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._patcher.model
        return module

    def as_built(self) -> Any:
        model = copy.copy(self._patcher.model)  # shares its layers; only its own notes are replaced
        model.__dict__ = {**model.__dict__, **{name: copy.copy(_PLACED[name]) for name in _PLACED if hasattr(model, name)}}
        return model

    @contextmanager
    def unpaged(self) -> Iterator[None]:
        notes = [(vars(layer), {name: value for name, value in vars(layer).items() if _PAGED.fullmatch(name)})
                 for layer in self._patcher.model.modules()]
        try:
            for held, found in notes:
                for name in found:
                    del held[name]
            yield
        finally:
            for held, found in notes:
                held.update(found)

    def token(self) -> object:
        # Clones have their original's `patches_uuid`, whatever objects they patch, and what is gone leaves its `id` to others:
        # a weak reference to it is never equal to another's.
        patcher = self._patcher
        hooks = patcher.current_hooks
        strengths = tuple((ref(hook.hook_ref), hook.strength) for hook in hooks.hooks) if hooks is not None else None
        held = (patcher.object_patches, patcher.injections, patcher.weight_wrapper_patches)
        replaced = tuple((name, id(value)) for one in held for name, value in one.items())
        return ref(patcher), patcher.patches_uuid, strengths, replaced

    def patches(self) -> Mapping[str, Any]:
        found = {name: getattr(self._patcher, name) for name in _PATCHED if hasattr(self._patcher, name)}
        return {**found, "patches_uuid": self._patcher.patches_uuid, "current_hooks": self._patcher.current_hooks}

    def known(self) -> Mapping[int, str]:
        modules = {id(module): name for name, module in self._patcher.model.named_modules()}
        return {**modules, id(self._patcher.model): ""}

    def altered(self) -> set[str]:
        """What is replaced in the layers beside weights: functions of layers, and what packs inject."""
        replaced = {name for name in self._patcher.object_patches if name != "model_sampling"}
        return {*replaced, *self._patcher.injections, *self._patcher.weight_wrapper_patches}

    def place(self) -> None:
        comfy.model_management.load_models_gpu([self._patcher])


class RemoteVae(RemoteModel):
    """The same over a VAE. Its attributes are the host's choices for it, and functions; its patcher stays here."""

    kind = "vae"

    def __init__(self, vae: Any) -> None:
        super().__init__(vae.patcher)
        self._vae = vae

    def token(self) -> object:
        return object()  # nobody tells when an attribute changes

    def patches(self) -> Mapping[str, Any]:
        attributes = {name: value for name, value in vars(self._vae).items() if name != "patcher"}
        return {**super().patches(), "attributes": attributes}

    def known(self) -> Mapping[int, str]:
        return {**super().known(), id(self._vae): ITSELF}


def vae_remote_of(vae: Any) -> RemoteVae | None:
    """None for what is no VAE of ComfyUI's own class, or has no weights."""
    patcher: Any = getattr(vae, "patcher", None)
    ours = type(vae) is comfy.sd.VAE and hasattr(patcher, "object_patches") and vae.first_stage_model is patcher.model
    return RemoteVae(vae) if ours else None


def remote_of(patcher: Any) -> RemoteModel | None:
    """None for what does not predict as ComfyUI's diffusion models do: text encoders, VAEs, packs' own classes."""
    model = getattr(patcher, "model", None)
    ours = isinstance(model, comfy.model_base.BaseModel) and hasattr(patcher, "object_patches")
    return RemoteModel(patcher) if ours else None
