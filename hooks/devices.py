"""The devices that the host chose for each kind of model. Packs replace these functions, so they are asked each time."""
from __future__ import annotations

from typing import Any

import comfy.model_management

_ROLES = {"diffusion model": ("get_torch_device", "unet_offload_device"),
          "text encoder": ("text_encoder_device", "text_encoder_offload_device"),
          "VAE": ("vae_device", "vae_offload_device")}


def role(kind: str) -> tuple[Any, Any]:
    """(load device, offload device) for a kind of model now."""
    load, offload = (getattr(comfy.model_management, name)() for name in _ROLES[kind])
    return load, offload


def chosen() -> dict[str, str]:
    """Both devices of every kind, as text."""
    return {kind: " and ".join(map(str, role(kind))) for kind in _ROLES}
