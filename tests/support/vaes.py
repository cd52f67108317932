"""A real VAE of ComfyUI's, small enough for unit tests."""
from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.taesd.taesd
import torch


def taesd_vae(seed: int = 1) -> Any:
    """A TAESD of 16 channels with random weights, as the stock loader makes one."""
    torch.manual_seed(seed)
    state_dict = {name: torch.randn_like(value) * 0.05 for name, value in
                  comfy.taesd.taesd.TAESD(latent_channels=16).state_dict().items()}
    with torch.inference_mode():
        return comfy.sd.VAE(sd={**state_dict, "vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)})
